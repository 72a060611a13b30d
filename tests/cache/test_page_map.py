"""The page map against the pool's own word for each page."""

import random

import pytest

from chatserve.cache.block_manager import BlockManager
from chatserve.cache.host_pages import HostPages
from chatserve.cache.page_map import LEASED_BIT, OWNERS_MOST, OWNERS_SHIFT, STATE_BITS, STATES
from chatserve.cache.page_pool import PageState
from chatserve.cache.page_table import PageTable
from chatserve.cache.prefix_index import Namespace
from chatserve.cache.transit import Keep

SIZE = 4
TOKENS = b"\1\0\0\0" * SIZE


def read(cell: int) -> tuple[str, bool, int]:
    return STATES[cell & STATE_BITS], bool(cell & LEASED_BIT), cell >> OWNERS_SHIFT


def sealed(blocks: BlockManager, names: list[bytes]) -> PageTable:
    table = PageTable()
    assert blocks.reserve(table, 0, SIZE * len(names), step=1) is not None
    for name in names:
        blocks.seal(table, name, TOKENS, step=1)
    return table


@pytest.mark.parametrize("seed", range(20))
def test_every_cell_is_what_the_pool_says_of_its_page(seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    blocks = BlockManager(pages=200, page_size=SIZE)
    tables: list[PageTable] = []
    names: list[bytes] = []
    step = 1
    for _ in range(120):
        choice = rng.random()
        if choice < 0.3 and blocks.available >= 12:
            new = [rng.randbytes(32) for _ in range(rng.randrange(1, 8))]
            table = sealed(blocks, new)
            blocks.reserve(table, len(new) * SIZE, len(new) * SIZE + rng.randrange(4), step=step)
            names += new
            tables.append(table)
        elif choice < 0.6 and tables:
            tables.append(blocks.fork(rng.choice(tables)))
        elif choice < 0.8 and tables:
            blocks.release(tables.pop(rng.randrange(len(tables))), step=step + rng.randrange(3))
        elif choice < 0.9 and names:
            blocks.lease(rng.sample(names, min(5, len(names))), rng.choice((600.0, 0.0)))
        else:
            step += 1
            blocks.settle(step)
    leased = set[int]()
    cells = blocks.overview().page_map().cells
    assert len(cells) == 200
    for page, cell in enumerate(cells):
        state, has_lease, owners = read(cell)
        actual = blocks.pool.state(page).name.lower().removeprefix("named_")
        assert state == actual
        assert owners == min(OWNERS_MOST, blocks.pool.references(page))
        if has_lease:
            leased.add(page)
    assert leased == set(blocks._index.leased_pages())
    assert len(leased) == blocks.statistics().leased_pages
    assert len({read(cell)[0] for cell in cells}) >= 3, "a seed that shows nothing"


def test_a_page_of_very_many_owners_shows_the_most() -> None:
    blocks = BlockManager(pages=4, page_size=SIZE)
    table = sealed(blocks, [b"a" * 32])
    forks = [blocks.fork(table) for _ in range(40)]
    assert read(blocks.overview().page_map().cells[table.pages[0]]) == ("sealed", False, 15)
    for each in forks[13:]:
        blocks.release(each, step=0)
    assert read(blocks.overview().page_map().cells[table.pages[0]]) == ("sealed", False, 14)


def test_a_picture_does_not_change_with_its_pool() -> None:
    blocks = BlockManager(pages=4, page_size=SIZE)
    before = blocks.overview().page_map()
    table = sealed(blocks, [b"a" * 32])
    assert set(before.cells) == {STATES.index("free")}
    assert blocks.overview().page_map().cells[table.pages[0]] & STATE_BITS == PageState.SEALED


def test_the_slots_of_host_memory_have_a_map_too() -> None:
    host = HostPages(slots=3)
    slot = host.begin(b"n" * 32)
    assert slot is not None
    assert read(host.overview().page_map().cells[slot]) == ("loading", False, 1)
    keep = Keep(0, b"n" * 32, None, 0, TOKENS, Namespace())
    assert host.end(slot, keep, arrived=True, checksum=7)
    assert read(host.overview().page_map().cells[slot]) == ("sealed", False, 1)
    host.release(slot)
    assert read(host.overview().page_map().cells[slot]) == ("cached", False, 0)
    assert host.lease([b"n" * 32], 60) == 1
    assert read(host.overview().page_map().cells[slot])[1]


def test_what_nobody_here_has_is_told() -> None:
    blocks = BlockManager(pages=4, page_size=SIZE)
    sealed(blocks, [b"a" * 32, b"b" * 32])
    assert blocks.overview().without([b"a" * 32, b"c" * 32]) == [b"c" * 32]
