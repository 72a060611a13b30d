"""The block manager's promises, one test each, named after what must stay true."""

import pytest

from chatserve.cache.block_manager import BlockManager
from chatserve.cache.page_pool import PageState
from chatserve.cache.page_table import PageTable
from prefix_store.names import PageName, PageNamer, token_bytes

SIZE = 4
ROOT = b"r" * 32
NAMER = PageNamer(b"k" * 32, page_size=SIZE)


def names_of(tokens: list[int]) -> list[PageName]:
    return NAMER.names(ROOT, tokens)


def filled(blocks: BlockManager, tokens: list[int], *, step: int = 0) -> PageTable:
    """A table with `tokens` computed and its full pages sealed."""
    table = PageTable()
    names = names_of(tokens)
    matched = blocks.adopt(table, names, token_bytes(tokens))
    assert blocks.reserve(table, matched * SIZE, len(tokens), step=step) is not None
    for index in range(matched, len(tokens) // SIZE):
        page = tokens[index * SIZE : (index + 1) * SIZE]
        blocks.seal(table, names[index], token_bytes(page), step=step)
    return table


def pages(blocks: BlockManager, tokens: list[int]) -> int:
    return blocks.match(names_of(tokens), token_bytes(tokens))


def test_an_evicted_page_has_no_name_and_its_old_name_finds_nothing() -> None:
    blocks = BlockManager(pages=2, page_size=SIZE)
    old, new = list(range(8)), list(range(50, 58))
    blocks.release(filled(blocks, old), step=0)
    assert pages(blocks, old) == 2
    table = filled(blocks, new)
    assert pages(blocks, old) == 0
    assert pages(blocks, new) == 2
    assert set(blocks._index.pages()) == set(table.pages)
    blocks.check()


def test_two_tables_that_computed_one_page_share_it_and_either_may_go() -> None:
    blocks = BlockManager(pages=6, page_size=SIZE)
    tokens = list(range(8))
    names = names_of(tokens)
    one, other = PageTable(), PageTable()
    for table in (one, other):
        blocks.reserve(table, 0, 8, step=1)
    for index in range(2):
        for table in (one, other):
            page = tokens[index * SIZE : (index + 1) * SIZE]
            blocks.seal(table, names[index], token_bytes(page), step=1)
    assert one.pages == other.pages
    assert blocks.statistics().twins_total == 2
    assert blocks.coming == 2, "a twin that a step in flight writes is not free yet"
    blocks.settle(1)
    blocks.check()
    blocks.release(one, step=1)
    assert pages(blocks, tokens) == 2, "one twin went, and the other cannot be found"
    blocks.release(other, step=1)
    assert pages(blocks, tokens) == 2
    assert blocks.flush() == 2
    assert pages(blocks, tokens) == 0


def test_making_room_never_takes_the_pages_that_were_just_matched() -> None:
    blocks = BlockManager(pages=4, page_size=SIZE)
    tokens = list(range(12))
    blocks.release(filled(blocks, tokens), step=0)
    table = PageTable()
    blocks.adopt(table, names_of(tokens), token_bytes(tokens))
    assert blocks.reserve(table, 12, 16, step=1) == ()
    assert len(table.pages) == 4
    assert pages(blocks, tokens) == 3
    blocks.check()


def test_a_reservation_that_fails_changes_nothing() -> None:
    blocks = BlockManager(pages=4, page_size=SIZE)
    cached = list(range(60, 68))
    blocks.release(filled(blocks, cached), step=0)
    table = filled(blocks, [1, 2])
    before = blocks.statistics()
    assert blocks.reserve(table, 2, 17, step=1) is None
    assert blocks.statistics() == before
    assert pages(blocks, cached) == 2, "something was evicted for nothing"


@pytest.mark.parametrize("forks", [1, 3])
def test_a_partial_page_is_copied_by_every_writer_but_the_last(forks: int) -> None:
    blocks = BlockManager(pages=20, page_size=SIZE)
    parent = filled(blocks, list(range(6)))
    lines = [parent, *(blocks.fork(parent) for _ in range(forks))]
    shared = parent.pages[1]
    copies = [blocks.reserve(line, 6, 7, step=1) for line in lines]
    assert [len(made or ()) for made in copies] == [1] * forks + [0]
    assert all(copy.source == shared for made in copies for copy in made or ())
    last = [line.pages[1] for line in lines]
    assert len(set(last)) == forks + 1, "two writers of one page"
    assert {line.pages[0] for line in lines} == {parent.pages[0]}, "a sealed page was copied"
    assert all(blocks.pool.references(page) == 1 for page in last)
    blocks.check()


def test_names_end_where_the_tokens_were_cut() -> None:
    blocks = BlockManager(pages=8, page_size=SIZE)
    tokens = list(range(14))
    table = filled(blocks, tokens)
    blocks.truncate(table, 9)
    assert table.sealed == 2
    blocks.release(table, step=0)
    assert pages(blocks, tokens) == 2
    assert blocks.statistics().truncated_total == 1
    blocks.check()


def test_a_cut_leaves_the_names_that_somebody_else_has() -> None:
    blocks = BlockManager(pages=8, page_size=SIZE)
    tokens = list(range(12))
    table, other = filled(blocks, tokens), filled(blocks, tokens)
    blocks.truncate(table, 0)
    blocks.release(table, step=0)
    assert pages(blocks, tokens) == 3
    blocks.release(other, step=0)
    assert pages(blocks, tokens) == 3
    blocks.check()


def test_a_cut_keeps_parents_of_pages_that_stay() -> None:
    blocks = BlockManager(pages=8, page_size=SIZE)
    trunk = list(range(8))
    blocks.release(filled(blocks, [*trunk, 1, 1, 1, 1]), step=0)
    table = filled(blocks, [*trunk, 2, 2, 2, 2])
    blocks.truncate(table, 0)
    blocks.release(table, step=0)
    assert pages(blocks, [*trunk, 1, 1, 1, 1]) == 3
    assert pages(blocks, [*trunk, 2, 2, 2, 2]) == 2
    blocks.check()


def test_a_name_with_other_tokens_is_a_miss_and_is_never_replaced() -> None:
    blocks = BlockManager(pages=4, page_size=SIZE)
    tokens = [1, 2, 3, 4]
    (name,) = names_of(tokens)
    first = filled(blocks, tokens)
    assert blocks.match([name], token_bytes([4, 3, 2, 1])) == 0
    table = PageTable()
    blocks.reserve(table, 0, 4, step=1)
    assert blocks.seal(table, name, token_bytes([4, 3, 2, 1]), step=1) == []
    assert table.sealed == 0
    assert blocks.match([name], token_bytes(tokens)) == 1
    assert blocks.pool.state(table.pages[0]) is PageState.OPEN
    assert list(first.pages) != list(table.pages)
    blocks.check()


def test_pages_without_a_name_are_reused_before_anything_cached_is_evicted() -> None:
    blocks = BlockManager(pages=4, page_size=SIZE)
    cached = list(range(8))
    blocks.release(filled(blocks, cached), step=0)
    for _ in range(20):
        blocks.release(filled(blocks, [9, 9, 9]), step=0)
    assert pages(blocks, cached) == 2
    assert blocks.statistics().evicted_for_space_total == 0


def test_a_chain_dies_from_its_end_and_the_least_recently_used_one_first() -> None:
    blocks = BlockManager(pages=4, page_size=SIZE)
    old, young = list(range(8)), list(range(20, 28))
    blocks.release(filled(blocks, old), step=0)
    blocks.release(filled(blocks, young), step=0)
    found: list[tuple[int, int]] = []
    for _ in range(4):
        page = blocks._index.next_victim()
        assert page is not None
        blocks.departures.evict_one()
        blocks.check()
        found.append((pages(blocks, old), pages(blocks, young)))
    assert found == [(1, 2), (0, 2), (0, 1), (0, 0)]


def test_who_was_used_again_goes_last_and_its_old_place_counts_no_more() -> None:
    blocks = BlockManager(pages=6, page_size=SIZE)
    first, second, third = [list(range(start, start + 8)) for start in (0, 20, 40)]
    for tokens in (first, second, third):
        blocks.release(filled(blocks, tokens), step=0)
    for tokens in (second, first):
        table = PageTable()
        assert blocks.adopt(table, names_of(tokens), token_bytes(tokens)) == 2
        blocks.release(table, step=0)
    left: list[list[int]] = []
    while blocks.departures.evict_one():
        blocks.check()
        left.append([pages(blocks, tokens) for tokens in (third, second, first)])
    assert left == [[1, 2, 2], [0, 2, 2], [0, 1, 2], [0, 0, 2], [0, 0, 1], [0, 0, 0]]


def test_pages_die_in_the_order_of_their_last_use_not_of_their_numbers() -> None:
    # The pool gives its lowest page first: here the highest page is the oldest.
    blocks = BlockManager(pages=3, page_size=SIZE)
    tables = [filled(blocks, [start] * SIZE) for start in range(3)]
    assert [table.pages[0] for table in tables] == [0, 1, 2]
    for table in reversed(tables):
        blocks.release(table, step=0)
    for alive in ([True, True, False], [True, False, False], [False] * 3):
        assert blocks.departures.evict_one()
        assert [pages(blocks, [start] * SIZE) == 1 for start in range(3)] == alive


def test_what_is_flushed_is_booked_as_flushed_and_not_as_evicted_for_space() -> None:
    blocks = BlockManager(pages=4, page_size=SIZE)
    blocks.release(filled(blocks, list(range(8))), step=0)
    blocks.release(filled(blocks, [9] * 16), step=0)
    assert blocks.statistics().evicted_for_space_total == 2
    held = filled(blocks, [9] * 4)
    assert blocks.flush() == 3
    assert blocks.flush() == 0
    counted = blocks.statistics()
    assert (counted.evicted_by_flush_total, counted.evicted_for_space_total) == (3, 2)
    assert counted.named_pages == len(held) == 1


def test_a_page_in_flight_is_found_again_but_not_reused() -> None:
    blocks = BlockManager(pages=2, page_size=SIZE)
    tokens = list(range(8))
    blocks.release(filled(blocks, tokens, step=1), step=1)
    assert (blocks.available, blocks.coming) == (0, 2)
    table = PageTable()
    assert blocks.reserve(table, 0, 4, step=2) is None
    assert blocks.adopt(table, names_of(tokens), token_bytes(tokens)) == 2
    blocks.settle(1)
    assert blocks.pool.statistics().sealed == 2
    blocks.release(table, step=1)
    assert (blocks.available, blocks.coming) == (2, 0)
    blocks.check()


def test_without_caching_nothing_is_named_and_nothing_found() -> None:
    blocks = BlockManager(pages=4, page_size=SIZE, caching=False)
    tokens = list(range(8))
    table = filled(blocks, tokens)
    blocks.claim(7, names_of(tokens))
    assert pages(blocks, tokens) == 0
    assert blocks.statistics().claims.claimed == 0
    blocks.release(table, step=0)
    assert blocks.pool.free == 4


def test_the_book_of_evictable_leaves_stays_small_when_nothing_is_evicted() -> None:
    blocks = BlockManager(pages=40, page_size=SIZE)
    for turn in range(3000):
        tokens = [turn % 5] * 8
        blocks.release(filled(blocks, tokens), step=0)
    assert blocks._index._order.entries <= 2 * 40 + 2 * 64 + 2
    blocks.check()
