"""Refusals: when a refused client should come back.

A refusal costs a few milliseconds of the same core that serves the others. A fixed Retry-After
brings all refused clients back at once and ever again; this one grows with the rate of refusals,
so that they come back at about `RETURNS_PER_SECOND` however many they are.
"""

import math
from collections.abc import Callable

RETURNS_PER_SECOND = 20.0
SECONDS_MIN, SECONDS_MAX = 1.0, 60.0
_MEMORY_SECONDS = 5.0  # refusals fade by 1/e in this time


class Refusals:
    """Counts refusals, fading; monotonic clock injected."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._count = 0.0
        self._counted_at = clock()

    def refuse(self) -> float:
        """Book a refusal; seconds after which its client should ask again."""
        now = self._clock()
        past = max(0.0, now - self._counted_at)
        self._count = self._count * math.exp(-past / _MEMORY_SECONDS) + 1.0
        self._counted_at = now
        return min(SECONDS_MAX, max(SECONDS_MIN, self._count / RETURNS_PER_SECOND))
