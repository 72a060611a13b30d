"""A disk in memory that loses what it may lose: the one fake of these tests.

What a process sees is kept apart from what is on the disk. `power_loss` applies a random part of
the writes that were not synced, sector by sector, and of the folder entries that were not synced.
A failed sync drops what it should have written, for good, as Linux does. Any call can be made to
fail, or to be the last one before the crash.
"""

import errno
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SECTOR = 512


class Crash(BaseException):
    """The process dies here. Not an Exception: nothing may catch it."""


@dataclass(eq=False)
class Inode:
    """A file: as seen, as it is on the disk, and what was done since the last sync."""

    seen: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)  # None: cut at offset

    def write(self, offset: int, data: bytes) -> None:
        if len(self.seen) < offset:
            self.seen.extend(bytes(offset - len(self.seen)))
        self.seen[offset : offset + len(data)] = data
        self.pending.append((offset, data))

    def cut(self, size: int) -> None:
        del self.seen[size:]
        self.seen.extend(bytes(size - len(self.seen)))
        self.pending.append((size, None))

    def lose(self, dice: random.Random) -> None:
        """Become what the disk holds after the power was lost."""
        content = bytearray(self.durable)
        keep = dice.choice([0.0, 0.2, 0.5, 0.8, 1.0])
        for offset, data in self.pending:
            if data is None:
                if dice.random() < keep:
                    del content[offset:]
                    content.extend(bytes(offset - len(content)))
                continue
            start = 0
            while start < len(data):
                end = min(len(data), start + SECTOR - (offset + start) % SECTOR)
                if dice.random() < keep:
                    if len(content) < offset + end:
                        content.extend(bytes(offset + end - len(content)))
                    content[offset + start : offset + end] = data[start:end]
                start = end
        self.seen = content
        self.durable = bytes(content)
        self.pending = []


class FakeDisk:
    """See the module. Implements prefix_store.files.Files."""

    def __init__(self) -> None:
        self.entries: dict[Path, Inode] = {}
        self.durable_entries: dict[Path, Inode] = {}
        self.calls = 0
        self.log: list[str] = []
        self.on_call: Callable[[int, str], None] | None = None
        self.on_write: Callable[[int, bytes], None] | None = None
        self.on_read: Callable[[int, int], None] | None = None
        self.short_writes: random.Random | None = None
        self._open: dict[int, tuple[Inode, bool]] = {}
        self._failed: set[int] = set()
        self._locked: dict[Inode, int] = {}
        self._next = 1000
        self._folders: set[Path] = set()

    # The end of a process.

    def kill(self) -> None:
        """The process is gone: what it wrote is seen by the next one."""
        self._open.clear()
        self._locked.clear()
        self._failed.clear()
        self.on_call = None
        self.calls = 0

    def power_loss(self, dice: random.Random) -> None:
        """The machine is gone: what was not synced is there in part."""
        self.kill()
        for path in {*self.entries, *self.durable_entries}:
            if self.entries.get(path) is not self.durable_entries.get(path):
                chosen = dice.choice([self.entries, self.durable_entries]).get(path)
                self.durable_entries.pop(path, None)
                if chosen is not None:
                    self.durable_entries[path] = chosen
        self.entries = dict(self.durable_entries)
        for inode in set(self.entries.values()):
            inode.lose(dice)

    @property
    def open_descriptors(self) -> int:
        return len(self._open)

    def contents(self) -> dict[Path, bytes]:
        """What a process sees."""
        return {path: bytes(inode.seen) for path, inode in self.entries.items()}

    def on_disk(self) -> list[bytes]:
        """All that the disk may hold: synced content, and unsynced writes too."""
        inodes = {*self.entries.values(), *self.durable_entries.values()}
        return [part for inode in inodes for part in (inode.durable, bytes(inode.seen))]

    def restore(self, contents: dict[Path, bytes]) -> None:
        """Begin with these files."""
        self.kill()
        self.entries = {path: Inode(bytearray(raw), raw) for path, raw in contents.items()}
        self.durable_entries = dict(self.entries)

    def total_bytes(self) -> int:
        return sum(len(inode.seen) for inode in self.entries.values())

    # Files.

    def make_folder(self, path: Path) -> None:
        self._call("make_folder")
        self._folders.add(path)

    def folder_mode(self, path: Path) -> int:
        self._call("folder_mode")
        return 0o700

    def list_folder(self, path: Path) -> list[str]:
        self._call("list_folder")
        return [entry.name for entry in self.entries if entry.parent == path]

    def open(self, path: Path, *, create: bool, writable: bool = True) -> int:
        self._call("open")
        inode = self.entries.get(path)
        if inode is None:
            if not create:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            inode = self.entries[path] = Inode()
        self._next += 1
        self._open[self._next] = (inode, writable)
        return self._next

    def close(self, descriptor: int) -> None:
        inode, _ = self._open.pop(descriptor)
        if self._locked.get(inode) == descriptor:
            del self._locked[inode]
        self._call("close")

    def lock(self, descriptor: int) -> bool:
        self._call("lock")
        inode, _ = self._open[descriptor]
        return self._locked.setdefault(inode, descriptor) == descriptor

    def size(self, descriptor: int) -> int:
        self._call("size")
        return len(self._open[descriptor][0].seen)

    def pread_into(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        if self.on_read is not None:
            self.on_read(offset, len(buffer))
        self._call("pread")
        data = self._open[descriptor][0].seen[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        return len(data)

    def pwrite(self, descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> int:
        inode, writable = self._open[descriptor]
        assert writable, "a write through a descriptor for reading"
        raw = bytes(data)
        if self.on_write is not None:
            self.on_write(offset, raw)
        if self.short_writes is not None and len(raw) > 1:
            raw = raw[: self.short_writes.randint(1, len(raw))]
        try:
            self._call("pwrite")
        except Crash:
            inode.write(offset, raw[: len(raw) // 2])  # torn in the page cache, too
            raise
        inode.write(offset, raw)
        return len(raw)

    def sync(self, descriptor: int) -> None:
        assert descriptor not in self._failed, "a sync was tried again on a descriptor that failed"
        inode, _ = self._open[descriptor]
        try:
            self._call("sync")
        except OSError:
            # The kernel forgets that the pages were dirty: they are seen, and never written.
            self._failed.add(descriptor)
            inode.pending = []
            raise
        inode.durable = bytes(inode.seen)
        inode.pending = []

    def truncate(self, descriptor: int, size: int) -> None:
        self._call("truncate")
        self._open[descriptor][0].cut(size)

    def rename(self, source: Path, target: Path) -> None:
        self._call("rename")
        self.entries[target] = self.entries.pop(source)

    def unlink(self, path: Path) -> None:
        self._call("unlink")
        del self.entries[path]

    def sync_folder(self, path: Path) -> None:
        self._call("sync_folder")
        self.durable_entries = dict(self.entries)

    def free_bytes(self, path: Path) -> int:
        self._call("free_bytes")
        return 1 << 40

    def _call(self, what: str) -> None:
        self.calls += 1
        if self.on_call is not None:
            self.on_call(self.calls, what)


def crash_at(number: int) -> Callable[[int, str], None]:
    """For `on_call`: the process dies in its call of that number, and in all after."""

    def act(count: int, what: str) -> None:
        if count >= number:
            raise Crash

    return act


def fail_at(number: int, code: int, *, for_good: bool = False) -> Callable[[int, str], None]:
    """For `on_call`: the call of that number fails, or all from that on do."""

    def act(count: int, what: str) -> None:
        if count == number or (for_good and count > number):
            raise OSError(code, os.strerror(code))

    return act
