"""Owners: adding and taking away the owners of pages, in the pool and in the prefix index at once.

It may not know tables. A page that gets its first owner cannot be evicted any more; one that loses
its last may be, unless it lost its name meanwhile (`forgetting.py`): then it is free.
"""

from collections.abc import Iterable

from chatserve.cache.forgetting import Forgetting
from chatserve.cache.page_pool import PageId, PagePool, PageState
from chatserve.cache.prefix_index import PrefixIndex


class Owners:
    """Of one block manager."""

    def __init__(self, pool: PagePool, index: PrefixIndex, forgetting: Forgetting) -> None:
        self._pool = pool
        self._index = index
        self._forgetting = forgetting

    def retain(self, page: PageId) -> None:
        """One owner more. The page has a name, or an owner already."""
        if self._pool.references(page) == 0:
            self._index.set_owned(page)
        self._pool.retain(page)

    def retain_chain(self, held: dict[PageId, None], page: PageId) -> None:
        """Retain a named page and all before it, but for those that are held already."""
        chain: PageId | None = page
        while chain is not None and chain not in held:
            self.retain(chain)
            held[chain] = None
            chain = self._index.parent(chain)

    def release(self, page: PageId, step: int) -> None:
        """One owner less. step: the last step in flight that may touch the page for it."""
        state = self._pool.release(page, step)
        if state is PageState.CACHED:
            self._set_idle(page)
        elif state is not PageState.OPEN:
            self._forgetting.settled(page)

    def settle(self, pages: Iterable[PageId]) -> None:
        """The steps that might have touched these are over, and nobody owns them."""
        for page in pages:
            self._set_idle(page)

    def _set_idle(self, page: PageId) -> None:
        if not self._forgetting.let_go(page):
            self._index.set_idle(page)
