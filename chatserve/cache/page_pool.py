"""PagePool: the device's pages, their states and their owners.

It knows ids and counts, nothing of names (`prefix_index.py`) or of what a page holds.

    FREE ──allocate──▶ OPEN ──seal──▶ SEALED ──drop──▶ CACHED ──evict──▶ FREE
      │                 │ ▲             │ ▲ ▲             │
      │                 │ └──truncate───┘ │ └───retain────┘
      │                 └──drop──▶ FREE   │
      └──load──▶ LOADING ──loaded─────────┘      OPEN, SEALED ──drop while a step may still
                    └──load_failed──▶ FREE       touch it──▶ LEAVING ──settle──▶ FREE or CACHED

A page has a name exactly in SEALED, CACHED, and in LEAVING when it came from SEALED (NAMED_LEAVING
below: one state on the outside, two in the table so that the table alone says where it goes).
A page has owners exactly in OPEN, LOADING and SEALED. LOADING belongs to an I/O thread until it
reports. The sum over all states is the number of pages, always.

A page released while a step in flight touches it is LEAVING until that step's commit: `release`
is told the last step that may touch the owner's pages and `settle` which step has committed.
"""

from array import array
from dataclasses import dataclass
from enum import IntEnum

PageId = int


class PageState(IntEnum):
    """What a page is to the pool. See the drawing above."""

    FREE = 0
    OPEN = 1
    LOADING = 2
    SEALED = 3
    CACHED = 4
    LEAVING = 5
    NAMED_LEAVING = 6


class PageEvent(IntEnum):
    """What can happen to a page."""

    ALLOCATE = 0
    LOAD = 1
    LOADED = 2
    LOAD_FAILED = 3
    SEAL = 4
    TRUNCATE = 5
    DROP = 6
    DROP_BUSY = 7
    RETAIN = 8
    SETTLE = 9
    EVICT = 10


_S, _E = PageState, PageEvent

TRANSITIONS: dict[tuple[PageState, PageEvent], PageState] = {
    (_S.FREE, _E.ALLOCATE): _S.OPEN,
    (_S.FREE, _E.LOAD): _S.LOADING,
    (_S.LOADING, _E.LOADED): _S.SEALED,
    (_S.LOADING, _E.LOAD_FAILED): _S.FREE,
    (_S.OPEN, _E.SEAL): _S.SEALED,
    (_S.OPEN, _E.DROP): _S.FREE,
    (_S.OPEN, _E.DROP_BUSY): _S.LEAVING,
    (_S.SEALED, _E.TRUNCATE): _S.OPEN,
    (_S.SEALED, _E.DROP): _S.CACHED,
    (_S.SEALED, _E.DROP_BUSY): _S.NAMED_LEAVING,
    (_S.CACHED, _E.RETAIN): _S.SEALED,
    (_S.CACHED, _E.EVICT): _S.FREE,
    (_S.LEAVING, _E.SETTLE): _S.FREE,
    (_S.NAMED_LEAVING, _E.SETTLE): _S.CACHED,
    (_S.NAMED_LEAVING, _E.RETAIN): _S.SEALED,
}

OWNED = frozenset({_S.OPEN, _S.LOADING, _S.SEALED})
NAMED = frozenset({_S.SEALED, _S.CACHED, _S.NAMED_LEAVING})


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatistics:
    """Pages by state; `total` is their sum. `references` counts owners over all pages."""

    total: int
    free: int
    open: int
    loading: int
    sealed: int
    cached: int
    leaving: int
    references: int


class PagePool:
    """Owns page states and reference counts. All operations are O(1) but `check` and `settle`."""

    def __init__(self, pages: int) -> None:
        assert pages > 0, "a pool has at least one page"
        self.total = pages
        self._state = bytearray(pages)
        self._references = array("i", bytes(4 * pages))
        self._busy_until = array("q", bytes(8 * pages))
        self._free: list[PageId] = list(range(pages - 1, -1, -1))
        self._counts = [0] * len(PageState)
        self._counts[PageState.FREE] = pages
        self._leaving: dict[int, list[PageId]] = {}
        self._settled_step = 0
        self._reference_sum = 0

    @property
    def free(self) -> int:
        """Pages that can be allocated at once."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Named pages without an owner: they can be evicted, children first."""
        return self._counts[PageState.CACHED]

    @property
    def leaving(self) -> int:
        """Pages that become free or cached when a step in flight commits."""
        return self._counts[PageState.LEAVING] + self._counts[PageState.NAMED_LEAVING]

    def state(self, page: PageId) -> PageState:
        """The page's state."""
        return PageState(self._state[page])

    def pages_in(self, state: PageState) -> list[PageId]:
        """All pages of a state, in O(pages): microseconds for thousands."""
        if not self._counts[state]:
            return []
        found: list[PageId] = []
        page = self._state.find(state)
        while page >= 0:
            found.append(page)
            page = self._state.find(state, page + 1)
        return found

    def references(self, page: PageId) -> int:
        """How many owners the page has."""
        return self._references[page]

    def states(self) -> bytes:
        """A copy of all states, a byte a page: `PageState` numbers."""
        return bytes(self._state)

    def owners(self) -> "array[int]":
        """A copy of how many owners each page has: C ints."""
        return self._references[:]

    def allocate(self) -> PageId:
        """Take a free page for one owner who will write to it."""
        assert self._free, "allocate without a free page: the caller makes room first"
        page = self._free.pop()
        self._move(page, PageEvent.ALLOCATE)
        self._set_references(page, 1)
        return page

    def load(self) -> PageId:
        """Take a free page for an I/O thread that will fill it with a named page's bytes."""
        assert self._free, "load without a free page: the caller makes room first"
        page = self._free.pop()
        self._move(page, PageEvent.LOAD)
        self._set_references(page, 1)
        return page

    def loaded(self, page: PageId) -> None:
        """The bytes are there and checked; the page belongs to the owner that waited for it."""
        self._move(page, PageEvent.LOADED)

    def load_failed(self, page: PageId) -> None:
        """The bytes did not come; the page never had a name."""
        self._move(page, PageEvent.LOAD_FAILED)
        self._set_references(page, 0)
        self._free.append(page)

    def retain(self, page: PageId) -> None:
        """Add an owner. A cached or leaving page must have a name to be found by."""
        if self._references[page] == 0:
            self._move(page, PageEvent.RETAIN)
        self._set_references(page, self._references[page] + 1)

    def seal(self, page: PageId) -> None:
        """The page is full and has a name now; nobody writes to it any more."""
        self._move(page, PageEvent.SEAL)

    def truncate(self, page: PageId) -> None:
        """The page lost its name; it must have one owner."""
        assert self._references[page] == 1, "a shared page keeps its name"
        self._move(page, PageEvent.TRUNCATE)

    def release(self, page: PageId, busy_until: int) -> PageState:
        """Take an owner away and say what the page is now.

        busy_until: the last step, in flight or not, that may touch the page for this owner.
        """
        count = self._references[page]
        assert count > 0, "release of a page that nobody owns"
        if busy_until > self._busy_until[page]:
            self._busy_until[page] = busy_until
        if count > 1:
            self._set_references(page, count - 1)
            return PageState(self._state[page])
        busy = self._busy_until[page] > self._settled_step
        state = self._move(page, PageEvent.DROP_BUSY if busy else PageEvent.DROP)
        self._set_references(page, 0)
        if busy:
            self._leaving.setdefault(self._busy_until[page], []).append(page)
        elif state is PageState.FREE:
            self._free.append(page)
        return state

    def evict(self, page: PageId) -> None:
        """Free a cached page, whose name the caller has already forgotten."""
        self._move(page, PageEvent.EVICT)
        self._free.append(page)

    def settle(self, step: int) -> list[PageId]:
        """Step `step` and all before have committed. Returns the pages that became CACHED."""
        assert step >= self._settled_step, "steps commit in order"
        self._settled_step = step
        cached: list[PageId] = []
        for due in [number for number in self._leaving if number <= step]:
            for page in self._leaving.pop(due):
                if self._state[page] < PageState.LEAVING or self._busy_until[page] != due:
                    continue  # retained again since, or released again until a later step
                if self._move(page, PageEvent.SETTLE) is PageState.FREE:
                    self._free.append(page)
                else:
                    cached.append(page)
        return cached

    def statistics(self) -> PoolStatistics:
        """A frozen count of everything."""
        counts = self._counts
        return PoolStatistics(
            total=self.total,
            free=counts[PageState.FREE],
            open=counts[PageState.OPEN],
            loading=counts[PageState.LOADING],
            sealed=counts[PageState.SEALED],
            cached=counts[PageState.CACHED],
            leaving=counts[PageState.LEAVING] + counts[PageState.NAMED_LEAVING],
            references=self._reference_sum,
        )

    def balanced(self) -> bool:
        """The cheap subset of `check`, for every step in production."""
        return sum(self._counts) == self.total and self._counts[0] == len(self._free)

    def check(self) -> None:
        """Every invariant, in O(pages). For tests."""
        assert len(self._free) == len(set(self._free)), "a page is free twice"
        counts = [0] * len(PageState)
        for page in range(self.total):
            state = PageState(self._state[page])
            counts[state] += 1
            assert (self._references[page] > 0) == (state in OWNED), (page, state)
        assert counts == self._counts, (counts, self._counts)
        assert all(self._state[page] == PageState.FREE for page in self._free)
        assert counts[PageState.FREE] == len(self._free)
        assert self._reference_sum == sum(self._references)

    def _move(self, page: PageId, event: PageEvent) -> PageState:
        before = PageState(self._state[page])
        after = TRANSITIONS.get((before, event))
        assert after is not None, f"page {page}: {event.name} in state {before.name}"
        self._state[page] = after
        self._counts[before] -= 1
        self._counts[after] += 1
        return after

    def _set_references(self, page: PageId, count: int) -> None:
        self._reference_sum += count - self._references[page]
        self._references[page] = count
