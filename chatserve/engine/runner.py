"""The runner's thread, and what a runner is.

A runner runs one plan at a time, in a thread of its own: tensors have one owner. Plans cross in
one queue, results come back by `call_soon_threadsafe`: one thread crossing each way per step.

Between the long work of two steps, products and attention, the runner's thread needs the
interpreter: it samples, and builds the next batch. Whoever has heard of a result needs it as well,
for each of its tokens, and an operation of torch that lets go of it gets it back only when the
event loop waits, or after 5 ms. So a result is told when the next step's long work begins, where a
step is next (figures in docs/log.md).

A plan that was made before the failure of an earlier one was known is void: it counts on pages
and tokens which that step should have written, so it is answered without being run. What counts
on a void step is void too.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

from chatserve.engine.plan import StepFailure, StepPlan, StepResult

_log = logging.getLogger(__name__)


class DeviceLost(Exception):
    """Raised by a runner when no later step can succeed."""


class OutOfMemory(Exception):
    """Raised by a runner when a smaller step may succeed."""


class Runner(Protocol):
    """Computes steps. Called from one thread only.

    Raises OutOfMemory, DeviceLost, or anything else for a step that failed.
    """

    def run(self, plan: StepPlan, computing: Callable[[], None] | None = None) -> StepResult:
        """Do everything the plan says. computing: to be called, once or more, when the step begins
        what takes long and leaves the interpreter to others."""
        ...

    def close(self) -> None:
        """Give memory back."""
        ...


class StepRunner:
    """Runs plans in order on the caller's thread; whatever goes wrong is a StepFailure."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._failed_step = 0  # the last step that left undone what later ones may count on

    def run(self, plan: StepPlan, computing: Callable[[], None] | None = None) -> StepResult:
        """The plan's result. Raises nothing. computing: as in `Runner`."""
        if self._failed_step > plan.after:
            self._failed_step = plan.number
            failure = StepFailure("an earlier step failed", void=True)
            return StepResult(plan.number, failure=failure)
        started = time.monotonic()
        try:
            return self._runner.run(plan, computing)
        except DeviceLost as error:
            failure = StepFailure(str(error), fatal=True)
        except OutOfMemory as error:
            failure = StepFailure(str(error), out_of_memory=True)
        except Exception as error:
            # Whatever a model or a kernel raises ends this step, not the server.
            failure = StepFailure(f"{type(error).__name__}: {error}")
            _log.exception("step %d failed", plan.number)
        self._failed_step = plan.number
        return StepResult(plan.number, seconds=time.monotonic() - started, failure=failure)

    def close(self) -> None:
        """Give the runner's memory back."""
        self._runner.close()


class RunnerThread:
    """Runs plans in order and posts each result to `on_result` on the event loop."""

    def __init__(self, runner: Runner, on_result: Callable[[StepResult], None]) -> None:
        self._steps = StepRunner(runner)
        self._on_result = on_result
        self._loop = asyncio.get_running_loop()
        self._plans: SimpleQueue[StepPlan | None] = SimpleQueue()
        self._closed = False
        self._untold: list[StepResult] = []  # the thread's own
        self._heard = True  # the loop is there
        self._thread = threading.Thread(target=self._work, name="chatserve-runner", daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        """Hand a plan over. Never waits."""
        assert not self._closed
        self._plans.put(plan)

    def close(self) -> None:
        """No more plans. Idempotent; the thread ends after the plan it is at."""
        if not self._closed:
            self._closed = True
            self._plans.put(None)

    def join(self, timeout_seconds: float) -> bool:
        """Wait for the thread to end; blocks. Returns whether it did."""
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (plan := self._plans.get()) is not None:
            result = self._steps.run(plan, self._tell)
            self._tell()  # also where the step did not say that it was computing
            self._untold.append(result)
            if self._plans.empty():
                self._tell()
            if not self._heard:
                break
        self._tell()
        self._steps.close()

    def _tell(self) -> None:
        untold, self._untold = self._untold, []
        try:
            for result in untold:
                self._loop.call_soon_threadsafe(self._on_result, result)
        except RuntimeError:  # the loop is closed: nobody is left to hear of it
            self._heard = False
