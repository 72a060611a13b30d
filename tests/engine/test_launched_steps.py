"""Steps of a device that goes on by itself: the next one is launched before the last one's tokens
are fetched, nothing on its way waits for them, and what went wrong is told of the right one."""

import asyncio
import threading
from array import array
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from chatserve.engine import model_runner
from chatserve.engine.model_runner import ModelRunner
from chatserve.engine.page_mover import Moving, PageMover
from chatserve.engine.plan import Moves, PageMove, SampleOrder, Slice, StepPlan, StepResult
from chatserve.engine.runner import (
    DeviceLost,
    OutOfMemory,
    RunnerThread,
    StepRunner,
    StepUnderWay,
    run,
)
from chatserve.engine.token_counts import TokenCounts
from chatserve.engine.values import Sampling
from chatserve.model import LoadedModel, load_model
from chatserve.model.step import LateTokens
from chatserve_kernels.packing import Fetched, fetched
from tests.engine.build import Setup, ask, build, running
from tests.engine.launching import Launching
from tests.engine.oracle import assert_right, listen
from tests.model.families import build as build_model

SECONDS_MAX = 30.0


# The thread ------------------------------------------------------------------------------------


@dataclass
class Device:
    """Notes what is done with it. ends: lets a step end; waited_for: somebody waits for that."""

    ends: dict[int, threading.Event]
    waited_for: threading.Event = field(default_factory=threading.Event)
    did: list[str] = field(default_factory=list[str])
    at_once: frozenset[int] = frozenset()

    def start(
        self, plan: StepPlan, computing: Callable[[], None] | None = None
    ) -> StepResult | StepUnderWay:
        self.did.append(f"start {plan.number}")
        if plan.number in self.at_once:
            return StepResult(plan.number)

        def fetch() -> StepResult:
            self.waited_for.set()
            assert self.ends[plan.number].wait(SECONDS_MAX)
            self.did.append(f"end {plan.number}")
            return StepResult(plan.number)

        return fetch

    def close(self) -> None:
        self.did.append("close")


@dataclass
class Thread:
    """A runner's thread, and what its loop has heard."""

    device: Device
    told: list[int] = field(default_factory=list[int])
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.runner = RunnerThread(self.device, self._hear)

    def _hear(self, result: StepResult) -> None:
        self.told.append(result.number)
        self.news.set()

    def submit(self, number: int) -> None:
        self.runner.submit(plan(number))

    async def until(self, told: list[int]) -> None:
        async with asyncio.timeout(SECONDS_MAX):
            while self.told != told:
                self.news.clear()
                await self.news.wait()


@asynccontextmanager
async def thread_of(*, steps: int, at_once: frozenset[int] = frozenset()) -> AsyncGenerator[Thread]:
    ends = {number: threading.Event() for number in range(1, steps + 1)}
    thread = Thread(Device(ends, at_once=at_once))
    try:
        yield thread
    finally:
        for end in ends.values():
            end.set()
        thread.runner.close()
        assert await asyncio.to_thread(thread.runner.join, SECONDS_MAX)
        assert thread.device.did[-1] == "close"


def plan(number: int, after: int | None = None) -> StepPlan:
    return StepPlan(number, max(0, number - 2) if after is None else after, (), ())


async def test_the_next_step_is_launched_before_the_last_one_is_fetched() -> None:
    async with thread_of(steps=3) as thread:
        device = thread.device
        thread.submit(1)
        thread.submit(2)
        device.ends[1].set()
        await thread.until([1])
        assert device.did == ["start 1", "start 2", "end 1"]
        thread.submit(3)
        device.ends[2].set()
        await thread.until([1, 2])
        assert device.did[3:] == ["start 3", "end 2"]
        thread.runner.nothing_follows()
        device.ends[3].set()
        await thread.until([1, 2, 3])


async def test_a_step_that_nothing_follows_is_told_and_said_once() -> None:
    async with thread_of(steps=2) as thread:
        for number in (1, 2):
            thread.submit(number)
            for _ in range(3):
                thread.runner.nothing_follows()
            assert await asyncio.to_thread(thread.device.waited_for.wait, SECONDS_MAX)
            assert thread.runner._plans.empty()  # pyright: ignore[reportPrivateUsage]
            thread.device.waited_for.clear()
            thread.device.ends[number].set()
            await thread.until(list(range(1, number + 1)))


async def test_a_step_that_was_done_at_once_is_told_after_the_one_under_way() -> None:
    async with thread_of(steps=2, at_once=frozenset({2})) as thread:
        thread.submit(1)
        thread.submit(2)
        thread.device.ends[1].set()
        await thread.until([1, 2])


async def test_what_is_under_way_at_the_end_is_told_before_the_memory_goes() -> None:
    async with thread_of(steps=2) as thread:
        thread.submit(1)
        thread.submit(2)
        thread.runner.close()
        thread.device.ends[1].set()
        thread.device.ends[2].set()
        await thread.until([1, 2])
    assert thread.device.did == ["start 1", "start 2", "end 1", "end 2", "close"]


# What goes wrong -------------------------------------------------------------------------------


@dataclass
class Failing:
    """Steps that raise where they start or where they end."""

    at_start: dict[int, Exception] = field(default_factory=dict[int, Exception])
    at_end: dict[int, Exception] = field(default_factory=dict[int, Exception])
    ended: list[int] = field(default_factory=list[int])

    def start(
        self, plan: StepPlan, computing: Callable[[], None] | None = None
    ) -> StepResult | StepUnderWay:
        if plan.number in self.at_start:
            raise self.at_start[plan.number]

        def fetch() -> StepResult:
            self.ended.append(plan.number)
            if plan.number in self.at_end:
                raise self.at_end[plan.number]
            return StepResult(plan.number)

        return fetch

    def close(self) -> None:
        pass


def outcomes(runner: Failing, *, after: int = 2) -> list[str]:
    """Of steps 1, 2 and 3: 2 is launched before 1 has ended, 3 when both have, planned after one
    of them."""
    steps = StepRunner(runner)
    first, second = plan(1, after=0), plan(2, after=0)
    one, two = steps.start(first), steps.start(second)
    results = [
        started if isinstance(started, StepResult) else steps.end(each, started)
        for each, started in ((first, one), (second, two))
    ]
    results.append(steps.run(plan(3, after=after)))
    return [_named(result) for result in results]


def _named(result: StepResult) -> str:
    failure = result.failure
    if failure is None:
        return "good"
    kinds = {"void": failure.void, "fatal": failure.fatal, "full": failure.out_of_memory}
    return next((name for name, yes in kinds.items() if yes), "failed")


def test_a_step_that_fails_where_it_ends_makes_the_one_launched_on_it_void() -> None:
    runner = Failing(at_end={1: ValueError("odd")})
    assert outcomes(runner) == ["failed", "void", "good"]
    assert runner.ended == [1, 2, 3], "its pages are others' once it has ended"
    assert outcomes(Failing(at_end={1: OutOfMemory()})) == ["full", "void", "good"]
    both = {1: ValueError("odd"), 2: ValueError("even")}
    assert outcomes(Failing(at_end=both)) == ["failed", "void", "good"]


def test_a_step_that_fails_where_it_starts_leaves_the_one_before_alone() -> None:
    assert outcomes(Failing(at_start={2: OutOfMemory()})) == ["good", "full", "good"]
    both = Failing(at_end={1: ValueError("odd")}, at_start={2: ValueError("even")})
    assert outcomes(both) == ["failed", "failed", "good"]
    assert outcomes(both, after=1) == ["failed", "failed", "void"]


def test_a_device_that_is_gone_is_said_to_be_whatever_failed_before() -> None:
    gone = {1: ValueError("odd"), 2: DeviceLost("gone")}
    assert outcomes(Failing(at_end=gone))[:2] == ["failed", "fatal"]


# The engine ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps_in_flight", [1, 2])
async def test_an_engine_has_two_steps_under_way_and_ends_the_last(steps_in_flight: int) -> None:
    house = build(Setup(steps_in_flight=steps_in_flight, launched=True))
    async with running(house):
        for seed in (1, 2):
            request = ask((1, 2, 3, 4, 5), 9, samples=2, temperature=1.0, seed=seed)
            heard = await listen(house.engine.open(house.prepare(request)))
            assert_right(request, heard, house.setup.vocabulary)
    launching = house.launching
    assert isinstance(launching, Launching)
    assert launching.most == steps_in_flight
    assert launching.under_way == []


# The model's runner ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = build_model("llama", tmp_path_factory.mktemp("launched"), seed=3)
    return load_model(folder, device="cpu", dtype="float32", page_size=16)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes whenever the host asks for what is on the device."""
    noted: list[str] = []
    wait = Fetched.wait

    def noting(it: Fetched) -> tuple[torch.Tensor, ...]:
        noted.append("wait")
        return wait(it)

    monkeypatch.setattr(Fetched, "wait", noting)
    return noted


TABLES = tuple(np.array([page], dtype=np.int32).tobytes() for page in (2, 3, 1))


def prompts(*samplings: Sampling) -> StepPlan:
    slices = tuple(
        Slice(n, 0, 0, (5 + n, 6, 7), None, TABLES[n], True, (order(n, 3, sampling),))
        for n, sampling in enumerate(samplings)
    )
    return StepPlan(1, 0, (), slices)


def continued(*samplings: Sampling) -> StepPlan:
    """Each one's next step, the last of them first: three rows go round, so that a row and the one
    that it comes from cannot be mixed up."""
    each = tuple(enumerate(samplings))
    slices = tuple(
        Slice(n, 0, 3, (), n, TABLES[n], True, (order(n, 4, sampling, (5 + n, 6, 7)),))
        for n, sampling in (*each[-1:], *each[:-1])
    )
    return StepPlan(2, 0, (), slices)


def order(
    sequence: int, position: int, sampling: Sampling, prompt: tuple[int, ...] = ()
) -> SampleOrder:
    counts = TokenCounts.of(array("i", prompt), len(prompt))
    return SampleOrder(sequence, 0, sampling, 0, position, counts=counts)


def together(runner: ModelRunner, *plans: StepPlan) -> list[StepResult]:
    """All launched before any is fetched."""
    started = [runner.start(each) for each in plans]
    results = [each if isinstance(each, StepResult) else each() for each in started]
    runner.close()
    return results


HOT = Sampling(temperature=1.5, seed=4, top_logprobs=3)
PRESSING = Sampling(temperature=0.0, logit_bias=((9, 50.0),))
PENALTY = replace(PRESSING, repetition_penalty=1000.0)  # nothing said before survives it


def test_tokens_that_nobody_has_fetched_are_the_next_steps_inputs(
    model: LoadedModel, waits: list[str]
) -> None:
    samplings = HOT, Sampling(temperature=0.0), Sampling(temperature=1.0, seed=8)
    plans = prompts(*samplings), continued(*samplings)
    expected = together(ModelRunner(model, pages=4, fill=torch.nan, ahead=False), *plans)
    ahead = ModelRunner(model, pages=4, fill=torch.nan, ahead=True)
    waits.clear()
    started = [ahead.start(each) for each in plans]
    assert waits == [], "a launch has waited for the device"
    results = [each() for each in started if not isinstance(each, StepResult)]
    assert len(results) == len(plans)
    for mine, its in zip(results, expected, strict=True):
        assert (mine.tokens, mine.finite, mine.logprobs) == (its.tokens, its.finite, its.logprobs)
    assert sum(each is not None for each in expected[1].logprobs) == 1
    assert len(set(expected[0].tokens)) == 3, "a swap would not show"
    ahead.close()


def test_tokens_that_were_fetched_are_put_in_by_the_host(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, and where the step before has ended."""

    def put(late: LateTokens, tokens: torch.Tensor) -> None:
        raise AssertionError("the device was asked")

    monkeypatch.setattr(LateTokens, "put", put)
    for ahead in (False, True):
        runner = ModelRunner(model, pages=4, fill=torch.nan, ahead=ahead)
        runner.run(prompts(HOT))
        assert runner.run(continued(HOT)).finite == (True,)
        runner.close()


def test_a_step_is_launched_on_the_models_device(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever device the thread has of its own: Triton asks for that alone."""
    done: list[Any] = []

    @contextmanager
    def as_current(device: torch.device) -> Generator[None]:
        done.append(device)
        yield
        done.append("left")

    monkeypatch.setattr(model_runner, "as_current", as_current)
    forward = model.forward

    def noted(*given: Any, **named: Any) -> torch.Tensor:
        done.append("forward")
        return forward(*given, **named)

    monkeypatch.setattr(model, "forward", noted)
    runner = ModelRunner(model, pages=4, fill=torch.nan)
    runner.run(prompts(HOT))
    assert done == [model.device, "forward", "left"]
    runner.close()


def test_a_cpu_does_a_step_at_once(model: LoadedModel) -> None:
    runner = ModelRunner(model, pages=4, fill=torch.nan)
    assert isinstance(runner.start(prompts(HOT)), StepResult)
    runner.close()


def test_a_penalty_counts_a_token_that_nobody_has_fetched(
    model: LoadedModel, waits: list[str]
) -> None:
    """Each row its own, beside a row without a penalty."""
    samplings = PENALTY, HOT, replace(PRESSING, frequency_penalty=100.0, logit_bias=((11, 50.0),))
    plans = prompts(*samplings), continued(*samplings)
    runner = ModelRunner(model, pages=4, fill=torch.nan, ahead=True)
    started = [runner.start(each) for each in plans]
    assert waits == [], "a launch has waited for the device"
    results = [each() for each in started if not isinstance(each, StepResult)]
    runner.close()
    expected = together(ModelRunner(model, pages=4, fill=torch.nan, ahead=False), *plans)
    assert [each.tokens for each in results] == [each.tokens for each in expected]
    first, second = results
    assert (first.tokens[0], first.tokens[2]) == (9, 11)
    plain = [replace(each, repetition_penalty=1.0, frequency_penalty=0.0) for each in samplings]
    uncounted = together(
        ModelRunner(model, pages=4, fill=torch.nan), prompts(*plain), continued(*plain)
    )
    differ = [mine != its for mine, its in zip(second.tokens, uncounted[1].tokens, strict=True)]
    assert differ == [True, True, False], "the penalties were to change two tokens"


def test_a_step_takes_no_longer_for_the_one_that_it_was_launched_behind(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(model_runner, "time", clock)
    runner = ModelRunner(model, pages=4, fill=0.0, ahead=True)
    started: list[Any] = []
    for each, later in ((prompts(HOT), 101.0), (continued(HOT), 107.0)):
        started.append(runner.start(each))
        now = later
    first: StepResult = started[0]()
    now = 110.0
    second: StepResult = started[1]()
    now = 150.0
    third = runner.run(prompts(HOT))
    assert (first.seconds, second.seconds, third.seconds) == (7.0, 3.0, 0.0)
    runner.close()


@pytest.mark.parametrize("where", ["launched", "fetched"])
def test_a_step_that_fails_is_told_of_only_when_its_moves_are_over(
    where: str, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a copy still writes to must not be another's yet."""
    runner = ModelRunner(model, pages=4, slots=2, fill=0.0, ahead=True)
    waited: list[str] = []

    class Event:
        def synchronize(self) -> None:
            waited.append("for the moves")

    events: Any = (Event(), Event())
    moving = Moving(fetched((), torch.device("cpu")), 1, 0.0, events)

    def begin(mover: PageMover, moves: Moves) -> Moving:
        return moving

    def fail(*_: object) -> Any:
        raise MemoryError

    monkeypatch.setattr(PageMover, "begin", begin)
    monkeypatch.setattr(*((runner, "_logits") if where == "launched" else (Fetched, "wait")), fail)
    ordered = StepPlan(1, 0, (), prompts(HOT).slices, Moves(saves=(PageMove(3, 1),)))
    with pytest.raises(OutOfMemory):
        run(runner, ordered)
    assert waited == ["for the moves"]
    runner.close()


def test_a_step_of_a_device_asks_for_its_end_even_without_samples(
    tmp_path: Path, model: LoadedModel, waits: list[str]
) -> None:
    """Or a slice in the middle of a prompt would seem to take no time."""
    runner = ModelRunner(model, pages=4, fill=0.0, ahead=True)
    (item,) = prompts(HOT).slices
    started = runner.start(StepPlan(1, 0, (), (item._replace(orders=()),)))
    assert not isinstance(started, StepResult)
    assert waits == []
    assert started().tokens == ()
    assert waits
    runner.close()
