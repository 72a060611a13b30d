"""A runner whose device goes on by itself, as a GPU does: a step is launched, and what became of it
is heard of when its result is asked for."""

from collections.abc import Callable
from dataclasses import dataclass, field

from chatserve.engine.plan import StepPlan, StepResult
from chatserve.engine.runner import Runner, StepUnderWay

UNDER_WAY_MAX = 2


@dataclass
class Launching:
    """Around a runner that does a step at once."""

    runner: Runner
    under_way: list[int] = field(default_factory=list[int])
    most: int = 0

    def start(
        self, plan: StepPlan, computing: Callable[[], None] | None = None
    ) -> StepResult | StepUnderWay:
        assert len(self.under_way) < UNDER_WAY_MAX, "a step too many was launched"
        self.under_way.append(plan.number)
        self.most = max(self.most, len(self.under_way))
        result: StepResult | StepUnderWay | None = None
        failed: Exception | None = None
        try:
            result = self.runner.start(plan, computing)
        except Exception as error:
            failed = error

        def fetch() -> StepResult:
            assert self.under_way.pop(0) == plan.number, "results are asked for in order, once"
            if failed is not None:
                raise failed
            assert isinstance(result, StepResult)
            return result

        return fetch

    def close(self) -> None:
        self.runner.close()
