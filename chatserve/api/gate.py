"""Counts who does how much at once, and how often: requests of a key, sign-ins of an address.

Nothing here waits: a limit that is reached raises Busy at once, before anything is decoded.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager

from chatserve.errors import Busy


class RequestGate:
    """Requests being served, by tenant."""

    def __init__(self) -> None:
        self._serving: dict[str, int] = {}

    @property
    def serving(self) -> int:
        """Over all tenants."""
        return sum(self._serving.values())

    @contextmanager
    def enter(self, tenant: str, limit: int) -> Generator[None]:
        """Hold one of the tenant's `limit` places for as long as the block lasts."""
        count = self._serving.get(tenant, 0)
        if count >= limit:
            raise Busy("This key has too many requests at once.", retry_after=1.0)
        self._serving[tenant] = count + 1
        try:
            yield
        finally:
            left = self._serving[tenant] - 1
            if left:
                self._serving[tenant] = left
            else:
                del self._serving[tenant]


class RateLimit:
    """At most `attempts` in `seconds`, by address; the longest unseen addresses are forgotten.

    A bucket that refills: it holds `attempts` at most, and gets one back every
    `seconds / attempts`.
    """

    def __init__(
        self,
        attempts: int,
        seconds: float,
        addresses_max: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._attempts = attempts
        self._seconds_each = seconds / attempts
        self._addresses_max = addresses_max
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # left, at

    def take(self, address: str) -> None:
        """Count one attempt, or raise Busy."""
        now = self._clock()
        left, at = self._buckets.pop(address, (float(self._attempts), now))
        left = min(float(self._attempts), left + (now - at) / self._seconds_each)
        if left < 1.0:
            self._buckets[address] = (left, now)
            raise Busy("Too many attempts.", retry_after=(1.0 - left) * self._seconds_each)
        self._buckets[address] = (left - 1.0, now)
        while len(self._buckets) > self._addresses_max:
            self._buckets.popitem(last=False)
