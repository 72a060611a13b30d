"""The runner's thread, and what a runner is.

A runner runs one plan at a time, in a thread of its own: tensors have one owner. Plans cross in
one queue, results come back by `call_soon_threadsafe`: one thread crossing each way per step.

Between the long work of two steps, products and attention, the runner's thread needs the
interpreter: it samples, and builds the next batch. Whoever has heard of a result needs it as well,
for each of its tokens, and an operation of torch that lets go of it gets it back only when the
event loop waits, or after 5 ms. So a result is told when the next step's long work begins, where a
step is next (figures in docs/log.md).

A device of its own goes on by itself once a step is launched. Then the next step is launched before
this one's tokens are fetched, so that the device has work all the time; tokens that it needs stay
there. While one step is under way and no other is there to be launched, the thread does not know
whether to wait for the step or for a plan: the event loop says when nothing follows.

    loop      plan 1, plan 2                     commit 1, plan 3         commit 2, nothing follows
    thread    launch 1, launch 2, wait for 1 ▶   launch 3, wait for 2 ▶   wait for 3 ▶
    device    1─────────────────2──────────────────────3───────────────────

A plan that was made before the failure of an earlier one was known is void: it counts on pages
and tokens which that step should have written, so it is answered without being run, or what it gave
is thrown away. What counts on a void step is void too.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from enum import Enum
from queue import SimpleQueue
from typing import Protocol

from chatserve.engine.plan import StepFailure, StepPlan, StepResult

_log = logging.getLogger(__name__)


class _Order(Enum):
    """What crosses to the thread beside plans."""

    NOTHING_FOLLOWS = "nothing follows"
    END = "end"


class DeviceLost(Exception):
    """Raised by a runner when no later step can succeed."""


class OutOfMemory(Exception):
    """Raised by a runner when a smaller step may succeed."""


# Waits for a step that the device is at by itself. To be called once, in the order of the steps.
# Raises what `Runner.start` may raise.
StepUnderWay = Callable[[], StepResult]


class Runner(Protocol):
    """Computes steps. Called from one thread only."""

    def start(
        self, plan: StepPlan, computing: Callable[[], None] | None = None
    ) -> StepResult | StepUnderWay:
        """Do everything the plan says, or launch it. One step more may be started before the
        result of one under way is asked for.

        computing: to be called, once or more, when the step begins what takes long and leaves the
        interpreter to others. Raises OutOfMemory, DeviceLost, or anything else for a step that
        failed.
        """
        ...

    def close(self) -> None:
        """Give memory back."""
        ...


def run(runner: Runner, plan: StepPlan) -> StepResult:
    """A step from its start to its end. Raises what `Runner.start` may raise."""
    started = runner.start(plan)
    return started if isinstance(started, StepResult) else started()


class StepRunner:
    """Runs plans in order on the caller's thread; whatever goes wrong is a StepFailure."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._failed_step = 0  # the last step that left undone what later ones may count on

    def run(self, plan: StepPlan) -> StepResult:
        """The plan's result, from its start to its end. Raises nothing."""
        started = self.start(plan)
        return started if isinstance(started, StepResult) else self.end(plan, started)

    def start(
        self, plan: StepPlan, computing: Callable[[], None] | None = None
    ) -> StepResult | StepUnderWay:
        """As `Runner.start`, but raises nothing."""
        if self._failed_step > plan.after:
            return self._void(plan)
        started = time.monotonic()
        try:
            return self._runner.start(plan, computing)
        except Exception as error:
            return self._failed(plan, error, started)

    def end(self, plan: StepPlan, under_way: StepUnderWay) -> StepResult:
        """The result of a step under way; void where one failed that it counts on. Raises
        nothing."""
        void = plan.after < self._failed_step < plan.number
        started = time.monotonic()
        try:
            result = under_way()
        except Exception as error:
            result = self._failed(plan, error, started)
        fatal = result.failure is not None and result.failure.fatal
        return self._void(plan) if void and not fatal else result

    def close(self) -> None:
        """Give the runner's memory back."""
        self._runner.close()

    def _void(self, plan: StepPlan) -> StepResult:
        self._failed_step = max(self._failed_step, plan.number)
        return StepResult(plan.number, failure=StepFailure("an earlier step failed", void=True))

    def _failed(self, plan: StepPlan, error: Exception, started: float) -> StepResult:
        self._failed_step = max(self._failed_step, plan.number)
        if isinstance(error, DeviceLost):
            failure = StepFailure(str(error), fatal=True)
        elif isinstance(error, OutOfMemory):
            failure = StepFailure(str(error), out_of_memory=True)
        else:
            # Whatever a model or a kernel raises ends this step, not the server.
            failure = StepFailure(f"{type(error).__name__}: {error}")
            _log.error("step %d failed", plan.number, exc_info=error)
        return StepResult(plan.number, seconds=time.monotonic() - started, failure=failure)


class RunnerThread:
    """Runs plans in order and posts each result to `on_result` on the event loop."""

    def __init__(self, runner: Runner, on_result: Callable[[StepResult], None]) -> None:
        self._steps = StepRunner(runner)
        self._on_result = on_result
        self._loop = asyncio.get_running_loop()
        self._plans: SimpleQueue[StepPlan | _Order] = SimpleQueue()
        self._closed = False
        self._said_nothing_follows = True
        self._under_way: tuple[StepPlan, StepUnderWay] | None = None  # the thread's own
        self._untold: list[StepResult] = []  # so is this
        self._heard = True  # the loop is there
        self._thread = threading.Thread(target=self._work, name="chatserve-runner", daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        """Hand a plan over. Never waits."""
        assert not self._closed
        self._said_nothing_follows = False
        self._plans.put(plan)

    def nothing_follows(self) -> None:
        """The next plan comes when the last one's result is told, at the earliest: without this
        that may not be told at all. Never waits."""
        if not self._said_nothing_follows:
            self._said_nothing_follows = True
            self._plans.put(_Order.NOTHING_FOLLOWS)

    def close(self) -> None:
        """No more plans. Idempotent; the thread ends after those that it was given."""
        if not self._closed:
            self._closed = True
            self._plans.put(_Order.END)

    def join(self, timeout_seconds: float) -> bool:
        """Wait for the thread to end; blocks. Returns whether it did."""
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while self._heard and (order := self._plans.get()) is not _Order.END:
            if order is _Order.NOTHING_FOLLOWS:
                self._end_under_way()
            else:
                assert isinstance(order, StepPlan)
                self._start(order)
            if self._plans.empty():
                self._tell()
        self._end_under_way()
        self._tell()
        self._steps.close()

    def _start(self, plan: StepPlan) -> None:
        started = self._steps.start(plan, self._tell)
        self._tell()  # also where the step did not say that it was computing
        self._end_under_way()
        if isinstance(started, StepResult):
            self._untold.append(started)
        else:
            self._under_way = plan, started

    def _end_under_way(self) -> None:
        if self._under_way is not None:
            plan, step = self._under_way
            self._under_way = None
            self._untold.append(self._steps.end(plan, step))
            self._tell()  # the device is at the next step already, if there is one

    def _tell(self) -> None:
        untold, self._untold = self._untold, []
        try:
            for result in untold:
                self._loop.call_soon_threadsafe(self._on_result, result)
        except RuntimeError:  # the loop is closed: nobody is left to hear of it
            self._heard = False
