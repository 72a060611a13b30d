"""Long forms of the engine's tests, over the simulated model."""

import random
import resource
import sys
from collections.abc import Callable

import pytest

from tests.engine.build import Setup
from tests.engine.churn import churn
from tests.engine.stepper import Stepper
from tests.engine.test_cancellation import SETUP, STAGES, Stage, leave_once
from tests.engine.test_invariants import many_turns
from tests.engine.test_leaving_storm import (
    test_faults_of_our_own_among_those_who_leave_end_nobody_but_who_was_at_hand_twice as faults,
)
from tests.engine.test_leaving_storm import (
    test_leaving_at_any_point_of_a_tiny_pool_harms_nobody_else as leaving,
)
from tests.engine.test_recovery import (
    test_exceptions_at_random_places_never_give_a_wrong_token as exceptions_at_random_places,
)
from tests.engine.test_simulation import SETUPS, mixed_requests, simulate

pytestmark = pytest.mark.soak

GROWTH_MIB_MAX = 1.0  # resident memory after the first tenth of a run


def resident_mib() -> float:
    """The most memory that this process ever held."""
    unit = 1024 if sys.platform == "linux" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


async def test_ten_thousand_requests_with_a_tenth_leaving_leave_nothing_behind() -> None:
    house = await churn(10_000, leaving=0.1, seed=2, check_every=50)
    print(house.scheduler.statistics())


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_leaving_ten_thousand_times_at_each_stage_leaks_no_page(stage: Stage) -> None:
    times = 10_000 // len(STAGES) + 1
    stepper = Stepper(SETUP)
    for index in range(times):
        if index % 50 == 0:  # faults add up to a broken device, as they should
            stepper = Stepper(SETUP)
        leave_once(stepper, stage, company=index % 3, seed=index)
        stepper.house.auditor.forget_groups()
        stepper.asked.clear()


def test_a_hundred_thousand_turns_are_flat() -> None:
    many_turns(10_000)
    before = resident_mib()
    many_turns(100_000)
    assert resident_mib() - before <= GROWTH_MIB_MAX


@pytest.mark.parametrize("name", SETUPS)
async def test_simulation_with_many_seeds(name: str) -> None:
    setup: Setup = SETUPS[name]
    first = random.randrange(1 << 30)
    for seed in range(first, first + 15):
        print(f"seed={seed}")
        await simulate(setup, mixed_requests(seed, 60, longest=60), seed)


async def test_exceptions_at_random_places_with_many_seeds() -> None:
    for seed in range(1000, 1400):
        await exceptions_at_random_places(seed)


@pytest.mark.parametrize("storm", [leaving, faults], ids=["leaving", "faults"])
def test_storms_with_many_seeds(storm: Callable[[int], None]) -> None:
    first = random.randrange(1 << 30)
    for seed in range(first, first + 2000):
        print(f"seed={seed}")
        storm(seed)
