"""Pages that go down and come back: who waits, who does not, and what is done when it fails."""

import asyncio
import random
import threading

import pytest

from chatserve.cache.transit import Keeps, Load
from chatserve.engine.drafts import DraftLimits
from chatserve.engine.sequence import Life
from chatserve.engine.tiers import LOADS_MAX, TierLimits
from tests.engine.build import Setup, ask, build, quiet, random_tokens, running
from tests.engine.fake_depot import FakeDepot
from tests.engine.oracle import assert_right, listen
from tests.engine.stepper import Stepper

SIZE = 4
LONG = tuple(range(40))  # ten pages


def _house(**fields: object) -> tuple[Stepper, FakeDepot]:
    depot = FakeDepot()
    return Stepper(Setup(depot=depot, page_size=SIZE, **fields)), depot  # type: ignore[arg-type]


def _left_over(**fields: object) -> tuple[Stepper, FakeDepot]:
    """A house whose pages of LONG are below and nowhere else, and nothing else is."""
    stepper, depot = _house(**fields)
    stepper.ask(ask(LONG, 1))
    stepper.run_all()
    stepper.house.blocks.flush()
    assert len(depot.kept) == 10
    return stepper, depot


def test_what_was_computed_goes_down_and_comes_back() -> None:
    stepper, depot = _left_over()
    computed = stepper.house.runner.computed_positions
    asked = stepper.ask(ask((*LONG, 7), 3))
    stepper.run_all()
    stepper.assert_right(asked)
    (receipt,) = asked.heard[0].receipts
    assert (receipt.device, receipt.disk, receipt.computed) == (0, 40, 1)
    assert stepper.house.runner.computed_positions - computed == 1 + 2, "one prompt token, two more"
    stepper.assert_pages_hold_what_their_names_say()
    assert depot.kept.keys() == set(stepper.house.blocks._index.pages().values())


def test_generated_pages_go_down_too_with_their_place_in_the_chain() -> None:
    stepper, depot = _house()
    asked = stepper.ask(ask((1, 2, 3), 18))
    stepper.run_all()
    tokens = (1, 2, 3, *asked.heard[0].tokens)
    names = stepper.house.prepare(ask(tokens, 1)).names
    assert [depot.kept[name].position for name in names] == [0, 1, 2, 3, 4]
    assert [depot.kept[name].parent for name in names] == [None, *names[:-1]]


def test_a_load_is_a_wait_without_pages_and_others_run_meanwhile() -> None:
    stepper, _ = _left_over()
    waiting = stepper.ask(ask(LONG, 2))
    assert stepper.plan() is None, "nothing to compute until the pages are there"
    assert stepper.lives(waiting) == {Life.FOLLOWING}
    assert not stepper.sequences(waiting)[0].table.pages
    other = stepper.ask(ask((90, 91, 92), 5))
    while not other.over:
        assert stepper.plan() or stepper.commit(), "the load holds up another request"
    assert stepper.lives(waiting) == {Life.FOLLOWING}
    stepper.run_all()
    stepper.assert_right(waiting, other)


def test_a_queue_that_is_full_up_does_not_strand_what_arrives() -> None:
    """Lessons 19: completions are processed apart from the queue's head."""
    stepper, _ = _left_over(sequences_max=1)
    waiting = stepper.ask(ask(LONG, 1))
    stepper.plan()
    stepper.ask(ask((80, 81), 30))
    stepper.ask(ask((70, 71), 30))
    stepper.plan()
    stepper.order()
    assert isinstance(stepper.move(), Load)
    assert stepper.deliver()
    assert stepper.lives(waiting) == {Life.QUEUED}
    assert stepper.house.blocks.statistics().transit.loading == 0
    stepper.run_all()
    stepper.assert_right()


def test_many_who_want_the_same_pages_load_them_once() -> None:
    stepper, depot = _left_over()
    before = depot.reads
    asked = [stepper.ask(ask((*LONG, tail), 2)) for tail in range(5)]
    stepper.run_all()
    stepper.assert_right(*asked)
    assert depot.reads - before == 10
    assert [one.heard[0].receipts[0].disk for one in asked] == [40] * 5


@pytest.mark.parametrize("bad", [0, 3, 9])
def test_what_does_not_arrive_is_computed(bad: int) -> None:
    stepper, depot = _left_over()
    names = stepper.house.prepare(ask(LONG, 1)).names
    depot.torn.add(names[bad])
    asked = stepper.ask(ask((*LONG, 5), 2))
    stepper.run_all()
    stepper.assert_right(asked)
    (receipt,) = asked.heard[0].receipts
    assert (receipt.device, receipt.disk, receipt.computed) == (0, bad * SIZE, 41 - bad * SIZE)
    stepper.assert_pages_hold_what_their_names_say()
    assert stepper.house.blocks.statistics().transit.failed_total == 10 - bad
    depot.torn.clear()
    stepper.house.blocks.flush()
    again = stepper.ask(ask((*LONG, 5), 2))
    stepper.run_all()
    assert again.heard[0].receipts[0].disk == 40, "what was bad below has been written anew"


def test_a_depot_that_raises_costs_time_and_nothing_else() -> None:
    stepper, depot = _left_over()
    depot.raising = True
    asked = stepper.ask(ask(LONG, 2))
    stepper.run_all()
    stepper.assert_right(asked)
    assert asked.heard[0].receipts[0].disk == 0
    assert stepper.sequences(asked) == []
    assert stepper.scheduler.statistics().tiers.loads_total == LOADS_MAX, "not for ever"


def test_nothing_of_another_tenants_or_salt_is_found_below() -> None:
    stepper, depot = _left_over()
    before = depot.reads
    asked = [stepper.ask(ask(LONG, 1, tenant="b")), stepper.ask(ask(LONG, 1, salt="s"))]
    stepper.run_all()
    assert [one.heard[0].receipts[0].computed for one in asked] == [40, 40]
    assert depot.reads == before
    own = stepper.ask(ask(LONG, 1, tenant="b"))
    stepper.run_all()
    assert own.heard[0].receipts[0].computed == 1


@pytest.mark.parametrize("moved", [False, True])
def test_who_leaves_while_its_pages_load_leaves_no_trace(moved: bool) -> None:
    stepper, _ = _left_over()
    asked = stepper.ask(ask(LONG, 2))
    stepper.plan()
    stepper.order()
    if moved:
        stepper.move()
    stepper.abort(asked)
    stepper.scheduler.check()
    stepper.run_all()
    stepper.house.assert_baseline()
    came = stepper.ask(ask(LONG, 1))
    stepper.run_all()
    assert came.heard[0].receipts[0].device == 39, "what was loaded for nobody is there"


def test_pages_being_read_are_not_evicted_nor_are_those_before_them() -> None:
    stepper, depot = _house(pages=12)
    stepper.ask(ask(LONG, 1))
    while not stepper.asked[1].over:
        stepper.plan()
        stepper.commit()
    stepper.order()
    owners = stepper.house.blocks.transit.owners()
    assert len(owners) == 10
    other = stepper.ask(ask(tuple(range(50, 70)), 1))
    assert stepper.plan() is None, "all but two pages are being read"
    assert isinstance(stepper.move(), Keeps)
    assert len(depot.kept) == 10
    stepper.run_all()
    stepper.assert_right(other)


def test_what_is_evicted_before_its_copy_is_counted_as_lost() -> None:
    stepper, depot = _house(pages=12)
    first = stepper.ask(ask(LONG, 1))
    while not first.over:
        stepper.plan()
        stepper.commit()
    second = stepper.ask(ask(tuple(range(50, 90)), 1))
    while not second.over:
        stepper.plan()
        stepper.commit()
    transit = stepper.house.blocks.statistics().transit
    assert transit.lost_total > 0
    assert transit.lost_total + transit.unkept == 20
    stepper.run_all()
    assert len(depot.kept) == 20 - transit.lost_total


def test_a_lost_page_is_kept_when_somebody_has_it_again() -> None:
    stepper, depot = _left_over()
    names = stepper.house.prepare(ask(LONG, 1)).names
    stepper.ask(ask(LONG, 1))
    stepper.run_all()
    del depot.kept[names[4]]  # the disk made room
    stepper.ask(ask(LONG, 1))
    stepper.run_all()
    assert names[4] in depot.kept


def test_use_on_the_device_counts_below() -> None:
    stepper, depot = _left_over()
    stepper.ask(ask(LONG, 1))
    stepper.run_all()
    depot.touched.clear()
    stepper.ask(ask(LONG, 1))
    stepper.run_all()
    assert depot.touched == list(stepper.house.prepare(ask(LONG, 1)).names)


def test_the_receipt_says_what_was_saved() -> None:
    stepper, _ = _left_over()
    tiers = stepper.scheduler.tiers
    tiers.observe_step(1000, 10.0)
    rate = tiers.statistics().compute_token_seconds
    assert rate is not None
    assert rate > 0.001
    stepper.job_seconds = 0.01
    asked = stepper.ask(ask(LONG, 1))
    stepper.run_all()
    assert asked.heard[0].receipts[0].saved == pytest.approx(39 * rate - 0.01)
    again = stepper.ask(ask(LONG, 1))
    stepper.run_all()
    assert again.heard[0].receipts[0].saved == pytest.approx(39 * rate), "from the device: at once"


def test_copies_wait_for_a_quiet_moment_but_for_a_small_share() -> None:
    limits = TierLimits(keep_pages=2, busy_share=0.1)
    stepper, depot = _house(tiers=limits, pages=200, context_length=200)
    asked = stepper.ask(ask(LONG, 100))
    stepper.job_seconds = 1.0
    kept: list[int] = []
    for _ in range(60):
        stepper.plan()
        stepper.order()
        stepper.move()
        stepper.deliver()
        stepper.commit()
        kept.append(len(depot.kept))
        stepper.house.clock.now += 1.0
    assert not asked.over
    assert 8 <= kept[-1] <= 14, "two pages every ten seconds"
    stepper.run_all()
    assert len(depot.kept) == (40 + 99) // SIZE, "and the rest at once, when all is quiet"


def test_a_pool_that_is_full_of_kept_pages_is_no_reason_to_hurry() -> None:
    """Free pages are gone for good in a server that has run for a while."""
    limits = TierLimits(keep_pages=2, busy_share=0.1)
    stepper, depot = _house(tiers=limits, pages=120, context_length=200)
    source = random.Random(3)
    for _ in range(12):
        stepper.ask(ask(random_tokens(source, 40), 1))
        stepper.run_all()
    assert stepper.house.blocks.pool.free == 0
    before = len(depot.kept)
    stepper.ask(ask(LONG, 60))
    stepper.job_seconds = 1.0
    for _ in range(30):
        stepper.plan()
        stepper.order()
        stepper.move()
        stepper.deliver()
        stepper.commit()
        stepper.house.clock.now += 1.0
    assert len(depot.kept) - before <= 8, "two pages every ten seconds"


def test_copies_do_not_wait_where_pages_would_be_lost() -> None:
    stepper, depot = _house(pages=14, tiers=TierLimits(keep_pages=2, busy_share=1e-9))
    stepper.ask(ask(LONG, 12))
    for _ in range(100):
        stepper.plan()
        stepper.order()
        stepper.move()
        stepper.deliver()
        stepper.commit()
    assert len(depot.kept) >= 10


def test_the_write_budget_holds_in_the_long_run() -> None:
    rate = 0.01  # pages a second: 36 an hour
    stepper, depot = _house(tiers=TierLimits(write_pages_a_second=rate), pages=1000)
    source = random.Random(4)
    for number in range(60):
        stepper.ask(ask(random_tokens(source, 40), 1))
        stepper.run_all()
        assert abs(len(depot.kept) - min(10 * (number + 1), 36 + number)) <= 1
        stepper.house.clock.now += 100.0


async def test_what_the_write_budget_had_no_room_for_is_written_later_unasked() -> None:
    depot = FakeDepot()
    house = build(Setup(depot=depot, tiers=TierLimits(write_pages_a_second=1 / 3600)))
    async with running(house) as engine:
        await listen(engine.open(house.prepare(ask(LONG, 1))))
        await quiet(house)
        assert len(depot.kept) == 1, "an hour's worth at once"
        house.clock.now += 3600.0
        assert engine._ferry._timer is not None, "nothing else would come"
        engine._ferry._timer.cancel()
        engine._ferry.wake()
        while len(depot.kept) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)


def test_a_draft_brings_pages_up_before_the_request_comes() -> None:
    stepper, depot = _left_over()
    computed = stepper.house.runner.computed_positions
    assert stepper.draft("typing", (*LONG, 1, 2, 3, 4))
    stepper.run_all()
    assert depot.reads == 10
    assert stepper.house.runner.computed_positions - computed == SIZE, "the new page alone"
    assert stepper.house.blocks.statistics().draft_pages == 11
    asked = stepper.ask(ask((*LONG, 1, 2, 3, 4, 5), 2))
    stepper.run_all()
    stepper.assert_right(asked)
    assert asked.heard[0].receipts[0].device == 44
    assert depot.reads == 10


def test_a_request_waits_for_what_a_draft_is_loading() -> None:
    stepper, depot = _left_over()
    assert stepper.draft("typing", LONG)
    assert stepper.plan() is None
    stepper.order()
    asked = stepper.ask(ask((*LONG, 9), 2))
    stepper.plan()
    assert stepper.lives(asked) == {Life.FOLLOWING}
    stepper.run_all()
    stepper.assert_right(asked)
    assert depot.reads == 10
    assert stepper.house.blocks.statistics().draft_pages == 0, "the request has adopted them"


@pytest.mark.parametrize("when", ["ordered", "moved"])
def test_a_draft_that_is_withdrawn_while_it_loads_leaves_pages_and_nothing_else(when: str) -> None:
    stepper, _ = _left_over()
    assert stepper.draft("typing", LONG)
    assert stepper.plan() is None
    stepper.order()
    if when == "moved":
        stepper.move()
    stepper.scheduler.withdraw("typing")
    stepper.run_all()
    stepper.house.assert_baseline()
    assert stepper.house.blocks.statistics().draft_pages == 10


def test_a_draft_that_cannot_be_loaded_is_computed() -> None:
    stepper, depot = _left_over()
    depot.raising = True
    assert stepper.draft("typing", LONG)
    stepper.run_all()
    depot.raising = False
    assert stepper.house.blocks.statistics().draft_pages == 10
    stepper.assert_pages_hold_what_their_names_say()


def test_a_drafts_load_takes_no_more_of_others_pages_than_a_draft_may() -> None:
    limits = DraftLimits(pool_share=0.25)
    stepper, _ = _left_over(pages=16, drafts=limits)
    stepper.ask(ask(tuple(range(50, 90)), 1))  # ten pages of somebody else
    stepper.run_all()
    assert stepper.draft("typing", LONG)
    stepper.run_all()
    statistics = stepper.house.blocks.statistics()
    assert 0 < statistics.draft_pages <= 6 + 4
    assert statistics.evicted_for_space_total <= 4


async def test_an_engine_with_threads_serves_from_below() -> None:
    depot = FakeDepot()
    house = build(Setup(depot=depot, pages=64))
    request, longer = ask(LONG, 3), ask((*LONG, 1, 2), 3)
    async with running(house) as engine:
        assert not engine.statistics().keep_processor_seconds_total
        assert_right(request, await listen(engine.open(house.prepare(request))), 97)
        await quiet(house)
        while house.blocks.statistics().transit.unkept:  # noqa: ASYNC110
            await asyncio.sleep(0)
        copying = engine.statistics().keep_processor_seconds_total
        assert copying > 0
        house.blocks.flush()
        assert_right(request, await listen(engine.open(house.prepare(request))), 97)
        assert engine.statistics().keep_processor_seconds_total == copying, "loads are not counted"
        house.blocks.flush()
        heard = await listen(engine.open(house.prepare(longer)))
        assert_right(longer, heard, 97)
        assert heard[0].receipts[0].disk == 40
        await quiet(house)
    house.assert_baseline()


class _StuckDepot(FakeDepot):
    """Its reads wait until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.let_go = threading.Event(), threading.Event()

    def get(self, reads):
        self.entered.set()
        assert self.let_go.wait(60)
        return super().get(reads)


async def test_a_recovery_waits_for_pages_that_a_thread_still_writes() -> None:
    """Else it would write into pages that the new cache has given to somebody else."""
    depot = _StuckDepot()
    house = build(Setup(depot=depot, pages=16))
    first = ask(LONG, 1)
    async with running(house, recoveries=1) as engine:
        await listen(engine.open(house.prepare(first)))
        await quiet(house)
        house.blocks.flush()
        old = house.blocks
        stream = engine.open(house.prepare(first))
        while not depot.entered.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0)
        engine._recovering = True
        engine._signal.set()
        other = ask(tuple(range(50, 90)), 1)
        second = engine.open(house.prepare(other))
        for _ in range(100):
            await asyncio.sleep(0)
        assert house.blocks is old, "a thread still has pages of the old cache"
        depot.let_go.set()
        assert_right(other, await listen(second), 97)
        assert_right(first, await listen(stream), 97)
        assert house.blocks is not old
        await quiet(house)


async def test_what_has_no_copy_gets_one_when_the_engine_stops() -> None:
    depot = FakeDepot()
    house = build(Setup(depot=depot, tiers=TierLimits(keep_pages=1, busy_share=1e-9)))
    async with running(house) as engine:
        stream = engine.open(house.prepare(ask(LONG, 100)))
        async for batch in stream:
            if batch[-1].tokens:
                break
    assert len(depot.kept) >= 10
