"""Drafts: prompts that are computed ahead of the request that may come for them.

A draft is the settled beginning of a prompt whose user still types, or the history of a chat that
was just opened. It knows no text and no consumer: what comes of it is named pages, which the
request, if it comes, finds as it finds any others.

    put ──▶ line ──▶ adopt what is resident ──▶ one page a step ──▶ all there: forgotten
            ▲ │                                  │
            │ └── put again (newer text), withdraw, a failed step: given back where it stands
            └──── a request came, or others have waited a turn: the pages are given back

Theory of operation. A draft's step is planned only while no sequence lives and no step is in
flight, it computes one page, and nothing is planned beside it; so a request waits for one page at
the most, and that page is sealed before the request looks for its prefix. Therefore a draft needs
no claim and holds up nobody, and it holds no page while anything of a request is planned: there is
nothing to take from it. Its pages are evicted before all others until a request adopts them
(`prefix_index.py`), so what is bounded here is how much of others' it may evict. A draft that
finds no page, or whose step fails, ends: it is a courtesy. So does one that has computed as many
pages as it has, where drafts that do not all fit in the pool evict each other's.

Pages that are below the device are loaded instead (`tiers.py`). A request that comes meanwhile
waits for that load, which it would have begun itself.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

from chatserve.cache.page_table import PageTable
from chatserve.engine.plan import Slice
from chatserve.engine.roster import Roster
from chatserve.engine.sequence import PreparedRequest
from chatserve.engine.tiers import LOADS_MAX, Tiers
from prefix_store.names import PageName, token_bytes

NO_SEQUENCE = 0  # what a draft's slices name: no sequence has this id
BROKEN_MAX = 256  # names (32 bytes) of pages whose step failed: no draft tries them again


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftLimits:
    """lines_max: drafts waiting at once; more are not taken. turn_pages: pages that one computes
    while others wait. pool_share: of all pages, how many drafted ones may be there at the cost of
    pages that others left.
    """

    lines_max: int = 256
    turn_pages: int = 16
    pool_share: float = 0.25


@dataclass(slots=True, eq=False)
class _Line:
    """One draft. Its table is empty, or holds the resident pages and the one in flight."""

    key: Hashable
    prepared: PreparedRequest
    table: PageTable = field(default_factory=PageTable)
    hold: int = 0  # which of all holds of tables this one is: slices of one hold follow on
    load: int = 0  # the last load of its pages, 0: none yet
    loads: int = 0  # how many
    turn: int = 0  # pages computed in this turn
    computed: int = 0  # pages in all

    def page(self, index: int, size: int) -> tuple[int, ...]:
        """The token ids of a page."""
        return self.prepared.request.tokens[index * size : (index + 1) * size]


class Drafts:
    """See the module. Owned by the scheduler; every method is synchronous."""

    def __init__(self, roster: Roster, tiers: Tiers, limits: DraftLimits) -> None:
        self._roster = roster
        self._tiers = tiers
        self._limits = limits
        self._lines: OrderedDict[Hashable, _Line] = OrderedDict()
        self._holding: _Line | None = None  # the one whose table has pages
        self._step = 0  # the step that computes its last page, 0: none
        self._holds = 0
        self._broken: OrderedDict[PageName, None] = OrderedDict()
        self.computed_tokens = 0

    def __len__(self) -> int:
        """Drafts that are not all there yet."""
        return len(self._lines)

    @property
    def in_flight(self) -> bool:
        """Whether a step computes a draft's page now."""
        return self._step > 0

    @property
    def tables(self) -> tuple[PageTable, ...]:
        """The tables that hold pages. For tests."""
        return () if self._holding is None else (self._holding.table,)

    def put(self, key: Hashable, prepared: PreparedRequest) -> bool:
        """Compute these pages when there is nothing else to do, instead of what `key` wanted
        before. Returns whether it was taken."""
        self.withdraw(key, keep_place=True)
        taken = bool(prepared.names) and self._roster.blocks.caching
        if taken and (key in self._lines or len(self._lines) < self._limits.lines_max):
            table = PageTable(space=prepared.space)
            self._lines[key] = _Line(key, prepared, table)
            return True
        self._lines.pop(key, None)
        return False

    def withdraw(self, key: Hashable, *, keep_place: bool = False) -> None:
        """Nobody wants it any more; what was computed stays, and what is being computed will."""
        line = self._lines.get(key)
        if line is None:
            return
        if not keep_place:
            del self._lines[key]
        if line is self._holding and not self.in_flight:
            self._give_back()

    def give_way(self) -> None:
        """A request is about to be planned: no draft holds a page."""
        assert not self.in_flight, "nothing is planned beside a draft's page"
        if self._holding is not None:
            self._give_back()

    # A page --------------------------------------------------------------------------------

    def order(self, step: int) -> Slice | None:
        """The next page of the draft whose turn it is, to be computed alone in `step`."""
        assert not self.in_flight, "one page at a time"
        while (line := self._next()) is not None:
            if line is not self._holding:
                self.give_way()
                self._take_hold(line)
            if self._load(line):
                self._holding = None  # the load has its pages
                continue
            if self._extend(line):
                self._step = step
                return self._slice(line)
            del self._lines[line.key]
            self._give_back()
        return None

    def _next(self) -> _Line | None:
        """The first line that does not wait for a load."""
        loading = self._roster.blocks.transit.is_loading
        return next((line for line in self._lines.values() if not loading(line.load)), None)

    def _load(self, line: _Line) -> bool:
        """What comes next is below the device: bring it up instead of computing it."""
        blocks, names, table = self._roster.blocks, line.prepared.names, line.table
        first = len(table)
        if line.loads >= LOADS_MAX or first == len(names):
            return False
        room = blocks.pool.free + max(0, self._pages_most - blocks.statistics().draft_pages)
        tokens = token_bytes(line.prepared.request.tokens)[4 * blocks.page_size * first :]
        load = self._tiers.begin_draft_load(table, names[first : first + room], tokens)
        line.load, line.loads = load, line.loads + (load > 0)
        return load > 0

    @property
    def _pages_most(self) -> int:
        """Drafted pages that may be there at the cost of what others left."""
        return int(self._roster.blocks.pool.total * self._limits.pool_share)

    def commit(self, *, failed: bool) -> None:
        """The step in flight is over: its page is named, or not tried again."""
        line, step = self._holding, self._step
        assert line is not None
        assert step, "no page is in flight"
        blocks, table, names = self._roster.blocks, line.table, line.prepared.names
        index, self._step = table.sealed, 0
        wanted = self._lines.get(line.key) is line
        if failed:
            self._broken[names[index]] = None
            if len(self._broken) > BROKEN_MAX:
                self._broken.popitem(last=False)
        else:
            page = line.page(index, blocks.page_size)
            woken = blocks.seal(table, names[index], token_bytes(page), step=step, drafting=True)
            assert not woken, "somebody waits for a draft"
            self.computed_tokens += len(page)
        if wanted and table.sealed == index:
            del self._lines[line.key]  # failed, or not to be named
        if not wanted or table.sealed == index:
            self._give_back(step)
        else:
            self._pass_on(line)

    def _pass_on(self, line: _Line) -> None:
        """After its turn a draft goes behind the others."""
        line.computed += 1
        line.turn += 1
        if line.turn >= self._limits.turn_pages and len(self._lines) > 1:
            line.turn = 0
            self._lines.move_to_end(line.key)

    def forget(self) -> None:
        """The device is given up: nothing is computed ahead any more."""
        self._lines.clear()
        self._step = 0
        self.give_way()

    def restart(self) -> None:
        """The cache was begun anew: all drafts end, and tables mean nothing."""
        self._lines.clear()
        self._holding, self._step = None, 0

    def check(self) -> None:
        """Every invariant. For tests."""
        assert len(self._lines) <= self._limits.lines_max
        assert all(not line.table.pages for line in self._lines.values() if line != self._holding)
        if self._holding is None:
            assert not self.in_flight, "a page in flight without a table"
        else:
            table = self._holding.table
            assert len(table) == table.sealed + self.in_flight, "a draft's page too many"
            assert self.in_flight or self._lines.get(self._holding.key) is self._holding

    # Inside --------------------------------------------------------------------------------

    def _take_hold(self, line: _Line) -> None:
        request, names = line.prepared.request, line.prepared.names
        self._roster.blocks.adopt(line.table, names, token_bytes(request.tokens), drafting=True)
        self._holds += 1
        self._holding, line.hold = line, self._holds

    def _extend(self, line: _Line) -> bool:
        """A page for what comes next; False where all is there, or nothing more is to be had."""
        blocks, names, index = self._roster.blocks, line.prepared.names, len(line.table)
        if index == len(names) or line.computed == len(names) or names[index] in self._broken:
            return False
        return blocks.extend(line.table, drafts_max=self._pages_most)

    def _slice(self, line: _Line) -> Slice:
        size, index = self._roster.blocks.page_size, line.table.sealed
        return Slice(
            sequence=NO_SEQUENCE,
            incarnation=line.hold,
            start=index * size,
            tokens=line.page(index, size),
            pending=None,
            pages=line.table.snapshot(),
            write=True,
            orders=(),
        )

    def _give_back(self, step: int = 0) -> None:
        assert self._holding is not None
        self._roster.blocks.release(self._holding.table, step=step)
        self._holding = None
