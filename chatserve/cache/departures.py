"""Departures: idle pages that leave the device, and how they are counted.

    evict_one   the next by the order of eviction, for somebody who needs its room
    flush       all of them
    retire      those that nobody has used for long and has leased, where a tier below has them
    evict       those of some names, where a tier below has them, or there is none

Only pages that nobody owns leave, children before parents, so what stays can be found.
"""

from collections.abc import Collection
from typing import NamedTuple

from chatserve.cache.below import Below
from chatserve.cache.page_pool import PageId, PagePool, PageState
from chatserve.cache.prefix_index import PrefixIndex
from chatserve.cache.statistics import CacheCounts
from chatserve.cache.transit import Transit
from prefix_store.names import PageName


class Evicted(NamedTuple):
    """Pages of some names. left: gone from here. stayed: resident still, as they are in use, or
    continued by a page that stays, or have no copy in the tier below."""

    left: int = 0
    stayed: int = 0


class Departures:
    """Of one block manager. below: the tier that pages must be in before they leave, where nobody
    needs their room; None where there is none, and pages are gone when they leave."""

    def __init__(
        self, pool: PagePool, index: PrefixIndex, transit: Transit, below: Below | None
    ) -> None:
        self.counts = CacheCounts()
        self._pool = pool
        self._index = index
        self._transit = transit
        self._below = below

    def evict_one(self) -> bool:
        """Make room; False where no page may go. One without a copy is lost, and counted so."""
        page = self._index.next_victim()
        if page is None:
            return False
        name, drafted = self._index.name(page), self._index.is_drafted(page)
        self._free(page, lost=not drafted and name is not None and not self._is_kept(name))
        self.counts.evicted += 1
        return True

    def flush(self) -> int:
        """Forget every page that nobody owns. Returns how many."""
        count = 0
        while (page := self._index.next_victim()) is not None:
            self._free(page)
            count += 1
        self.counts.flushed += count
        return count

    def retire(self, seconds: float, most: int) -> int:
        """Look at up to so many pages that nobody used for so long, those first that are idle for
        longest, and evict what a tier below has. Leased pages stay. How many were looked at."""
        looked = 0
        while self._below is not None and looked < most:
            page = self._index.stale(seconds)
            name = None if page is None else self._index.name(page)
            if page is None or name is None:
                break
            looked += 1
            if self._below.contains(name):
                self._free(page)
                self.counts.retired += 1
            else:
                self._index.pass_over(page, seconds)
        return looked

    def evict(self, names: Collection[PageName]) -> Evicted:
        """The idle pages of these names that the tier below has leave, whatever leases they have;
        all idle ones where there is no such tier. O(names)."""
        left = stayed = 0
        for page in self._index.resident(names):
            name = self._index.name(page)
            idle = self._pool.state(page) is PageState.CACHED
            kept = name is not None and self._is_kept(name)
            if idle and kept and not self._index.has_children(page):
                self._free(page)
                left += 1
            else:
                stayed += 1
        self.counts.dismissed += left
        return Evicted(left, stayed)

    def _is_kept(self, name: PageName) -> bool:
        """Whether nothing is lost when this page leaves that could be kept."""
        if self._below is None:
            return True
        return self._below.contains(name) and not self._transit.waits(name)

    def unname(self, page: PageId, *, lost: bool = False) -> None:
        """Forget the name of a page without resident children. lost: no copy of it is left."""
        name = self._index.name(page)
        assert name is not None, "a page without a name"
        self._transit.forget(name, lost=lost)
        self._index.remove(page)

    def _free(self, page: PageId, *, lost: bool = False) -> None:
        self.unname(page, lost=lost)
        self._pool.evict(page)
