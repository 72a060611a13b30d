"""Verifier: whether pages below the device are what they were, by a sample, while all goes on.

    sample of names ─▶ some at a time: retain those that are on the device ─▶ a thread reads them
    below (what does not authenticate is dropped there) and compares ─▶ give them back

What differs from its copy below is forgotten in both places: nobody can tell which one is right,
and any doubt is a miss. It need not be a fault: a page that was computed again beside an older copy
differs by rounding. Pages are compared only where the I/O threads address the device's memory
itself, that is without host memory; elsewhere they are read and authenticated alone.

The thread is none of the two for loads and copies, so nobody waits for a check but who asked.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from random import Random
from typing import NamedTuple

from chatserve.cache.page_pool import PageId
from chatserve.engine.scheduler import Scheduler
from chatserve.engine.traffic import PART_BYTES, Depot, PageMemory, Traffic
from chatserve.errors import Busy, Unavailable
from prefix_store.names import PageName
from prefix_store.values import Verdict

VERIFY_PAGES_MAX = 4096
RETRY_SECONDS = 2.0


class Verified(NamedTuple):
    """checked: pages that were read, of which so many were wrong (dropped), or unreadable (dropped
    too). absent: left the disk before they were read. compared: of the right ones, those that were
    on the device as well; different: of these, forgotten in both places."""

    checked: int = 0
    wrong: int = 0
    unreadable: int = 0
    absent: int = 0
    compared: int = 0
    different: int = 0


class _Outcome(NamedTuple):
    """Of one page. same: None where it was not compared."""

    name: PageName
    verdict: Verdict
    same: bool | None


class Verifier:
    """One engine's. On the event loop. act: does something between two events of the engine's
    loop. recovering: whether the cache is about to begin anew. forget: in every tier."""

    def __init__(
        self,
        scheduler: Scheduler,
        traffic: Traffic | None,
        *,
        act: Callable[[Callable[[], None]], None],
        recovering: Callable[[], bool],
        forget: Callable[[Collection[PageName]], Awaitable[None]],
    ) -> None:
        self._scheduler = scheduler
        self._traffic = traffic
        self._act = act
        self._recovering = recovering
        self._forget = forget
        self._random = Random()
        self._busy = self._closed = False
        # More than one where a caller left and another check began: its thread still reads.
        self._reading: set[asyncio.Future[list[_Outcome]]] = set()

    @property
    def under_way(self) -> bool:
        """Whether a thread reads pages."""
        return bool(self._reading)

    async def verify(self, pages: int) -> Verified:
        """Check so many pages (no more than VERIFY_PAGES_MAX), drawn from all below; fewer where
        there are fewer. A caller that is cancelled leaves what was found so far dropped.

        Raises Busy while another check runs, Unavailable once the engine stops, and where a page
        that differs cannot be dropped now: it is out of reach then.
        """
        assert 0 < pages <= VERIFY_PAGES_MAX, "checked at the door"
        if self._traffic is None:
            return Verified()
        if self._busy:
            raise Busy("Pages are being checked already.", retry_after=RETRY_SECONDS)
        self._busy = True
        try:
            depot, size = self._traffic.depot, self._traffic.page_bytes
            names = await asyncio.to_thread(depot.sample, pages, self._random)
            at_once = max(1, PART_BYTES // size)
            outcomes: list[_Outcome] = []
            for first in range(0, len(names), at_once):
                outcomes += await self._check(self._traffic, names[first : first + at_once])
            return _sum(outcomes)
        finally:
            self._busy = False

    async def close(self) -> None:
        """Check no more, and wait for the threads."""
        self._closed = True
        if self._reading:
            await asyncio.wait(tuple(self._reading))

    async def _check(self, traffic: Traffic, names: Sequence[PageName]) -> list[_Outcome]:
        if self._closed:
            raise Unavailable("The server is shutting down.", retry_after=RETRY_SECONDS)
        blocks = self._scheduler.blocks
        compares = self._scheduler.tiers.direct and not self._recovering()
        check = blocks.begin_check(names) if compares else None
        pages = (None,) * len(names) if check is None else check.pages
        work = partial(_read, traffic.depot, traffic.memory, traffic.page_bytes, names, pages)
        reading = asyncio.get_running_loop().run_in_executor(None, work)
        self._reading.add(reading)

        def over(done: "asyncio.Future[list[_Outcome]]") -> None:
            # Whether or not its caller is still there: nobody else gives the pages back.
            self._reading.discard(done)
            if not done.cancelled():
                done.exception()
            if check is not None:
                self._act(partial(blocks.end_check, check))

        reading.add_done_callback(over)
        outcomes = await asyncio.shield(reading)
        different = [outcome.name for outcome in outcomes if outcome.same is False]
        if different:
            await self._forget(different)
        return outcomes


def _read(
    depot: Depot,
    memory: PageMemory,
    page_bytes: int,
    names: Sequence[PageName],
    pages: Sequence[PageId | None],
) -> list[_Outcome]:
    """In a thread."""
    buffers = [bytearray(page_bytes) for _ in names]
    verdicts = depot.verify(names, buffers)
    outcomes: list[_Outcome] = []
    for name, verdict, page, buffer in zip(names, verdicts, pages, buffers, strict=True):
        same = None
        if page is not None and verdict is Verdict.RIGHT:
            # Copied, since comparing views goes byte by byte, with the interpreter's lock held.
            same = buffer == bytearray(memory.page_view(page))
        outcomes.append(_Outcome(name, verdict, same))
    return outcomes


def _sum(outcomes: Sequence[_Outcome]) -> Verified:
    verdicts = [outcome.verdict for outcome in outcomes]
    same = [outcome.same for outcome in outcomes if outcome.same is not None]
    absent = verdicts.count(Verdict.ABSENT)
    return Verified(
        checked=len(verdicts) - absent,
        wrong=verdicts.count(Verdict.WRONG),
        unreadable=verdicts.count(Verdict.UNREADABLE),
        absent=absent,
        compared=len(same),
        different=same.count(False),
    )
