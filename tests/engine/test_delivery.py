"""A step's tokens reach their consumers a few at a turn of the loop, and all of them do."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

import chatserve.engine.engine as engine_module
from chatserve.engine.engine import DELIVERIES_A_TURN
from chatserve.engine.plan import StepPlan, StepResult
from chatserve.engine.runner import RunnerThread
from chatserve.engine.stream import Stream
from chatserve.engine.values import Emission
from tests.engine.build import Setup, ask, build, running

STREAMS = 5 * DELIVERIES_A_TURN


async def test_a_turn_of_the_loop_delivers_to_a_few_streams_only() -> None:
    house = build(
        Setup(
            pages=4 * STREAMS,
            sequences_max=STREAMS,
            budget_min=8 * STREAMS,
            budget_max=8 * STREAMS,
        )
    )
    turn = 0
    delivered: list[int] = []  # the turn of each delivery
    put = Stream.put

    def noting(stream: Stream, emission: Emission) -> None:
        delivered.append(turn)
        put(stream, emission)

    def next_turn() -> None:
        nonlocal turn
        turn += 1
        loop.call_soon(next_turn)

    loop = asyncio.get_running_loop()
    loop.call_soon(next_turn)
    streams = [
        house.engine.open(house.prepare(ask((number, 1, 2), 6))) for number in range(STREAMS)
    ]
    for stream in streams:
        stream.put = noting.__get__(stream)
    async with running(house):
        said = await asyncio.gather(*(_tokens(stream) for stream in streams))
    assert all(len(tokens) == 6 for tokens in said)
    assert len(delivered) == 6 * STREAMS
    per_turn = [delivered.count(each) for each in set(delivered)]
    assert max(per_turn) <= DELIVERIES_A_TURN


@pytest.mark.parametrize("rows", [4, 3])
async def test_a_result_of_very_many_rows_leaves_a_turn_before_the_next_plan(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "ROWS_A_TURN", 3)
    house = build(Setup(steps_in_flight=2))
    turn = 0
    turns: dict[str, int] = {}
    go_on = threading.Event()

    def next_turn() -> None:
        nonlocal turn
        turn += 1
        loop.call_soon(next_turn)

    def note(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: object) -> object:
            turns.setdefault(name, turn)
            if name == "the plan after it":
                go_on.set()
            return call(*arguments)

        return noted

    def hold(plan: StepPlan) -> None:
        if plan.number == 2:  # it runs for as long as the first one is committed
            assert go_on.wait(30)

    def commit(result: StepResult) -> object:
        monkeypatch.setattr(
            house.scheduler, "plan", note("the plan after it", house.scheduler.plan)
        )
        monkeypatch.setattr(house.scheduler, "commit", whole_commit)
        turns["the commit"] = turn
        assert len(result.tokens) == rows
        return whole_commit(result)

    loop = asyncio.get_running_loop()
    loop.call_soon(next_turn)
    house.runner.before_step = hold
    whole_commit = house.scheduler.commit
    monkeypatch.setattr(house.scheduler, "commit", commit)
    streams = [house.engine.open(house.prepare(ask((number, 1, 2), 6))) for number in range(rows)]
    async with running(house):
        said = await asyncio.gather(*(_tokens(stream) for stream in streams))
    assert all(len(tokens) == 6 for tokens in said)
    assert (turns["the plan after it"] > turns["the commit"]) == (rows > 3)


@pytest.mark.parametrize("in_flight", [1, 2])
async def test_the_next_step_is_handed_over_before_a_steps_tokens_are_delivered(
    in_flight: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = build(Setup(steps_in_flight=in_flight))
    handed_over = 0
    ahead: list[int] = []  # steps handed over after the one whose token is delivered
    submit = RunnerThread.submit

    def noting_submit(thread: RunnerThread, plan: StepPlan) -> None:
        nonlocal handed_over
        handed_over = plan.number
        submit(thread, plan)

    monkeypatch.setattr(RunnerThread, "submit", noting_submit)
    stream = house.engine.open(house.prepare(ask((1, 2, 3), 10)))
    put = stream.put

    def noting_put(emission: Emission) -> None:
        ahead.append(handed_over - len(ahead) - 1)  # the n-th step gives the n-th token
        put(emission)

    stream.put = noting_put
    async with running(house):
        assert len(await _tokens(stream)) == 10
    left = [10 - number for number in range(1, 11)]
    assert all(seen >= min(in_flight, most) for seen, most in zip(ahead, left, strict=True))


async def _tokens(stream: Stream) -> list[int]:
    return [token async for batch in stream for emission in batch for token in emission.tokens]
