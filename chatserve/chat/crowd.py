"""Who is accepted and has no place in the engine yet, through whatever door they came.

On the event loop alone.  The engine is asked for room for all of them (`check_room`), so that a
crowd is refused before it is tokenized, whether it comes as requests, as turns, or as both.
"""

import asyncio
from collections import Counter


class Crowd:
    """places: for those on their trip to the executor."""

    def __init__(self, places: int) -> None:
        """places: as many as the executor has workers."""
        self.places = asyncio.Semaphore(places)
        self._of: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """How many there are."""
        return self._of.total()

    def of(self, tenant: str) -> int:
        """How many there are of one tenant."""
        return self._of[tenant]

    def enter(self, tenant: str) -> None:
        """One more."""
        self._of[tenant] += 1

    def leave(self, tenant: str) -> None:
        """One less."""
        self._of[tenant] -= 1
        if not self._of[tenant]:
            del self._of[tenant]
