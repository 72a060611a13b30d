"""When a step's result is told: once the next step computes, so that the two do not want the
interpreter at once; and at once, when no step is next."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chatserve.engine import model_runner
from chatserve.engine.model_runner import ModelRunner
from chatserve.engine.plan import Moves, PageMove, SampleOrder, Slice, StepPlan, StepResult
from chatserve.engine.runner import RunnerThread
from chatserve.engine.values import Sampling
from chatserve.model import load_model
from chatserve.model.fused import FusedLayer
from chatserve.model.sampling import SampleRow, Samples, sample
from tests.model.families import build

SECONDS_MAX = 30.0


@dataclass
class Step:
    """What a step waits for, and what it has come to."""

    begun: threading.Event = field(default_factory=threading.Event)
    may_compute: threading.Event = field(default_factory=threading.Event)
    may_end: threading.Event = field(default_factory=threading.Event)


@dataclass
class HeldRunner:
    """Steps that go on when the test lets them. silent: they never say that they compute."""

    steps: list[Step]
    silent: bool = False
    closed: bool = False

    def start(self, plan: StepPlan, computing: Callable[[], None] | None = None) -> StepResult:
        step = self.steps[plan.number - 1]
        step.begun.set()
        assert step.may_compute.wait(SECONDS_MAX)
        if computing is not None and not self.silent:
            computing()
            computing()  # a result is told once
        assert step.may_end.wait(SECONDS_MAX)
        return StepResult(plan.number)

    def close(self) -> None:
        self.closed = True


@dataclass
class Told:
    """What the event loop has heard, with news of it."""

    numbers: list[int] = field(default_factory=list[int])
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def hear(self, result: StepResult) -> None:
        self.numbers.append(result.number)
        self.news.set()

    async def until(self, numbers: list[int]) -> None:
        async with asyncio.timeout(SECONDS_MAX):
            while self.numbers != numbers:
                self.news.clear()
                await self.news.wait()


@asynccontextmanager
async def thread_of(runner: HeldRunner, told: Told) -> AsyncGenerator[RunnerThread]:
    thread = RunnerThread(runner, told.hear)
    try:
        yield thread
    finally:
        for step in runner.steps:
            step.may_compute.set()
            step.may_end.set()
        thread.close()
        assert await asyncio.to_thread(thread.join, SECONDS_MAX)
        assert runner.closed


async def has_begun(step: Step) -> None:
    """Whatever the thread told before has been heard, too."""
    assert await asyncio.to_thread(step.begun.wait, SECONDS_MAX)
    await asyncio.sleep(0)


def plan(number: int) -> StepPlan:
    return StepPlan(number=number, after=number - 1, copies=(), slices=())


@pytest.mark.parametrize("silent", [False, True])
async def test_a_result_is_told_when_the_next_step_computes(silent: bool) -> None:
    told, runner = Told(), HeldRunner([Step(), Step(), Step()], silent=silent)
    first, second, third = runner.steps
    async with thread_of(runner, told) as thread:
        for number in (1, 2, 3):
            thread.submit(plan(number))
        first.may_compute.set()
        first.may_end.set()
        await has_begun(second)
        assert told.numbers == [], "the next one is still on its way to computing"
        second.may_compute.set()
        if silent:
            second.may_end.set()
            await told.until([1])
            await has_begun(third)
            assert told.numbers == [1]
        else:
            await told.until([1])
            assert not third.begun.is_set()
            second.may_end.set()
            await has_begun(third)
            assert told.numbers == [1]
            third.may_compute.set()
            await told.until([1, 2])
        third.may_compute.set()
        third.may_end.set()
        await told.until([1, 2, 3])


async def test_with_no_step_next_a_result_is_told_at_once_and_the_last_before_the_end() -> None:
    told, runner = Told(), HeldRunner([Step(), Step()])
    first, second = runner.steps
    async with thread_of(runner, told) as thread:
        thread.submit(plan(1))
        first.may_compute.set()
        first.may_end.set()
        await told.until([1])
        thread.submit(plan(2))
        await has_begun(second)
        thread.close()
    await told.until([1, 2])


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_a_model_says_so_before_it_has_written_anything(family: str, tmp_path: Path) -> None:
    """With layers in a chain, and with layers of torch's operations."""
    folder = build(family, tmp_path, hidden_size=64, seed=1)
    model = load_model(folder, device="cpu", dtype="float32", page_size=16)
    layers = sum(isinstance(each, FusedLayer) for each in model._model.modules())
    assert layers == (2 if family == "qwen3" else 0)
    runner = ModelRunner(model, pages=12, fill=torch.nan)
    table = np.array([3, 11], dtype=np.int32).tobytes()
    item = Slice(1, 1, 0, tuple(range(4, 24)), None, table, True, ())
    untouched: list[bool] = []

    def computing() -> None:
        pages = (np.frombuffer(runner.page_view(each), dtype=np.float32) for each in (3, 11))
        untouched.append(all(np.isnan(page).all() for page in pages))

    runner.run(StepPlan(number=1, after=0, copies=(), slices=(item,)), computing)
    assert untouched[0]
    untouched.clear()
    computing()
    assert untouched == [False], "the step wrote into these pages"
    runner.close()


def test_a_device_of_its_own_computes_once_it_has_its_orders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launching them needs the interpreter; waiting for tokens does not."""
    model = load_model(
        build("llama", tmp_path, seed=1), device="cpu", dtype="float32", page_size=16
    )
    runner = ModelRunner(model, pages=4)
    monkeypatch.setattr(runner, "_on_cpu", False)
    done: list[str] = []
    forward = model.forward

    def noted(*given: Any, **named: Any) -> torch.Tensor:
        result = forward(*given, **named)
        done.append("forward")
        return result

    def sampled(logits: torch.Tensor, rows: tuple[SampleRow, ...], *late: Any) -> Samples:
        done.append("sample")
        return sample(logits, rows, *late)

    monkeypatch.setattr(model, "forward", noted)
    monkeypatch.setattr(model_runner, "sample", sampled)
    order = SampleOrder(1, 1, Sampling(), 0, 3)
    table = np.array([2], dtype=np.int32).tobytes()
    item = Slice(1, 1, 0, (4, 5, 6), None, table, True, (order,))
    runner.run(
        StepPlan(number=1, after=0, copies=(), slices=(item,)), lambda: done.append("computing")
    )
    assert done == ["forward", "computing", "sample"]
    runner.close()


def test_pages_that_are_moved_hold_up_no_result(tmp_path: Path) -> None:
    """Also where a step does nothing else."""
    model = load_model(
        build("llama", tmp_path, seed=1), device="cpu", dtype="float32", page_size=16
    )
    runner = ModelRunner(model, pages=4, slots=2, fill=0.0)
    host = runner.host
    assert host is not None
    runner.page_view(3)[:] = bytes([7]) * len(runner.page_view(3))
    moved: list[bool] = []

    def look() -> None:
        moved.append(bytes(host.page_view(1)) == bytes(runner.page_view(3)))

    moves = Moves(saves=(PageMove(3, 1),))
    runner.run(StepPlan(number=1, after=0, copies=(), slices=(), moves=moves), look)
    look()
    assert moved == [False, True]
    runner.close()


def test_a_small_step_takes_one_thread_and_a_larger_one_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(
        build("llama", tmp_path, seed=1), device="cpu", dtype="float32", page_size=16
    )
    monkeypatch.setattr(model_runner, "ONE_THREAD_WORK_MAX", 5 * model.parameter_count)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 7)
        runner = ModelRunner(model, pages=4)
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    table = np.array([2], dtype=np.int32).tobytes()
    for number, tokens in enumerate((5, 6, 1), 1):
        item = Slice(1, 1, 0, tuple(range(4, 4 + tokens)), None, table, True, ())
        runner.run(StepPlan(number=number, after=0, copies=(), slices=(item,)))
    assert chosen == [1, 7, 1]
    runner.close()
