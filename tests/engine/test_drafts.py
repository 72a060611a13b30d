"""Drafts: what is computed ahead of a request, and that it costs no request anything but a page."""

import asyncio
import random

import pytest

from chatserve.engine.drafts import BROKEN_MAX, DraftLimits
from chatserve.engine.plan import StepPlan
from chatserve.engine.runner import DeviceLost
from chatserve.errors import Busy
from tests.engine.build import Setup, ask, build, quiet, random_tokens, running
from tests.engine.oracle import assert_right, listen
from tests.engine.stepper import InjectedFault, Stepper

SIZE = 4
SETUP = Setup(pages=64, page_size=SIZE, budget_min=8, budget_max=32)


def text(count: int, seed: int = 1) -> tuple[int, ...]:
    return random_tokens(random.Random(seed), count)


def drafted(stepper: Stepper) -> int:
    """Draft tokens computed so far."""
    return stepper.scheduler.statistics().draft_tokens_total


def receipt(stepper: Stepper, tokens: tuple[int, ...]):
    """What the request for a prompt finds, once it has run."""
    asked = stepper.ask(ask(tokens, 3))
    stepper.run_all()
    stepper.assert_right(asked)
    return asked.heard[0].receipts[0]


def test_a_request_finds_every_full_page_that_was_drafted() -> None:
    stepper = Stepper(SETUP)
    assert stepper.draft("socket", text(43))
    stepper.run_all()
    assert drafted(stepper) == 40
    found = receipt(stepper, text(43))
    assert (found.device, found.computed) == (40, 3)
    cache = stepper.house.blocks.statistics()
    assert (cache.draft_pages, cache.draft_sealed_total, cache.draft_adopted_total) == (0, 10, 10)
    assert stepper.scheduler.counts.prompt_tokens == 3, "a draft is no request's prompt"
    stepper.house.assert_baseline()


def test_a_draft_names_only_full_pages_of_its_own_tokens() -> None:
    stepper = Stepper(SETUP)
    stepper.draft("socket", text(SIZE + 3))
    stepper.run_all()
    assert stepper.house.blocks.statistics().named_pages == 1
    assert not stepper.draft("socket", text(SIZE - 1)), "less than a page"
    assert not stepper.scheduler.busy


def test_a_newer_draft_of_the_same_socket_keeps_the_pages_that_it_shares() -> None:
    stepper = Stepper(SETUP)
    stepper.draft("socket", text(40))
    for _ in range(6):
        stepper.step()
    assert drafted(stepper) == 6 * SIZE
    stepper.draft("socket", (*text(20), *text(20, seed=2)))
    assert stepper.scheduler.statistics().drafts == 1
    stepper.run_all()
    assert drafted(stepper) == 6 * SIZE + 20
    assert receipt(stepper, text(24)).device == 24 - 1  # a full hit computes one position
    stepper.house.assert_baseline()


def test_a_draft_of_what_is_resident_computes_nothing_and_marks_it_recently_used() -> None:
    stepper = Stepper(Setup(pages=12, page_size=SIZE, budget_min=8, budget_max=32))
    older, newer = text(16, seed=2), text(16, seed=3)
    receipt(stepper, older)
    receipt(stepper, newer)
    stepper.draft("socket", older)
    stepper.run_all()
    assert drafted(stepper) == 0
    assert not stepper.scheduler.busy
    receipt(stepper, text(24, seed=4))
    assert receipt(stepper, older).device == 15
    assert receipt(stepper, newer).device < 12, "what was looked at last should have stayed"


# Beside requests -----------------------------------------------------------------------------


def test_nothing_is_drafted_while_a_request_lives() -> None:
    stepper = Stepper(SETUP)
    asked = stepper.ask(ask(text(30), 12))
    stepper.draft("socket", text(40, seed=2))
    while not asked.over:
        assert drafted(stepper) == 0
        stepper.step()
    stepper.run_all()
    assert drafted(stepper) == 40


def test_a_request_waits_for_one_page_at_the_most_and_finds_it() -> None:
    stepper = Stepper(SETUP)
    stepper.draft("socket", text(40))
    for _ in range(3):
        stepper.step()
    page = stepper.plan()
    assert page is not None
    assert page.token_count == SIZE
    asked = stepper.ask(ask(text(42), 3))
    assert stepper.plan() is None, "its page would be computed twice"
    stepper.commit()
    plan = stepper.plan()
    assert plan is not None
    assert plan.slices[0].start == 4 * SIZE
    stepper.run_all()
    stepper.assert_right(asked)
    assert drafted(stepper) == 4 * SIZE
    assert asked.heard[0].receipts[0].computed == 42 - 4 * SIZE
    stepper.house.assert_baseline()


def test_a_draft_neither_leads_nor_follows() -> None:
    stepper = Stepper(SETUP)
    stepper.draft("socket", text(40))
    stepper.step()
    stepper.plan()
    asked = [stepper.ask(ask(text(40), 2, name=f"{number}")) for number in range(3)]
    assert stepper.house.blocks.statistics().claims.claimed == 0
    stepper.run_all()
    stepper.assert_right(*asked)
    assert drafted(stepper) <= 2 * SIZE


def test_drafts_make_no_request_busy() -> None:
    stepper = Stepper(Setup(pages=16, page_size=SIZE, sequences_max=1, queued_max=1))
    for key in range(20):
        stepper.draft(key, text(30, seed=key))
    stepper.plan()
    asked = [stepper.ask(ask(text(9, seed=number), 2)) for number in range(2)]
    with pytest.raises(Busy):
        stepper.ask(ask(text(9), 2))
    stepper.run_all()
    stepper.assert_right(*asked)
    stepper.house.assert_baseline()


def test_a_request_that_needs_the_whole_pool_gets_it_from_a_draft() -> None:
    stepper = Stepper(Setup(pages=12, page_size=SIZE, budget_min=64, budget_max=64))
    stepper.draft("socket", text(44))
    for _ in range(5):
        stepper.step()
    asked = stepper.ask(ask(text(44, seed=2), 4))
    stepper.step()
    assert stepper.scheduler.counts.preemptions == 0
    stepper.run_all()
    stepper.assert_right(asked)
    stepper.house.assert_baseline()


# Pages ---------------------------------------------------------------------------------------


def test_drafted_pages_go_before_those_that_requests_left() -> None:
    stepper = Stepper(Setup(pages=12, page_size=SIZE, budget_min=8, budget_max=32))
    receipt(stepper, text(16, seed=2))
    stepper.draft("socket", text(24, seed=3))
    stepper.run_all()
    assert stepper.house.blocks.statistics().draft_pages == 6
    receipt(stepper, text(20, seed=4))
    assert receipt(stepper, text(16, seed=2)).device == 15, "a request's page went first"


def test_an_adopted_page_is_a_draft_no_more() -> None:
    stepper = Stepper(Setup(pages=16, page_size=SIZE, budget_min=8, budget_max=32))
    stepper.draft("socket", text(16))
    stepper.run_all()
    receipt(stepper, text(18))
    stepper.draft("other", text(40, seed=2))
    stepper.run_all()
    receipt(stepper, text(30, seed=3))
    assert receipt(stepper, text(18)).device == 16


@pytest.mark.parametrize(("share", "lost"), [(0.0, 0), (0.25, 4), (0.5, 8)])
def test_a_draft_evicts_others_pages_up_to_its_share(share: float, lost: int) -> None:
    limits = DraftLimits(pool_share=share)
    stepper = Stepper(Setup(pages=16, page_size=SIZE, budget_max=64, drafts=limits))
    for seed in range(4):
        receipt(stepper, text(14, seed=10 + seed))
    assert stepper.house.blocks.statistics().pages.free == 0
    before = stepper.house.blocks.statistics()
    stepper.draft("socket", text(60))
    stepper.run_all()
    after = stepper.house.blocks.statistics()
    assert after.draft_pages == lost
    assert after.evicted_for_space_total - before.evicted_for_space_total == lost
    assert not stepper.scheduler.busy, "a draft that finds no page ends"
    stepper.house.assert_baseline()


def test_drafts_that_do_not_fit_together_come_to_an_end() -> None:
    limits = DraftLimits(turn_pages=1, pool_share=1.0)
    stepper = Stepper(Setup(pages=16, page_size=SIZE, drafts=limits))
    for key in range(3):
        stepper.draft(key, text(48, seed=key))
    stepper.run_all()
    assert drafted(stepper) <= 3 * 48
    stepper.house.assert_baseline()


def test_drafts_take_turns_and_find_what_they_share() -> None:
    stepper = Stepper(Setup(page_size=SIZE, drafts=DraftLimits(turn_pages=2)))
    stem = text(20)
    for key in range(2):
        stepper.draft(key, (*stem, *text(20, seed=2 + key)))
    for _ in range(8):
        stepper.step()
    assert stepper.scheduler.statistics().drafts == 2, "one was served to its end first"
    stepper.run_all()
    assert drafted(stepper) == 20 + 2 * 20


def test_more_drafts_than_there_is_room_for_are_not_taken() -> None:
    stepper = Stepper(Setup(page_size=SIZE, drafts=DraftLimits(lines_max=2)))
    assert stepper.draft("a", text(8))
    assert stepper.draft("b", text(8, seed=2))
    assert not stepper.draft("c", text(8, seed=3))
    assert stepper.draft("a", text(12, seed=4)), "a newer text of one that is there"
    assert not stepper.draft("b", text(1)), "nothing to compute"
    assert stepper.draft("c", text(8, seed=3))
    assert not stepper.draft("d", text(SETUP.pages * SIZE + 1)), "longer than the context"


def test_without_caching_nothing_is_drafted() -> None:
    stepper = Stepper(Setup(page_size=SIZE, caching=False))
    assert not stepper.draft("socket", text(40))
    assert not stepper.scheduler.busy


# Going ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["waiting", "between pages", "planned", "computed"])
@pytest.mark.parametrize("how", ["withdrawn", "replaced"])
def test_a_draft_that_goes_leaves_what_was_computed_and_holds_nothing(stage: str, how: str) -> None:
    stepper = Stepper(SETUP)
    stepper.draft("socket", text(40))
    if stage != "waiting":
        stepper.step()
        stepper.step()
    if stage in ("planned", "computed"):
        assert stepper.plan() is not None
    if stage == "computed":
        stepper.run()
    if how == "withdrawn":
        stepper.scheduler.withdraw("socket")
        stepper.scheduler.withdraw("socket")
    else:
        stepper.draft("socket", text(8, seed=2))
    stepper.scheduler.check()
    stepper.run_all()
    stepper.house.assert_baseline()
    pages = {"waiting": 0, "between pages": 2, "planned": 3, "computed": 3}[stage]
    assert drafted(stepper) == pages * SIZE + (8 if how == "replaced" else 0)
    assert receipt(stepper, text(40)).device == pages * SIZE


def test_a_draft_whose_step_fails_ends_and_is_not_tried_again() -> None:
    stepper = Stepper(SETUP)
    bad, good = text(40), text(40, seed=2)
    runs: list[StepPlan] = []

    def fail(plan: StepPlan) -> None:
        if plan.slices[0].tokens == bad[8:12]:
            runs.append(plan)
            raise InjectedFault("on purpose")

    stepper.house.runner.before_step = fail
    for _ in range(5):
        stepper.draft("socket", bad)
        stepper.run_all()
    assert len(runs) == 1
    assert stepper.scheduler.broken is None, "drafts convict nobody, least of all the device"
    assert stepper.scheduler.statistics().quarantined == 0
    assert drafted(stepper) == 8
    stepper.draft("socket", good)
    stepper.run_all()
    assert drafted(stepper) == 8 + 40
    stepper.house.runner.before_step = lambda plan: None
    assert receipt(stepper, bad).device == 8
    stepper.house.assert_baseline()


def test_what_is_remembered_of_failed_pages_is_bounded() -> None:
    stepper = Stepper(SETUP)

    def fail(_: StepPlan) -> None:
        raise InjectedFault("on purpose")

    stepper.house.runner.before_step = fail
    for seed in range(BROKEN_MAX + 5):
        stepper.draft("socket", text(SIZE, seed=seed))
        stepper.run_all(check=False)
    assert len(stepper.scheduler._drafts._broken) == BROKEN_MAX
    assert stepper.scheduler.broken is None


def test_a_device_that_is_lost_under_a_draft_is_lost() -> None:
    stepper = Stepper(SETUP)

    def lose(_: StepPlan) -> None:
        raise DeviceLost("on purpose")

    stepper.house.runner.before_step = lose
    stepper.draft("socket", text(40))
    stepper.run_all()
    assert stepper.scheduler.broken is not None
    assert not stepper.draft("socket", text(40))
    stepper.house.assert_baseline()


def test_a_recovery_ends_all_drafts() -> None:
    stepper = Stepper(SETUP)
    stepper.draft("a", text(40))
    stepper.draft("b", text(40, seed=2))
    stepper.step()
    stepper.plan()
    asked = stepper.ask(ask(text(40), 4))
    stepper.recover()
    stepper.scheduler.check()
    assert stepper.scheduler.statistics().drafts == 0
    stepper.run_all()
    stepper.assert_right(asked)
    stepper.house.assert_baseline()


# Through the loop ------------------------------------------------------------------------------


async def test_the_loop_drafts_by_itself_and_says_when_it_is_idle() -> None:
    house = build(SETUP)
    async with running(house) as engine:
        await engine.wait_idle()
        assert engine.draft("socket", house.prepare(ask(text(40), 0)))
        await quiet(house)
        request = ask(text(43), 4)
        with engine.open(house.prepare(request)) as stream:
            idle = asyncio.create_task(engine.wait_idle())
            heard = await listen(stream)
        assert_right(request, heard, house.setup.vocabulary)
        assert heard[0].receipts[0].device == 40
        await idle
        assert house.scheduler.idle
        engine.draft("socket", house.prepare(ask(text(40, seed=2), 0)))
        engine.withdraw("socket")
        await quiet(house)
    assert not engine.draft("socket", house.prepare(ask(text(40), 0))), "the engine has stopped"
    engine.withdraw("socket")
    house.assert_baseline()


async def test_nobody_is_idle_while_a_request_is_open() -> None:
    house = build(SETUP)
    async with running(house) as engine:
        with engine.open(house.prepare(ask(text(20), 20))) as stream:
            idle = asyncio.create_task(engine.wait_idle())
            await stream.get()
            assert not idle.done()
        await idle
        await quiet(house)
