"""Sharing: which prefixes are used by more than one, and what that saves, as a tree of runs.

    pages by parent              runs (a radix tree)
    a ─ b ─ c ─ d ─ e            [a b c] ─┬─ [d e]
              └ f ─ g                     └─ [f g]

A page is *shared* where a request found it (a *hit*), or where two or more own it now. What follows
the same shared page and is shared too are its branches; pages with one branch are one *run* with
it. Whoever found a page found those before it, so shared pages make trees from the roots on.

What is saved: a hit is one page that was not computed again, so tokens saved = hits * page size.
A page that goes takes its hits with it.

It knows numbers of pages alone. `Sharing` keeps a parent, a time and a count a page. Who looks
copies these in one piece, between two events of the loop that owns the pool (a `Picture`); the rest
is arithmetic on whole arrays that any thread can do. Its work is bounded: of more than LOOKED_AT
shared pages the tree is that of those which were found most often, the eldest of equals first; with
a page those before it are among them. For the times see `docs/architecture.md`.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chatserve.cache.page_pool import PageId

FIRST = -1  # the parent of a namespace's first page
NAMELESS = -2  # the parent of what is no named page
LOOKED_AT = 8192
COUNTED_MOST = 65_535  # hits: who was found more often is as good as one found so often

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SharedRun:
    """Pages that follow each other, first to last, with nothing shared between them branching off.

    above: the place of the run that it continues in the list it is told in, which is before its
    own; None for the first of a namespace. times, hits, owners: of each page. followers: how many
    resident pages follow each, shared or not. hits_under: of its pages, and of all shared ones that
    continue them.
    """

    above: int | None
    pages: tuple[PageId, ...]
    times: tuple[int, ...]
    hits: tuple[int, ...]
    owners: tuple[int, ...]
    followers: tuple[int, ...]
    hits_under: int


@dataclass(frozen=True, slots=True)
class SharedRuns:
    """Those with the most hits under them, the most first. pages_total, hits_total: of all shared
    pages. more: whether there are others than these runs."""

    runs: tuple[SharedRun, ...]
    pages_total: int
    hits_total: int
    more: bool


class Sharing:
    """Parents of named pages, and how often requests found them. All O(1) but `picture`; room grows
    by doubling."""

    def __init__(self) -> None:
        self._parents = array("i")
        self._times = array("q")
        self._hits = array("q")

    def named(self, page: PageId, parent: PageId | None, time: int) -> None:
        """A page has a name now, and follows that one; None: it is the first. time: another one at
        each naming, and later ones are greater."""
        if page >= len(self._parents):
            self._grow(page)
        self._parents[page] = FIRST if parent is None else parent
        self._times[page] = time
        self._hits[page] = 0

    def nameless(self, page: PageId) -> None:
        """A named page lost its name."""
        self._parents[page] = NAMELESS

    def found(self, pages: Iterable[PageId]) -> None:
        """A request found these named pages."""
        hits = self._hits
        for page in pages:
            hits[page] += 1

    def still_named(self, page: PageId, time: int) -> bool:
        """Whether the page has the name that it had at that time."""
        return self._times[page] == time and self._parents[page] != NAMELESS

    def picture(self, owners: "array[int]") -> "Picture":
        """A copy of it all. owners: of each page of the pool, C ints; not changed from now on."""
        known = min(len(owners), len(self._parents))  # no more pages were ever named
        return Picture(
            np.frombuffer(self._parents, dtype=np.intc)[:known].astype(np.int64),
            np.frombuffer(self._times, dtype=np.int64)[:known].copy(),
            np.frombuffer(self._hits, dtype=np.int64)[:known].copy(),
            np.frombuffer(owners, dtype=np.intc)[:known],
        )

    def check(self, page: PageId, parent: PageId | None) -> None:
        """A named page has this parent. For tests."""
        assert self._parents[page] == (FIRST if parent is None else parent), "another parent"

    def _grow(self, page: PageId) -> None:
        more = max(page + 1, 2 * len(self._parents)) - len(self._parents)
        self._parents.extend(array("i", [NAMELESS]) * more)
        self._times.extend(array("q", [0]) * more)
        self._hits.extend(array("q", [0]) * more)


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """Of one moment, one number a page each: parent, time of its naming, hits, owners."""

    parents: Numbers
    times: Numbers
    hits: Numbers
    owners: npt.NDArray[np.intc]

    def runs(self, most: int) -> SharedRuns:
        """Who shares what. most: runs at the most. For any thread."""
        shared = (self.parents > NAMELESS) & ((self.hits > 0) | (self.owners > 1))
        pages = np.flatnonzero(shared)
        total, found = len(pages), self.hits[pages]
        if not total:
            return SharedRuns((), 0, 0, more=False)
        if total > LOOKED_AT:
            pages = _most_found(pages, found, self.times)
        runs, more = _Tree(self, pages).runs(most)
        return SharedRuns(runs, total, int(found.sum()), more=more or total > LOOKED_AT)


def _most_found(pages: Numbers, found: Numbers, times: Numbers) -> Numbers:
    """LOOKED_AT of more pages: those found most often, of equals those named first."""
    counted = np.minimum(found, COUNTED_MOST)
    as_often = np.cumsum(np.bincount(counted)[::-1])[::-1]  # how many were found so often, or more
    least = np.count_nonzero(as_often > LOOKED_AT)
    above, equal = pages[counted >= least], pages[counted == least - 1]
    room = LOOKED_AT - len(above)
    if room:
        since = times[equal]
        equal = equal[since < np.partition(since, room)[room]]
        above = np.sort(np.concatenate((above, equal)))
    return above


class _Tree:
    """The runs that these pages make; with a page all those before it are among them. A page is its
    place in `pages` here, and a run the place of its head (its first page) among the heads."""

    def __init__(self, picture: Picture, pages: Numbers) -> None:
        """pages: those of the tree, in order."""
        parents = picture.parents
        self._picture = picture
        self._pages = pages
        self._followers = np.bincount(parents[parents >= 0], minlength=len(parents))[pages]
        places = np.full(len(parents) + 1, FIRST)  # the one entry more is what FIRST finds
        places[pages] = np.arange(len(pages))
        above = places[parents[pages]]
        branched = np.bincount(above + 1, minlength=len(pages) + 1)[1:] != 1
        heads = (above < 0) | branched[above]
        self._firsts = np.flatnonzero(heads)
        self._run_of = (np.cumsum(heads) - 1)[_heads(above, heads)]
        over = above[self._firsts]
        self._above = np.where(over < 0, FIRST, self._run_of[over])
        self._sizes = np.bincount(self._run_of)

    def runs(self, most: int) -> tuple[tuple[SharedRun, ...], bool]:
        """Those with the most hits under them, and whether there are more."""
        picture = self._picture
        hits = picture.hits[self._pages]
        # What is continued comes before what continues it: there is more under it, of pages at
        # least. So each page counts as a little more than its hits; far from 2 ** 53.
        scale = len(self._pages) + 1
        weights = np.bincount(self._run_of, weights=hits * scale + 1).astype(np.float64)
        under = _sums_under(self._above, weights)
        order = np.argsort(-under, kind="stable")[:most]
        told = np.full(len(self._firsts) + 1, FIRST)
        told[order] = np.arange(len(order))
        places = told[self._run_of]
        shown = np.flatnonzero(places >= 0)
        # A page has its name after those before it have theirs.
        by_run = shown[np.lexsort((picture.times[self._pages[shown]], places[shown]))]
        edges = np.cumsum(self._sizes[order])[:-1]
        found: list[SharedRun] = []
        for run, members in zip(order.tolist(), np.split(by_run, edges), strict=True):
            above, pages = int(told[self._above[run]]), self._pages[members]
            found.append(
                SharedRun(
                    above=None if above < 0 else above,
                    pages=tuple(pages.tolist()),
                    times=tuple(picture.times[pages].tolist()),
                    hits=tuple(hits[members].tolist()),
                    owners=tuple(picture.owners[pages].tolist()),
                    followers=tuple(self._followers[members].tolist()),
                    hits_under=int(under[run] // scale),
                )
            )
        return tuple(found), len(order) < len(self._firsts)


def _heads(above: Numbers, heads: npt.NDArray[np.bool_]) -> Numbers:
    """The first page of each one's run: every round looks twice as far up."""
    up = np.where(heads, np.arange(len(above)), above)
    while True:
        further = up[up]
        if np.array_equal(further, up):
            return up
        up = further


def _sums_under(above: Numbers, own: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """What each has with all that are under it: every round adds those twice as far down."""
    sums, up = own, above
    while (deep := np.flatnonzero(up >= 0)).size:
        sums = sums + np.bincount(up[deep], weights=sums[deep], minlength=len(sums))
        up = np.append(up, FIRST)[up]  # the one entry more is what FIRST finds
    return sums
