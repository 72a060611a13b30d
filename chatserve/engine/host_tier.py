"""HostTier: pages between the device and host memory, as copies in the step plan.

    device ─ Keeps ─▶ saves of the next plan ─commit─▶ slots ─ Keeps ─▶ I/O threads ─▶ below
    below ─ I/O threads ─▶ slots ─▶ promotions of the next plan ─commit─▶ device (a Load ends)

It stands where the I/O threads stand when they can address the device's memory themselves:
`tiers.py` gives it the same jobs and gets the same deliveries. A promotion is no part of the step
that it travels in: nobody reads the page before that step has committed and the sum was right.

A load is brought up in order, some pages at a time, as slots and the bound of a step permit, and
ends early at the first page that is not to be had. Synchronous, on the event loop.
"""

from array import array
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice

from chatserve.cache.host_pages import HostPages, Slot
from chatserve.cache.page_table import PageTable
from chatserve.cache.transit import Keep, Keeps, Load
from chatserve.engine.plan import Moves, PageMove, StepResult
from chatserve.engine.traffic import Delivery, Job
from prefix_store.names import PageName

MOVE_PAGES = 256  # of one step in each direction, where nothing is said


@dataclass(slots=True, eq=False)
class _Lift:
    """A load under way. given: pages whose slot is on its way or was; coming: not back yet."""

    load: Load
    began: float
    given: int = 0
    coming: int = 0
    broken: bool = False
    done: list[bool] = field(default_factory=list[bool])
    hosted: set[int] = field(default_factory=set[int])

    @property
    def over(self) -> bool:
        """Whether no page will be asked for any more."""
        return self.broken or self.given == len(self.done)

    def keep(self, index: int) -> Keep:
        """What a slot of its page `index` is called. Its page is nobody's yet."""
        load, at = self.load, self.load.above + index
        above = self.load.table.last_name if index == 0 else load.names[index - 1]
        return Keep(0, load.names[index], above, at, self.tokens(index), load.table.space)

    def tokens(self, index: int) -> bytes:
        """Token ids of its page `index`, int32 bytes."""
        size = len(self.load.tokens) // len(self.load.names)
        return self.load.tokens[index * size : (index + 1) * size]


@dataclass(frozen=True, slots=True)
class _Fetch:
    """A job for the I/O threads: pages of a lift, from below into slots."""

    lift: _Lift
    first: int


@dataclass(frozen=True, slots=True)
class _Raise:
    """A promotion that waits for its step."""

    lift: _Lift
    index: int
    slot: Slot


@dataclass(frozen=True, slots=True)
class _Batch:
    """What one step moves. slots: one per page of `keeps`; None where there was none to be had."""

    raises: tuple[_Raise, ...]
    keeps: Keeps | None = None
    slots: tuple[Slot | None, ...] = ()
    began: float = 0.0


class HostTier:
    """See the module. Owned by the tiers. new_id: numbers for its loads from below."""

    def __init__(
        self,
        pages: HostPages,
        new_id: Callable[[], int],
        *,
        clock: Callable[[], float],
        move_pages: int = MOVE_PAGES,
    ) -> None:
        self.pages = pages
        self.move_pages = move_pages
        self._new_id = new_id
        self._clock = clock
        self._lifts: list[_Lift] = []
        self._fetches: dict[int, _Fetch] = {}  # by the load's holder
        self._waiting: deque[_Raise] = deque()
        self._batches: dict[int, _Batch] = {}  # by the step's number
        self._orders: list[Job] = []

    @property
    def in_flight(self) -> bool:
        """Whether a page of the device is to be read or written."""
        return bool(self._lifts or self._batches)

    def take_orders(self) -> list[Job]:
        """What the I/O threads should do now, each once."""
        taken, self._orders = self._orders, []
        return taken

    # Up ------------------------------------------------------------------------------------

    def load(self, load: Load) -> None:
        """Bring up a load's pages, from the next `advance` on."""
        self._lifts.append(_Lift(load, self._clock(), done=[False] * len(load.names)))

    def advance(self) -> list[Delivery]:
        """Give every load its next pages, as far as there are slots; those that have ended. One
        that gets none waits for others to give theirs back; where there are none, it ends."""
        for lift in self._lifts:
            self._give(lift)
        busy = any(lift.coming for lift in self._lifts)
        ended = [lift for lift in self._lifts if not lift.coming and (lift.over or not busy)]
        self._lifts = [lift for lift in self._lifts if lift not in ended]
        now = self._clock()
        return [
            Delivery(lift.load, tuple(lift.done), now - lift.began, frozenset(lift.hosted))
            for lift in ended
        ]

    def _give(self, lift: _Lift) -> None:
        names = lift.load.names
        first: int | None = None  # of the pages that are to be fetched together
        slots: list[Slot] = []
        while not lift.over and lift.coming < self.move_pages:
            index = lift.given
            slot = self.pages.take(names[index], lift.tokens(index))
            if slot is not None:
                if first is not None:
                    self._fetch(lift, first, slots)
                    first, slots = None, []
                lift.hosted.add(index)
                self._waiting.append(_Raise(lift, index, slot))
            else:
                slot = self.pages.begin(names[index])
                if slot is None:
                    break
                first = index if first is None else first
                slots.append(slot)
            lift.given += 1
            lift.coming += 1
        if first is not None:
            self._fetch(lift, first, slots)

    def _fetch(self, lift: _Lift, first: int, slots: list[Slot]) -> None:
        names = lift.load.names[first : first + len(slots)]
        fetch = Load(
            holder=self._new_id(),
            table=PageTable(array("i", slots), [], lift.load.table.space),
            above=0,
            names=names,
            tokens=b"".join(lift.tokens(first + index) for index in range(len(slots))),
            drafting=lift.load.drafting,
        )
        self._fetches[fetch.holder] = _Fetch(lift, first)
        self._orders.append(fetch)

    def finish(self, delivery: Delivery) -> list[Delivery]:
        """The I/O threads have fetched pages; the loads that have ended thereby."""
        job = delivery.job
        assert isinstance(job, Load)
        fetch = self._fetches.pop(job.holder)
        lift = fetch.lift
        for offset, (slot, arrived) in enumerate(zip(job.pages, delivery.done, strict=True)):
            index = fetch.first + offset
            if self.pages.end(slot, lift.keep(index), arrived=arrived):
                self._waiting.append(_Raise(lift, index, slot))
            else:
                lift.coming -= 1
                lift.broken = True
        return self.advance()

    # In a step -----------------------------------------------------------------------------

    def order(self, number: int, keeps: Keeps | None) -> Moves | None:
        """What step `number` moves: `keeps` down, and up what is ready, within the bound. None
        where it need not be; for an empty one there is no room, and its step ends `keeps`."""
        raises = tuple(islice(_drain(self._waiting), self.move_pages))
        slots = () if keeps is None else tuple(self.pages.begin(each.name) for each in keeps.pages)
        if not raises and keeps is None:
            return None
        self._batches[number] = _Batch(raises, keeps, slots, self._clock())
        saves = () if keeps is None else zip(keeps.pages, slots, strict=True)
        return Moves(
            saves=tuple(PageMove(keep.page, slot) for keep, slot in saves if slot is not None),
            promotions=tuple(
                PageMove(each.slot, each.lift.load.pages[each.index]) for each in raises
            ),
        )

    def commit(self, number: int, result: StepResult) -> list[Delivery]:
        """Step `number` is over: what has ended thereby. Of a failed one nothing has arrived."""
        batch = self._batches.pop(number, None)
        if batch is None:
            return []
        ended = self._saved(batch, result)
        failed = result.failure is not None
        sums = [None] * len(batch.raises) if failed else result.promoted
        for each, checksum in zip(batch.raises, sums, strict=True):
            each.lift.coming -= 1
            good = checksum is not None and self.pages.promoted(each.slot, checksum)
            each.lift.done[each.index] = good
            each.lift.broken |= not good
            self.pages.release(each.slot)
        return ended + self.advance()

    def _saved(self, batch: _Batch, result: StepResult) -> list[Delivery]:
        keeps = batch.keeps
        if keeps is None:
            return []
        sums = iter(result.saved)
        done: list[bool] = []
        for keep, slot in zip(keeps.pages, batch.slots, strict=True):
            if slot is None:
                done.append(self.pages.holds(keep.name))
                continue
            checksum = None if result.failure is not None else next(sums)
            kept = self.pages.end(slot, keep, arrived=checksum is not None, checksum=checksum)
            if kept:
                self.pages.release(slot)
            done.append(kept)
        return [Delivery(keeps, tuple(done), self._clock() - batch.began)]

    # Going ---------------------------------------------------------------------------------

    def forget(self, names: Collection[PageName]) -> None:
        """Nobody finds these in host memory any more."""
        self.pages.forget(names)

    def restart(self) -> None:
        """The cache is begun anew; no step and no thread has a page."""
        self._lifts.clear()
        self._fetches.clear()
        self._waiting.clear()
        self._batches.clear()
        self._orders.clear()
        self.pages.restart()

    def check(self) -> None:
        """Every invariant. For tests."""
        self.pages.check()
        reading = [each.slot for each in self._waiting]
        reading += [each.slot for batch in self._batches.values() for each in batch.raises]
        owned = self.pages.owners() + Counter(reading)
        for slot, count in owned.items():
            assert self.pages.pool.references(slot) == count, "a slot that nobody gives back"
        assert self.pages.pool.statistics().sealed == len(owned), "a slot is held by nobody"
        filling = sum(len(lift.load.names) for lift in self._lifts)
        assert sum(lift.coming for lift in self._lifts) <= filling


def _drain(waiting: "deque[_Raise]") -> Iterator[_Raise]:
    while waiting:
        yield waiting.popleft()
