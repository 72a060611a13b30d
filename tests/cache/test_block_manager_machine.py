"""A state machine drives the block manager alone, against a model that keeps what pages hold.

The model is a list of page contents, written exactly where the tables say. If a page were given
out too early, shared by two writers, named wrongly or found under an old name, some table would
read other tokens than its own.
"""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chatserve.cache.block_manager import BlockManager
from chatserve.cache.page_pool import PageState
from chatserve.cache.page_table import PageTable
from prefix_store.names import PageNamer, token_bytes

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9)


class Line:
    """A table, the tokens that it stands for, and the last step that may touch it."""

    def __init__(
        self, table: PageTable, tokens: list[int], last_step: int, *, drafting: bool = False
    ) -> None:
        self.table = table
        self.tokens = tokens
        self.last_step = last_step
        self.drafting = drafting
        self.barred: set[bytes] = set()  # forgotten while pages of these names were being filled


class BlockManagerMachine(RuleBasedStateMachine):
    """See the module."""

    @initialize(pages=st.integers(3, 12), size=st.sampled_from([1, 2, 3]), caching=st.booleans())
    def begin(self, pages: int, size: int, caching: bool) -> None:
        self.size = size
        self.blocks = BlockManager(pages=pages, page_size=size, caching=caching)
        self.namer = PageNamer(b"k" * 32, page_size=size)
        self.root = b"r" * 32
        self.content: list[list[int | None]] = [[None] * size for _ in range(pages)]
        self.busy = [0] * pages
        self.lines: list[Line] = []
        self.settled = 0
        self.step = 1
        self.drafted: dict[bytes, None] = {}  # names that only drafts have had

    @precondition(lambda self: len(self.lines) < 5)
    @rule(tokens=TOKENS, drafting=st.sampled_from([False, False, True]))
    def adopt(self, tokens: list[int], drafting: bool) -> None:
        raw = token_bytes(tokens)
        names = self.namer.names(self.root, tokens)
        table = PageTable()
        matched = self.blocks.match(names, raw)
        adopted = self.blocks.adopt(table, names, raw, drafting=drafting)
        assert adopted == matched == len(table.pages)
        if not drafting:
            for name in names[:matched]:
                self.drafted.pop(name, None)
        line = Line(table, tokens[: matched * self.size], 0, drafting=drafting)
        self.lines.append(line)

    @precondition(lambda self: any(line.drafting for line in self.lines))
    @rule(data=st.data(), more=TOKENS, most=st.integers(0, 4))
    def write_ahead(self, data: st.DataObject, more: list[int], most: int) -> None:
        """A draft's page: found, written and named between two steps."""
        line = data.draw(st.sampled_from([line for line in self.lines if line.drafting]))
        page_tokens = (more * self.size)[: self.size]
        before = self.blocks.statistics()
        kept = {*self.blocks._index.pages().values()} - self.drafted.keys()
        taken = self.blocks.extend(line.table, drafts_max=most)
        after = self.blocks.statistics()
        gone = kept - {*self.blocks._index.pages().values()}
        assert len(gone) <= (before.draft_pages < most), "a request's page, beyond the share"
        if gone:
            assert before.pages.free == 0
            assert not [page for page in self._idle_leaves() if page in self.drafted]
        assert after.evicted_for_space_total - before.evicted_for_space_total <= 1
        if not taken:
            assert after == before, "refused, and yet something changed"
            return
        page = line.table.pages[-1]
        assert self.busy[page] <= self.settled, "a page that a step in flight still touches"
        self.content[page] = list(page_tokens)
        line.tokens = line.tokens + page_tokens
        line.last_step = self.step
        self._seal(line)

    @precondition(lambda self: any(not line.drafting for line in self.lines))
    @rule(data=st.data(), more=TOKENS)
    def write(self, data: st.DataObject, more: list[int]) -> None:
        line = data.draw(st.sampled_from([line for line in self.lines if not line.drafting]))
        start, end = len(line.tokens), len(line.tokens) + len(more)
        before = self.blocks.statistics()
        had = list(line.table.pages)
        copies = self.blocks.reserve(line.table, start, end, step=self.step)
        if copies is None:
            assert self.blocks.statistics() == before, "a failed reservation is rolled back whole"
            assert list(line.table.pages) == had
            assert self.blocks.shortage(line.table, start, end) > 0
            return
        for copy in copies:
            self.content[copy.target] = self.content[copy.source][:]
        for page in set(line.table.pages) - set(had):
            assert self.busy[page] <= self.settled, "a page that a step in flight still touches"
        for page in set(had) - set(line.table.pages):
            self.busy[page] = max(self.busy[page], self.step)
        for position, token in enumerate(more, start):
            page = line.table.pages[position // self.size]
            assert self.blocks.pool.references(page) == 1, "a written page has one owner"
            assert self.blocks.pool.state(page) is PageState.OPEN
            self.content[page][position % self.size] = token
        line.tokens = line.tokens + more
        line.last_step = self.step

    @precondition(lambda self: self.lines)
    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        self._seal(data.draw(st.sampled_from(self.lines)))

    def _seal(self, line: Line) -> None:
        names = self.namer.names(self.root, line.tokens)
        before = line.table.sealed
        haunted = any(map(self.blocks.forgetting.is_ghost, line.table.pages[:before]))
        self._seal_pages(line, names)
        if self.blocks.caching:
            fresh = line.table.names[before:]
            assert not line.barred.intersection(fresh), "forgotten, and back again"
            assert not (fresh and haunted), "a page that nobody could find was named"

    def _seal_pages(self, line: Line, names: list[bytes]) -> None:
        for index in range(line.table.sealed, len(line.tokens) // self.size):
            page = line.tokens[index * self.size : (index + 1) * self.size]
            old = line.table.pages[index]
            new = names[index] not in self.blocks._index.pages().values()
            self.blocks.seal(
                line.table,
                names[index],
                token_bytes(page),
                step=line.last_step,
                drafting=line.drafting,
            )
            if line.table.sealed == index:
                return  # not to be named; nor is what follows
            if line.table.sealed > index and not line.drafting:
                self.drafted.pop(names[index], None)
            elif line.table.sealed > index and new:
                self.drafted[names[index]] = None
            if line.table.pages[index] != old:
                self.busy[old] = max(self.busy[old], line.last_step)

    def _idle_leaves(self) -> set[bytes]:
        entries = self.blocks._index._by_name
        return {name for name, entry in entries.items() if entry.idle and not entry.children}

    @precondition(lambda self: any(not line.drafting for line in self.lines))
    @precondition(lambda self: len(self.lines) < 6)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        line = data.draw(st.sampled_from([line for line in self.lines if not line.drafting]))
        table = self.blocks.fork(line.table)
        self.lines.append(Line(table, line.tokens[:], line.last_step))
        self.lines[-1].barred = set(line.barred)

    @precondition(lambda self: self.lines)
    @rule(data=st.data(), cut=st.integers(0, 9))
    def let_go(self, data: st.DataObject, cut: int) -> None:
        line = data.draw(st.sampled_from(self.lines))
        self.lines.remove(line)
        if cut < 6 and not line.drafting:
            keep = max(0, len(line.tokens) - cut)
            self.blocks.truncate(line.table, keep)
            assert line.table.sealed <= keep // self.size, "names after the cut"
        for page in line.table.pages:
            self.busy[page] = max(self.busy[page], line.last_step)
        self.blocks.release(line.table, step=line.last_step)
        assert not line.table.pages
        assert not line.table.names

    @rule()
    def next_step(self) -> None:
        self.step = min(self.step + 1, self.settled + 2)

    @precondition(lambda self: self.step > self.settled + 1)
    @rule()
    def settle(self) -> None:
        self.settled += 1
        self.blocks.settle(self.settled)

    @rule()
    def flush(self) -> None:
        before = self.blocks.statistics().pages
        gone = self.blocks.flush()
        after = self.blocks.statistics().pages
        assert after.free == before.free + gone
        assert gone == before.cached - after.cached

    @rule(tokens=TOKENS, data=st.data(), first=st.integers(0, 2))
    def forget(self, tokens: list[int], data: st.DataObject, first: int) -> None:
        """The names of some prefix, or of one that a line has, all or from some page on."""
        line = data.draw(st.sampled_from([None, *self.lines]))
        if line is not None:
            tokens = line.tokens
        names = self.namer.names(self.root, tokens)[first:]
        entries = self.blocks._index._by_name
        doomed = {name for name in names if name in entries}
        for name, entry in entries.items():  # parents before children
            if entry.parent in doomed:
                doomed.add(name)
        owned = {name for name in doomed if self.blocks.pool.references(entries[name].page)}
        leaving = {
            name
            for name in doomed
            if self.blocks.pool.state(entries[name].page) is PageState.NAMED_LEAVING
        }
        before = self.blocks.statistics()
        assert self.blocks.forget(names) == [], "nobody claims anything here"
        after = self.blocks.statistics()
        assert not doomed & self.blocks._index._by_name.keys(), "forgotten, and found"
        assert after.named_pages == before.named_pages - len(doomed), "too much was forgotten"
        assert after.pages.free - before.pages.free == len(doomed - owned - leaving)
        assert after.ghosts - before.ghosts == len(owned | leaving)
        assert after.forgotten_total - before.forgotten_total == len(doomed)
        for other in self.lines:
            # What is being filled under such a name now does not get it later.
            own = self.namer.names(self.root, other.tokens + [0] * self.size)
            started = len(other.table.pages)
            other.barred |= set(own[other.table.sealed : started]) & set(names)
            for more in ([0], [1]):
                filling = self.namer.names(self.root, (other.tokens + more * self.size))
                other.barred |= set(filling[other.table.sealed : started]) & set(names)

    @invariant()
    def tables_read_their_own_tokens(self) -> None:
        if not hasattr(self, "blocks"):
            return
        self.blocks.check()
        for line in self.lines:
            read = [token for page in line.table.pages for token in self.content[page]]
            assert read[: len(line.tokens)] == line.tokens
            sealed = line.table.pages[: line.table.sealed]
            named = [page in self.blocks._index.pages() for page in sealed]
            assert named == sorted(named, reverse=True), "a page is found without its parents"
        owners = sum(len(line.table) for line in self.lines)
        assert self.blocks.statistics().logical_pages == owners
        for page in self.blocks._index.pages():
            entry = self.blocks._index._by_page[page]
            assert token_bytes(self.content[page]) == entry.tokens, "a name for other tokens"
        resident = set(self.blocks._index._by_name)
        drafted = {name for name, entry in self.blocks._index._by_name.items() if entry.drafted}
        assert drafted == resident & self.drafted.keys(), "drafted until a request adopts it"
        assert self.blocks.statistics().draft_pages == len(drafted)
        self.drafted = dict.fromkeys(drafted)

    def teardown(self) -> None:
        if not hasattr(self, "blocks"):
            return
        for line in self.lines:
            self.blocks.release(line.table, step=line.last_step)
        self.blocks.settle(self.settled + 2)
        self.blocks.check()
        assert self.blocks.forgetting.ghosts == 0, "a ghost without an owner"
        self.blocks.flush()
        assert self.blocks.pool.free == self.blocks.pool.total, "pages leaked"


BlockManagerMachine.TestCase.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, print_blob=True
)
TestBlockManagerMachine = BlockManagerMachine.TestCase
