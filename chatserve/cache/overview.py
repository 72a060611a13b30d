"""Overview: one tier's pages as an admin looks at them. It changes nothing.

Made anew for each look and not kept: a cache that begins anew has another pool and index. On the
loop that owns them.
"""

from collections.abc import Collection
from dataclasses import dataclass

from chatserve.cache.page_map import PageMap, page_map
from chatserve.cache.page_pool import PagePool
from chatserve.cache.prefix_index import PrefixIndex
from chatserve.cache.sharing import Picture, SharedRun
from chatserve.cache.transit import Transit
from prefix_store.names import PageName


@dataclass(frozen=True, slots=True)
class NamedRun:
    """A run whose first pages, as many as it has names, are still here. tenant: in whose share the
    last of these counts: public pages come first, and are in the share of who had them computed."""

    run: SharedRun
    names: tuple[PageName, ...]
    tenant: str


class Overview:
    """Of the device's pages, or of those of host memory."""

    def __init__(self, pool: PagePool, index: PrefixIndex, transit: Transit) -> None:
        self._pool = pool
        self._index = index
        self._transit = transit

    def page_map(self) -> PageMap:
        """What every page is now. For its time see `page_map.py`."""
        return page_map(self._pool, self._index.leased_pages())

    def sharing(self) -> Picture:
        """Which pages are shared, copied at this moment. Threads that copy pages own them too, and
        are not counted. For its time see `docs/architecture.md`."""
        owners = self._pool.owners()
        for page, count in self._transit.owners().items():
            owners[page] -= count
        return self._index.sharing.picture(owners)

    def named(self, run: SharedRun) -> NamedRun | None:
        """A run with the names that its pages had in the picture and still have; None where there
        are none: pages go from the end. O(its pages)."""
        still = map(self._index.sharing.still_named, run.pages, run.times)
        here = run.pages[: [*still, False].index(False)]
        if not here:
            return None
        return NamedRun(run, tuple(self._index.names(here)), self._index.tenant(here[-1]))

    def without(self, names: Collection[PageName]) -> list[PageName]:
        """Those of the names that no page here has. O(names)."""
        return [name for name in names if not self._index.holds(name)]
