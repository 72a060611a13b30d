"""Every call that the page store makes to the file system, behind one protocol.

The store never touches `os` itself: tests put a disk in its place that drops, tears and refuses.
"""

import fcntl
import os
import stat
from pathlib import Path
from typing import Protocol

from prefix_store.values import Buffer

FILE_MODE = 0o600
FOLDER_MODE = 0o700


class Files(Protocol):
    """Files by descriptor, all positional. Each may raise OSError. Paths are never followed
    through a symbolic link in their last part."""

    def make_folder(self, path: Path) -> None:
        """Make a folder of mode 0700 unless it is there; missing parents are made too."""
        ...

    def folder_mode(self, path: Path) -> int:
        """Permission bits of a folder; NotADirectoryError for anything else, links included."""
        ...

    def list_folder(self, path: Path) -> list[str]:
        """Names of what lies in a folder, in no order."""
        ...

    def open(self, path: Path, *, create: bool, writable: bool = True) -> int:
        """A descriptor of a regular file, made with mode 0600 where `create` and it is missing."""
        ...

    def close(self, descriptor: int) -> None:
        """Give a descriptor back."""
        ...

    def lock(self, descriptor: int) -> bool:
        """Take the file's exclusive lock until the descriptor is closed; False if taken."""
        ...

    def size(self, descriptor: int) -> int:
        """Length of a file in bytes."""
        ...

    def pread_into(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        """Read at an offset; fewer bytes than asked for at the end of the file."""
        ...

    def pwrite(self, descriptor: int, data: Buffer, offset: int) -> int:
        """Write at an offset; how many bytes were taken."""
        ...

    def sync(self, descriptor: int) -> None:
        """Return when the file's content and length are on the disk."""
        ...

    def truncate(self, descriptor: int, size: int) -> None:
        """Set a file's length."""
        ...

    def rename(self, source: Path, target: Path) -> None:
        """Rename, replacing the target."""
        ...

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        ...

    def sync_folder(self, path: Path) -> None:
        """Return when the folder's entries are on the disk."""
        ...

    def free_bytes(self, path: Path) -> int:
        """What the file system still has for us."""
        ...


class LocalFiles:
    """Files of this machine."""

    def make_folder(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir(mode=FOLDER_MODE)
        except FileExistsError:
            return
        self.sync_folder(path.parent)

    def folder_mode(self, path: Path) -> int:
        mode = os.lstat(path).st_mode
        if not stat.S_ISDIR(mode):
            raise NotADirectoryError(f"{path} is not a folder")
        return stat.S_IMODE(mode)

    def list_folder(self, path: Path) -> list[str]:
        return os.listdir(path)

    def open(self, path: Path, *, create: bool, writable: bool = True) -> int:
        flags = os.O_RDWR if writable else os.O_RDONLY
        if create:
            flags |= os.O_CREAT
        # O_NONBLOCK: a pipe in a file's place must not keep us waiting for its other end.
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(path, flags, FILE_MODE)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(f"{path} is not a regular file")
        return descriptor

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def lock(self, descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def size(self, descriptor: int) -> int:
        return os.fstat(descriptor).st_size

    def pread_into(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(descriptor, [buffer], offset)

    def pwrite(self, descriptor: int, data: Buffer, offset: int) -> int:
        return os.pwrite(descriptor, data, offset)

    def sync(self, descriptor: int) -> None:
        os.fdatasync(descriptor)

    def truncate(self, descriptor: int, size: int) -> None:
        os.ftruncate(descriptor, size)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def sync_folder(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def free_bytes(self, path: Path) -> int:
        figures = os.statvfs(path)
        return figures.f_bavail * figures.f_frsize


def write_all(files: Files, descriptor: int, data: Buffer, offset: int) -> None:
    """Write all of `data`; a short write is continued, one that takes nothing is an OSError."""
    rest = memoryview(data)
    while rest:
        taken = files.pwrite(descriptor, rest, offset)
        if taken <= 0:
            raise OSError("the disk took nothing of a write")
        rest = rest[taken:]
        offset += taken


def read_all(files: Files, descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer`; the number of bytes read, smaller only at the end of the file."""
    done = 0
    while done < len(buffer):
        taken = files.pread_into(descriptor, buffer[done:], offset + done)
        if taken <= 0:
            break
        done += taken
    return done


def read_bytes(files: Files, descriptor: int, length: int, offset: int) -> bytes:
    """Up to `length` bytes at an offset; fewer only at the end of the file."""
    buffer = bytearray(length)
    done = read_all(files, descriptor, memoryview(buffer), offset)
    return bytes(memoryview(buffer)[:done])
