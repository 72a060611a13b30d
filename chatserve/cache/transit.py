"""Transit: pages on their way between the device and the tiers below it.

    named on the device ─▶ unkept ─take─▶ Keeps: an I/O thread reads them ──▶ copies below
    FREE ─begin_load─▶ Load: an I/O thread writes it ─end_load─▶ CACHED (or FREE, where it failed)

A page in transit has the transit as an owner, and so have the pages before it in its chain, since
whoever owns a page owns its parents. Nobody evicts it, and nobody writes to it but the I/O thread
that fills a LOADING page, which has no name until its bytes have been checked.

Unkept are the named pages that wait for their copy below, oldest first. A page that is evicted
while no tier below has it is lost: it costs time, when it is wanted again, and nothing else.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from chatserve.cache.page_pool import PageId
from chatserve.cache.page_table import PageTable
from chatserve.cache.prefix_index import NOWHERE, Namespace
from prefix_store.names import PageName


@dataclass(frozen=True, slots=True)
class Keep:
    """A sealed page to be copied below. position: its index in its chain; tokens: int32 bytes.

    space: whose it is. checksum: of its bytes, where one was taken; a copy is made of
    those bytes alone.
    """

    page: PageId
    name: PageName
    parent: PageName | None
    position: int
    tokens: bytes
    space: Namespace = NOWHERE
    checksum: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Keeps:
    """Pages that are being copied down; held: all that are retained meanwhile, parents too.

    number: tells it from others.
    """

    number: int
    pages: tuple[Keep, ...]
    held: tuple[PageId, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Check:
    """Pages that are compared with what is below. pages: by the names that were asked for, None
    for those that are not here; held: all that are retained meanwhile, parents too."""

    number: int
    pages: tuple[PageId | None, ...]
    held: tuple[PageId, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """Pages that are being filled from below. The first `above` pages of the table were resident.

    holder: its id among the claims. names and tokens (int32 bytes) are those of the LOADING pages.
    """

    holder: int
    table: PageTable
    above: int
    names: tuple[PageName, ...]
    tokens: bytes
    drafting: bool

    @property
    def pages(self) -> tuple[PageId, ...]:
        """The LOADING pages, in the order of `names`."""
        return tuple(self.table.pages[self.above :])


@dataclass(frozen=True, slots=True, kw_only=True)
class TransitStatistics:
    """Pages: unkept, keeping, loading now; *_total from the start of the process.

    lost: evicted while no tier below had it. failed: a load gave up on the page.
    """

    unkept: int = 0
    keeping: int = 0
    loading: int = 0
    kept_total: int = 0
    lost_total: int = 0
    loaded_total: int = 0
    failed_total: int = 0


class Transit:
    """The books of all that is on its way. The block manager changes the pages themselves."""

    def __init__(self) -> None:
        self._unkept: OrderedDict[PageName, Keep] = OrderedDict()
        self._keeping: dict[int, Keeps] = {}
        self._keeping_names: dict[PageName, int] = {}  # to the number of their Keeps
        self._number = 0
        self._checks: dict[int, Check] = {}
        self._loads: dict[int, Load] = {}
        self._kept = self._lost = self._loaded = self._failed = 0

    @property
    def unkept(self) -> int:
        """Named pages that wait for their copy."""
        return len(self._unkept)

    def count_on(self, before: "Transit") -> None:
        """Go on from what another one counted."""
        self._kept, self._lost = before._kept, before._lost
        self._loaded, self._failed = before._loaded, before._failed

    def waiting(self) -> tuple[Keep, ...]:
        """Those that wait for their copy."""
        return tuple(self._unkept.values())

    def owners(self) -> Counter[PageId]:
        """How many transits own each page."""
        count: Counter[PageId] = Counter()
        for keeps in self._keeping.values():
            count.update(keeps.held)
        for load in self._loads.values():
            count.update(load.table.pages)
        for check in self._checks.values():
            count.update(check.held)
        return count

    # Copies to be made ---------------------------------------------------------------------

    def want(self, keep: Keep) -> None:
        """This page should have a copy below; harmless if it waits for one already."""
        if keep.name not in self._keeping_names:
            self._unkept.setdefault(keep.name, keep)

    def next_unkept(self) -> Keep | None:
        """Take out the one that waits longest."""
        return self._unkept.popitem(last=False)[1] if self._unkept else None

    def waits(self, name: PageName) -> bool:
        """Whether the page of this name waits for its copy."""
        return name in self._unkept

    def forget(self, name: PageName, *, lost: bool) -> bool:
        """The page of this name is about to lose it; lost: and no copy of it is left. Whether it
        waited for its copy."""
        self._lost += lost
        return self._unkept.pop(name, None) is not None

    def lose(self) -> Keep | None:
        """Give up the one that waits longest: there is no room to wait in."""
        keep = self.next_unkept()
        self._lost += keep is not None
        return keep

    def withdraw(self, name: PageName) -> None:
        """No copy of this page is wanted any more; one that is being made does not count."""
        self._unkept.pop(name, None)
        self._keeping_names.pop(name, None)

    def begin_keep(self, pages: Sequence[Keep], held: Sequence[PageId]) -> Keeps:
        """An I/O thread is about to read these pages; held: with those before them, each once."""
        self._number += 1
        keeps = Keeps(self._number, tuple(pages), tuple(held))
        self._keeping[keeps.number] = keeps
        self._keeping_names.update((keep.name, keeps.number) for keep in pages)
        return keeps

    def end_keep(self, keeps: Keeps, stored: int) -> None:
        """It has read them; `stored` of them have a copy now."""
        del self._keeping[keeps.number]
        for keep in keeps.pages:
            if self._keeping_names.get(keep.name) == keeps.number:
                del self._keeping_names[keep.name]
        self._kept += stored

    def begin_check(self, pages: tuple[PageId | None, ...], held: tuple[PageId, ...]) -> Check:
        """A thread is about to read these pages; held: with those before them, each once."""
        self._number += 1
        check = self._checks[self._number] = Check(self._number, pages, held)
        return check

    def end_check(self, check: Check) -> None:
        """It has read them."""
        del self._checks[check.number]

    # Loads ---------------------------------------------------------------------------------

    def begin_load(self, load: Load) -> None:
        """An I/O thread is about to write to the load's pages."""
        self._loads[load.holder] = load

    def is_loading(self, holder: int) -> bool:
        """Whether this holder of claims is a load."""
        return holder in self._loads

    def end_load(self, load: Load, arrived: int) -> None:
        """It has; the first `arrived` pages are good."""
        del self._loads[load.holder]
        self._loaded += arrived
        self._failed += len(load.names) - arrived

    def statistics(self) -> TransitStatistics:
        """A frozen picture."""
        return TransitStatistics(
            unkept=len(self._unkept),
            keeping=len(self._keeping_names),
            loading=sum(len(load.names) for load in self._loads.values()),
            kept_total=self._kept,
            lost_total=self._lost,
            loaded_total=self._loaded,
            failed_total=self._failed,
        )

    def check(self, names: dict[PageId, PageName]) -> None:
        """Every invariant. names: all named pages. For tests."""
        for name, keep in self._unkept.items():
            assert keep.name == name
            assert names.get(keep.page) == name, "a page waits for its copy under an old name"
            assert name not in self._keeping_names, "a page waits for its copy twice"
        reading = [
            keep
            for keeps in self._keeping.values()
            for keep in keeps.pages
            if self._keeping_names.get(keep.name) == keeps.number
        ]
        assert {keep.name for keep in reading} == self._keeping_names.keys()
        assert len(reading) == len(self._keeping_names), "a page is read twice"
        for keep in reading:
            assert names.get(keep.page) == keep.name, "a page is read under an old name"
        loading = [page for load in self._loads.values() for page in load.pages]
        assert len(loading) == len(set(loading)), "a page is filled twice"
        assert not set(loading) & names.keys(), "a page has a name before its bytes"
