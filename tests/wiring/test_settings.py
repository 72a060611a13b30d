"""Settings: three sources in one order, and one line for each mistake."""

import argparse
import os
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from chatserve.cache.eviction import DEFAULT_POLICY, POLICIES
from chatserve.errors import SettingsError
from chatserve.settings import EVICTIONS, OPTIONS, Settings, add_options, read_settings
from tests.wiring.server import completed


def read(arguments: list[str], environment: dict[str, str] | None = None) -> Settings:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return read_settings(parser.parse_args(arguments), environment or {})


def test_every_policy_of_eviction_can_be_asked_for() -> None:
    assert set(EVICTIONS) == POLICIES.keys()
    assert POLICIES[read([]).eviction] is DEFAULT_POLICY
    assert read(["--eviction", "lru"]).eviction == "lru"
    with pytest.raises(SettingsError, match="patience, lru, fifo"):
        read(["--eviction", "random"])


@pytest.mark.parametrize(
    ("given", "seconds"), [("30s", 30.0), ("1.5h", 5_400.0), ("2D", 172_800.0)]
)
def test_an_age_is_a_number_and_a_unit(given: str, seconds: float) -> None:
    assert read(["--max-page-age", given]).max_page_age == seconds
    assert read(["--max-memory-idle", given]).max_memory_idle == seconds
    for wrong in ("0h", "30", "h", "-1h", "1w", ""):
        with pytest.raises(SettingsError, match="12h"):
            read([f"--max-page-age={wrong}"])


def test_the_disk_may_be_left_out() -> None:
    assert read([]).disk_capacity is None
    assert read(["--disk-capacity", "0"]).disk_capacity == 0
    assert read(["--disk-capacity", "2GiB"]).disk_capacity == 2 << 30
    assert read(["--disk-write-budget", "off"]).disk_write_budget == 0
    with pytest.raises(SettingsError, match="disk-capacity"):
        read(["--disk-capacity", "a lot"])


def test_defaults() -> None:
    settings = read([])
    assert (settings.host, settings.port, settings.page_size) == ("127.0.0.1", 8000, 16)
    assert settings.model is None
    assert settings.prefix_cache
    assert settings.data_dir.name == "chatserve"


def test_the_command_line_beats_the_environment_beats_the_file(tmp_path: Path) -> None:
    config = tmp_path / "chatserve.toml"
    config.write_text('port = 1111\npage_size = 32\nmodel = "a"\nallowed_host = ["x", "y"]\n')
    environment = {"CHATSERVE_CONFIG": str(config), "CHATSERVE_PORT": "2222"}
    settings = read(["--port", "3333"], environment)
    assert (settings.port, settings.page_size, settings.model) == (3333, 32, "a")
    assert settings.allowed_host == ("x", "y")
    assert read([], environment).port == 2222
    assert read(["--config", str(config)]).port == 1111
    assert read(["b"], environment).model == "b"


@pytest.mark.parametrize(
    ("text", "value"), [("1MiB", 1 << 20), ("1.5GiB", 3 << 29), ("2g", 2 << 30), ("4096K", 1 << 22)]
)
def test_sizes(text: str, value: int) -> None:
    assert read(["--kv-memory", text]).kv_memory == value


@pytest.mark.parametrize(
    "arguments",
    [
        ["--port", "70000"],
        ["--port", "１２"],
        ["--page-size", "24"],
        ["--page-size", "4"],
        ["--kv-memory", "lots"],
        ["--kv-memory", "10"],
        ["--host-memory", "1000TiB"],
        ["--disk-write-budget", "1025TiB"],
        ["--disk-capacity", "9" * 400],
        ["--step-target", "nan"],
        ["--shutdown-timeout", "-1"],
        ["--dtype", "int3"],
        ["--quantize", "int4"],
        ["--prefix-cache", "perhaps"],
        ["--steps-in-flight", "3"],
        ["--page-size", "64", "--max-batch-tokens", "32"],
        ["--config", "no-such-file.toml"],
    ],
)
def test_a_wrong_value_is_one_line(arguments: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        read(arguments)
    assert "\n" not in caught.value.message


def test_more_host_memory_than_the_machine_has_is_refused() -> None:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert read(["--host-memory", str(machine)]).host_memory == machine
    with pytest.raises(SettingsError, match=rf"--host-memory.* {machine} bytes"):
        read(["--host-memory", str(machine + 1)])


@pytest.mark.parametrize(
    "text", ["prot = 1", "port = [1]", "port = {a = 1}", "allowed_host = 'x'\nport = 1.5", "a ="]
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str) -> None:
    config = tmp_path / "c.toml"
    config.write_text(text)
    with pytest.raises(SettingsError) as caught:
        read(["--config", str(config)])
    assert str(config) in caught.value.message


def test_every_option_is_in_the_help_with_its_default() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    text = parser.format_help()
    for option in OPTIONS:
        assert option.flag in text


def _broken_model(argument: str, folder: Path) -> str:
    """For '{model:FILE:TEXT}' a copy of the shipped model with that file changed (or taken out)."""
    if not argument.startswith("{model:"):
        return argument
    name, text = argument[len("{model:") : -1].split(":", 1)
    target = folder / "model"
    shutil.copytree(Path(str(files("chatserve.demonstration") / "model")), target)
    (target / name).unlink()
    if text:
        (target / name).write_text(text)
    return str(target)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "x"], "--port"),
        (["--host", "0.0.0.0"], "--api-key"),
        (["no/such/folder", "--port", "0"], "no/such/folder"),
        (["--api-key-file", "missing.toml"], "missing.toml"),
        (["--port", "0", "{model:config.json:[]}"], "config"),
        (["--port", "0", '{model:generation_config.json:{"temperature": "hot"}}'], "temperature"),
        (["--port", "0", "{model:tokenizer.json:}"], "tokenizer.json"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_the_process_ends_with_one_line_and_status_2(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    arguments = [_broken_model(each, tmp_path) for each in arguments]
    done = completed("serve", *arguments, "--data-dir", str(tmp_path))
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{folder}"], "has no config.json"),
        (["{folder}/nothing"], "There is no model folder"),
        (["{folder}/file"], "is not a folder"),
        (["--chat-template", "{folder}/nothing"], "--chat-template"),
        (["--chat-template", "{folder}"], "--chat-template"),
        (["--chat-template", "{folder}/binary"], "--chat-template"),
    ],
)
def test_a_file_that_is_not_there_is_told_before_anything_is_started(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    folder, data = tmp_path / "given", tmp_path / "data"
    folder.mkdir()
    (folder / "file").write_text("not a folder")
    (folder / "binary").write_bytes(b"\xff\xfe")
    given = [each.replace("{folder}", str(folder)) for each in arguments]
    # Any import of these ends the process in another way.
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "transformers.py").write_text("raise SystemExit('transformers was imported')")
    done = subprocess.run(
        [sys.executable, "-m", "chatserve", "serve", *given, "--port", "0", "--data-dir", data],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("chatserve: ")
    assert words in line
    assert not data.exists(), "a data folder was begun"
