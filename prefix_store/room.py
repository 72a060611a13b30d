"""The size cap of a folder: how many bytes each slab may have."""

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _Opened:
    """A slab in use, and how it is asked to give back at least so many bytes."""

    shrink: Callable[[int], None]


class Room:
    """Shares a folder's bytes among its slabs. Any thread.

    A slab claims bytes before its files grow and gives them back after they shrank, so the sum of
    the files is never above the capacity. When bytes are missing, `press` removes slabs that nobody
    has opened, and then asks opened ones for what they have above their share. Only who removes or
    adopts a slab waits for the disk: whoever asks for numbers does not.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.reclaimed = 0
        self._claims: dict[str, int] = {}
        self._idle: dict[str, Callable[[], None]] = {}
        self._opened: dict[str, _Opened] = {}
        self._lock = threading.RLock()  # never held while the disk works
        self._removing = threading.RLock()  # before `_lock`

    @property
    def idle(self) -> tuple[str, ...]:
        """Slabs that lie in the folder and are not opened."""
        with self._lock:
            return tuple(self._idle)

    def idle_bytes(self) -> int:
        """What they take."""
        with self._lock:
            return sum(self._claims[owner] for owner in self._idle)

    def leave(self, owner: str, bytes_: int, remove: Callable[[], None]) -> None:
        """A slab lies in the folder; `remove` deletes its files and may raise OSError."""
        with self._lock:
            self._claims[owner] = bytes_
            self._idle[owner] = remove

    def adopt(self, owner: str) -> None:
        """A slab is about to be opened: it is not removed for others any more."""
        with self._removing, self._lock:
            self._idle.pop(owner, None)

    def opened(self, owner: str, bytes_: int, shrink: Callable[[int], None]) -> None:
        """A slab is open and has so many bytes, whether they fit or not."""
        with self._lock:
            self._claims[owner] = bytes_
            self._opened[owner] = _Opened(shrink)

    def remove(self, owner: str) -> None:
        """Delete an idle slab. Raises OSError."""
        with self._removing:
            remove = self._idle.get(owner)
            if remove is not None:
                remove()
                with self._lock:
                    del self._idle[owner]
                    del self._claims[owner]
                    self.reclaimed += 1

    def claim(self, owner: str, wanted_bytes: int) -> bool:
        """Let `owner` have so many bytes in all; False, and nothing changes, if they are too many.

        Giving bytes back (a smaller claim than before) always works.
        """
        with self._lock:
            fits = wanted_bytes <= self.left(owner)
            if fits or wanted_bytes <= self._claims.get(owner, 0):
                self._claims[owner] = wanted_bytes
                return True
            return False

    def claimed(self, owner: str) -> int:
        """How many bytes `owner` has, used or not."""
        with self._lock:
            return self._claims.get(owner, 0)

    def left(self, owner: str) -> int:
        """How many bytes `owner` could claim now."""
        with self._lock:
            others = sum(claim for name, claim in self._claims.items() if name != owner)
            return self.capacity_bytes - others

    def press(self, owner: str, least_bytes: int, wanted_bytes: int) -> None:
        """Where `owner` could not claim `least_bytes`, try to make room: by removing idle slabs
        until it could, else by asking opened ones for what it is short of `wanted_bytes` and of its
        share. Raises OSError from the removal of files. Call without a lock that a shrinking slab
        would need."""
        for idle in self.idle:
            if least_bytes <= self.left(owner):
                return
            self.remove(idle)
        with self._lock:
            if least_bytes <= self.left(owner):
                return
            share = self.capacity_bytes // max(1, len(self._opened))
            missing = min(wanted_bytes, share) - self.left(owner)
            above = sorted(
                (
                    (claim - share, name)
                    for name, claim in self._claims.items()
                    if name != owner and name in self._opened and claim > share
                ),
                reverse=True,
            )
            asked = [(min(surplus, missing), self._opened[name]) for surplus, name in above]
        for bytes_, slab in asked:
            if bytes_ > 0 and min(wanted_bytes, share) > self.left(owner):
                slab.shrink(bytes_)

    def excess(self) -> int:
        """By how many bytes all claims are above the capacity."""
        with self._lock:
            return max(0, sum(self._claims.values()) - self.capacity_bytes)
