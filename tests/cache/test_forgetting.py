"""Names that are forgotten while pages under them, or after them, are on their way."""

import pytest

from chatserve.cache.departures import Evicted
from chatserve.cache.page_table import PageTable
from prefix_store.names import token_bytes
from tests.cache.test_block_manager import SIZE, filled, names_of, pages
from tests.cache.test_departures import NEW, OLD, Below, house, told


def test_what_is_loaded_under_a_page_that_was_forgotten_meanwhile_gets_no_name() -> None:
    below = Below()
    blocks, _ = house(20, below)
    told(blocks, OLD[:SIZE])
    names = names_of(OLD)
    below.names.update(names[1:])
    table = PageTable()
    assert blocks.adopt(table, names, token_bytes(OLD)) == 1
    load = blocks.begin_load(7, table, names[1:], token_bytes(OLD[SIZE:]))
    assert load is not None
    blocks.forget(names[:1])  # the load's own names are not among these
    assert blocks.forgetting.ghosts == 1, "the load has it still"
    assert blocks.end_load(load, [True, True]) == (0, [])
    assert pages(blocks, OLD) == 0
    assert len(blocks._index) == 0
    assert blocks.pool.free == blocks.pool.total
    blocks.check()


@pytest.mark.parametrize("first", [0, 1, 2])
def test_pages_that_were_forgotten_while_they_were_loaded_get_no_name(first: int) -> None:
    below = Below()
    blocks, _ = house(20, below)
    names, tokens = names_of(OLD), token_bytes(OLD)
    below.names.update(names)
    load = blocks.begin_load(7, PageTable(), names, tokens)
    assert load is not None
    blocks.forget(names[first:])  # none of them is named yet
    assert blocks.end_load(load, [True] * 3) == (first, [])
    assert pages(blocks, OLD) == len(blocks._index) == first, "those before them are"
    blocks.check()
    rest = PageTable()
    assert blocks.adopt(rest, names, tokens) == first
    again = blocks.begin_load(8, rest, names[first:], tokens[4 * SIZE * first :])
    assert again is not None
    assert blocks.end_load(again, [True] * (3 - first)) == (3 - first, [])
    assert pages(blocks, OLD) == 3, "what is loaded from then on has its name"
    blocks.check()


def test_what_is_computed_anew_is_copied_though_the_forgotten_one_is_being_copied() -> None:
    below = Below()
    blocks, _ = house(20, below)
    told(blocks, OLD)
    keeps = blocks.take_unkept(9)
    assert keeps is not None
    blocks.forget(names_of(OLD))
    assert blocks.statistics().transit.keeping == 0
    told(blocks, OLD)
    blocks.check()
    blocks.end_keep(keeps, [True] * 3)  # and dropped from there with the rest
    again = blocks.take_unkept(9)
    assert again is not None
    assert [keep.name for keep in again.pages] == names_of(OLD)
    assert not {keep.page for keep in again.pages} & {keep.page for keep in keeps.pages}
    blocks.end_keep(again, [True] * 3)
    blocks.check()


def test_a_late_copy_of_a_forgotten_page_is_none_of_the_page_that_was_computed_anew() -> None:
    below = Below()
    blocks, _ = house(6, below)
    names = names_of(OLD)
    told(blocks, OLD)
    keeps = blocks.take_unkept(9)
    assert keeps is not None
    blocks.forget(names)
    told(blocks, OLD)
    assert blocks.statistics().transit.unkept == 3
    below.names.update(names)  # by the thread that was at it, and yet to be dropped with the rest
    assert blocks.evict(names) == Evicted(0, 3)
    told(blocks, NEW)
    assert pages(blocks, OLD) == 0
    assert blocks.statistics().transit.lost_total == 3
    blocks.end_keep(keeps, [True] * 3)
    blocks.check()


def test_a_copy_of_a_page_that_was_being_filled_does_not_get_the_forgotten_name() -> None:
    blocks, _ = house(20)
    names = names_of(OLD)
    first = PageTable()
    blocks.reserve(first, 0, 2, step=0)
    second = blocks.fork(first)
    blocks.forget(names)
    (copy,) = blocks.reserve(second, 2, SIZE, step=0) or ()
    assert second.pages[0] == copy.target
    for table in (second, first):
        blocks.seal(table, names[0], token_bytes(OLD[:SIZE]), step=0)
        assert table.sealed == 0, "filled since before it was forgotten"
    blocks.release(first, step=0)
    blocks.release(second, step=0)
    assert pages(blocks, OLD) == 0
    blocks.release(filled(blocks, OLD), step=0)
    assert pages(blocks, OLD) == 3, "who begins from then on names it again"
    blocks.check()
