"""A slab against something dumb that tells the truth: a dict, and rules about what may miss."""

import tempfile
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from prefix_store import PageStore
from tests.prefix_store.pages import (
    SECRET,
    SHAPE,
    folder_bytes,
    get,
    get_all,
    name,
    parent,
    write,
)

NUMBERS = 48
CAPACITY = 190_000
MAX_AGE = 100.0
pages = st.integers(0, NUMBERS - 1)
runs = st.tuples(pages, st.integers(1, 12))


class SlabMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.now = 1_000_000.0
        self.known: set[int] = set()  # stored, and not seen to be gone
        self.cut: set[int] = set()  # dropped or never stored: its children may be orphans
        self.cut.update(range(NUMBERS))
        self.gets = 0
        self.hits = 0
        self.last_use: dict[int, float] = {}
        self.open()

    def open(self) -> None:
        self.store = PageStore.open(
            Path(self.folder.name) / "pages",
            SECRET,
            capacity_bytes=CAPACITY,
            max_age_seconds=MAX_AGE,
            clock=lambda: self.now,
        )
        self.slab = self.store.slab(SHAPE)

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    def look(self) -> set[int]:
        """What the index has now; pages may leave it only by a rule that evicts."""
        return {number for number in range(NUMBERS) if self.slab.contains(name(number))}

    def evicted(self, before: set[int]) -> set[int]:
        """Pages that left since; checks that no parent left before its child."""
        now = self.look()
        left = before - now
        for number in now & before:
            if parent(number) is not None and number - 1 in left:
                raise AssertionError(f"page {number - 1} left before page {number}")
        self.known &= now
        for number in left:
            self.last_use.pop(number, None)
        return left

    @rule(run=runs)
    def put(self, run: tuple[int, int]) -> None:
        numbers = range(run[0], min(NUMBERS, sum(run)))
        before = self.look()
        results = self.slab.put([write(number) for number in numbers])
        self.evicted(before)
        assert all(results), "a slab that can evict has room"
        now = self.look()
        for number in numbers:
            self.last_use[number] = self.now
            if number in now:
                self.known.add(number)

    @rule(number=pages)
    def get(self, number: int) -> None:
        expected = number in self.known
        self.gets += 1
        assert get(self.slab, number) == expected
        self.hits += expected
        if expected:
            self.last_use[number] = self.now

    @rule(numbers=st.lists(pages, max_size=12))
    def get_together(self, numbers: list[int]) -> None:
        expected = [number in self.known for number in numbers]
        self.gets += len(numbers)
        assert get_all(self.slab, numbers) == expected
        self.hits += sum(expected)
        for number in self.known & set(numbers):
            self.last_use[number] = self.now

    @rule(numbers=st.lists(pages, max_size=6))
    def drop(self, numbers: list[int]) -> None:
        there = self.known & set(numbers)
        assert self.slab.drop([name(number) for number in numbers]) == len(there)
        self.known -= there
        files = [path.read_bytes() for path in (Path(self.folder.name) / "pages").iterdir()]
        for number in numbers:
            assert not any(name(number) in raw for raw in files)
            self.last_use.pop(number, None)

    @rule(numbers=st.lists(pages, max_size=6))
    def touch(self, numbers: list[int]) -> None:
        self.slab.touch([name(number) for number in numbers])
        for number in self.known & set(numbers):
            self.last_use[number] = self.now

    @rule(first=pages)
    def find(self, first: int) -> None:
        run = 0
        while first + run in self.known:
            run += 1
        assert self.slab.find([name(number) for number in range(first, NUMBERS)]) == run

    @rule(seconds=st.floats(1, 80))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def expire(self) -> None:
        before = self.look()
        young = {number for number in before if self.now - self.last_use[number] <= MAX_AGE}
        removed = self.store.gc()
        left = self.evicted(before)
        assert removed == len(left)
        assert not young & left
        for number in self.look() - young:
            chain = [number]
            while chain[-1] + 1 in self.known and parent(chain[-1] + 1) is not None:
                chain.append(chain[-1] + 1)
            assert young & set(chain), f"page {number} is old and nothing young continues it"

    @rule()
    def reopen(self) -> None:
        before, statistics = self.look(), self.slab.statistics()
        self.store.close()
        self.open()
        assert self.look() == before
        again = self.slab.statistics()
        assert (again.hits, again.writes, again.evictions, again.misses) == (
            statistics.hits,
            statistics.writes,
            statistics.evictions,
            statistics.misses,
        )

    @invariant()
    def sums_hold(self) -> None:
        figures = self.slab.statistics()
        e, m = figures.evictions, figures.misses
        left = e.space + e.age + e.orphan + e.forgotten + e.bad
        assert figures.pages == len(self.known) == figures.writes - left
        assert e.bad == m.authentication == m.tokens == m.io == figures.io_errors == 0
        assert figures.hits == self.hits
        assert figures.hits + m.absent == self.gets
        reachable = {n for n in self.known if parent(n) is None or n - 1 in self.known}
        assert figures.orphans == len(self.known - reachable)
        size = folder_bytes(Path(self.folder.name) / "pages")
        assert size <= self.store.statistics().bytes <= CAPACITY


TestSlabMachine = SlabMachine.TestCase
TestSlabMachine.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, print_blob=True
)
