"""Steps that fail: the others go on, the guilty ends, and nothing is computed on what was not."""

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from chatserve.engine.plan import SampleOrder, StepPlan
from chatserve.engine.runner import DeviceLost, OutOfMemory, StepRunner
from chatserve.engine.values import FinishReason
from chatserve.errors import NumericalFault, Quarantined, StepFault, Unavailable
from tests.engine.build import Setup, ask, build, quiet, random_tokens, running
from tests.engine.oracle import Heard, assert_right, expected, listen
from tests.engine.stepper import Asked, InjectedFault, Stepper

SETUP = Setup(pages=64, page_size=4, budget_min=16, budget_max=16)
PLANS_MAX = 400  # of a handful of short requests, faults and all


def prompt(count: int, seed: int = 1) -> tuple[int, ...]:
    return random_tokens(random.Random(seed), count)


def crowd(stepper: Stepper, count: int = 6) -> list[Asked]:
    source = random.Random(4)
    stem = random_tokens(source, 10)
    return [
        stepper.ask(
            ask(
                (*stem, *random_tokens(source, index)),
                12,
                samples=1 + index % 3,
                temperature=1.0,
                seed=index,
            )
        )
        for index in range(count)
    ]


def fail_at(*steps: int, error: type[Exception] = InjectedFault) -> Callable[[StepPlan], None]:
    """A step hook that raises in the given steps."""

    def hook(plan: StepPlan) -> None:
        if plan.number in steps:
            raise error(f"step {plan.number}")

    return hook


@pytest.mark.parametrize(("in_flight", "launched"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("steps", [(1,), (2,), (3,), (5,), (8,)])
def test_a_step_that_fails_once_costs_nobody_anything_but_time(
    steps: tuple[int, ...], in_flight: int, launched: bool
) -> None:
    setup = Setup(pages=64, page_size=4, budget_max=16, steps_in_flight=in_flight)
    stepper = Stepper(replace(setup, launched=launched))
    stepper.house.runner.before_step = fail_at(*steps)
    asked = crowd(stepper)
    stepper.run_all()
    stepper.assert_right(*asked)
    stepper.house.assert_baseline()
    assert stepper.scheduler.counts.failed_steps == len(steps)
    assert stepper.house.auditor.plans < PLANS_MAX


def test_nothing_runs_on_what_a_void_step_left_undone() -> None:
    stepper = Stepper(Setup(pages=64, page_size=4, budget_min=4, budget_max=4))
    gone = stepper.ask(ask(prompt(4), 1))
    stepper.plan()
    stepper.abort(gone)  # the step that fails has nobody left to be suspected
    stepper.house.runner.before_step = fail_at(1)
    stays = stepper.ask(ask(prompt(40, 2), 4))
    stepper.plan()
    stepper.commit()
    assert stepper.plan() is None, "a step was planned on one that is void"
    stepper.run_all()
    stepper.assert_right(stays)
    assert stepper.house.auditor.plans < 30, "voids that follow from voids"


def test_what_counts_on_a_void_step_is_void_too() -> None:
    house = build(SETUP)
    house.runner.before_step = fail_at(1)
    steps = StepRunner(house.runner)
    results = [
        steps.run(StepPlan(number=number, after=after, copies=(), slices=()))
        for number, after in [(1, 0), (2, 0), (3, 1), (4, 2), (5, 4), (6, 4)]
    ]
    fates = [result.failure and result.failure.void for result in results]
    assert fates == [False, True, True, True, None, None]


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("samples", [1, 3])
def test_the_input_that_breaks_a_step_twice_is_quarantined_and_the_others_finish(
    samples: int, in_flight: int
) -> None:
    stepper = Stepper(Setup(pages=64, page_size=4, budget_max=64, steps_in_flight=in_flight))
    poison = prompt(7, 99)
    guilty: set[int] = set()

    def hook(plan: StepPlan) -> None:
        if any(item.sequence in guilty for item in plan.slices):
            raise InjectedFault("poison")

    stepper.house.runner.before_step = hook
    others = crowd(stepper)
    for _ in range(3):
        stepper.step()
    bad = stepper.ask(ask(poison, 6, samples=samples, temperature=1.0))
    stepper.until(lambda: bool(bad.heard[0].tokens))
    guilty.update(item.id for item in stepper.sequences(bad))
    stepper.run_all()
    stepper.assert_right(*others)
    for heard in bad.heard:
        assert heard.finish is FinishReason.ERROR
        assert isinstance(heard.error, StepFault)
    assert stepper.scheduler.counts.failed_steps == 2
    assert stepper.scheduler.broken is None, "one input is not a broken device"
    with pytest.raises(Quarantined):
        stepper.ask(ask(poison, 3))
    stepper.house.assert_baseline()


@pytest.mark.parametrize("caching", [True, False])
def test_probation_ends_where_the_step_failed_and_company_is_kept_again(*, caching: bool) -> None:
    """Without a cache a suspect is computed anew, in several steps, before it gets that far."""
    setup = Setup(page_size=4, budget_min=16, budget_max=16, steps_in_flight=1, caching=caching)
    stepper = Stepper(setup)
    suspects = [stepper.ask(ask(prompt(30, seed), 24)) for seed in range(3)]
    stepper.until(lambda: all(len(one.heard[0].tokens) >= 3 for one in suspects))
    plans: list[StepPlan] = []

    def hook(plan: StepPlan) -> None:
        plans.append(plan)
        if len(plans) == 1:
            raise InjectedFault("once")

    stepper.house.runner.before_step = hook
    stepper.step()
    newcomer = stepper.ask(ask(prompt(5, 9), 4))
    failed = {item.sequence: item.end for item in plans[0].slices}
    assert len(failed) == 3
    stepper.until(lambda: newcomer.over)
    assert not any(one.over for one in suspects), "they generated in company for no step"
    after = [[item.sequence for item in plan.slices] for plan in plans[1:]]
    solo = next(index for index, company in enumerate(after) if len(company) > 1)
    reached = {plan.slices[0].sequence: plan.slices[0].end for plan in plans[1 : solo + 1]}
    assert reached == failed, "each is alone as far as the failed step, and no further"
    assert sum(a != b for a, b in pairwise(after[:solo])) == 2, "one after the other"
    assert (solo == 3) == caching
    stepper.run_all()
    assert all(len(plan.slices) > 1 for plan in plans[solo + 1 : solo + 9]), "alone again"
    stepper.assert_right()
    assert stepper.scheduler.counts.failed_steps == 1
    stepper.house.assert_baseline()


def test_three_inputs_that_fail_alone_in_a_row_mean_a_broken_device() -> None:
    stepper = Stepper(SETUP)
    asked = crowd(stepper)

    def hook(_: StepPlan) -> None:
        raise InjectedFault("always")

    stepper.house.runner.before_step = hook
    stepper.run_all()
    assert stepper.scheduler.broken is not None
    assert stepper.scheduler.counts.failed_steps <= 6
    assert all(one.finish is FinishReason.ERROR for item in asked for one in item.heard)
    with pytest.raises(Unavailable):
        stepper.ask(ask(prompt(3), 1))


def test_a_step_out_of_memory_is_tried_smaller_and_nobody_is_blamed() -> None:
    stepper = Stepper(Setup(pages=64, page_size=4, budget_min=4, budget_max=128))

    def hook(plan: StepPlan) -> None:
        if plan.token_count > 12:
            raise OutOfMemory(f"{plan.token_count} tokens")

    stepper.house.runner.before_step = hook
    asked = [stepper.ask(ask(prompt(50, seed), 5)) for seed in range(4)]
    stepper.run_all()
    stepper.assert_right(*asked)
    assert stepper.scheduler.statistics().quarantined == 0
    assert stepper.scheduler.broken is None
    stepper.house.assert_baseline()


def test_a_request_that_no_step_is_small_enough_for_ends_alone() -> None:
    stepper = Stepper(Setup(pages=64, page_size=4, budget_min=4, budget_max=64))
    others = crowd(stepper)
    bad = stepper.ask(ask(prompt(9, 50), 4))
    (guilty,) = stepper.sequences(bad)

    def hook(plan: StepPlan) -> None:
        if any(item.sequence == guilty.id for item in plan.slices):
            raise OutOfMemory("never")

    stepper.house.runner.before_step = hook
    stepper.run_all()
    stepper.assert_right(*others)
    assert bad.heard[0].finish is FinishReason.ERROR
    stepper.house.assert_baseline()


@pytest.mark.parametrize("step", [1, 2, 6])
def test_a_lost_device_ends_everything_within_its_step(step: int) -> None:
    stepper = Stepper(SETUP)
    asked = crowd(stepper)
    stepper.house.runner.before_step = fail_at(step, error=DeviceLost)
    for _ in range(step):
        stepper.step()
    assert not stepper.house.engine.healthy
    for one in asked:
        assert all(isinstance(heard.error, Unavailable) for heard in one.heard)
    stepper.run_all()
    stepper.house.assert_baseline()


def test_a_row_that_is_not_finite_ends_its_sample_alone_and_leaves_no_page() -> None:
    stepper = Stepper(SETUP)
    others = crowd(stepper)
    bad = stepper.ask(ask(prompt(14, 77), 12, samples=3, temperature=1.0, seed=5))

    def after_row(order: SampleOrder) -> bool:
        return not (order.sampling.seed == 5 and order.sample == 1 and order.position == 18)

    stepper.house.runner.after_row = after_row
    assert others[5].request.sampling.seed == 5
    others.pop()  # its own sample 1 is as unlucky
    stepper.run_all()
    stepper.assert_right(*others)
    assert isinstance(bad.heard[1].error, NumericalFault)
    assert len(bad.heard[1].tokens) == 4
    for sample in (0, 2):
        heard = bad.heard[sample]
        assert heard.finish is not FinishReason.ERROR
    stepper.house.assert_baseline()
    names = stepper.house.namer.names(
        stepper.house.prepare(bad.request).root,
        (*bad.request.tokens, *bad.heard[1].tokens),
    )
    assert not stepper.house.blocks._index.holds(names[-1]), "a page of the bad row was kept"


@pytest.mark.parametrize("steps", [1, 2])
def test_a_row_that_is_not_finite_names_nothing_of_who_has_left(steps: int) -> None:
    stepper = Stepper(SETUP)
    tokens = prompt(14)
    bad = stepper.ask(ask(tokens, 12))
    whole = (*tokens, *expected(bad.request, 0, stepper.house.setup.vocabulary).tokens)
    names = stepper.house.namer.names(stepper.house.prepare(bad.request).root, whole)
    resident = stepper.house.blocks._index.holds
    stepper.until(lambda: len(bad.heard[0].tokens) == 5)
    assert resident(names[3])
    stepper.house.runner.after_row = lambda order: False
    for _ in range(steps):
        stepper.plan()
    stepper.abort(bad)
    assert stepper.lives(bad) == set()
    while stepper.commit():
        pass
    assert not any(map(resident, names)), "what is not a number may be in its pages"
    stepper.house.assert_baseline()


async def test_an_engine_loses_its_device_and_every_stream_ends() -> None:
    house = build(SETUP)
    house.runner.before_step = fail_at(3, error=DeviceLost)
    requests = [ask(prompt(9, seed), 20, samples=2) for seed in range(5)]
    async with running(house) as engine:
        streams = [engine.open(house.prepare(request)) for request in requests]
        answers = [await listen(stream) for stream in streams]
        assert not engine.healthy
        with pytest.raises(Unavailable):
            engine.open(house.prepare(requests[0]))
        await quiet(house)
    heard: list[Heard] = [one for answer in answers for one in answer]
    assert all(isinstance(one.error, Unavailable) for one in heard)
    house.assert_baseline()


async def test_an_engine_outlives_a_failed_step() -> None:
    house = build(SETUP)
    house.runner.before_step = fail_at(4)
    requests = [ask(prompt(9, seed), 10) for seed in range(5)]
    async with running(house) as engine:
        streams = [engine.open(house.prepare(request)) for request in requests]
        answers = [await listen(stream) for stream in streams]
        await quiet(house)
    for request, heard in zip(requests, answers, strict=True):
        assert_right(request, heard, house.setup.vocabulary)
    house.assert_baseline()
