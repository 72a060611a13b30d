"""Host memory between the device and what is below: what goes there, comes back, and fails."""

import asyncio

import pytest

from chatserve.cache.page_pool import PageState
from chatserve.cache.transit import Keeps, Load
from chatserve.engine.plan import NO_MOVES, StepPlan
from chatserve.engine.sequence import Life
from chatserve.engine.tiers import LOADS_MAX, TierLimits
from chatserve.engine.values import Flushed
from tests.engine.build import Setup, ask, build, quiet, running
from tests.engine.fake_depot import FakeDepot
from tests.engine.oracle import assert_right, listen
from tests.engine.stepper import InjectedFault, Stepper

SIZE = 4
LONG = tuple(range(40))  # ten pages


def _house(slots: int = 64, **fields: object) -> Stepper:
    return Stepper(Setup(page_size=SIZE, slots=slots, **fields))  # type: ignore[arg-type]


def _left_over(slots: int = 64, **fields: object) -> Stepper:
    """A house whose pages of LONG are in host memory, and not on the device."""
    stepper = _house(slots, **fields)
    stepper.ask(ask(LONG, 1))
    stepper.run_all()
    stepper.house.blocks.flush()
    return stepper


def _receipt(stepper: Stepper, tokens=LONG, **fields):
    asked = stepper.ask(ask(tokens, 2, **fields))
    stepper.run_all()
    stepper.assert_right(asked)
    stepper.assert_pages_hold_what_their_names_say()
    stepper.assert_slots_hold_what_their_names_say()
    return asked.heard[0].receipts[0]


def _pictures(stepper: Stepper):
    return stepper.house.host.statistics()


def test_what_was_computed_is_saved_and_promoted() -> None:
    stepper = _left_over()
    assert _pictures(stepper).saved_total == 10
    computed = stepper.house.runner.computed_positions
    receipt = _receipt(stepper, (*LONG, 7))
    assert (receipt.device, receipt.host, receipt.disk, receipt.computed) == (0, 40, 0, 1)
    assert receipt.cached == 40
    assert stepper.house.runner.computed_positions - computed == 1 + 1
    assert _pictures(stepper).promoted_total == 10
    assert _receipt(stepper, (*LONG, 7)).device == 40, "then it is on the device"


def test_a_save_travels_with_a_step_and_an_idle_one_alone() -> None:
    stepper = _house()
    stepper.ask(ask(LONG, 9))
    plans: list[StepPlan] = []
    while (plan := stepper.plan()) is not None or stepper.commit():
        plans += [plan] if plan is not None else []
    with_saves = [plan for plan in plans if plan.moves.saves]
    assert with_saves
    assert any(plan.slices for plan in with_saves), "beside what is computed"
    assert not plans[-1].slices, (
        "what the last step sealed goes without waiting for another request"
    )
    assert plans[-1].moves.saves
    assert sum(len(plan.moves.saves) for plan in plans) == 12
    pages = [move.source for plan in plans for move in plan.moves.saves]
    assert len(set(pages)) == 12, "each once"


def test_nobody_reads_a_promoted_page_before_its_step_has_committed() -> None:
    stepper = _left_over()
    waiting = stepper.ask(ask(LONG, 2))
    plan = stepper.plan()
    assert plan is not None
    assert not plan.slices
    assert len(plan.moves.promotions) == 10
    assert stepper.lives(waiting) == {Life.FOLLOWING}
    blocks = stepper.house.blocks
    assert {blocks.pool.state(move.target) for move in plan.moves.promotions} == {PageState.LOADING}
    other = stepper.ask(ask((90, 91, 92), 1))
    assert stepper.plan() is not None, "others go on meanwhile"
    stepper.run_all()
    stepper.assert_right(waiting, other)


def test_a_long_load_is_spread_over_steps() -> None:
    stepper = _left_over(tiers=TierLimits(move_pages=3))
    stepper.ask(ask(LONG, 2))
    counts: list[int] = []
    while (plan := stepper.plan()) is not None or stepper.commit():
        counts += [len(plan.moves.promotions)] if plan and plan.moves.promotions else []
    assert counts == [3, 3, 3, 1]
    stepper.assert_right()


def test_a_page_whose_memory_failed_is_not_served() -> None:
    stepper = _left_over()
    names = stepper.house.prepare(ask(LONG)).names
    slot = stepper.house.host._index.page(names[6])
    stepper.spoil(slot)
    receipt = _receipt(stepper)
    assert (receipt.host, receipt.computed) == (24, 16)
    picture = _pictures(stepper)
    assert picture.corrupt_total == 1
    assert stepper.house.host.holds(names[6]), "computed anew, it is saved again"
    stepper.house.blocks.flush()
    assert _receipt(stepper).host == 39


def test_a_page_whose_memory_failed_is_not_copied_to_disk_either() -> None:
    depot = FakeDepot()
    stepper = _house(depot=depot, tiers=TierLimits(keep_pages=4))
    stepper.ask(ask(LONG, 1))
    while stepper.plan() is not None or stepper.commit():
        pass
    names = stepper.house.prepare(ask(LONG)).names
    stepper.spoil(stepper.house.host._index.page(names[2]))
    stepper.run_all()
    assert depot.kept.keys() == set(names) - {names[2]}


def test_host_memory_that_is_too_small_keeps_what_it_can_and_disk_has_the_rest() -> None:
    depot = FakeDepot()
    stepper = _left_over(4, depot=depot)
    assert _pictures(stepper).cached == 4
    assert len(depot.kept) == 10
    receipt = _receipt(stepper)
    assert receipt.host + receipt.disk == 39


def test_a_chain_may_lie_in_both_and_comes_up_in_order() -> None:
    depot = FakeDepot()
    stepper = _left_over(depot=depot)
    names = stepper.house.prepare(ask(LONG)).names
    assert depot.kept.keys() == set(names)
    stepper.house.host.forget([names[5]])  # and what continues it
    assert stepper.house.host.find(names) == 10
    receipt = _receipt(stepper)
    assert (receipt.host, receipt.disk, receipt.computed) == (20, 19, 1)


def test_what_was_fetched_from_disk_stays_in_host_memory() -> None:
    depot = FakeDepot()
    stepper = _left_over(depot=depot)
    stepper.house.host.flush()
    assert _receipt(stepper).disk == 39
    before = depot.reads
    stepper.house.blocks.flush()
    assert _receipt(stepper).host == 39
    assert depot.reads == before
    slot = stepper.house.host._index.page(stepper.house.prepare(ask(LONG)).names[1])
    stepper.spoil(slot)
    stepper.house.blocks.flush()
    assert _receipt(stepper).host == SIZE, "its checksum was taken when it was first brought up"


@pytest.mark.parametrize("bad", [0, 4, 9])
def test_what_the_disk_does_not_give_is_computed(bad: int) -> None:
    depot = FakeDepot()
    stepper = _left_over(depot=depot)
    stepper.house.host.flush()
    depot.torn.add(stepper.house.prepare(ask(LONG)).names[bad])
    receipt = _receipt(stepper, (*LONG, 5))
    assert (receipt.disk, receipt.computed) == (bad * SIZE, 41 - bad * SIZE)
    assert _pictures(stepper).filling == _pictures(stepper).held == 0


def test_another_tenant_finds_nothing() -> None:
    stepper = _left_over()
    assert _receipt(stepper, tenant="b").computed == 40
    assert _receipt(stepper, salt="s").computed == 40
    stepper.house.blocks.flush()
    assert _receipt(stepper, tenant="b").host == 39


def test_who_leaves_while_pages_come_up_leaves_no_trace() -> None:
    stepper = _left_over(depot=FakeDepot())
    for flush in (False, True):
        if flush:
            stepper.house.host.flush()
        stepper.house.blocks.flush()
        asked = stepper.ask(ask(LONG, 2))
        stepper.plan()
        stepper.order()
        stepper.abort(asked)
        stepper.run_all()
        stepper.house.assert_baseline()
        assert _pictures(stepper).filling == _pictures(stepper).held == 0


def test_a_failed_step_brings_nothing_and_accuses_nobody() -> None:
    stepper = _left_over()

    def fail(plan: StepPlan) -> None:
        if plan.moves.promotions:
            raise InjectedFault("a copy that fails")

    stepper.house.runner.before_step = fail
    asked = stepper.ask(ask(LONG, 2))
    stepper.run_all()
    stepper.assert_right(asked)
    assert asked.heard[0].receipts[0].computed == 40
    statistics = stepper.scheduler.statistics()
    assert statistics.failed_steps_total == LOADS_MAX
    assert statistics.quarantined == 0
    stepper.house.runner.before_step = lambda plan: None
    stepper.house.blocks.flush()
    assert _receipt(stepper).host == 39, "what is in host memory is as good as before"


def test_two_loads_for_few_slots_wait_for_each_other() -> None:
    depot = FakeDepot()
    stepper = _house(4, depot=depot, tiers=TierLimits(move_pages=4))
    other = tuple(range(50, 90))
    for tokens in (LONG, other):
        stepper.ask(ask(tokens, 1))
        stepper.run_all()
    stepper.house.blocks.flush()
    stepper.house.host.flush()
    kept = {
        tokens: stepper.house.host.find(stepper.house.prepare(ask(tokens)).names)
        for tokens in (LONG, other)
    }
    asked = [stepper.ask(ask(tokens, 2)) for tokens in (LONG, other)]
    stepper.run_all()
    stepper.assert_right(*asked)
    assert set(kept.values()) == {10}, "nothing made room in host memory before it had a copy"
    assert [one.heard[0].receipts[0].disk for one in asked] == [39, 39]


def test_who_finds_no_slot_at_all_is_computed_at_once() -> None:
    """Nobody waits for the I/O threads to be done with others' pages."""
    depot = FakeDepot()
    stepper = _house(4, depot=depot)
    stepper.ask(ask(LONG, 1))
    stepper.run_all()
    stepper.house.blocks.flush()
    stepper.house.host.flush()
    stepper.ask(ask(tuple(range(50, 67)), 1))
    while stepper.plan() is not None or stepper.commit():
        pass
    stepper.order()
    assert stepper.house.host.available == 0, "all slots are being copied down"
    stepper.ask(ask(LONG, 1))
    plan = stepper.plan()
    assert plan is not None
    assert plan.slices
    stepper.run_all()
    stepper.assert_right()


def test_a_failed_save_is_no_copy() -> None:
    stepper = _house()

    def fail(plan: StepPlan) -> None:
        if plan.moves.saves:
            raise InjectedFault("a copy that fails")

    stepper.house.runner.before_step = fail
    asked = stepper.ask(ask(LONG, 1))
    stepper.run_all()
    stepper.assert_right(asked)
    assert _pictures(stepper).free == 64
    stepper.house.runner.before_step = lambda plan: None
    assert _receipt(stepper, (*LONG, 9)).device == 40
    assert _pictures(stepper).saved_total == 10, "wanted again by who has it again"


def test_moves_that_fail_convict_nobody_who_is_on_probation() -> None:
    stepper = _left_over(depot=FakeDepot())
    stepper.house.host.flush()
    failed: list[int] = []

    def fail(plan: StepPlan) -> None:
        if plan.moves.promotions or not failed:
            failed.append(plan.number)
            raise InjectedFault("a step that fails")

    stepper.house.runner.before_step = fail
    suspect = stepper.ask(ask((90, 91, 92), 6))
    stepper.plan()
    waiting = stepper.ask(ask(LONG, 2))
    stepper.plan()
    stepper.order()
    stepper.move()
    stepper.commit()
    stepper.deliver()
    stepper.run_all()
    stepper.assert_right(suspect, waiting)
    assert len(failed) > 1
    assert stepper.scheduler.statistics().quarantined == 0


def test_host_memory_goes_on_where_the_write_budget_is_spent() -> None:
    depot = FakeDepot()
    limits = TierLimits(write_pages_a_second=1e-9, keep_pages=4)
    stepper = _house(6, depot=depot, tiers=limits)
    for start in (0, 50):
        stepper.ask(ask(tuple(range(start, start + 20)), 1))
        stepper.run_all()
    stepper.house.blocks.flush()
    assert len(depot.kept) == 1, "the burst of an hour: a page"
    assert _pictures(stepper).transit.lost_total >= 3
    assert _receipt(stepper, tuple(range(50, 70))).host == 19


def test_forgotten_pages_are_in_host_memory_no_more_nor_come_back() -> None:
    depot = FakeDepot()
    stepper = _left_over(depot=depot)
    names = stepper.house.prepare(ask(LONG)).names
    stepper.forget(names[3:])
    stepper.drop()
    assert stepper.house.host.find(names) == 3
    assert _pictures(stepper).cached == 3
    assert _receipt(stepper).computed == 40 - 3 * SIZE


def test_what_is_just_being_saved_or_promoted_is_forgotten_too() -> None:
    stepper = _left_over(depot=FakeDepot())
    names = stepper.house.prepare(ask(LONG)).names
    asked = stepper.ask(ask(LONG, 9))
    plan = stepper.plan()
    assert plan is not None
    assert plan.moves.promotions
    stepper.forget(names)
    assert not stepper.house.host._index.pages()
    stepper.run_all()
    stepper.drop()
    stepper.assert_right(asked)
    stepper.house.blocks.flush()
    fresh = stepper.ask(ask(LONG, 1))
    while not any(plan.moves.saves for plan in stepper._plans):
        assert stepper.plan() or stepper.commit()
    stepper.forget(names)
    stepper.run_all()
    stepper.assert_right(fresh)
    assert not set(stepper.house.host._index.pages().values()) & set(names)
    stepper.house.assert_baseline()


def test_what_the_device_has_anyway_makes_room_in_host_memory_first() -> None:
    other = tuple(range(50, 74))  # six pages
    stepper = _house(16)
    for tokens in (LONG, other, LONG):  # the second time it is found on the device
        stepper.ask(ask(tokens, 1))
        stepper.run_all()
        stepper.house.clock.now += 1.0
    assert _pictures(stepper).free == 0
    stepper.ask(ask(tuple(range(80, 92)), 1))  # three more
    stepper.run_all()
    kept = set(stepper.house.host._index.pages().values())
    names = [stepper.house.prepare(ask(tokens)).names for tokens in (LONG, other)]
    assert kept.issuperset(names[1])
    assert len(kept.intersection(names[0])) == 7
    assert names[0][0] in kept, "the end goes before the beginning"


async def test_an_engine_serves_from_host_memory_and_from_disk() -> None:
    depot = FakeDepot()
    house = build(Setup(page_size=SIZE, slots=12, depot=depot, pages=16))
    async with running(house) as engine:
        request = ask(LONG, 4)
        for source in ("computed", "host", "disk"):
            heard = await listen(engine.open(house.prepare(request)))
            assert_right(request, heard, 97)
            assert getattr(heard[0].receipts[0], source) >= 39
            await quiet(house)
            while len(depot.kept) < 10:  # noqa: ASYNC110
                await asyncio.sleep(0)
            await quiet(house)
            house.blocks.flush()
            if source == "host":
                house.host.flush()


async def test_a_flush_empties_host_memory_too_and_says_how_much() -> None:
    depot = FakeDepot()
    house = build(Setup(page_size=SIZE, slots=12, depot=depot, pages=16))
    async with running(house) as engine:
        await listen(engine.open(house.prepare(ask(LONG, 1))))
        await quiet(house)
        while len(depot.kept) < 10:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await quiet(house)
        assert engine.flush() == Flushed(device=10, host=10)
        assert engine.flush() == Flushed()
        picture = house.host.statistics()
        assert (picture.flushed_total, picture.evicted_total, picture.free) == (10, 0, 12)
        heard = await listen(engine.open(house.prepare(ask(LONG, 1))))
        receipt = heard[0].receipts[0]
        assert (receipt.device, receipt.host, receipt.disk) == (0, 0, 39)


def test_a_flush_leaves_what_waits_for_its_copy_on_the_disk() -> None:
    depot = FakeDepot()
    stepper = _house(depot=depot, tiers=TierLimits(keep_pages=4))
    stepper.ask(ask(LONG, 1))
    while stepper.plan() is not None or stepper.commit():
        pass
    stepper.order()
    stepper.move()
    stepper.deliver()
    assert len(depot.kept) == 4
    assert stepper.house.host.flush() == 0, "those that have a copy are the parents of the others"
    stepper.run_all()
    assert len(depot.kept) == 10
    assert stepper.house.host.flush() == 10


def test_jobs_of_host_memory_are_of_slots() -> None:
    """The threads never see a page of the device."""
    depot = FakeDepot()
    stepper = _left_over(12, depot=depot, pages=64)
    stepper.house.host.flush()
    stepper.ask(ask((*LONG, 9), 20))
    seen: list[int] = []
    for _ in range(200):
        stepper.plan()
        stepper.order()
        job = stepper.move()
        if isinstance(job, Load):
            seen += job.pages
        elif isinstance(job, Keeps):
            seen += [keep.page for keep in job.pages]
        stepper.deliver()
        stepper.commit()
    assert seen
    assert max(seen) < 12
    stepper.assert_right()


def test_plans_without_host_memory_move_nothing() -> None:
    stepper = Stepper(Setup(page_size=SIZE, depot=FakeDepot()))
    stepper.ask(ask(LONG, 3))
    while (plan := stepper.plan()) is not None or stepper.commit():
        assert plan is None or plan.moves == NO_MOVES
