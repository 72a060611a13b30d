"""The token budget follows measured step time."""

import random

import pytest

from chatserve.engine.pace import PATIENCE, Pace


def settle(
    pace: Pace, fixed: float, per_token: float, *, steps: int = 60, noise: float = 0.0
) -> int:
    """Steps at a cost of fixed + per_token each: whole budgets, and some last slices."""
    source = random.Random(3)
    for step in range(steps):
        tokens = pace.budget() if step % 3 else max(1, pace.budget() // 2)
        seconds = fixed + per_token * tokens
        pace.observe(tokens, seconds * (1 + noise * source.uniform(-1, 1)))
    return pace.budget()


@pytest.mark.parametrize(("fixed", "per_token"), [(0.0, 0.001), (0.02, 0.0005), (0.05, 0.002)])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_step_takes_about_the_target_time(fixed: float, per_token: float, noise: float) -> None:
    pace = Pace(target_seconds=0.1, tokens_min=8, tokens_max=4096)
    tokens = settle(pace, fixed, per_token, noise=noise)
    assert 0.05 <= fixed + per_token * tokens <= 0.2


def test_a_slow_device_gets_the_smallest_steps_and_a_fast_one_the_largest() -> None:
    slow = Pace(target_seconds=0.1, tokens_min=8, tokens_max=512)
    assert settle(slow, 0.0, 1.0) == 8
    fast = Pace(target_seconds=0.1, tokens_min=8, tokens_max=512)
    assert settle(fast, 0.0, 1e-7) == 512


def test_a_device_that_becomes_slower_is_noticed() -> None:
    pace = Pace(target_seconds=0.1, tokens_min=8, tokens_max=4096)
    before = settle(pace, 0.01, 0.0005)
    after = settle(pace, 0.01, 0.005)
    assert after < before / 3


@pytest.mark.parametrize("seconds", [0.0, 1e-12, 1e6])
def test_strange_times_keep_the_budget_in_its_bounds(seconds: float) -> None:
    pace = Pace(target_seconds=0.1, tokens_min=8, tokens_max=512)
    for tokens in [1, 1, 512, 3, 3, 3, 100]:
        pace.observe(tokens, seconds)
        assert 8 <= pace.budget() <= 512


def test_a_step_takes_longer_while_nobody_waits_for_a_next_token() -> None:
    pace = Pace(target_seconds=0.1, tokens_min=8, tokens_max=4096)
    settle(pace, 0.05, 0.002)
    assert 0.1 <= 0.05 + 0.002 * pace.budget(patient=True) / PATIENCE <= 0.15
    assert pace.budget(patient=True) > 5 * pace.budget(), "the fixed part is paid less often"
    small = Pace(target_seconds=0.1, tokens_min=8, tokens_max=100)
    settle(small, 0.0, 1e-6)
    assert small.budget(patient=True) == 100, "memory bounds it all the same"


def test_running_out_of_memory_halves_the_step_for_good() -> None:
    pace = Pace(target_seconds=0.1, tokens_min=8, tokens_max=512)
    assert pace.shrink(200)
    assert settle(pace, 0.0, 1e-6) == 100
    assert pace.shrink(9)
    assert not pace.shrink(8), "nothing smaller is possible"
    assert pace.budget() == 8
