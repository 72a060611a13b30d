"""Leaving: one test for each state in which an asker may go, named by what is left behind."""

import asyncio
import random
from collections.abc import Callable

import pytest

from chatserve.engine.plan import StepPlan
from chatserve.engine.sequence import Life
from chatserve.engine.values import FinishReason
from chatserve.errors import Unavailable
from tests.engine.build import Setup, ask, build, quiet, random_tokens, running
from tests.engine.oracle import listen
from tests.engine.stepper import Asked, InjectedFault, Stepper

SETUP = Setup(pages=32, page_size=4, budget_min=8, budget_max=8, sequences_max=12)
Stage = Callable[[Stepper, tuple[int, ...]], Asked]


def prompt(count: int, seed: int = 1) -> tuple[int, ...]:
    return random_tokens(random.Random(seed), count)


def queued(stepper: Stepper, tokens: tuple[int, ...]) -> Asked:
    return stepper.ask(ask(tokens, 8, samples=3, temperature=1.0))


def planned(stepper: Stepper, tokens: tuple[int, ...]) -> Asked:
    asked = queued(stepper, tokens)
    stepper.plan()
    return asked


def between_slices(stepper: Stepper, tokens: tuple[int, ...]) -> Asked:
    asked = planned(stepper, tokens)
    stepper.commit()
    return asked


def two_steps_in_flight(stepper: Stepper, tokens: tuple[int, ...]) -> Asked:
    asked = planned(stepper, tokens)
    stepper.plan()
    stepper.run()
    return asked


def following(stepper: Stepper, tokens: tuple[int, ...]) -> Asked:
    leader = stepper.ask(ask((*tokens, 1), 4))
    stepper.plan()
    asked = queued(stepper, tokens)
    stepper.plan()
    assert stepper.lives(asked) == {Life.FOLLOWING}
    assert not leader.over
    return asked


def forked_and_uncommitted(stepper: Stepper, tokens: tuple[int, ...]) -> Asked:
    asked = queued(stepper, tokens)
    for _ in range(100):
        if len(stepper.sequences(asked)) > 1:
            return asked
        if stepper.plan() is None:
            stepper.commit()
    raise AssertionError("it never forked")


def generating(stepper: Stepper, tokens: tuple[int, ...]) -> Asked:
    asked = queued(stepper, tokens)
    stepper.until(lambda: len(asked.heard[0].tokens) >= 3)
    return asked


def one_sample_over(stepper: Stepper, tokens: tuple[int, ...]) -> Asked:
    asked = generating(stepper, tokens)
    stepper.cut(asked, 0, 1)
    return asked


def preempted(stepper: Stepper, tokens: tuple[int, ...]) -> Asked:
    asked = generating(stepper, tokens)
    for sequence in stepper.sequences(asked)[:2]:
        stepper.scheduler.roster.preempt(sequence)
    return asked


def suspect(stepper: Stepper, tokens: tuple[int, ...]) -> Asked:
    asked = generating(stepper, tokens)
    _fail_next(stepper)
    stepper.commit()
    assert stepper.scheduler.roster.held
    return asked


def on_probation(stepper: Stepper, tokens: tuple[int, ...]) -> Asked:
    asked = suspect(stepper, tokens)
    while stepper.commit():
        pass
    stepper.plan()
    return asked


def in_a_failing_step(stepper: Stepper, tokens: tuple[int, ...]) -> Asked:
    asked = generating(stepper, tokens)
    _fail_next(stepper)
    stepper.plan()
    stepper.run()
    return asked


def _fail_next(stepper: Stepper) -> None:
    left = [None]

    def hook(_: StepPlan) -> None:
        if left:
            left.pop()
            raise InjectedFault("once")

    stepper.house.runner.before_step = hook


STAGES: list[Stage] = [
    queued,
    planned,
    between_slices,
    two_steps_in_flight,
    following,
    forked_and_uncommitted,
    generating,
    one_sample_over,
    preempted,
    suspect,
    on_probation,
    in_a_failing_step,
]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
@pytest.mark.parametrize("company", [0, 4])
def test_leaving_gives_every_page_back_by_the_next_commits(stage: Stage, company: int) -> None:
    stepper = Stepper(SETUP)
    leave_once(stepper, stage, company)


def leave_once(stepper: Stepper, stage: Stage, company: int, seed: int = 1) -> None:
    """One request leaves at a stage; company stays, and is served right."""
    tokens = prompt(18, seed)
    others = [
        stepper.ask(ask(tokens[: 6 + index], 6, temperature=1.0, seed=index, priority=1))
        for index in range(company)
    ]
    asked = stage(stepper, tokens)
    stepper.abort(asked)
    stepper.scheduler.check()
    assert not stepper.sequences(asked)
    for _ in range(stepper.scheduler.in_flight):
        stepper.commit()
    assert stepper.house.blocks.coming == 0, "pages that nobody needs are still leaving"
    owners = sum(len(item.table) for item in stepper.scheduler.roster.running)
    assert stepper.house.blocks.statistics().logical_pages == owners
    stepper.run_all(check=False)
    stepper.assert_right(*others)
    stepper.house.assert_baseline()


def test_leaving_twice_or_after_the_end_changes_nothing() -> None:
    stepper = Stepper(SETUP)
    asked = stepper.ask(ask(prompt(5), 3))
    stepper.run_all()
    counted = dict(stepper.scheduler.counts.finished)
    stepper.scheduler.abort(asked.group)
    stepper.scheduler.abort(asked.group)
    assert stepper.scheduler.finish(asked.group, 0, 1) == ()
    assert stepper.scheduler.counts.finished == counted
    assert stepper.scheduler.progress(asked.group) is None
    stepper.assert_right(asked)


async def test_a_consumer_that_read_to_the_end_aborts_nothing() -> None:
    house = build(SETUP)
    async with running(house) as engine:
        with engine.open(house.prepare(ask(prompt(5), 3, samples=2))) as stream:
            await listen(stream)
            stream.finish(0, 1)
        stream.close()
        await quiet(house)
    assert house.scheduler.counts.finished[FinishReason.ABORT] == 0
    assert house.scheduler.counts.finished[FinishReason.LENGTH] == 2
    house.assert_baseline()


async def test_a_stream_closed_under_its_reader_is_over_for_both() -> None:
    house = build(SETUP)
    async with running(house) as engine:
        stream = engine.open(house.prepare(ask(prompt(5), 100)))
        await stream.get()
        reader = asyncio.create_task(listen(stream))
        await asyncio.sleep(0)
        stream.close()
        (heard,) = await reader
        assert heard.finish is None
        assert stream.progress() is None
        await quiet(house)
    house.assert_baseline()


async def test_a_reader_that_is_cancelled_may_read_on_and_misses_nothing() -> None:
    house = build(SETUP)
    request = ask(prompt(5), 40)
    async with running(house) as engine:
        with engine.open(house.prepare(request)) as stream:
            reading = asyncio.create_task(stream.get())
            await asyncio.sleep(0)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            (heard,) = await listen(stream)
    assert len(heard.tokens) == 40


async def test_every_stream_ends_when_the_engine_stops_and_none_is_opened_after() -> None:
    house = build(SETUP)
    async with running(house) as engine:
        streams = [engine.open(house.prepare(ask(prompt(9, seed), 100))) for seed in range(8)]
        await streams[0].get()
    for stream in streams:
        (heard,) = await asyncio.wait_for(listen(stream), 5)
        assert heard.finish is FinishReason.ERROR
        assert isinstance(heard.error, Unavailable)
    with pytest.raises(Unavailable):
        engine.open(house.prepare(ask(prompt(3), 1)))


async def test_a_request_is_refused_by_nobody_before_the_engine_runs() -> None:
    house = build(SETUP)
    stream = house.engine.open(house.prepare(ask(prompt(5), 3)))
    async with running(house):
        (heard,) = await listen(stream)
    assert heard.finish is FinishReason.LENGTH


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("queued_before", [True, False])
def test_who_is_queued_behind_pages_of_the_retired_waits_for_them(
    steps: int, queued_before: bool
) -> None:
    stepper = Stepper(Setup(pages=8, page_size=4, budget_min=32, budget_max=32))
    behind = ask(prompt(24, seed=2), 4)
    leaving = stepper.ask(ask(prompt(20), 8))
    asked = stepper.ask(behind) if queued_before else None
    for _ in range(steps):
        assert stepper.plan() is not None
    stepper.abort(leaving)
    asked = asked or stepper.ask(behind)
    assert stepper.plan() is None
    assert stepper.lives(asked) == {Life.QUEUED}
    stepper.run_all()
    stepper.assert_right(asked)
    stepper.house.assert_baseline()


def test_every_step_that_was_in_flight_when_the_asker_left_is_still_named() -> None:
    stepper = Stepper(SETUP)
    asked = stepper.ask(ask(prompt(24), 4))
    stepper.plan()
    stepper.plan()
    stepper.abort(asked)
    names = stepper.house.prepare(asked.request).names
    resident = stepper.house.blocks._index.holds
    for pages in (2, 4):  # a step is 8 tokens
        stepper.commit()
        assert [resident(name) for name in names] == [number < pages for number in range(6)]
    stepper.house.assert_baseline()


def crowded(stepper: Stepper) -> list[Asked]:
    """Three that run, have filled every page with two steps in flight, and need more next."""
    asked = [stepper.ask(ask(prompt(7, seed), 20)) for seed in range(3)]
    running = stepper.scheduler.roster.running
    while not running or running[0].planned < 12:
        if stepper.plan() is None:
            stepper.commit()
    while stepper.scheduler.in_flight < 2:
        stepper.plan()
    assert [one.planned for one in running] == [12] * 3
    assert stepper.house.blocks.available == 0
    return asked


@pytest.mark.parametrize("way", ["left", "finished"])
def test_nobody_is_robbed_for_pages_that_come_with_the_next_commit(way: str) -> None:
    stepper = Stepper(Setup(pages=9, page_size=4, budget_min=64, budget_max=64))
    first, second, last = crowded(stepper)
    preempted = stepper.scheduler.counts.preemptions
    if way == "left":
        stepper.abort(second)
    else:
        stepper.cut(second, 0, 1)
    stepper.commit()
    assert stepper.house.blocks.available == 0
    assert stepper.plan() is None
    assert stepper.lives(first) == stepper.lives(last) == {Life.RUNNING}
    stepper.commit()
    assert stepper.plan() is not None
    assert stepper.scheduler.counts.preemptions == preempted
    stepper.run_all()
    stepper.assert_right(first, last)
    stepper.house.assert_baseline()


def test_of_the_pages_of_the_retired_only_those_that_nobody_shares_are_coming() -> None:
    stepper = Stepper(Setup(pages=32, page_size=4, budget_min=64, budget_max=64))
    stays = stepper.ask(ask(prompt(16), 20))
    stepper.until(lambda: bool(stays.heard[0].tokens))
    leaving = stepper.ask(ask((*prompt(16), *prompt(6, seed=2)), 20, samples=2, temperature=1.0))
    stepper.until(lambda: bool(leaving.heard[0].tokens))
    while stepper.plan() is not None:
        pass
    stepper.abort(leaving)
    coming, available = stepper.scheduler.roster.coming, stepper.house.blocks.available
    assert coming > 0
    while stepper.scheduler.roster.retired:
        stepper.commit()
    assert stepper.house.blocks.available == available + coming
    stepper.run_all()
    stepper.assert_right(stays)
