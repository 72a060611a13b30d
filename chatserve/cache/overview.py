"""Overview: one tier's pages as an admin looks at them. It changes nothing.

Made anew for each look and not kept: a cache that begins anew has another pool and index. On the
loop that owns them.
"""

from collections.abc import Collection

from chatserve.cache.page_map import PageMap, page_map
from chatserve.cache.page_pool import PagePool
from chatserve.cache.prefix_index import PrefixIndex
from prefix_store.names import PageName


class Overview:
    """Of the device's pages, or of those of host memory."""

    def __init__(self, pool: PagePool, index: PrefixIndex) -> None:
        self._pool = pool
        self._index = index

    def page_map(self) -> PageMap:
        """What every page is now. For its time see `page_map.py`."""
        return page_map(self._pool, self._index.leased_pages())

    def without(self, names: Collection[PageName]) -> list[PageName]:
        """Those of the names that no page here has. O(names)."""
        return [name for name in names if not self._index.holds(name)]
