"""What a prompt's token costs, by two steps before there are requests, and who is told."""

from collections.abc import Callable

import pytest

from chatserve.engine.plan import StepPlan, StepResult
from chatserve.engine.simulated_runner import SimulatedRunner
from chatserve.engine.tiers import TierLimits
from chatserve.engine.trial import prompt_token_seconds
from tests.engine.build import Setup, ask
from tests.engine.fake_depot import FakeDepot
from tests.engine.stepper import Stepper

SHORT = tuple(range(39))  # two pages, and no step that says what computing a prompt costs


class _Told:
    """A simulated runner whose steps are said to have taken what `seconds` tells of their tokens,
    the first one a second more."""

    def __init__(self, *, step: float, token: float) -> None:
        self._runner = SimulatedRunner(pages=5, page_size=16)
        self._step, self._token = step, token
        self.plans: list[StepPlan] = []

    def start(self, plan: StepPlan, computing: Callable[[], None] | None = None) -> StepResult:
        result = self._runner.start(plan, computing)
        late = 0.0 if self.plans else 1.0
        self.plans.append(plan)
        seconds = late + self._step + self._token * plan.token_count
        return StepResult(plan.number, result.tokens, result.finite, seconds=seconds)

    def close(self) -> None:
        self._runner.close()


@pytest.mark.parametrize("tokens", [2, 16, 40, 64])
def test_a_token_is_told_without_what_each_step_costs_or_a_late_start(tokens: int) -> None:
    runner = _Told(step=0.5, token=0.25)
    assert prompt_token_seconds(runner, tokens=tokens, page_size=16) == pytest.approx(0.25)
    assert {plan.token_count for plan in runner.plans} == {1, tokens}
    assert all(each.orders for plan in runner.plans for each in plan.slices), "it is waited for"


def test_a_device_to_which_tokens_are_nothing_saves_nothing() -> None:
    runner = _Told(step=0.5, token=-0.001)
    assert prompt_token_seconds(runner, tokens=64, page_size=16) == 0.0


def test_a_short_chat_is_told_what_it_saved_and_nothing_is_decided_by_it() -> None:
    depot = FakeDepot()
    limits = TierLimits(trial_token_seconds=0.002)
    stepper = Stepper(Setup(depot=depot, page_size=16, tiers=limits))
    tiers = stepper.scheduler.tiers

    def answered(seconds: float) -> float | None:
        """Pages are on disk alone, and loading takes so long; the seconds that this saved."""
        stepper.house.blocks.flush()
        asked = stepper.ask(ask(SHORT, 1))
        stepper.job_seconds = seconds
        stepper.run_all()
        (receipt,) = asked.heard[0].receipts
        assert (receipt.disk, receipt.computed) == (32, 7)
        return receipt.saved

    stepper.ask(ask(SHORT, 1))
    stepper.run_all()
    assert answered(10.0) == 0.0, "loading took longer"
    assert answered(0.0) == pytest.approx(32 * 0.002), "loaded, though computing seemed quicker"
    assert tiers.statistics().compute_token_seconds is None, "measured is what a step says"
    tiers.observe_step(1000, 10_000.0)
    assert answered(0.0) == pytest.approx(32 * 10.0), "and that is what counts"
