"""Sampler: one sample a second for all who look, and none while nobody does.

    viewer ─┐ wait: until it is time, and nobody else has taken the sample
    viewer ─┼─▶ take ─▶ ring of the last five minutes ─▶ each viewer, what it has not seen
    viewer ─┘

Theory of operation. There is no task: whoever looks waits until the next sample is due, and the
first to wake takes it for all. So the sampling begins and ends with those who look, and has no one
else to stop it. A viewer that was slow finds several rows that it has not seen, at most the ring's:
nothing is kept for it. What was counted while nobody looked is in no row: the first sample after a
pause tells what there is now, and no growth.

It may not know what is sampled (`samples.py`) nor how it is sent (`sample_routes.py`).
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable

from chatserve.api.samples import Reading, Row, Statistics, read, row

SAMPLE_SECONDS = 1.0
PAUSE_SECONDS = 3.0  # between two samples: then the second one knows no growth
HISTORY_SECONDS = 300.0
RING_ROWS = 300
_MINUTE_SECONDS = 60.0


class Sampler:
    """One server's, on its event loop."""

    def __init__(
        self,
        statistics: Callable[[], Statistics],
        streams: Callable[[], int],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """statistics: frozen, by owner. streams: answers that are open now. clock, wall: seconds,
        monotonic and since 1970."""
        self._statistics = statistics
        self._streams = streams
        self._clock = clock
        self._wall = wall
        self._sleep = sleep
        self._ring: deque[tuple[float, Row]] = deque(maxlen=RING_ROWS)  # by the clock
        self._readings: deque[Reading] = deque()  # of the last minute
        self._taken = 0

    @property
    def taken(self) -> int:
        """Samples so far."""
        return self._taken

    def since(self, number: int) -> list[Row]:
        """The rows after the first `number` samples, of the last five minutes, oldest first."""
        count = min(self._taken - number, len(self._ring))
        oldest = self._clock() - HISTORY_SECONDS
        rows = list(self._ring)[len(self._ring) - count :]
        return [each for clock, each in rows if clock >= oldest]

    async def wait(self, number: int) -> None:
        """Return once there are more than `number` samples, by taking one where it is due."""
        while self._taken <= number:
            due = self._readings[-1].clock + SAMPLE_SECONDS if self._readings else self._clock()
            if self._clock() >= due:
                self._take()
            else:
                await self._sleep(due - self._clock())

    def _take(self) -> None:
        clock = self._clock()
        readings = self._readings
        if readings and clock - readings[-1].clock > PAUSE_SECONDS:
            readings.clear()
        while readings and clock - readings[0].clock > _MINUTE_SECONDS:
            readings.popleft()
        reading = read(self._statistics(), clock)
        before = readings[-1] if readings else None
        minute = readings[0] if readings else None
        taken = row(reading, before, minute, at=self._wall(), streams=self._streams())
        readings.append(reading)
        self._ring.append((clock, taken))
        self._taken += 1
