"""BlockManager: the one hash-addressed door of the cache floor.

    match    how much of a prefix is resident          (changes nothing)
    adopt    take the resident prefix into a table     (retained before anything is allocated)
    reserve  room for positions about to be written    (whole or not at all; copies on write)
    fork     share a table with another sequence
    seal     name a full page, or adopt its twin
    release  give a table back; truncate first where tokens were cut off
    settle   a step has committed
    extend   room for what is computed ahead of any request
    claims   who computes what now (`claims.py`)
    below    how much more of a prefix the tiers below have; begin_load, end_load: bring it up
    begin_check, end_check   pages that a thread compares with their copies below
    take_unkept, end_keep    copies for the tiers below (`transit.py`)
    forget   names that nobody may find any more (`forgetting.py`)
    lease, hold, evict, flush, retire    which idle pages leave late, or now (`departures.py`)

Theory of operation. A table's sealed pages are named and immutable; only its last, partial page
is written, and only by its only owner: `reserve` orders a PageCopy for any other writer. When a
page fills whose name is resident already (two sequences computed the same thing at once), `seal`
swaps the table over to the resident one and drops the newcomer, so a name has one page.

A release while steps are in flight leaves pages LEAVING until those commit; they are counted as
`coming`, so that nobody is preempted for pages that are on their way anyway.

Pages that were computed ahead (*drafted*) are evicted before all others until a request has adopted
them, so they cost nobody anything but the pages of others that `extend` evicts: those it bounds.
Without caching (`caching=False`) nothing is ever named: the same code, no hits.
"""

from collections.abc import Callable, Collection, Sequence

from chatserve.cache.below import Below
from chatserve.cache.claims import Claims
from chatserve.cache.departures import Departures, Evicted
from chatserve.cache.forgetting import Forgetting
from chatserve.cache.misses import Misses
from chatserve.cache.overview import Overview
from chatserve.cache.owners import Owners
from chatserve.cache.page_pool import NAMED, PageId, PagePool, PageState
from chatserve.cache.page_table import PageCopy, PageTable
from chatserve.cache.prefix_index import PrefixIndex
from chatserve.cache.statistics import CacheCounts, CacheStatistics
from chatserve.cache.transit import Check, Keep, Keeps, Load, Transit
from prefix_store.names import PageName


class BlockManager:
    """Pages of one device under names of one page size. Owned by the event loop.

    below: the tiers below the device, if any. order: makes the index, with its policy of eviction.
    """

    def __init__(
        self,
        *,
        pages: int,
        page_size: int,
        caching: bool = True,
        below: Below | None = None,
        order: Callable[[], PrefixIndex] = PrefixIndex,
    ) -> None:
        assert page_size > 0, "a page has at least one position"
        self.page_size = page_size
        self.pool = PagePool(pages)
        self.claims = Claims()
        self.transit = Transit()
        self._below = below if caching else None
        self._caching = caching
        self._index = order()
        self.forgetting = Forgetting(self.pool, self._index, self.transit, self.claims)
        self._owners = Owners(self.pool, self._index, self.forgetting)
        self.misses = Misses(self._index)
        self.departures = Departures(self.pool, self._index, self.transit, self._below)

    @property
    def _counts(self) -> CacheCounts:
        return self.departures.counts

    # What there is -------------------------------------------------------------------------

    @property
    def available(self) -> int:
        """Pages that can be had now: free ones, and cached ones by eviction."""
        return self.pool.free + self.pool.cached

    @property
    def coming(self) -> int:
        """Pages that will be available when the steps in flight have committed."""
        return self.pool.leaving

    @property
    def caching(self) -> bool:
        """Whether pages are named at all."""
        return self._caching

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many positions."""
        return -(-tokens // self.page_size)

    def match(self, names: Sequence[PageName], tokens: bytes) -> int:
        """How many pages of this prefix are resident. tokens: int32 bytes, at least that many."""
        if not self._caching:
            return 0
        step = 4 * self.page_size
        for index, name in enumerate(names):
            if self._index.find(name, tokens[index * step : (index + 1) * step]) is None:
                return index
        return len(names)

    # Taking and giving back ----------------------------------------------------------------

    def adopt(
        self, table: PageTable, names: Sequence[PageName], tokens: bytes, *, drafting: bool = False
    ) -> int:
        """Retain the resident part of a prefix in an empty table; returns its pages.

        drafting: for no request, so that drafted pages stay drafted.
        """
        assert not table.pages, "a prefix is adopted by an empty table"
        if not self._caching:
            return 0
        step = 4 * self.page_size
        for index, name in enumerate(names):
            page = self._index.find(name, tokens[index * step : (index + 1) * step])
            if page is None:
                break
            self._owners.retain(page)
            if not drafting:
                self._counts.draft_adopted += self._index.keep(page)
                self._want_copy(table, page, name, tokens[index * step : (index + 1) * step])
            table.pages.append(page)
            table.names.append(name)
        return len(table.pages)

    def count_on(self, before: "BlockManager") -> None:
        """Take the place of another one, whose pages are lost: what it counted goes on."""
        self.departures.counts = before._counts
        self.claims.count_on(before.claims)
        self.transit.count_on(before.transit)
        self.forgetting.count_on(before.forgetting)

    def account(self, names: Sequence[PageName], *, prompt_tokens: int, hit_tokens: int) -> None:
        """Book one request's look-up, which found these pages: their copies are as good as used."""
        self._counts.query_tokens += prompt_tokens
        self._counts.hit_tokens += hit_tokens
        self._index.found(names)
        if self._below is not None and names:
            self._below.touch(names)

    def shortage(self, table: PageTable, start: int, end: int) -> int:
        """How many pages too few there are for `reserve` with these positions; 0 or less: none."""
        new = max(0, self.pages_for(end) - len(table))
        return new + len(self._shared(table, start, end)) - self.available

    def reserve(
        self, table: PageTable, start: int, end: int, *, step: int
    ) -> tuple[PageCopy, ...] | None:
        """Make positions start..end writable by this table alone, in the step being planned.

        Returns the copies which that step must do first, or None with nothing changed where there
        are not enough pages.
        """
        shared = self._shared(table, start, end)
        new = max(0, self.pages_for(end) - len(table.pages))
        if not shared and not new:
            return ()
        if not self._make_room(new + len(shared)):
            return None
        copies: list[PageCopy] = []
        for index in shared:
            source, target = table.pages[index], self.pool.allocate()
            assert index >= table.sealed, "a sealed page is never written"
            table.pages[index] = target
            self.forgetting.copied(source, target)
            self._owners.release(source, step)
            copies.append(PageCopy(source, target))
        for _ in range(new):
            table.pages.append(self.pool.allocate())
        self._counts.copies += len(copies)
        return tuple(copies)

    def extend(self, table: PageTable, *, drafts_max: int) -> bool:
        """One more page for what is computed ahead: a free one, or a drafted one's by eviction;
        another's only while there are fewer than `drafts_max` drafted pages. False: none.
        """
        if not self.pool.free:
            victim = self._index.next_victim()
            if victim is None:
                return False
            if not self._index.is_drafted(victim) and self._index.drafted >= drafts_max:
                return False
            self.departures.evict_one()
        table.pages.append(self.pool.allocate())
        return True

    def claim(self, holder: int, names: Sequence[PageName]) -> None:
        """`holder` will compute these names. Nothing to claim where nothing is ever named."""
        if self._caching:
            self.claims.claim(holder, names)

    def fork(self, table: PageTable) -> PageTable:
        """A second table over the same pages, the partial one included."""
        for page in table.pages:
            self._owners.retain(page)
        return table.twin()

    def seal(
        self, table: PageTable, name: PageName, tokens: bytes, *, step: int, drafting: bool = False
    ) -> list[int]:
        """Name the table's first unsealed page, which is full and computed.

        step: the last step in flight that may touch the page. drafting: no request had it computed.
        Returns the followers that waited for it. Where it could not be named, `table.sealed` stays.
        """
        if not self._caching:
            return []
        index = table.sealed
        page = table.pages[index]
        if not self.forgetting.may_name(table, page, name):
            leader = None if drafting else self.claims.leader(name)
            return [] if leader is None else self.claims.drop(leader)
        twin = self._index.find(name, tokens)
        if twin == page:
            pass  # a fork of this table has sealed the shared page already
        elif twin is not None:
            self._owners.retain(twin)
            if not drafting:
                self._counts.draft_adopted += self._index.keep(twin)
            table.pages[index] = twin
            self._owners.release(page, step)
            self._counts.twins += 1
        elif self._index.holds(name):
            return []  # a name with other tokens: the newcomer, and what follows, stay nameless
        else:
            self.pool.seal(page)
            self.forgetting.settled(page)
            self._index.add(page, name, table.last_name, tokens, table.space, drafted=drafting)
            self._counts.sealed += 1
            self._counts.draft_sealed += drafting
            if not drafting:
                self._want_copy(table, page, name, tokens)
        table.names.append(name)
        return self.claims.sealed(name)

    def truncate(self, table: PageTable, tokens: int) -> None:
        """Cut the names (and, where nobody else has them, the pages' names) after `tokens`.

        The pages stay in the table until it is released.
        """
        keep = tokens // self.page_size
        while table.sealed > keep:
            table.names.pop()
            page = table.pages[table.sealed]
            alone = self.pool.references(page) == 1
            if alone and self.forgetting.gave_up(page):
                self.pool.truncate(page)
            elif alone and not self._index.has_children(page):
                self.departures.unname(page)
                self.pool.truncate(page)
                self._counts.truncated += 1

    def release(self, table: PageTable, *, step: int) -> None:
        """Give all pages back. step: the last step in flight that may touch them (0: none)."""
        for page in reversed(table.pages):
            self._owners.release(page, step)
        table.pages = table.pages[:0]
        table.names = []

    def settle(self, step: int) -> None:
        """All steps up to this one have committed."""
        self._owners.settle(self.pool.settle(step))

    def flush(self) -> int:
        """Forget every page that nobody owns. Returns how many."""
        return self.departures.flush()

    def retire(self, seconds: float, most: int) -> int:
        """Evict what nobody used for so long, after up to so many looks (`Departures.retire`)."""
        return self.departures.retire(seconds, most)

    def lease(self, names: Collection[PageName], seconds: float) -> int:
        """Others go before the resident pages of these names, for so long from now; 0 ends leases.
        How many pages those are. A wish and no pin (`eviction_order.py`)."""
        return self._index.lease_names(names, seconds)

    def hold(self, names: Collection[PageName], seconds: float, *, share: float) -> None:
        """The same as a courtesy: it shortens no lease, passes over drafted pages, and stops where
        so many of all pages have leases (share: from 0 to 1)."""
        self._index.hold_names(names, seconds, most=int(share * self.pool.total))

    def evict(self, names: Collection[PageName]) -> Evicted:
        """The idle pages of these names leave the device (`Departures.evict`)."""
        return self.departures.evict(names)

    def resident(self, names: Collection[PageName]) -> int:
        """How many of these names have a page here."""
        return len(self._index.resident(names))

    def forget(self, names: Collection[PageName]) -> list[int]:
        """Nobody finds these names here any more, until they are computed anew: pages that nobody
        owns are free at once, with all that continue them, others on release.

        Returns the followers to wake. What is below: `forgetting.hide_below`.
        """
        return self.forgetting.forget(names)

    # The tiers below -----------------------------------------------------------------------

    def below(self, names: Sequence[PageName], matched: int) -> int:
        """How many pages after the first `matched` of this prefix the tiers below have."""
        wanted = self.forgetting.reach(names[matched:])
        return 0 if self._below is None else self._below.find(wanted)

    def begin_load(
        self,
        holder: int,
        table: PageTable,
        names: Sequence[PageName],
        tokens: bytes,
        *,
        drafting: bool = False,
    ) -> Load | None:
        """Room for the pages of these names and tokens, which follow those of `table`, to be filled
        from below.

        holder: claims the names. The load takes what the table holds, and retains it until it ends,
        so that what arrives has its parents. None with nothing changed where there are not enough
        pages.
        """
        assert len(table) == table.sealed, "a load goes on where the resident part ends"
        if not self._make_room(len(names)):
            return None
        above = len(table)
        taken = PageTable(table.pages, table.names, table.space)
        table.pages, table.names = table.pages[:0], []
        taken.pages.extend(self.pool.load() for _ in range(len(names)))
        wanted = tuple(names)
        load = Load(
            holder=holder,
            table=taken,
            above=above,
            names=wanted,
            tokens=tokens[: 4 * self.page_size * len(names)],
            drafting=drafting,
        )
        self.transit.begin_load(load)
        self.claims.claim(holder, wanted)
        return load

    def end_load(self, load: Load, arrived: Sequence[bool]) -> tuple[int, list[int]]:
        """The I/O thread is done with the pages; arrived: which of them hold what was asked for.

        Names those up to the first that does not, and leaves them to whoever wants them. Returns
        how many, and the followers that waited for them.
        """
        good = self.forgetting.end_load(load, [*arrived, False].index(False))
        table, step = load.table, 4 * self.page_size
        self.transit.end_load(load, good)
        woken: list[int] = []
        kept = table.pages[: load.above]
        parent = table.last_name
        for index, page in enumerate(load.pages):
            name, tokens = load.names[index], load.tokens[index * step : (index + 1) * step]
            twin = self._index.find(name, tokens)
            if index >= good or self._index.holds(name):
                self.pool.load_failed(page)
                if twin is not None and not load.drafting:  # a draft has computed it meanwhile
                    self._counts.draft_adopted += self._index.keep(twin)
            else:
                self.pool.loaded(page)
                space, drafting = table.space, load.drafting
                self._index.add(page, name, parent, tokens, space, drafted=drafting, loaded=True)
                kept.append(page)
                woken += self.claims.sealed(name)
            parent = name
        table.pages = kept
        woken += self.claims.drop(load.holder)
        self.release(table, step=0)
        return good, woken

    def take_unkept(self, most: int) -> Keeps | None:
        """Up to so many pages that no tier below has, oldest first, retained until `end_keep`; None
        where there are none."""
        taken: list[Keep] = []
        held: dict[PageId, None] = {}
        while self._below is not None and len(taken) < most:
            keep = self.transit.next_unkept()
            if keep is None:
                break
            if not self._below.contains(keep.name):
                self._owners.retain_chain(held, keep.page)
                taken.append(keep)
        return self.transit.begin_keep(taken, tuple(held)) if taken else None

    def end_keep(self, keeps: Keeps, stored: Sequence[bool]) -> None:
        """The I/O thread has read these pages; stored: which of them have a copy now."""
        self.transit.end_keep(keeps, sum(stored))
        for page in keeps.held:
            self._owners.release(page, 0)

    def begin_check(self, names: Sequence[PageName]) -> Check:
        """Retain the pages of these names that are here, so that a thread may read them until
        `end_check`."""
        pages = tuple(map(self._index.page, names))
        held: dict[PageId, None] = {}
        for page in pages:
            if page is not None:
                self._owners.retain_chain(held, page)
        return self.transit.begin_check(pages, tuple(held))

    def end_check(self, check: Check) -> None:
        """The thread has read them."""
        self.transit.end_check(check)
        for page in check.held:
            self._owners.release(page, 0)

    # Looking at it -------------------------------------------------------------------------

    def overview(self) -> Overview:
        """The pages as an admin looks at them, now."""
        return Overview(self.pool, self._index, self.transit)

    def statistics(self) -> CacheStatistics:
        """A frozen picture."""
        return self._counts.picture(
            self.page_size,
            pages=self.pool.statistics(),
            claims=self.claims.statistics(),
            transit=self.transit.statistics(),
            named=len(self._index),
            drafted=self._index.drafted,
            leased=self._index.leased,
            forgotten=self.forgetting.total,
            ghosts=self.forgetting.ghosts,
        )

    def check(self) -> None:
        """Every invariant of the floor, in O(pages). For tests."""
        self.pool.check()
        self._index.check()
        self.claims.check()
        self.forgetting.check()
        named = self._index.pages()
        self.transit.check(named)
        for page, count in self.transit.owners().items():
            assert self.pool.references(page) >= count, "a page in transit without an owner"
        for page in range(self.pool.total):
            state = self.pool.state(page)
            has_name = state in NAMED and not self.forgetting.is_ghost(page)
            assert has_name == (page in named), (page, state)
        victim = self._index.next_victim()
        assert victim is None or self.pool.state(victim) is PageState.CACHED
        assert victim is not None or not self.pool.cached, "cached pages that cannot be evicted"

    # Inside --------------------------------------------------------------------------------

    def _shared(self, table: PageTable, start: int, end: int) -> list[int]:
        """Indices of pages under these positions that somebody else owns too."""
        pages, references = table.pages, self.pool.references
        shared: list[int] = []
        for index in range(start // self.page_size, min(len(pages), self.pages_for(end))):
            if references(pages[index]) > 1:
                shared.append(index)
        return shared

    def _make_room(self, pages: int) -> bool:
        if pages > self.available:
            return False
        while self.pool.free < pages:
            if not self.departures.evict_one():
                return False
        return True

    def _want_copy(self, table: PageTable, page: PageId, name: PageName, tokens: bytes) -> None:
        """Before the page is appended to the table's names: its copy below, if it has none."""
        if self._below is not None and not self._below.contains(name):
            position = len(table.names)
            self.transit.want(Keep(page, name, table.last_name, position, tokens, table.space))
