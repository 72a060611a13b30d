"""The lock of the data folder: one chatserve at a time.

Everything that this folder keeps has one writer: whoever holds the lock. It is the kernel's
(flock), so it ends with the process however that ends. No child has it: the descriptor is closed at
exec. The file itself stays, for removing it would let two hold locks on two files of one name.
"""

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from chatserve.errors import SettingsError, StartError

LOCK_NAME = "chatserve.lock"


class FolderLock:
    """Held from construction to `close`. A context manager."""

    def __init__(self, folder: Path) -> None:
        """Make the folder if it is not there, and take its lock. Raises StartError."""
        path = folder / LOCK_NAME
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            raise SettingsError(f"The data folder {folder} cannot be used: {error}.") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            who = f"process {holder}" if holder.isdigit() else "another process"
            raise StartError(
                f"The data folder {folder} is in use by {who}: "
                "end that chatserve first, or name another folder with --data-dir."
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise SettingsError(f"The data folder {folder} cannot be locked: {error}.") from error
        self._descriptor: int | None = descriptor

    def close(self) -> None:
        """Let others have it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
