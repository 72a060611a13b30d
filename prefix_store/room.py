"""The size cap of a folder: how many bytes each slab may have."""

import threading
from collections.abc import Callable


class Room:
    """Shares a folder's bytes among its slabs. Any thread.

    A slab claims bytes before its files grow and gives them back after they shrank, so the sum of
    the files is never above the capacity. `reclaim` is asked for the bytes that are missing before
    a claim is refused: it removes slabs that are not opened.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.reclaim: Callable[[int], None] = lambda missing_bytes: None
        self._claims: dict[str, int] = {}
        self._lock = threading.RLock()

    @property
    def claimed_bytes(self) -> int:
        """What all claims add up to."""
        with self._lock:
            return sum(self._claims.values())

    def claim(self, owner: str, wanted_bytes: int) -> bool:
        """Let `owner` have so many bytes in all; False, and nothing changes, if they are too many.

        Giving bytes back (a smaller claim than before) always works.
        """
        with self._lock:
            if wanted_bytes <= self._claims.get(owner, 0) or self._fits(owner, wanted_bytes):
                self._claims[owner] = wanted_bytes
                return True
            return False

    def largest(self, owner: str, least_bytes: int) -> int:
        """How many bytes `owner` could claim now; others are reclaimed to reach `least_bytes`."""
        with self._lock:
            self._fits(owner, least_bytes)
            return self._left(owner)

    def force(self, owner: str, bytes_: int) -> None:
        """State what is there already, whether it fits or not."""
        with self._lock:
            self._claims[owner] = bytes_

    def excess(self) -> int:
        """By how many bytes the claims are above the capacity."""
        return max(0, self.claimed_bytes - self.capacity_bytes)

    def release(self, owner: str) -> None:
        """The owner's files are gone."""
        with self._lock:
            self._claims.pop(owner, None)

    def _left(self, owner: str) -> int:
        others = sum(claim for name, claim in self._claims.items() if name != owner)
        return self.capacity_bytes - others

    def _fits(self, owner: str, wanted_bytes: int) -> bool:
        missing = wanted_bytes - self._left(owner)
        if missing > 0:
            self.reclaim(missing)
        return wanted_bytes <= self._left(owner)
