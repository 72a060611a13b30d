"""PrefixIndex: which resident page has which name, as a tree, and which leaf goes first.

It knows names, parents and uses; states and owners are the pool's (`page_pool.py`).

    p is in the index under n   ⇔   page p's name is n
    a page's parent is resident as long as the page is

Eviction takes leaves only, so parents outlive children and whatever is resident can be found from
the root. Which leaf goes first is a policy's word (`eviction.py`), kept in order by an
`EvictionOrder`, which also knows the shares of tenants and leases. Ticks come from one counter;
when a sequence is released its last page gets the smallest, so that a chain dies from its end
where a policy makes no difference.

A page that was computed ahead of any request (*drafted*) goes before all others, until a request
has adopted it. Whoever adopts a page has adopted its parents, so a drafted page has drafted
children only, and the leaves that go first are never in the way of others.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from chatserve.cache.eviction import DEFAULT_POLICY, EvictionPolicy, PageUse, UseMemory
from chatserve.cache.eviction_order import EvictionOrder, Tenant
from chatserve.cache.page_pool import PageId
from chatserve.cache.sharing import Sharing
from prefix_store.names import PageName

REMEMBERED_SLOTS = 65_536  # uses of pages that are gone: 256 KiB
TOKEN_BYTES = 4  # token ids are int32
AGAIN = 0.25  # of an age: until a page so old that could not go is looked at again
LIKE_MOST = 32  # pages that are compared to say where a prompt first differs


class Namespace(NamedTuple):
    """Whose pages they are: the tenant in whose share they count, and what stands above the first
    page of each chain."""

    tenant: Tenant = ""
    root: bytes = b""


NOWHERE = Namespace()


@dataclass(slots=True)
class _Entry:
    page: PageId
    name: PageName
    parent: PageName | None
    tokens: bytes
    tenant: Tenant
    sealed: int
    run: int
    uses: int
    children: int = 0
    used: int = 0
    seconds: float = 0.0
    idle: bool = False  # nobody owns the page: it may be evicted once it has no children
    drafted: bool = False  # computed ahead, and no request has adopted it
    awaited: bool = False  # brought up for a request that is still to adopt it
    root: bytes = b""  # of a namespace's first page: what stands above it
    child: "_Entry | None" = None  # the last named of those that continue it
    older: "_Entry | None" = None  # beside it, under the same parent
    newer: "_Entry | None" = None

    @property
    def evictable(self) -> bool:
        return self.idle and not self.children


class PrefixIndex:
    """Names of resident pages. Raises nothing: a broken invariant is an AssertionError."""

    def __init__(
        self,
        *,
        eviction: EvictionPolicy = DEFAULT_POLICY,
        shares: Mapping[Tenant, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
        remembered: int = REMEMBERED_SLOTS,
    ) -> None:
        """shares: pages guaranteed to tenants. clock: seconds. remembered: slots for the uses of
        pages that are gone (`UseMemory`)."""
        self._by_name: dict[PageName, _Entry] = {}
        self._by_page: dict[PageId, _Entry] = {}
        self._policy = eviction
        self._order = EvictionOrder(shares=shares, clock=clock)
        self._clock = clock
        self._gone = UseMemory(remembered)
        self._firsts: dict[bytes, _Entry] = {}  # by root, the last named
        self.sharing = Sharing()
        self._tick = 0
        self._drafted = 0

    def __len__(self) -> int:
        return len(self._by_name)

    @property
    def drafted(self) -> int:
        """Resident pages that were computed ahead and not adopted since."""
        return self._drafted

    @property
    def leaves(self) -> int:
        """Pages of which each could be the next to be evicted."""
        return len(self._order)

    def is_drafted(self, page: PageId) -> bool:
        """Whether a named page is one of those."""
        return self._by_page[page].drafted

    def find(self, name: PageName, tokens: bytes) -> PageId | None:
        """The page of that name, if its token ids (int32 bytes) are these."""
        entry = self._by_name.get(name)
        return entry.page if entry is not None and entry.tokens == tokens else None

    def holds(self, name: PageName) -> bool:
        """Whether a page of that name is resident, whatever its tokens."""
        return name in self._by_name

    def page(self, name: PageName) -> PageId | None:
        """The page of that name, whatever its tokens."""
        entry = self._by_name.get(name)
        return None if entry is None else entry.page

    def name(self, page: PageId) -> PageName | None:
        """The page's name, if it has one."""
        entry = self._by_page.get(page)
        return None if entry is None else entry.name

    def add(
        self,
        page: PageId,
        name: PageName,
        parent: PageName | None,
        tokens: bytes,
        space: Namespace = NOWHERE,
        *,
        drafted: bool = False,
        loaded: bool = False,
    ) -> None:
        """Name an owned page. Its parent is resident, or None for a namespace's first page.

        loaded: brought up from below, so it was used before, and who had it brought up adopts it.
        """
        assert name not in self._by_name, "two pages of one name"
        assert page not in self._by_page, "two names for one page"
        run = len(tokens) // TOKEN_BYTES
        above = None
        if parent is not None:
            above = self._by_name[parent]
            if above.evictable:
                self._order.withdraw(above.page)
            above.children += 1
            if above.uses <= 1:  # the parent is new as well
                run += above.run
        self._tick += 1
        entry = _Entry(
            page=page,
            name=name,
            parent=parent,
            tokens=tokens,
            tenant=space.tenant,
            sealed=self._tick,
            run=run,
            uses=max(self._gone.recall(name), loaded) + (not drafted),
            drafted=drafted,
            awaited=loaded and not drafted,
            root=space.root,
        )
        self._link(entry)
        self._drafted += drafted
        self._by_name[name] = entry
        self._by_page[page] = entry
        self.sharing.named(page, None if above is None else above.page, self._tick)
        self._order.enter(space.tenant)

    def remove(self, page: PageId) -> None:
        """Forget a page's name. It has no resident children."""
        entry = self._by_page.pop(page)
        assert entry.children == 0, "a parent must outlive its children"
        del self._by_name[entry.name]
        self.sharing.nameless(page)
        self._drafted -= entry.drafted
        self._order.leave(page, entry.tenant)
        self._gone.remember(entry.name, entry.uses)
        self._unlink(entry)
        if entry.parent is not None:
            above = self._by_name[entry.parent]
            above.children -= 1
            if above.evictable:
                self._offer(above)

    def parent(self, page: PageId) -> PageId | None:
        """The page that a named page follows; None for a namespace's first."""
        name = self._by_page[page].parent
        return None if name is None else self._by_name[name].page

    def family(self, names: Collection[PageName]) -> list[PageId]:
        """The resident pages of these names and all that continue them, children first.

        O(names) where nothing else continues them, else O(pages).
        """
        found = {name: self._by_name[name] for name in names if name in self._by_name}
        inside = Counter(entry.parent for entry in found.values())
        if any(entry.children != inside[name] for name, entry in found.items()):
            # In the order of their naming: parents before children.
            for name, entry in self._by_name.items():
                if name in found or entry.parent in found:
                    found[name] = entry
        entries = sorted(found.values(), key=lambda entry: entry.sealed, reverse=True)
        return [entry.page for entry in entries]

    def has_children(self, page: PageId) -> bool:
        """Whether a named page has resident children."""
        return self._by_page[page].children > 0

    def was_here(self, name: PageName) -> bool:
        """Whether a page of this name was resident and went, as far as that is remembered."""
        return self._gone.recall(name) > 0

    def likeness(self, parent: PageName | None, space: Namespace, tokens: bytes) -> int:
        """With how many of these tokens (int32 bytes) the tenant's resident pages begin that follow
        the same parent (for None: the same root). Looks at the last of them."""
        above = None if parent is None else self._by_name.get(parent)
        entry = self._firsts.get(space.root) if parent is None else above and above.child
        most = 0
        for _ in range(LIKE_MOST):
            if entry is None:
                break
            if entry.tenant == space.tenant:
                most = max(most, _common(entry.tokens, tokens))
            entry = entry.older
        return most

    def set_idle(self, page: PageId) -> None:
        """The page has no owner any more; this is its last use so far."""
        entry = self._by_page[page]
        self._tick += 1
        entry.used = self._tick
        entry.seconds = self._clock()
        entry.idle = True
        if entry.evictable:
            self._offer(entry)

    def set_owned(self, page: PageId) -> None:
        """The page has an owner again."""
        entry = self._by_page[page]
        if entry.evictable:
            self._order.withdraw(page)
        entry.idle = False

    def keep(self, page: PageId) -> bool:
        """A request has adopted the page, which counts as a use. Returns whether it was a drafted
        one until now."""
        entry = self._by_page[page]
        was, entry.drafted = entry.drafted, False
        self._drafted -= was
        entry.uses += not entry.awaited  # it counted when the page was named
        entry.awaited = False
        if entry.evictable:
            self._offer(entry)
        return was

    def found(self, names: Iterable[PageName]) -> None:
        """A request was answered with the resident pages of these names."""
        by_name = self._by_name
        self.sharing.found([by_name[name].page for name in names])

    def names(self, pages: Iterable[PageId]) -> list[PageName]:
        """Of these named pages."""
        return [entry.name for entry in map(self._by_page.__getitem__, pages)]

    def tenant(self, page: PageId) -> Tenant:
        """In whose share a named page counts."""
        return self._by_page[page].tenant

    def lease(self, page: PageId, until: float) -> None:
        """Others go before this named page until then (seconds of the clock), however long ago its
        last use is; the lease ends by itself, or with a time that is over. Its parents outlive it
        anyway; its children need leases of their own. It is no pin: when every evictable page is
        leased, the one whose lease ends first goes."""
        assert page in self._by_page, "a lease on a page without a name"
        self._order.lease(page, until)

    def lease_names(self, names: Collection[PageName], seconds: float) -> int:
        """Lease the resident pages of these names for so long, in place of any leases that they
        have; 0 seconds end those. Returns how many pages those are. O(names)."""
        until = self._clock() + seconds
        pages = self._resident(names)
        for entry in pages:
            self._order.lease(entry.page, until)
        return len(pages)

    def hold_names(self, names: Collection[PageName], seconds: float, *, most: int) -> None:
        """The same for a courtesy: it shortens no lease, passes over drafted pages, and stops where
        `most` pages of all have leases."""
        until, room = self._clock() + seconds, most - self._order.leased
        for entry in self._resident(names):
            before = self._order.lease_of(entry.page)
            new = before == -math.inf
            if not entry.drafted and before < until and (room > 0 or not new):
                self._order.lease(entry.page, until)
                room -= new

    @property
    def leased(self) -> int:
        """Named pages whose lease has not ended."""
        return self._order.leased

    def leased_pages(self) -> list[PageId]:
        """Which those are, each once. O(leased)."""
        return self._order.leased_pages()

    def _resident(self, names: Collection[PageName]) -> list[_Entry]:
        """The pages of these names, children first."""
        found = [self._by_name[name] for name in set(names) if name in self._by_name]
        return sorted(found, key=lambda entry: entry.sealed, reverse=True)

    def resident(self, names: Collection[PageName]) -> list[PageId]:
        """The pages of these names, children first."""
        return [entry.page for entry in self._resident(names)]

    def pages_of(self, tenant: Tenant) -> int:
        """How many named pages a tenant has."""
        return self._order.pages_of(tenant)

    def next_victim(self) -> PageId | None:
        """The idle leaf to evict first, by the module's order; None where there is none. Changes
        nothing."""
        return self._order.first()

    def stale(self, seconds: float) -> PageId | None:
        """The idle leaf without a lease that was used longest ago, if that is so long ago; the
        order of eviction has no say. None where there is none."""
        return self._order.oldest(self._clock() - seconds)

    def pass_over(self, page: PageId, seconds: float) -> None:
        """What `stale` has just said must stay: it says so again in `seconds` * AGAIN, so that it
        is in nobody's way until then."""
        self._order.pass_over(page, self._clock() - seconds * (1 - AGAIN))

    def check(self) -> None:
        """Every invariant, in O(pages). For tests."""
        assert len(self._by_name) == len(self._by_page)
        children: dict[PageName, int] = {}
        tenants: dict[Tenant, int] = {}
        for name, entry in self._by_name.items():
            assert entry.name == name
            assert self._by_page[entry.page] is entry
            self._check_links(entry)
            above = None if entry.parent is None else self._by_name[entry.parent].page
            self.sharing.check(entry.page, above)
            tenants[entry.tenant] = tenants.get(entry.tenant, 0) + 1
            if entry.parent is not None:
                assert entry.parent in self._by_name, "an orphan"
                children[entry.parent] = children.get(entry.parent, 0) + 1
                above = self._by_name[entry.parent]
                assert entry.drafted or not above.drafted, "a drafted page under a kept one"
        for name, entry in self._by_name.items():
            assert entry.children == children.get(name, 0)
        assert self._drafted == sum(entry.drafted for entry in self._by_name.values())
        assert all(self.pages_of(tenant) == count for tenant, count in tenants.items())
        self._order.check()
        evictable = [page for page, entry in self._by_page.items() if entry.evictable]
        assert len(evictable) == len(self._order), "offered and not evictable"
        assert all(page in self._order for page in evictable), "a leaf that nobody would find"

    def pages(self) -> dict[PageId, PageName]:
        """All named pages. For tests and for pictures of the cache."""
        return {page: entry.name for page, entry in self._by_page.items()}

    def _first(self, entry: _Entry) -> _Entry | None:
        """The last named of those under the entry's parent."""
        if entry.parent is None:
            return self._firsts.get(entry.root)
        return self._by_name[entry.parent].child

    def _set_first(self, entry: _Entry, first: _Entry | None) -> None:
        if entry.parent is not None:
            self._by_name[entry.parent].child = first
        elif first is None:
            del self._firsts[entry.root]
        else:
            self._firsts[entry.root] = first

    def _link(self, entry: _Entry) -> None:
        entry.older = self._first(entry)
        if entry.older is not None:
            entry.older.newer = entry
        self._set_first(entry, entry)

    def _unlink(self, entry: _Entry) -> None:
        if entry.newer is None:
            self._set_first(entry, entry.older)
        else:
            entry.newer.older = entry.older
        if entry.older is not None:
            entry.older.newer = entry.newer
        entry.older = entry.newer = None

    def _check_links(self, entry: _Entry) -> None:
        assert (entry.newer is None) == (self._first(entry) is entry), "beside nobody"
        assert entry.newer is None or entry.newer.older is entry
        assert entry.older is None or entry.older.newer is entry
        beside = entry.older
        assert beside is None or beside.parent == entry.parent, "beside a stranger"
        if beside is not None and entry.parent is None:
            assert beside.root == entry.root, "beside a stranger's first page"

    def _offer(self, leaf: _Entry) -> None:
        """The leaf may go, in the place that the policy gives it."""
        use = PageUse(leaf.sealed, leaf.used, leaf.seconds, leaf.uses, leaf.run)
        self._order.offer(
            leaf.page,
            self._policy.place(use),
            tick=leaf.used,
            tenant=leaf.tenant,
            early=leaf.drafted,
            used_at=leaf.seconds,
        )


def _common(first: bytes, second: bytes) -> int:
    """How many token ids both begin with."""
    different = int.from_bytes(first, "little") ^ int.from_bytes(second, "little")
    if not different:
        return min(len(first), len(second)) // TOKEN_BYTES
    lowest_bit = (different & -different).bit_length() - 1
    return lowest_bit // (8 * TOKEN_BYTES)
