"""Backoff with full jitter: before try n a random time from nothing to first * 2**n, bounded."""

from collections.abc import Callable
from dataclasses import dataclass

_DOUBLINGS_MAX = 30


@dataclass(slots=True)
class Backoff:
    """Seconds to wait, by try. jitter: a number from 0 to 1."""

    first: float
    most: float
    jitter: Callable[[], float]
    tries: int = 0

    def next(self) -> float:
        """The next wait."""
        step = min(self.most, self.first * 2.0 ** min(self.tries, _DOUBLINGS_MAX))
        self.tries += 1
        return step * self.jitter()

    def reset(self) -> None:
        """It worked."""
        self.tries = 0
