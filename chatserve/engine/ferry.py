"""Ferry: the engine's side of the tiers below: jobs to the threads, and what comes back.

    scheduler.tiers ─orders─▶ Ferry ─▶ Traffic's threads ─Delivery─▶ Ferry ─▶ scheduler.tiers

It decides nothing (`tiers.py` does) and moves nothing (`traffic.py` does). Without a traffic there
are no tiers below, and every method does nothing.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Collection

from chatserve.cache.transit import Keeps
from chatserve.engine.scheduler import Scheduler
from chatserve.engine.traffic import Delivery, Traffic
from prefix_store.names import PageName

KEEP_REST_SECONDS = 10.0  # some gigabytes
CLOSE_TIMEOUT_SECONDS = 30.0


class Ferry:
    """Owned by the engine; on the event loop. signal: set when there is something to do."""

    def __init__(
        self, scheduler: Scheduler, traffic: Traffic | None, signal: asyncio.Event
    ) -> None:
        self._tiers = scheduler.tiers
        self._traffic = traffic
        self._signal = signal
        self._deliveries: deque[Delivery] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def under_way(self) -> bool:
        """Whether the I/O threads have pages."""
        return self._traffic is not None and self._traffic.in_flight > 0

    @property
    def faults(self) -> int:
        """Parts of jobs that ended with an exception."""
        return 0 if self._traffic is None else self._traffic.faults

    @property
    def keep_processor_seconds(self) -> float:
        """What the threads have taken of a processor to copy pages down."""
        return 0.0 if self._traffic is None else self._traffic.keep_processor_seconds

    def begin(self) -> None:
        """Start the threads."""
        if self._traffic is not None:
            self._traffic.begin(self._arrive)

    def finish_one(self) -> bool:
        """Hand the oldest delivery to the scheduler. False where there is none."""
        if not self._deliveries:
            return False
        self._tiers.finish(self._deliveries.popleft())
        return True

    def order(self, *, idle: bool) -> None:
        """Hand the threads what is to be done now, and let go of what nobody uses. idle: no request
        is here."""
        self._tiers.retire()
        if self._traffic is not None:
            self._tiers.order_keeps(idle=idle)
            for job in self._tiers.take_orders():
                if isinstance(job, Keeps):
                    self._traffic.keep(job)
                else:
                    self._traffic.load(job)
        seconds = self._tiers.wait_seconds
        if seconds is not None and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self.wake)

    def wake(self) -> None:
        """Time alone has brought something to do."""
        self._timer = None
        self._signal.set()

    def restart(self) -> None:
        """The cache was begun anew, with nothing under way: what came back is void."""
        self._deliveries.clear()

    async def drop(self, names: Collection[PageName]) -> None:
        """Forget pages below. Raises what the depot raises."""
        if self._traffic is not None:
            await self._traffic.drop(names)

    async def keep_rest(self) -> None:
        """The engine stops: copy down what has no copy yet, as far as that goes in some seconds."""
        if self._timer is not None:
            self._timer.cancel()
        if self._traffic is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KEEP_REST_SECONDS):
                while True:
                    self._signal.clear()
                    while self.finish_one():
                        pass
                    self.order(idle=True)
                    if not self.under_way:
                        break
                    await self._signal.wait()

    async def close(self) -> None:
        """Let the threads end, and wait for them."""
        if self._timer is not None:
            self._timer.cancel()
        if self._traffic is not None:
            self._traffic.close()
            await asyncio.to_thread(self._traffic.join, CLOSE_TIMEOUT_SECONDS)

    def _arrive(self, delivery: Delivery) -> None:
        self._deliveries.append(delivery)
        self._signal.set()
