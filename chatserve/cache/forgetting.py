"""Forgetting: names that nobody may find from now on, and pages that go as soon as they can.

    idle, with all that continues it    its name goes, and it is free at once
    owned                               its name goes; freed when its last owner lets go (*ghost*)
    being computed or loaded            never gets a forgotten name (*barred*)
    below                               not looked for there until the tiers below have dropped it

A ghost is a page without a name whose owners go on reading it. What would follow a ghost stays
nameless too: whoever found it would not own the pages before it. So all resident pages that
continue a forgotten one are forgotten on the device, whoever computed them: that costs others time.

Only pages that were being filled when a name was forgotten are barred from it: who computes the
same tokens anew, from then on, names them again.
"""

from collections import Counter
from collections.abc import Collection, Sequence

from chatserve.cache.claims import Claims
from chatserve.cache.page_pool import PageId, PagePool, PageState
from chatserve.cache.page_table import PageTable
from chatserve.cache.prefix_index import PrefixIndex
from chatserve.cache.transit import Load, Transit
from prefix_store.names import PageName


class Forgetting:
    """The books of one block manager. The rest of the floor asks it before it names a page."""

    def __init__(
        self, pool: PagePool, index: PrefixIndex, transit: Transit, claims: Claims
    ) -> None:
        self._pool = pool
        self._index = index
        self._transit = transit
        self._claims = claims
        self._ghosts: set[PageId] = set()
        self._barred: set[PageName] = set()
        self._suspects: set[PageId] = set()  # being filled when a name was barred
        self._below: Counter[PageName] = Counter()
        self.total = 0  # pages that lost their names

    @property
    def ghosts(self) -> int:
        """Pages that lost their names and are still owned."""
        return len(self._ghosts)

    def count_on(self, before: "Forgetting") -> None:
        """Take the place of another one, whose pages are lost: what is being dropped below is still
        not to be looked for."""
        self._below = before._below
        self.total = before.total

    def forget(self, names: Collection[PageName]) -> list[int]:
        """From now on nobody finds these names on the device.

        Returns the followers to wake: whom they wait for will not name what they want.
        """
        woken: list[int] = []
        for name in names:
            self._transit.withdraw(name)
            leader = self._claims.leader(name)
            if leader is not None and not self._transit.is_loading(leader):
                woken += self._claims.drop(leader)
        pages = self._index.family(names)
        for page in pages:
            name = self._index.name(page)
            assert name is not None, "a family has names"
            self._transit.withdraw(name)
            self._index.remove(page)
            if self._pool.state(page) is PageState.CACHED:
                self._pool.evict(page)
            else:
                self._ghosts.add(page)
        filling = self._pool.pages_in(PageState.OPEN) + self._pool.pages_in(PageState.LOADING)
        if filling and names:
            self._suspects.update(filling)
            self._barred.update(names)
        self.total += len(pages)
        return woken

    def family(self, names: Collection[PageName]) -> set[PageName]:
        """Which of these names are resident, and all that continue them."""
        found = map(self._index.name, self._index.family(names))
        return {name for name in found if name is not None}

    def hide_below(self, names: Collection[PageName]) -> None:
        """Do not look for these below, until `dropped`. Before the tiers there are told."""
        self._below.update(set(names))

    def dropped(self, names: Collection[PageName]) -> None:
        """The tiers below have dropped these, or have them out of reach. Once for each
        `hide_below`."""
        self._below.subtract(set(names))
        self._below = +self._below

    def reach(self, names: Sequence[PageName]) -> Sequence[PageName]:
        """These, up to the first that is not to be looked for below."""
        if self._below:
            for index, name in enumerate(names):
                if name in self._below:
                    return names[:index]
        return names

    # Pages ---------------------------------------------------------------------------------

    def may_name(self, table: PageTable, page: PageId, name: PageName) -> bool:
        """Whether a page, which follows the table's last sealed one, may get this name."""
        if self.is_ghost(page) or (page in self._suspects and name in self._barred):
            return False
        return not table.names or table.pages[table.sealed - 1] not in self._ghosts

    def is_ghost(self, page: PageId) -> bool:
        """Whether an owned page has lost its name."""
        return page in self._ghosts

    def copied(self, source: PageId, target: PageId) -> None:
        """A page that is being filled has a copy, which is filled on."""
        if source in self._suspects:
            self._suspects.add(target)

    def settled(self, page: PageId) -> None:
        """A page has its name, or nobody fills it any more."""
        if self._suspects:
            self._suspects.discard(page)
            if not self._suspects:
                self._barred.clear()

    def let_go(self, page: PageId) -> bool:
        """A page has no owner any more, and is CACHED: whether it was a ghost. Then it is free."""
        if page not in self._ghosts:
            return False
        self._ghosts.remove(page)
        self._pool.evict(page)
        return True

    def gave_up(self, page: PageId) -> bool:
        """A page was cut off by its only owner, so that it has no name any more: whether it was a
        ghost, and had none."""
        was = page in self._ghosts
        self._ghosts.discard(page)
        return was

    def end_load(self, load: Load, good: int) -> int:
        """A load has ended: how many of the first `good` pages may be named."""
        if load.above and load.table.pages[load.above - 1] in self._ghosts:
            good = 0
        for index, (page, name) in enumerate(zip(load.pages, load.names, strict=True)):
            if page in self._suspects and name in self._barred:
                good = min(good, index)
        for page in load.pages:
            self.settled(page)
        return good

    def check(self) -> None:
        """Every invariant. For tests."""
        named = self._index.pages()
        for page in self._ghosts:
            assert page not in named, "a ghost with a name"
            assert self._pool.state(page) in (PageState.SEALED, PageState.NAMED_LEAVING)
        filling = (PageState.OPEN, PageState.LOADING)
        assert all(self._pool.state(page) in filling for page in self._suspects)
        assert bool(self._barred) <= bool(self._suspects), "names barred for nobody"
        assert all(count > 0 for count in self._below.values())
