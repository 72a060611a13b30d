"""Traffic: threads that move page bytes between the device's memory and a tier below.

    load, keep ──▶ parts in one queue, loads first ──▶ I/O threads ──▶ Delivery on the event loop

A job is cut into parts of some pages, so that threads share it and reading one part overlaps with
decrypting another; its delivery comes once, when its last part is done. Whatever goes wrong in a
part is a miss of its pages, is logged and counted, and nobody waits for ever. What would end the
thread itself (what is no `Exception`) does so after that, and another thread takes its place.

Pages that are to be forgotten (`drop`) are left out of the copies that were ordered and not begun;
those that a thread is just making are awaited and then dropped with the rest.

The memory is the runner's, but a page in transit belongs to the thread that moves it: the cache
floor sees to it that no step touches a LOADING page and that nobody writes to a page being read.
"""

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence, Set
from dataclasses import dataclass, field
from queue import PriorityQueue
from random import Random
from typing import Protocol

from chatserve.cache.page_pool import PageId
from chatserve.cache.transit import Keeps, Load
from chatserve.engine.checksums import checksum
from prefix_store.names import PageName
from prefix_store.values import PageRead, PageWrite, Verdict

_log = logging.getLogger(__name__)

THREADS = 2
PART_BYTES = 4 << 20  # large enough to stream, small enough that threads share one chat's pages
_LOAD, _KEEP, _END = 0, 1, 2  # in the order of their turn


class PageMemory(Protocol):
    """Pages in memory that this process can address: the device's, or the host's slots."""

    def page_view(self, page: PageId) -> memoryview:
        """The page's bytes, writable."""
        ...


class Depot(Protocol):
    """A tier below: `prefix_store.Slab` is one. Called from several threads at once; a method that
    raises counts as a miss."""

    def find(self, names: Sequence[PageName]) -> int:
        """How many of these names, from the first, it knows. Takes microseconds."""
        ...

    def contains(self, name: PageName) -> bool:
        """Whether it knows the name. Takes microseconds."""
        ...

    def touch(self, names: Sequence[PageName]) -> None:
        """These were used. Takes microseconds."""
        ...

    def get(self, reads: Sequence[PageRead]) -> list[bool]:
        """Fill the buffers; which of them hold what was asked for."""
        ...

    def sample(self, count: int, random: Random) -> list[PageName]:
        """So many names, or all, drawn without repetition. May take milliseconds."""
        ...

    def verify(
        self, names: Sequence[PageName], into: Sequence[bytearray | memoryview]
    ) -> list[Verdict]:
        """Fill the buffers, to see whether these are what was kept; what is not is dropped."""
        ...

    def put(self, writes: Sequence[PageWrite]) -> list[bool]:
        """Keep these; which of them are kept."""
        ...

    def drop(self, names: Collection[PageName]) -> int:
        """Forget these for good, every byte; how many there were. Raises where it cannot: then they
        are out of reach all the same, and the rest is for the next `drop`."""
        ...


Job = Load | Keeps


@dataclass(frozen=True, slots=True)
class Delivery:
    """A job is done. done: per page, whether its bytes arrived (or were kept). seconds: from the
    start of its first part to the end of its last. hosted: which pages of a load (indices) were in
    host memory."""

    job: Job
    done: tuple[bool, ...]
    seconds: float
    hosted: frozenset[int] = frozenset()


@dataclass(slots=True, eq=False)
class _Job:
    """A job under way. Its fields change under the traffic's lock."""

    job: Job
    done: list[bool]
    parts_left: int
    began: float | None = None
    barred: frozenset[PageName] = frozenset()  # not to be copied any more
    moving: int = 0  # parts that threads have just now


@dataclass(order=True, slots=True)
class _Part:
    urgency: int
    number: int
    first: int = field(compare=False, default=0)
    last: int = field(compare=False, default=0)
    job: _Job | None = field(compare=False, default=None)


class Traffic:
    """See the module. Methods are for the event loop, but for the threads' own."""

    def __init__(self, depot: Depot, memory: PageMemory, *, page_bytes: int) -> None:
        self.depot = depot
        self.memory = memory
        self.page_bytes = page_bytes
        self._part_pages = max(1, PART_BYTES // page_bytes)
        self._parts: PriorityQueue[_Part] = PriorityQueue()
        self._numbers = itertools.count()
        self._lock = threading.Condition()
        self._keeps: dict[int, _Job] = {}  # by their numbers
        self._threads: list[threading.Thread] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_delivery: Callable[[Delivery], None] = _nobody
        self.loads_in_flight = 0
        self.keeps_in_flight = 0
        self.faults = 0  # parts that ended with an exception: the depot's fault, or ours
        self.keep_processor_seconds = 0.0  # that the threads have taken to copy pages down

    @property
    def in_flight(self) -> int:
        """Jobs given out and not delivered."""
        return self.loads_in_flight + self.keeps_in_flight

    def begin(self, on_delivery: Callable[[Delivery], None]) -> None:
        """Start the threads; deliveries are made on the running event loop."""
        self._loop, self._on_delivery = asyncio.get_running_loop(), on_delivery
        for number in range(THREADS):
            self._threads.append(self._start(number))

    def load(self, load: Load) -> None:
        """Fill a load's pages."""
        self.loads_in_flight += 1
        # Shared out to all threads, even where one part would do: somebody waits.
        share = -(-len(load.names) // THREADS)
        self._submit(load, len(load.names), _LOAD, min(self._part_pages, share))

    def keep(self, keeps: Keeps) -> None:
        """Copy pages down."""
        self.keeps_in_flight += 1
        job = self._submit(keeps, len(keeps.pages), _KEEP, self._part_pages)
        with self._lock:
            self._keeps[keeps.number] = job

    async def drop(self, names: Collection[PageName]) -> int:
        """Have these forgotten below; how many there were. No copy that was ordered before this
        call brings them back. Raises what the depot's `drop` raises."""
        wanted = frozenset(names)
        with self._lock:
            jobs = tuple(self._keeps.values())
            for job in jobs:
                job.barred |= wanted
        return await asyncio.to_thread(self._drop, wanted, jobs)

    def close(self) -> None:
        """No more jobs; threads end when what was given out is done. Idempotent."""
        for _ in self._threads:
            self._parts.put(_Part(_END, next(self._numbers)))

    def join(self, timeout_seconds: float) -> bool:
        """Wait for the threads; blocks. Returns whether all have ended."""
        until = time.monotonic() + timeout_seconds
        for number in range(len(self._threads)):
            # One that dies meanwhile has a successor, which is in its place before it has ended.
            while (left := until - time.monotonic()) > 0 and self._threads[number].is_alive():
                self._threads[number].join(left)
        return not any(thread.is_alive() for thread in self._threads)

    def _start(self, number: int) -> threading.Thread:
        thread = threading.Thread(
            target=self._work, args=(number,), name=f"chatserve-io-{number}", daemon=True
        )
        thread.start()
        return thread

    def _submit(self, job: Job, count: int, urgency: int, part_pages: int) -> _Job:
        assert count, "a job without pages"
        starts = range(0, count, part_pages)
        shared = _Job(job, [False] * count, len(starts))
        for first in starts:
            last = min(count, first + part_pages)
            self._parts.put(_Part(urgency, next(self._numbers), first, last, shared))
        return shared

    # On the threads ------------------------------------------------------------------------

    def _work(self, number: int) -> None:
        try:
            while (part := self._parts.get()).job is not None:
                self._do(part, part.job)
        except BaseException:
            _log.error("I/O thread %d ends, and another one takes its place", number)
            self._threads[number] = self._start(number)
            raise

    def _do(self, part: _Part, job: _Job) -> None:
        with self._lock:
            if job.began is None:
                job.began = time.monotonic()
            began, barred = job.began, job.barred
            job.moving += 1
        done = [False] * (part.last - part.first)
        taken = time.thread_time()
        try:
            done = move(job.job, part.first, part.last, self.depot, self.memory, barred)
        except Exception:
            # A depot says False for what it cannot do; an exception is its fault, or ours.
            _log.exception("page bytes could not be moved")
            self._count_fault()
        except BaseException:
            self._count_fault()
            raise
        finally:
            self._done(part, job, done, began, time.thread_time() - taken)

    def _count_fault(self) -> None:
        with self._lock:
            self.faults += 1

    def _done(self, part: _Part, job: _Job, done: list[bool], began: float, taken: float) -> None:
        with self._lock:
            if isinstance(job.job, Keeps):
                self.keep_processor_seconds += taken
            job.done[part.first : part.last] = done
            job.parts_left -= 1
            job.moving -= 1
            self._lock.notify_all()
            if job.parts_left:
                return
        delivery = Delivery(job.job, tuple(job.done), time.monotonic() - began)
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._deliver, delivery)
        except RuntimeError:
            _log.debug("the event loop has gone: nobody takes the delivery")

    def _drop(self, names: frozenset[PageName], jobs: Sequence[_Job]) -> int:
        """On a thread of its own: what others are writing is dropped once it is there."""
        with self._lock:
            self._lock.wait_for(lambda: not any(job.moving for job in jobs))
        return self.depot.drop(names)

    def _deliver(self, delivery: Delivery) -> None:
        if isinstance(delivery.job, Load):
            self.loads_in_flight -= 1
        else:
            self.keeps_in_flight -= 1
            with self._lock:
                del self._keeps[delivery.job.number]
        self._on_delivery(delivery)


def move(
    job: Job,
    first: int,
    last: int,
    depot: Depot,
    memory: PageMemory,
    barred: Set[PageName] = frozenset(),
) -> list[bool]:
    """Move the bytes of a job's pages from `first` on, before `last`; which of them were moved.
    A page whose bytes are not those of its checksum is not copied down.

    barred: names of which no copy is to be made.
    """
    view = memory.page_view
    if isinstance(job, Load):
        size = len(job.tokens) // len(job.names)
        pages = job.pages
        reads = [
            PageRead(job.names[i], job.tokens[i * size : (i + 1) * size], view(pages[i]))
            for i in range(first, last)
        ]
        return depot.get(reads)
    keeps = job.pages[first:last]
    good = [
        keep.name not in barred
        and (keep.checksum is None or checksum(view(keep.page)) == keep.checksum)
        for keep in keeps
    ]
    writes = [
        PageWrite(keep.name, keep.parent, keep.position, keep.tokens, view(keep.page))
        for keep, fine in zip(keeps, good, strict=True)
        if fine
    ]
    kept = iter(depot.put(writes))
    return [fine and next(kept) for fine in good]


def _nobody(delivery: Delivery) -> None:
    del delivery
