"""Shared prefixes against a dumb model of them: a page at a time, by the drawing."""

import random
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import pytest

from chatserve.cache import sharing
from chatserve.cache.block_manager import BlockManager
from chatserve.cache.page_table import PageTable
from chatserve.cache.prefix_index import Namespace
from chatserve.cache.sharing import SharedRuns, Sharing

SIZE = 4
TOKENS = b"\1\0\0\0" * SIZE
ANN = Namespace("ann", b"root of ann")


@dataclass
class Page:
    parent: int | None
    time: int
    hits: int = 0
    owners: int = 0


class Forest:
    """Pages as they are named, found, owned and unnamed: in the books, and here."""

    def __init__(self, rng: random.Random, total: int) -> None:
        self.rng = rng
        self.total = total
        self.pages: dict[int, Page] = {}
        self.sharing = Sharing()
        self.time = 0

    def grow(self, chain: int) -> None:
        """Go on from somewhere with so many pages, as far as there is room."""
        parent = self.rng.choice([None, *self.pages, *self.pages])
        for _ in range(chain):
            free = sorted(set(range(self.total)) - self.pages.keys())
            if not free:
                return
            page = self.rng.choice(free)
            self.time += 1
            self.sharing.named(page, parent, self.time)
            self.pages[page] = Page(parent, self.time)
            parent = page

    def path(self, page: int | None) -> list[int]:
        path: list[int] = []
        while page is not None:
            path.append(page)
            page = self.pages[page].parent
        return path[::-1]

    def find(self) -> None:
        """A request finds all up to some page, and owns it or not."""
        path = self.path(self.rng.choice(list(self.pages)))
        self.sharing.found(path)
        own = self.rng.random() < 0.3
        for page in path:
            self.pages[page].hits += 1
            self.pages[page].owners += own

    def drop(self) -> None:
        """A page that none continues goes."""
        leaves = sorted(self.pages.keys() - {page.parent for page in self.pages.values()})
        page = self.rng.choice(leaves)
        self.sharing.nameless(page)
        del self.pages[page]

    def owners(self) -> "array[int]":
        owners = [0 if page not in self.pages else self.pages[page].owners for page in range(99)]
        return array("i", owners[: self.total])

    # The dumb model --------------------------------------------------------------------------

    def shared(self) -> set[int]:
        return {number for number, page in self.pages.items() if page.hits > 0 or page.owners > 1}

    def runs(self, among: set[int]) -> list[tuple[int, ...]]:
        """Each run's pages, from its first one on."""
        followers: dict[int | None, list[int]] = {}
        for page in among:
            followers.setdefault(self.pages[page].parent, []).append(page)
        heads = [
            page
            for page in among
            if self.pages[page].parent is None or len(followers[self.pages[page].parent]) > 1
        ]
        runs: list[tuple[int, ...]] = []
        for head in heads:
            run = [head]
            while len(following := followers.get(run[-1], [])) == 1:
                run += following
            runs.append(tuple(run))
        return runs

    def under(self, head: int, among: Iterable[int]) -> int:
        return sum(self.pages[page].hits for page in among if head in self.path(page))

    def assert_told(self, told: SharedRuns, most: int, among: set[int]) -> None:
        wanted = {run: self.under(run[0], among) for run in self.runs(among)}
        assert len(told.runs) == min(most, len(wanted))
        unders = sorted(wanted.values(), reverse=True)
        assert [run.hits_under for run in told.runs] == unders[:most]
        for place, run in enumerate(told.runs):
            assert wanted[run.pages] == run.hits_under
            pages = [self.pages[page] for page in run.pages]
            assert run.hits == tuple(page.hits for page in pages)
            assert run.owners == tuple(page.owners for page in pages)
            assert run.times == tuple(page.time for page in pages)
            assert all(map(self.sharing.still_named, run.pages, run.times))
            parents = [page.parent for page in self.pages.values()]
            assert run.followers == tuple(map(parents.count, run.pages))
            if pages[0].parent is None:
                assert run.above is None
            else:
                assert run.above is not None
                assert run.above < place
                assert told.runs[run.above].pages[-1] == pages[0].parent


@pytest.mark.parametrize("seed", range(60))
def test_runs_are_those_of_the_dumb_model(seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    forest = Forest(rng, total=rng.choice((3, 20, 60)))
    compared = 0
    for _ in range(60):
        choice = rng.random()
        if choice < 0.4 or not forest.pages:
            forest.grow(rng.randrange(1, 7))
        elif choice < 0.8:
            forest.find()
        else:
            forest.drop()
        most = rng.choice((1, 3, 100))
        told = forest.sharing.picture(forest.owners()).runs(most)
        among = forest.shared()
        forest.assert_told(told, most, among)
        assert told.pages_total == len(among)
        assert told.hits_total == sum(forest.pages[page].hits for page in among)
        assert told.more == (len(forest.runs(among)) > most)
        compared += len(told.runs)
    assert compared, "nothing was ever shared"


@pytest.mark.parametrize("seed", range(40))
def test_of_many_pages_those_found_most_often_make_the_tree(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    most = rng.choice((1, 5, 12))
    monkeypatch.setattr(sharing, "LOOKED_AT", most)
    monkeypatch.setattr(sharing, "COUNTED_MOST", rng.choice((1, 3, 100)))
    forest = Forest(rng, total=60)
    for _ in range(12):
        forest.grow(rng.randrange(1, 7))
    for _ in range(rng.randrange(10, 60)):
        forest.find()
    shared = forest.shared()
    assert len(shared) > most
    told = forest.sharing.picture(forest.owners()).runs(100)
    counted = {page: min(forest.pages[page].hits, sharing.COUNTED_MOST) for page in shared}
    ranked = sorted(shared, key=lambda page: (-counted[page], forest.pages[page].time))
    forest.assert_told(told, 100, set(ranked[:most]))
    assert told.more
    assert told.pages_total == len(shared)
    assert told.hits_total == sum(forest.pages[page].hits for page in shared)


def test_nothing_is_shared_where_there_is_nothing() -> None:
    empty = SharedRuns((), 0, 0, more=False)
    assert Sharing().picture(array("i", [])).runs(5) == empty
    assert BlockManager(pages=3, page_size=SIZE).overview().sharing().runs(5) == empty


def sealed(blocks: BlockManager, names: list[bytes], above: PageTable | None = None) -> PageTable:
    table = PageTable(space=ANN) if above is None else above
    start = len(table)
    assert blocks.reserve(table, SIZE * start, SIZE * (start + len(names)), step=1) is not None
    for name in names:
        blocks.seal(table, name, TOKENS, step=1)
    return table


def asked(blocks: BlockManager, names: list[bytes]) -> PageTable:
    """As a request that finds what is there."""
    table = PageTable(space=ANN)
    found = blocks.adopt(table, names, TOKENS * len(names))
    blocks.account(names[:found], prompt_tokens=SIZE * len(names), hit_tokens=SIZE * found)
    return table


def test_hits_are_counted_once_a_request_and_drafts_are_none() -> None:
    blocks = BlockManager(pages=9, page_size=SIZE)
    first = sealed(blocks, [b"a", b"b", b"c"])
    drafted = PageTable(space=ANN)
    assert blocks.adopt(drafted, [b"a", b"b", b"c"], TOKENS * 3, drafting=True) == 3
    blocks.release(drafted, step=0)
    assert blocks.overview().sharing().runs(5).runs == ()
    second = asked(blocks, [b"a", b"b", b"x"])
    (run,) = blocks.overview().sharing().runs(5).runs
    assert (run.hits, run.owners) == ((1, 1), (2, 2))
    named = blocks.overview().named(run)
    assert named is not None
    assert (named.names, named.tenant) == ((b"a", b"b"), "ann")
    for table in (first, second):
        blocks.release(table, step=0)
    (run,) = blocks.overview().sharing().runs(5).runs
    assert (run.hits, run.owners, run.followers) == ((1, 1), (0, 0), (1, 1))
    assert blocks.flush() == 3
    assert blocks.overview().sharing().runs(5).runs == ()
    blocks.check()


def test_who_forks_shares_and_a_thread_that_copies_does_not() -> None:
    blocks = BlockManager(pages=9, page_size=SIZE)
    table = sealed(blocks, [b"a", b"b"])
    check = blocks.begin_check([b"a", b"b"])
    assert blocks.overview().sharing().runs(5).runs == ()
    fork = blocks.fork(table)
    (run,) = blocks.overview().sharing().runs(5).runs
    assert (run.hits, run.owners, run.hits_under) == ((0, 0), (2, 2), 0)
    blocks.end_check(check)
    for each in (table, fork):
        blocks.release(each, step=0)


def test_a_run_whose_pages_went_meanwhile_has_the_names_of_those_that_did_not() -> None:
    blocks = BlockManager(pages=3, page_size=SIZE)
    blocks.release(sealed(blocks, [b"a", b"b", b"c"]), step=1)
    blocks.settle(1)
    blocks.release(asked(blocks, [b"a", b"b", b"c"]), step=1)
    picture = blocks.overview().sharing()
    blocks.evict([b"c"])
    (run,) = picture.runs(5).runs
    assert len(run.pages) == 3
    named = blocks.overview().named(run)
    assert named is not None
    assert named.names == (b"a", b"b")
    blocks.flush()
    assert blocks.overview().named(run) is None
    blocks.release(sealed(blocks, [b"x", b"y", b"z"]), step=1)
    assert blocks.overview().named(run) is None, "other pages under the same numbers"
