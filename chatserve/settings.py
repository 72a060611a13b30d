"""Settings: read once, from the command line, the environment and a TOML file, in that order.

`OPTIONS` is the one table: the parser, `--help`, the environment names, the TOML keys and the
documentation's test all come from it. A value is checked by its option's own reader; what two
options say together is checked in `Settings`.
"""

import argparse
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from chatserve.errors import SettingsError

LOADING_THREAD = "chatserve-loading"  # the name of the one that loads the model
ENVIRONMENT_PREFIX = "CHATSERVE_"
PAGE_SIZES = (8, 256)
EVICTIONS = ("patience", "lru", "fifo")  # the keys of the cache floor's POLICIES
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B?|B)?", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])", re.IGNORECASE)
_DURATIONS = {"s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}
_SIZE_MOST = 1 << 50  # no disk takes more in a day, and no machine has it: a slip of the hand
_UNITS = {"": 1, "b": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All options of `chatserve serve`, checked. None means: decided at start, from the machine.

    kv_memory, host_memory, disk_capacity: bytes. disk_write_budget: bytes a day. step_target,
    shutdown_timeout, chat_grace, max_memory_idle, max_page_age: seconds. context_reserve: tokens.
    """

    model: str | None
    served_model_name: str | None
    host: str
    port: int
    data_dir: Path
    device: str
    dtype: str
    quantize: str
    threads: int | None
    cuda_graphs: bool
    page_size: int
    kv_dtype: str
    kv_memory: int | None
    host_memory: int | None
    prefix_cache: bool
    eviction: str
    disk_capacity: int | None
    disk_write_budget: int
    max_memory_idle: float | None
    max_page_age: float | None
    public_prompts: Path | None
    context_length: int | None
    max_batch_tokens: int | None
    max_sequences: int
    max_queued: int
    step_target: float
    steps_in_flight: int
    chat_template: Path | None
    api_key: str | None
    api_key_file: Path | None
    allowed_host: tuple[str, ...]
    cors_origin: tuple[str, ...]
    shutdown_timeout: float
    redis_url: str | None
    chat_grace: float
    history: str
    context_reserve: int | None
    drafts: bool
    log_level: str

    def __post_init__(self) -> None:
        if self.max_batch_tokens is not None and self.max_batch_tokens < self.page_size:
            raise SettingsError("--max-batch-tokens must hold at least one page (--page-size).")
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if self.host_memory is not None and self.host_memory > machine:
            raise SettingsError(
                f"--host-memory: {self.host_memory} bytes are more than this machine's memory, "
                f"{machine} bytes."
            )


@dataclass(frozen=True, slots=True)
class Option:
    """One setting: its name in TOML (with dashes on the command line), reader, default, help."""

    name: str
    read: Callable[[str], object]
    default: object
    help: str
    group: str
    metavar: str | None = None
    repeated: bool = False

    @property
    def flag(self) -> str:
        """Its spelling on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """Its name in the environment."""
        return ENVIRONMENT_PREFIX + self.name.upper()


def _data_home() -> Path:
    home = os.environ.get("XDG_DATA_HOME")
    return (Path(home) if home else Path.home() / ".local" / "share") / "chatserve"


def _integer(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text) if re.fullmatch(r"-?[0-9]{1,18}", text.strip()) else None
        if value is None or not least <= value <= most:
            raise ValueError(f"expected a whole number from {least} to {most}")
        return value

    return read


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 86_400.0:
        raise ValueError("expected seconds, from 0 to 86400")
    return value


def _step_target(text: str) -> float:
    value = _seconds(text)
    if value < 0.001:
        raise ValueError("expected seconds, at least 0.001")
    return value


def _size(text: str) -> int:
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise ValueError("expected bytes, such as 512MiB or 4GiB")
    unit = (match[2] or "b").lower()[0]
    value = float(match[1]) * _UNITS[unit]
    if not 1024**2 <= value <= _SIZE_MOST:
        raise ValueError("expected from 1MiB to 1024TiB")
    return int(value)


def _size_or_none(text: str) -> int:
    return 0 if text.strip().lower() in ("0", "off", "none") else _size(text)


def _age(text: str) -> float:
    matched = _DURATION.fullmatch(text.strip())
    if matched is None or not float(matched[1]):
        raise ValueError("expected a time, such as 12h or 30d")
    return float(matched[1]) * _DURATIONS[matched[2].lower()]


def _page_size(text: str) -> int:
    value = _integer(*PAGE_SIZES)(text)
    if value & (value - 1):
        raise ValueError("expected a power of two from 8 to 256")
    return value


def _switch(text: str) -> bool:
    words = {"on": True, "true": True, "yes": True, "1": True}
    words |= {"off": False, "false": False, "no": False, "0": False}
    try:
        return words[text.strip().lower()]
    except KeyError:
        raise ValueError("expected on or off") from None


def _one_of(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return text

    return read


def _path(text: str) -> Path:
    return Path(text).expanduser()


OPTIONS: tuple[Option, ...] = (
    Option("host", str, "127.0.0.1", "address to listen on; others than loopback need a key",
           "network"),
    Option("port", _integer(0, 65535), 8000, "port to listen on; 0 takes a free one", "network"),
    Option("allowed_host", str, (), "another Host header to accept (repeatable)", "network",
           "HOST", repeated=True),
    Option("cors_origin", str, (), "an origin whose pages may use /v1 (repeatable)", "network",
           "ORIGIN", repeated=True),
    Option("shutdown_timeout", _seconds, 30.0, "seconds that running replies get at the end",
           "network", "SECONDS"),
    Option("api_key", str, None, "the one key that clients must present", "keys", "KEY"),
    Option("api_key_file", _path, None, "TOML file of [[keys]]: name, key, role, requests, "
           "cache_share", "keys", "FILE"),
    Option("device", str, "auto", "auto, cpu, cuda or cuda:N", "model"),
    Option("dtype", _one_of("auto", "float32", "bfloat16", "float16"), "auto",
           "auto, float32, bfloat16 or float16", "model"),
    Option("quantize", _one_of("none", "int8"), "none", "none, or int8: on a CPU, half the memory "
           "for weights and sooner tokens, a little less exact", "model"),
    Option("threads", _integer(1, 1024), None, "CPU threads of the model; default: one per core",
           "model", "N"),
    Option("cuda_graphs", _switch, True, "on a CUDA device, steps of one token for each reply as "
           "recorded graphs: on or off", "model", "on|off"),
    Option("context_length", _integer(16, 1 << 24), None, "tokens of a conversation at the most",
           "model", "TOKENS"),
    Option("chat_template", _path, None, "Jinja file to use instead of the model's own", "model",
           "FILE"),
    Option("served_model_name", str, None, "the model's name for clients", "model", "NAME"),
    Option("page_size", _page_size, 16, "token positions in a page: 8, 16, … 256", "cache",
           "TOKENS"),
    Option("kv_dtype", _one_of("auto", "fp8"), "auto", "type of K and V in pages: auto (the "
           "model's), or fp8: half of bfloat16's memory, a little less exact, and on a CPU slower",
           "cache"),
    Option("kv_memory", _size, None, "memory for pages, at least 1MiB and four pages of the model; "
           "default: a share of what is free", "cache",
           "BYTES"),
    Option("host_memory", _size_or_none, None, "the machine's memory for idle pages, between the "
           "device and the disk; default: 0 on a CPU, with a GPU a share of what is free", "cache",
           "BYTES"),
    Option("prefix_cache", _switch, True, "keep and share pages: on or off", "cache", "on|off"),
    Option("eviction", _one_of(*EVICTIONS), EVICTIONS[0], "which idle pages go first: " +
           ", ".join(EVICTIONS), "cache", "POLICY"),
    Option("disk_capacity", _size_or_none, None, "disk for pages that survive a restart, 0 for "
           "none; default: a quarter of what is free, 16GiB at the most", "cache", "BYTES"),
    Option("disk_write_budget", _size_or_none, 256 << 30, "written to that disk in a day at the "
           "most, in the long run; 0 for no bound", "cache", "BYTES"),
    Option("max_memory_idle", _age, None, "leave pages unused for so long to the disk: 10m, 12h; "
           "default: only to make room", "cache", "TIME"),
    Option("max_page_age", _age, None, "forget pages on disk unused for so long: 12h, 30d", "cache",
           "TIME"),
    Option("public_prompts", _path, None, "TOML file of [[prompts]]: name, text: system prompts "
           "whose pages all keys share", "cache", "FILE"),
    Option("data_dir", _path, None, "folder for what must survive a restart", "cache", "DIR"),
    Option("max_batch_tokens", _integer(8, 1 << 20), None, "tokens of a step at the most",
           "scheduling", "TOKENS"),
    Option("max_sequences", _integer(1, 4096), 128, "replies computed at once", "scheduling", "N"),
    Option("max_queued", _integer(0, 1 << 20), 1024, "requests waiting before 429", "scheduling",
           "N"),
    Option("step_target", _step_target, 0.1, "seconds that a step with a long prompt should take "
           "while others get replies; four times as long while nobody does", "scheduling",
           "SECONDS"),
    Option("steps_in_flight", _integer(1, 2), 2, "1, or 2 to plan a step while another runs",
           "scheduling", "N"),
    Option("redis_url", str, None, "Redis >= 6.2 or Valkey that keeps conversations: redis://, "
           "rediss:// or unix://; default: one of our own, in the data folder", "conversations",
           "URL"),
    Option("chat_grace", _seconds, 300.0, "seconds that a chat's reply goes on with nobody looking",
           "conversations", "SECONDS"),
    Option("history", _one_of("auto", "template", "as-computed"), "auto",
           "earlier replies in a prompt: template (as it renders them), as-computed (as they were "
           "generated, reasoning included), or auto", "conversations"),
    Option("context_reserve", _integer(1, 1 << 24), None, "tokens left for a chat's reply before "
           "its oldest turns are left out; default: an eighth of the context", "conversations",
           "TOKENS"),
    Option("drafts", _switch, True, "compute what a user still types ahead, while there is nothing "
           "else to do: on or off", "conversations", "on|off"),
    Option("log_level", _one_of("debug", "info", "warning", "error"), "info",
           "debug, info, warning or error", "logging"),
)  # fmt: skip

GROUPS = ("network", "keys", "model", "cache", "conversations", "scheduling", "logging")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Put every option, grouped, into a parser. Defaults stay out of it: see `read_settings`."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="local folder or hub id of a model; without it the small demonstration model",
    )
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for option in OPTIONS:
        default = "" if option.default in (None, ()) else f" [{_shown(option.default)}]"
        groups[option.group].add_argument(
            option.flag,
            action="append" if option.repeated else "store",
            metavar=option.metavar or option.name.rsplit("_", 1)[-1].upper(),
            default=None,
            help=(option.help + default).replace("%", "%%"),
        )
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file with any of these options (with underscores)"
    )


def read_settings(given: argparse.Namespace, environment: Mapping[str, str]) -> Settings:
    """Settings from parsed arguments, the environment and the TOML file that either names.

    Raises SettingsError with one line that names the source of a wrong value.
    """
    values: dict[str, object] = {option.name: option.default for option in OPTIONS}
    values["model"] = None
    config = cast("str | None", given.config) or environment.get(ENVIRONMENT_PREFIX + "CONFIG")
    if config is not None:
        values.update(_from_file(Path(config).expanduser()))
    for option in OPTIONS:
        text = environment.get(option.variable)
        if text is not None:
            texts = [part.strip() for part in text.split(",")] if option.repeated else [text]
            values[option.name] = _read(option, texts, option.variable)
    if environment.get(ENVIRONMENT_PREFIX + "MODEL"):
        values["model"] = environment[ENVIRONMENT_PREFIX + "MODEL"]
    for option in OPTIONS:
        text = getattr(given, option.name)
        if text is not None:
            values[option.name] = _read(option, text if option.repeated else [text], option.flag)
    if given.model is not None:
        values["model"] = given.model
    values["data_dir"] = values["data_dir"] or _data_home()
    return Settings(**cast("dict[str, Any]", values))


def _from_file(path: Path) -> dict[str, object]:
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"Cannot read {path}: {type(error).__name__}.") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path} is not TOML: {error}.") from error
    values: dict[str, object] = {}
    by_name = {option.name: option for option in OPTIONS}
    for key, value in table.items():
        if key == "model" and isinstance(value, str):
            values[key] = value
            continue
        option = by_name.get(key)
        if option is None:
            raise SettingsError(f"{path}: there is no option {key!r}.")
        items = cast("list[object]", value) if isinstance(value, list) else [value]
        if isinstance(value, list) != option.repeated and isinstance(value, list | dict):
            raise SettingsError(f"{path}: {key} takes one value.")
        texts = [str(item).lower() if isinstance(item, bool) else str(item) for item in items]
        values[key] = _read(option, texts, f"{path}: {key}")
    return values


def _read(option: Option, texts: Sequence[str], source: str) -> object:
    try:
        read = [option.read(text) for text in texts]
    except ValueError as error:
        raise SettingsError(f"{source}: {error}; got {', '.join(texts)!r}.") from None
    return tuple(read) if option.repeated else read[0]


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


assert {option.name for option in OPTIONS} | {"model"} == {item.name for item in fields(Settings)}
