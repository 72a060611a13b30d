"""Backoff: how long to wait before the next try.

Twice as long each time, up to a bound, and a random part of that: those who failed together do
not come back together.
"""

import random
from dataclasses import dataclass


@dataclass(slots=True)
class Backoff:
    """Seconds to wait, by try."""

    first: float
    most: float
    tries: int = 0

    def next(self) -> float:
        """The next wait: from half of the step to all of it."""
        step = min(self.most, self.first * 2.0 ** min(self.tries, 30))
        self.tries += 1
        return step * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """It worked."""
        self.tries = 0
