"""Public prompts in files: those that `--public-prompts` names, and those that an admin posted.

    FILE                                TOML, its owner's: read at each start, never written
    DATA_DIR/public-prompts.json        what was posted: written whole, synced and renamed, so that
                                        it is always the old list or the new one; and how many
                                        tokens a public prompt ever had

What is here are texts. Which pages they make is a matter of the served model.
"""

import json
import os
import re
import threading
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from chatserve.errors import SettingsError

KEPT_NAME = "public-prompts.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAME_RULE = "1 to 64 letters, digits, dots, dashes or underscores"
_OPTION = "--public-prompts"


def is_prompt_name(name: str) -> bool:
    """Whether a public prompt may be called so: a part of a path that needs no escapes."""
    return _NAME.fullmatch(name) is not None


def read_prompt_file(path: Path) -> dict[str, str]:
    """Texts by name, in the file's order. Raises SettingsError with one line."""
    try:
        tables: dict[str, object] = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SettingsError(f"{_OPTION} {path} cannot be read: {reason}.") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{_OPTION} {path} is not TOML: {_one_line(error)}.") from error
    entries = tables.get("prompts")
    if set(tables) != {"prompts"} or not isinstance(entries, list):
        raise SettingsError(f"{_OPTION} {path} must hold [[prompts]] tables and nothing else.")
    prompts: dict[str, str] = {}
    for entry in cast("list[object]", entries):
        name, text = _checked(entry, f"{_OPTION} {path}")
        if name in prompts:
            raise SettingsError(f"{_OPTION} {path} has two prompts called {name!r}.")
        prompts[name] = text
    return prompts


def _checked(entry: object, source: str) -> tuple[str, str]:
    fields = cast("dict[str, object]", entry) if isinstance(entry, dict) else {}
    name, text = fields.get("name"), fields.get("text")
    if set(fields) != {"name", "text"} or not isinstance(name, str) or not isinstance(text, str):
        raise SettingsError(f"{source}: a prompt has a name and a text, both strings.")
    if not is_prompt_name(name):
        raise SettingsError(f"{source}: {name[:64]!r} is no name; a name is {NAME_RULE}.")
    if not text.strip():
        raise SettingsError(f"{source}: the text of {name!r} is empty.")
    return name, text


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """texts: of posted prompts, by name. tokens_max: of any public prompt that there ever was, from
    a file or posted, under any model: how far pages may once have been public."""

    texts: Mapping[str, str] = field(default_factory=dict[str, str])
    tokens_max: int = 0


class KeptPrompts:
    """What is on disk. Methods block, and are for any thread."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / KEPT_NAME
        # Whoever was cancelled may still be writing when the next one comes.
        self._lock = threading.Lock()

    def read(self) -> Kept:
        """What was written last. Raises OSError or ValueError for a file that is no such list."""
        try:
            found: object = json.loads(self._path.read_text("utf-8"))
        except FileNotFoundError:
            return Kept()
        fields = cast("dict[str, object]", found) if isinstance(found, dict) else {}
        entries, tokens_max = fields.get("prompts"), fields.get("tokens_max")
        if not isinstance(entries, list) or not isinstance(tokens_max, int):
            raise ValueError("it holds no list of prompts")
        try:
            texts = dict(_checked(entry, "it") for entry in cast("list[object]", entries))
        except SettingsError as error:
            raise ValueError(error.message) from None
        return Kept(texts=texts, tokens_max=tokens_max)

    def write(self, kept: Kept) -> None:
        """Keep exactly this, for good when it returns. Raises OSError, with the old one kept."""
        entries = [{"name": name, "text": text} for name, text in kept.texts.items()]
        fields = {"tokens_max": kept.tokens_max, "prompts": entries}
        body = json.dumps(fields, ensure_ascii=False, indent=1).encode("utf-8")
        fresh = self._path.with_suffix(".new")
        with self._lock:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            with os.fdopen(os.open(fresh, flags, 0o600), "wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self._path)
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
