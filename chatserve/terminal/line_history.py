"""Lines that were typed, kept between runs in a file that only its owner can read.

The file has one JSON string a line, oldest first, and at most LINES_MAX of them after a start. A
file that cannot be read or written costs the memory of lines and nothing else.
"""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit.history import History

LINES_MAX = 1_000
LINE_CHARACTERS_MAX = 10_000
_BYTES_MAX = 4 * 1024 * 1024


class LineHistory(History):
    """path None: for this run only."""

    def __init__(self, path: Path | None) -> None:
        super().__init__()
        self._path = path

    def load_history_strings(self) -> Iterable[str]:
        """The latest first. Writes the file anew where it has grown too long."""
        if self._path is None:
            return []
        try:
            with self._path.open("rb") as file:
                file.seek(max(0, self._path.stat().st_size - _BYTES_MAX))
                found = file.read(_BYTES_MAX).splitlines()
        except OSError:
            return []
        lines: list[str] = []
        for each in found:
            with contextlib.suppress(ValueError):
                line: object = json.loads(each)
                if isinstance(line, str):
                    lines.append(line)
        if len(found) > LINES_MAX:
            lines = lines[-LINES_MAX:]
            self._write("wb", lines)
        return reversed(lines)

    def store_string(self, string: str) -> None:
        """Keep one more."""
        del self._loaded_strings[LINES_MAX:]
        if len(string) <= LINE_CHARACTERS_MAX:
            self._write("ab", [string])

    def _write(self, mode: str, lines: list[str]) -> None:
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open(self._path, mode, opener=_private) as file:
                file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
