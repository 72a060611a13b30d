"""Exported conversations as files. Nothing is overwritten, and nothing without end is read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from chatserve.terminal.commands import CommandError

FILE_BYTES_MAX = 64 * 1024 * 1024


def write_file(name: str, content: Mapping[str, object]) -> None:
    """A new file. Raises CommandError."""
    try:
        with Path(name).expanduser().open("x", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=1)
    except (OSError, RuntimeError, ValueError) as error:
        raise CommandError(f"{name}: {_reason(error)}") from error


def read_file(name: str) -> Mapping[str, object]:
    """A file's content. Raises CommandError."""
    try:
        with Path(name).expanduser().open("rb") as file:
            content: object = json.loads(file.read(FILE_BYTES_MAX))
    except (OSError, RuntimeError, ValueError, RecursionError) as error:
        raise CommandError(f"{name}: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise CommandError(f"{name}: this is not an exported conversation.")
    return cast(dict[str, object], content)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or "this is not JSON."
