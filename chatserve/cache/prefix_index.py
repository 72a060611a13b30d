"""PrefixIndex: which resident page has which name, as a tree, and which leaf goes first.

It knows names, parents and last uses; states and owners are the pool's (`page_pool.py`).

    p is in the index under n   ⇔   page p's name is n
    a page's parent is resident as long as the page is

Eviction takes leaves only, so parents outlive children and whatever is resident can be found from
the root. Among the leaves the least recently used goes first. Ticks come from one counter;
when a sequence is released its last page gets the smallest, so that a chain dies from its end.

A page that was computed ahead of any request (*drafted*) goes before all others, until a request
has adopted it. Whoever adopts a page has adopted its parents, so a drafted page has drafted
children only, and the leaves that go first are never in the way of others.
"""

from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from chatserve.cache.page_pool import PageId
from prefix_store.names import PageName


@dataclass(slots=True)
class _Entry:
    page: PageId
    name: PageName
    parent: PageName | None
    tokens: bytes
    children: int = 0
    used: int = 0
    idle: bool = False  # nobody owns the page: it may be evicted once it has no children
    drafted: bool = False  # computed ahead, and no request has adopted it

    @property
    def place(self) -> tuple[bool, int, PageId]:
        """Its place in the order of eviction."""
        return (not self.drafted, self.used, self.page)


class PrefixIndex:
    """Names of resident pages. Raises nothing: a broken invariant is an AssertionError."""

    def __init__(self) -> None:
        self._by_name: dict[PageName, _Entry] = {}
        self._by_page: dict[PageId, _Entry] = {}
        # A heap of (kept, used, page); stale entries are skipped.
        self._leaves: list[tuple[bool, int, PageId]] = []
        self._tick = 0
        self._drafted = 0

    def __len__(self) -> int:
        return len(self._by_name)

    @property
    def drafted(self) -> int:
        """Resident pages that were computed ahead and not adopted since."""
        return self._drafted

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
        *,
        drafted: bool = False,
    ) -> None:
        """Name an owned page. Its parent is resident, or None for a namespace's first page."""
        assert name not in self._by_name, "two pages of one name"
        assert page not in self._by_page, "two names for one page"
        if parent is not None:
            self._by_name[parent].children += 1
        entry = _Entry(page=page, name=name, parent=parent, tokens=tokens, drafted=drafted)
        self._drafted += drafted
        self._by_name[name] = entry
        self._by_page[page] = entry

    def remove(self, page: PageId) -> None:
        """Forget a page's name. It has no resident children."""
        entry = self._by_page.pop(page)
        assert entry.children == 0, "a parent must outlive its children"
        del self._by_name[entry.name]
        self._drafted -= entry.drafted
        if entry.parent is not None:
            above = self._by_name[entry.parent]
            above.children -= 1
            if above.idle and above.children == 0:
                self._push(above)

    def has_children(self, page: PageId) -> bool:
        """Whether a named page has resident children."""
        return self._by_page[page].children > 0

    def set_idle(self, page: PageId) -> None:
        """The page has no owner any more; this is its last use so far."""
        entry = self._by_page[page]
        self._tick += 1
        entry.used = self._tick
        entry.idle = True
        if entry.children == 0:
            self._push(entry)

    def set_owned(self, page: PageId) -> None:
        """The page has an owner again."""
        self._by_page[page].idle = False

    def keep(self, page: PageId) -> bool:
        """A request has adopted the page. Returns whether it was a drafted one until now."""
        entry = self._by_page[page]
        was, entry.drafted = entry.drafted, False
        self._drafted -= was
        return was

    def next_victim(self) -> PageId | None:
        """The idle leaf to evict first, by the module's order; None where there is none. Changes
        nothing."""
        leaves = self._leaves
        while leaves:
            _, used, page = leaves[0]
            entry = self._by_page.get(page)
            if entry is None or not entry.idle or entry.children or entry.used != used:
                heappop(leaves)
                continue
            return page
        return None

    def check(self) -> None:
        """Every invariant, in O(pages). For tests."""
        assert len(self._by_name) == len(self._by_page)
        children: dict[PageName, int] = {}
        for name, entry in self._by_name.items():
            assert entry.name == name
            assert self._by_page[entry.page] is entry
            if entry.parent is not None:
                assert entry.parent in self._by_name, "an orphan"
                children[entry.parent] = children.get(entry.parent, 0) + 1
                above = self._by_name[entry.parent]
                assert entry.drafted or not above.drafted, "a drafted page under a kept one"
        for name, entry in self._by_name.items():
            assert entry.children == children.get(name, 0)
        assert self._drafted == sum(entry.drafted for entry in self._by_name.values())
        live = set(self._leaves)
        for entry in self._by_page.values():
            if entry.idle and entry.children == 0:
                assert entry.place in live, "an evictable leaf that nobody would find"

    def pages(self) -> dict[PageId, PageName]:
        """All named pages. For tests and for pictures of the cache."""
        return {page: entry.name for page, entry in self._by_page.items()}

    def _push(self, leaf: _Entry) -> None:
        """A pool that is never full never looks for victims, so stale entries are swept here."""
        heappush(self._leaves, leaf.place)
        if len(self._leaves) > 2 * len(self._by_page) + 64:
            self._leaves = [
                entry.place for entry in self._by_page.values() if entry.idle and not entry.children
            ]
            heapify(self._leaves)
