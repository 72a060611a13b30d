"""What an admin wants of one conversation's pages: leases, warming, eviction; and holds."""

import random
from functools import partial

import pytest

from chatserve.cache.block_manager import BlockManager
from chatserve.cache.prefix_index import PrefixIndex
from chatserve.engine.drafts import DraftLimits
from chatserve.engine.sequence import Life
from chatserve.engine.wishes import HOLD_SECONDS, Dismissed, Leased, Warmth
from tests.engine.build import Clock, Setup, ask, random_tokens
from tests.engine.fake_depot import FakeDepot
from tests.engine.stepper import Stepper

SIZE = 4
OLD, NEW, LAST = (random_tokens(random.Random(seed), 41) for seed in (1, 2, 3))  # ten pages each


def _house(clock: Clock | None = None, **fields) -> Stepper:
    order = partial(PrefixIndex, clock=clock or Clock())

    def make_blocks(setup, below) -> BlockManager:
        return BlockManager(pages=setup.pages, page_size=SIZE, below=below, order=order)

    return Stepper(Setup(page_size=SIZE, make_blocks=make_blocks, **fields))


def _names(stepper: Stepper, tokens=OLD) -> tuple[bytes, ...]:
    return stepper.house.prepare(ask(tokens)).names


def _found(stepper: Stepper, tokens=OLD):
    """What a request for a prompt finds; it computes the rest."""
    asked = stepper.ask(ask(tokens, 1))
    stepper.run_all()
    stepper.assert_right(asked)
    stepper.assert_pages_hold_what_their_names_say()
    return asked.heard[0].receipts[0]


def _wishes(stepper: Stepper):
    return stepper.house.engine.wishes


# Leases --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_a_leased_conversation_outlasts_one_that_was_used_since(seconds: float) -> None:
    stepper = _house(pages=24)
    _found(stepper, OLD)
    _found(stepper, NEW)
    assert _wishes(stepper).lease(_names(stepper), seconds) == Leased(device=10)
    _found(stepper, LAST)
    assert (_found(stepper, OLD).device == 40) == (seconds > 0)


def test_a_lease_is_over_when_its_time_is() -> None:
    clock = Clock()
    stepper = _house(clock, pages=24)
    _found(stepper, OLD)
    _found(stepper, NEW)
    _wishes(stepper).lease(_names(stepper), 60.0)
    clock.now += 60.0
    _found(stepper, LAST)
    assert _found(stepper, OLD).device < 40


def test_a_pool_full_of_leased_pages_refuses_nobody() -> None:
    stepper = _house(pages=12)
    _found(stepper, OLD)
    _wishes(stepper).lease(_names(stepper), 600.0)
    assert _found(stepper, NEW).computed == 41
    stepper.house.assert_baseline()


def test_slots_of_host_memory_are_leased_too() -> None:
    stepper = _house(pages=64, slots=22)
    _found(stepper, OLD)
    _found(stepper, NEW)
    stepper.run_all()
    assert _wishes(stepper).lease(_names(stepper), 60.0) == Leased(10, 10)
    assert stepper.house.host.statistics().leased == 10
    _found(stepper, LAST)
    stepper.run_all()
    held = [name for name in _names(stepper) if stepper.house.host.holds(name)]
    assert len(held) == 10, "others left before them"


def test_public_pages_are_no_conversations() -> None:
    stepper = _house(pages=64)
    engine = stepper.house.engine
    engine.publish([engine.public_names(OLD[:20])], tokens_max=20)
    stepper.ask(ask(OLD, 1))
    stepper.run_all()
    names = _names(stepper)
    assert sum(map(engine.is_public, names)) == 5
    assert _wishes(stepper).lease(names, 60.0) == Leased(5)
    assert _wishes(stepper).evict(names) == Dismissed(device=5)
    asked = stepper.ask(ask(OLD, 1))
    stepper.run_all()
    stepper.assert_right()
    assert asked.heard[0].receipts[0].device == 20


# Holds ---------------------------------------------------------------------------------------


def test_a_hold_ends_by_itself_and_takes_a_quarter_of_the_pool_at_the_most() -> None:
    clock = Clock()
    stepper = _house(clock, pages=24)
    _found(stepper, OLD)
    _wishes(stepper).hold(_names(stepper))
    assert stepper.house.blocks.statistics().leased_pages == 6
    clock.now += HOLD_SECONDS
    assert stepper.house.blocks.statistics().leased_pages == 0


# Eviction ------------------------------------------------------------------------------------


def test_an_evicted_conversation_comes_back_from_the_disk() -> None:
    stepper = _house(pages=64, depot=FakeDepot())
    _found(stepper, OLD)
    _found(stepper, NEW)
    assert _wishes(stepper).evict(_names(stepper)) == Dismissed(device=10)
    assert _found(stepper, OLD).disk == 40
    assert _found(stepper, NEW).device == 40, "nobody asked for that"
    stepper.house.assert_baseline()


def test_host_memory_is_emptied_of_it_too() -> None:
    stepper = _house(pages=64, slots=64, depot=FakeDepot())
    _found(stepper, OLD)
    stepper.run_all()
    assert _wishes(stepper).evict(_names(stepper)) == Dismissed(device=10, host=10)
    receipt = _found(stepper, OLD)
    assert (receipt.device, receipt.host, receipt.disk) == (0, 0, 40)
    stepper.assert_slots_hold_what_their_names_say()


def test_pages_of_a_reply_under_way_stay_and_are_counted() -> None:
    stepper = _house(pages=64)
    asked = stepper.ask(ask(OLD, 12))
    stepper.until(lambda: Life.RUNNING in stepper.lives(asked) and bool(asked.heard[0].tokens))
    gone = _wishes(stepper).evict(_names(stepper))
    assert gone == Dismissed(device_stayed=10)
    stepper.run_all()
    stepper.assert_right(asked)
    gone = _wishes(stepper).evict(_names(stepper))
    assert gone == Dismissed(device_stayed=10), "what the reply said goes on after them"
    line = (*OLD, *asked.heard[0].tokens)
    assert _wishes(stepper).evict(_names(stepper, line)) == Dismissed(device=len(line) // SIZE)
    stepper.house.assert_baseline()


# Warming -------------------------------------------------------------------------------------


def _left_over(**fields) -> Stepper:
    """A house whose pages of OLD are below and nowhere else."""
    stepper = _house(depot=FakeDepot(), **fields)
    _found(stepper, OLD)
    stepper.run_all()
    _wishes(stepper).evict(_names(stepper))
    return stepper


def _warm(stepper: Stepper, tokens=OLD) -> Warmth:
    return _wishes(stepper).warm(stepper.house.prepare(ask(tokens)))


@pytest.mark.parametrize("slots", [0, 64])
def test_a_warmed_conversation_is_on_the_device_before_anybody_asks(slots: int) -> None:
    stepper = _left_over(pages=64, slots=slots)
    computed = stepper.house.runner.computed_positions
    assert _warm(stepper) == Warmth(coming=10)
    assert _warm(stepper) == Warmth(coming=10), "asked twice, loaded once"
    stepper.run_all()
    assert _warm(stepper) == Warmth(device=10)
    assert stepper.house.blocks.statistics().transit.loaded_total == 10
    assert stepper.house.runner.computed_positions == computed, "warming computes nothing"
    assert _found(stepper, OLD).device == 40
    stepper.house.assert_baseline()


def test_what_is_nowhere_is_not_computed() -> None:
    stepper = _left_over(pages=64)
    assert _warm(stepper, (*OLD[:40], *NEW)) == Warmth(coming=10, nowhere=10)
    assert _warm(stepper, NEW) == Warmth(nowhere=10)
    stepper.run_all()
    assert stepper.house.blocks.statistics().named_pages == 10


def test_a_conversation_is_warmed_while_requests_run() -> None:
    stepper = _left_over(pages=64)
    asked = stepper.ask(ask(NEW, 40))
    stepper.until(lambda: bool(asked.heard[0].tokens))
    assert _warm(stepper) == Warmth(coming=10)
    while _warm(stepper) != Warmth(device=10):
        stepper.plan()
        stepper.order()
        assert stepper.move() is None or stepper.deliver()
        stepper.commit()
    assert not asked.over, "it did not wait for the others' end"
    stepper.run_all()
    stepper.assert_right()
    stepper.house.assert_baseline()


def test_a_request_that_comes_meanwhile_waits_for_the_same_load() -> None:
    stepper = _left_over(pages=64)
    reads = stepper.house.setup.depot.reads
    _warm(stepper)
    assert _found(stepper, OLD).disk == 40
    assert stepper.house.setup.depot.reads - reads == 10


def test_warming_takes_from_others_as_much_as_drafts_may() -> None:
    stepper = _left_over(pages=22, drafts=DraftLimits(pool_share=0.25))
    _found(stepper, NEW)
    _found(stepper, LAST)
    free = stepper.house.blocks.pool.free
    assert free == 2
    assert _warm(stepper) == Warmth(coming=free + 5, below=3)
    stepper.run_all()
    stepper.house.assert_baseline()


def test_what_turns_out_bad_below_is_not_there_and_nothing_else_happens() -> None:
    stepper = _left_over(pages=64)
    stepper.house.setup.depot.torn.add(_names(stepper)[4])
    _warm(stepper)
    stepper.run_all()
    assert _warm(stepper).device == 4
    assert _found(stepper, OLD).computed >= 1
    stepper.house.assert_baseline()


def test_without_a_cache_there_is_nothing_to_wish_for() -> None:
    stepper = Stepper(Setup(page_size=SIZE, caching=False))
    _found(stepper, OLD)
    assert _warm(stepper) == Warmth(nowhere=10)
    assert _wishes(stepper).lease(_names(stepper), 60.0) == Leased()
    assert _wishes(stepper).evict(_names(stepper)) == Dismissed()
