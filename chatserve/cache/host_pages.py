"""HostPages: copies of named pages in host memory, between the device and what is below.

    device page ─save─▶ filling slot ─▶ kept: named, with its checksum ─promotion─▶ device page
    page below ──fetch─▶ filling slot ─┘                             └─ Keeps ─▶ page below

A slot is a page of a second pool, with the states of `page_pool.py`: LOADING while it is filled,
SEALED while somebody reads it, CACHED else; it goes by the same policies of eviction as a page of
the device. A slot's parent may be gone before it: what is found is the union over the tiers below
the device, so a chain may lie in both.

The checksum of a slot is that of the page it was saved from, taken on the device. A slot that was
fetched has none until its first promotion: its bytes were authenticated on their way in.

A page that waits for its copy below is owned by that wish, so others make room before it. Where
there are no others, the one that waits longest gives way: it is lost when the device's is evicted.

This is the books alone; it knows no bytes and no threads (`engine/host_tier.py`).
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from chatserve.cache.below import Below
from chatserve.cache.departures import Evicted
from chatserve.cache.overview import Overview
from chatserve.cache.page_pool import PageId, PagePool, PageState
from chatserve.cache.prefix_index import PrefixIndex
from chatserve.cache.transit import Keep, Keeps, Transit, TransitStatistics
from prefix_store.names import PageName

Slot = PageId  # of the host's memory


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStatistics:
    """Slots: total = free + filling + held + cached. *_total from the start of the process.

    held: being read, or waiting for the copy below. leased: others go before them, for now.
    corrupt: slots whose bytes were not what had been saved. transit: copies to what is below.
    """

    total: int = 0
    free: int = 0
    filling: int = 0
    held: int = 0
    cached: int = 0
    saved_total: int = 0
    promoted_total: int = 0
    evicted_total: int = 0
    flushed_total: int = 0
    leased: int = 0
    corrupt_total: int = 0
    transit: TransitStatistics = field(default_factory=TransitStatistics)


class HostPages:
    """`slots` pages of host memory. Owned by the event loop. below: what is under it, if anything.

    `Below` of the device's block manager. Raises nothing: a broken rule is an AssertionError.
    """

    def __init__(
        self,
        *,
        slots: int,
        below: Below | None = None,
        order: Callable[[], PrefixIndex] = PrefixIndex,
    ) -> None:
        self.pool = PagePool(slots)
        self.transit = Transit()
        self._below = below
        self._order = order
        self._index = order()
        self._checksums: dict[Slot, int] = {}
        self._filling: dict[PageName, Slot] = {}
        self._ghosts: set[Slot] = set()  # forgotten, and still being read
        self._saved = self._promoted = self._evicted = self._flushed = self._corrupt = 0

    # Below the device ----------------------------------------------------------------------

    def find(self, names: Sequence[PageName]) -> int:
        """How many of these names, from the first, are here or below."""
        count = 0
        while count < len(names):
            before = count
            while count < len(names) and self._index.holds(names[count]):
                count += 1
            if self._below is not None and count < len(names):
                count += self._below.find(names[count:])
            if count == before:
                break
        return count

    def contains(self, name: PageName) -> bool:
        """Whether it is here or below, or being copied here."""
        if self._index.holds(name) or name in self._filling:
            return True
        return self._below is not None and self._below.contains(name)

    def holds(self, name: PageName) -> bool:
        """Whether it is here."""
        return self._index.holds(name)

    def touch(self, names: Sequence[PageName]) -> None:
        """A request had these pages: what is below counts it. Here only what is brought up is used:
        a copy of what the device has anyway makes room first (docs/log.md)."""
        if self._below is not None:
            self._below.touch(names)

    @property
    def available(self) -> int:
        """Slots that can be had now."""
        return self.pool.free + self.pool.cached + self.transit.unkept

    @property
    def spare(self) -> int:
        """Slots that can be had now for certain without giving up a wish for a copy below: those
        before a page that has one can go only after it."""
        if not self.transit.unkept:
            return self.available
        return self.pool.free + self._index.leaves

    # Filling -------------------------------------------------------------------------------

    def begin(self, name: PageName) -> Slot | None:
        """A slot to be filled with this page; None where it is here already, or on its way, or
        all slots are in use."""
        if self._index.holds(name) or name in self._filling:
            return None
        while not self.pool.free:
            if not self._evict_one() and not self._lose_one():
                return None
        slot = self._filling[name] = self.pool.load()
        return slot

    def end(
        self,
        slot: Slot,
        keep: Keep,
        *,
        arrived: bool,
        checksum: int | None = None,
    ) -> bool:
        """It is filled, or will not be. checksum: as taken on the device, None of what came from
        below. Returns whether the slot has the page now, owned by the caller (`release`)."""
        wanted = self._filling.get(keep.name) == slot
        if wanted:
            del self._filling[keep.name]
        if not (wanted and arrived):
            self.pool.load_failed(slot)
            return False
        self.pool.loaded(slot)
        parent = keep.parent if keep.parent and self._index.holds(keep.parent) else None
        fetched = checksum is None
        self._index.add(slot, keep.name, parent, keep.tokens, keep.space, loaded=fetched)
        if fetched:
            self._index.keep(slot)  # by the load that it is for
        else:
            self._checksums[slot] = checksum
            self._saved += 1
        if self._below is not None and not self._below.contains(keep.name):
            self.transit.want(replace(keep, page=slot, checksum=checksum))
            self._retain(slot)
        return True

    # Reading -------------------------------------------------------------------------------

    def take(self, name: PageName, tokens: bytes) -> Slot | None:
        """The slot of a page, owned by the caller until `release`; None where it is not here.
        tokens: int32 bytes, which must be the page's."""
        slot = self._index.find(name, tokens)
        if slot is not None:
            self._index.keep(slot)
            self._retain(slot)
        return slot

    def release(self, slot: Slot) -> None:
        """The caller does not need the slot any more."""
        self._release(slot)

    def promoted(self, slot: Slot, checksum: int) -> bool:
        """A slot that the caller owns was copied to the device, where its bytes have this checksum:
        whether they are what was saved. If not, the slot has no name any more."""
        if self._checksums.setdefault(slot, checksum) == checksum:
            self._promoted += 1
            return True
        self._corrupt += 1
        name = self._index.name(slot)
        if name is not None:
            self.forget([name])
        return False

    # Copies for what is below --------------------------------------------------------------

    def take_unkept(self, most: int) -> Keeps | None:
        """Up to so many pages that what is below does not have, oldest first, owned until
        `end_keep`; None where there are none."""
        taken: list[Keep] = []
        while self._below is not None and len(taken) < most:
            keep = self.transit.next_unkept()
            if keep is None:
                break
            if self._below.contains(keep.name):
                self._release(keep.page)
            else:
                taken.append(keep)
        if not taken:
            return None
        return self.transit.begin_keep(taken, [keep.page for keep in taken])

    def end_keep(self, keeps: Keeps, stored: Sequence[bool]) -> None:
        """The I/O thread has read these slots; stored: which of them have a copy now."""
        self.transit.end_keep(keeps, sum(stored))
        for slot in keeps.held:
            self._release(slot)

    # Going ---------------------------------------------------------------------------------

    def forget(self, names: Collection[PageName]) -> None:
        """Nobody finds these here any more, nor what continues them; a slot that is being read is
        free when that has ended, and what is being copied here under these names is dropped."""
        for name in names:
            self._filling.pop(name, None)
        for slot in self._index.family(names):
            self._unname(slot)
            if self.pool.state(slot) is PageState.CACHED:
                self.pool.evict(slot)
            else:
                self._ghosts.add(slot)

    def flush(self) -> int:
        """Forget every page that nobody reads and that does not wait for its copy below, nor one
        behind it. Returns how many."""
        count = 0
        while self._evict_one():
            count += 1
        self._evicted -= count
        self._flushed += count
        return count

    def lease(self, names: Collection[PageName], seconds: float) -> int:
        """Others go before the slots of these names, for so long from now; 0 ends leases. How many
        slots those are."""
        return self._index.lease_names(names, seconds)

    def evict(self, names: Collection[PageName]) -> Evicted:
        """The slots of these names are given up that are below as well (all where nothing is), but
        for those that `flush` would leave, and those before a slot that stays."""
        left = stayed = 0
        for slot in self._index.resident(names):
            name = self._index.name(slot)
            kept = self._below is None or (name is not None and self._below.contains(name))
            idle = kept and self.pool.state(slot) is PageState.CACHED
            if idle and not self._index.has_children(slot):
                self._free(slot)
                left += 1
            else:
                stayed += 1
        self._flushed += left
        return Evicted(left, stayed)

    def retire(self, seconds: float, most: int) -> int:
        """Look at up to so many pages that nobody used for so long, those first that are idle for
        longest, and evict what is below as well. Leased ones stay. How many were looked at."""
        looked = 0
        while self._below is not None and looked < most:
            slot = self._index.stale(seconds)
            name = None if slot is None else self._index.name(slot)
            if slot is None or name is None:
                break
            looked += 1
            if self._below.contains(name):
                self._free(slot)
                self._evicted += 1
            else:
                self._index.pass_over(slot, seconds)
        return looked

    def restart(self) -> None:
        """Begin anew with nothing: no step and no thread has a slot."""
        transit = Transit()
        transit.count_on(self.transit)
        self.pool, self.transit, self._index = PagePool(self.pool.total), transit, self._order()
        self._checksums.clear()
        self._filling.clear()
        self._ghosts.clear()

    # Looking at it -------------------------------------------------------------------------

    def overview(self) -> Overview:
        """The slots as an admin looks at them, now."""
        return Overview(self.pool, self._index, self.transit)

    def owners(self) -> "Counter[Slot]":
        """How many copies to be made own each slot. For tests."""
        return self.transit.owners() + Counter(keep.page for keep in self.transit.waiting())

    def statistics(self) -> HostStatistics:
        """A frozen picture."""
        pool = self.pool.statistics()
        return HostStatistics(
            total=pool.total,
            free=pool.free,
            filling=pool.loading,
            held=pool.sealed,
            cached=pool.cached,
            saved_total=self._saved,
            promoted_total=self._promoted,
            evicted_total=self._evicted,
            flushed_total=self._flushed,
            leased=self._index.leased,
            corrupt_total=self._corrupt,
            transit=self.transit.statistics(),
        )

    def check(self) -> None:
        """Every invariant, in O(slots). For tests."""
        self.pool.check()
        self._index.check()
        named = self._index.pages()
        self.transit.check(named)
        for slot, count in self.owners().items():
            assert self.pool.references(slot) >= count, "a slot is read by nobody's leave"
        filling = set(self._filling.values())
        assert len(filling) == len(self._filling), "a slot is filled twice"
        for slot in range(self.pool.total):
            state = self.pool.state(slot)
            assert (slot in named) == (
                state is PageState.CACHED
                or (state is PageState.SEALED and slot not in self._ghosts)
            ), (slot, state)
            assert slot not in filling or state is PageState.LOADING
        assert not self._filling.keys() & set(named.values()), "here, and on its way here"
        assert self._checksums.keys() <= named.keys() | self._ghosts, "a checksum of nothing"

    # Inside --------------------------------------------------------------------------------

    def _retain(self, slot: Slot) -> None:
        if self.pool.references(slot) == 0:
            self._index.set_owned(slot)
        self.pool.retain(slot)

    def _release(self, slot: Slot) -> None:
        if self.pool.release(slot, 0) is not PageState.CACHED:
            return
        if slot in self._ghosts:
            self._ghosts.remove(slot)
            self._checksums.pop(slot, None)
            self.pool.evict(slot)
        else:
            self._index.set_idle(slot)

    def _unname(self, slot: Slot) -> None:
        name = self._index.name(slot)
        assert name is not None, "a slot without a name"
        if self.transit.forget(name, lost=False):
            self._release(slot)
        self.transit.withdraw(name)
        self._checksums.pop(slot, None)
        self._index.remove(slot)

    def _free(self, slot: Slot) -> None:
        self._unname(slot)
        self.pool.evict(slot)

    def _evict_one(self) -> bool:
        slot = self._index.next_victim()
        if slot is None:
            return False
        self._free(slot)
        self._evicted += 1
        return True

    def _lose_one(self) -> bool:
        """Give up one wish for a copy. Whether there was any."""
        keep = self.transit.lose()
        if keep is not None:
            self._release(keep.page)
        return keep is not None
