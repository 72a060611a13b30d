"""In-flight de-duplication: a new prefix is computed once, whoever leads and whatever befalls."""

import random
from collections.abc import Callable

import pytest

from chatserve.engine.plan import StepPlan
from chatserve.engine.sequence import Life
from tests.engine.build import Setup, ask, random_tokens
from tests.engine.stepper import Asked, InjectedFault, Stepper

SIZE = 16
PREFIX = random_tokens(random.Random(3), 1000)
SETUP = Setup(
    pages=600,
    page_size=SIZE,
    budget_min=128,
    budget_max=128,
    sequences_max=32,
    queued_max=2000,
    context_length=1100,
)
MARGIN = 1.05


def crowd(stepper: Stepper, count: int, *, tail: int = 0, tenant: str = "a") -> list[Asked]:
    """Requests with one new prefix, all there before the first step."""
    source = random.Random(7)
    return [
        stepper.ask(ask((*PREFIX, *random_tokens(source, tail)), 1, name=f"{index}", tenant=tenant))
        for index in range(count)
    ]


def own_positions(stepper: Stepper, requests: int, tail: int) -> int:
    """What each computes by itself: the rest after the last whole page, at least one token."""
    rest = len(PREFIX) % SIZE + tail
    return requests * max(1, rest)


@pytest.mark.parametrize("count", [32, 1000])
def test_one_new_prefix_is_computed_once(count: int) -> None:
    stepper = Stepper(SETUP)
    asked = crowd(stepper, count)
    stepper.run_all(check=count < 100)
    stepper.assert_right(*asked)
    prefix = stepper.house.runner.computed_positions - own_positions(stepper, count - 1, 0)
    assert prefix <= MARGIN * len(PREFIX)
    assert stepper.scheduler.counts.prompt_tokens == stepper.house.runner.computed_positions
    claims = stepper.house.blocks.statistics().claims
    assert claims.waited <= count - 1, "a follower was woken before the whole run was there"
    stepper.house.assert_baseline()


@pytest.mark.parametrize("fate", ["cancelled", "preempted", "failed", "finished by its asker"])
@pytest.mark.parametrize("progress", [1, 4, 7])
def test_a_follower_takes_over_from_a_leader_that_goes(fate: str, progress: int) -> None:
    stepper = Stepper(SETUP)
    asked = crowd(stepper, 32, tail=5)
    leader = asked[0]
    for _ in range(progress):
        stepper.step()
    assert stepper.lives(leader) == {Life.RUNNING}
    assert all(stepper.lives(one) == {Life.FOLLOWING} for one in asked[1:])
    in_flight = 2 * 128  # computed and never sealed
    if fate == "cancelled":
        stepper.abort(leader)
        assert all(stepper.lives(one) == {Life.FOLLOWING} for one in asked[1:])
        while stepper.commit():
            pass
        in_flight = 0  # what was being computed is still kept
    elif fate == "preempted":
        stepper.scheduler.roster.preempt(*stepper.sequences(leader))
    elif fate == "finished by its asker":
        stepper.cut(leader, 0, 0)
    else:
        stepper.house.runner.before_step = fail_once()
        stepper.commit()
    assert not any(stepper.lives(one) == {Life.FOLLOWING} for one in asked[1:])
    stepper.run_all()
    stepper.assert_right(*asked)
    computed = stepper.house.runner.computed_positions - own_positions(stepper, 32, 5)
    assert computed <= MARGIN * len(PREFIX) + in_flight
    stepper.house.assert_baseline()


def fail_once() -> Callable[[StepPlan], None]:
    """A step hook that raises the first time."""
    left = [None]

    def hook(_: StepPlan) -> None:
        if left:
            left.pop()
            raise InjectedFault("once")

    return hook


def test_followers_hold_nothing_and_their_matched_pages_may_be_evicted() -> None:
    stepper = Stepper(SETUP)
    warm = stepper.ask(ask(PREFIX[:320], 1, tenant="a"))
    stepper.run_all()
    asked = crowd(stepper, 10)
    stepper.step()
    followers = [sequence for one in asked[1:] for sequence in stepper.sequences(one)]
    assert {sequence.life for sequence in followers} == {Life.FOLLOWING}
    assert not any(sequence.table.pages for sequence in followers)
    (leader,) = stepper.sequences(asked[0])
    assert stepper.house.blocks.statistics().logical_pages == len(leader.table)
    stepper.abort(asked[0])
    stepper.house.blocks.flush()
    stepper.run_all()
    stepper.assert_right(warm, *asked)


def test_another_tenant_neither_waits_nor_hits() -> None:
    stepper = Stepper(SETUP)
    ours, theirs = crowd(stepper, 4, tenant="a"), crowd(stepper, 1, tenant="b")
    salted = stepper.ask(ask(PREFIX, 1, tenant="a", salt="s"))
    stepper.step()
    assert stepper.lives(theirs[0]) != {Life.FOLLOWING}
    stepper.run_all()
    stepper.assert_right(*ours, *theirs, salted)
    assert stepper.house.runner.computed_positions >= 3 * len(PREFIX)
    for stranger in (theirs[0], salted):
        assert stranger.heard[0].receipts[0].device == 0
    assert ours[1].heard[0].receipts[0].device == len(PREFIX) // SIZE * SIZE


def test_a_leader_inherits_its_followers_highest_priority() -> None:
    stepper = Stepper(SETUP)
    low = stepper.ask(ask(PREFIX, 1, priority=5))
    stepper.step()
    other = stepper.ask(ask(random_tokens(random.Random(1), 600), 1, priority=1))
    stepper.step()
    (leader,) = stepper.sequences(low)
    running = stepper.scheduler.roster.running
    assert running[-1] is leader
    followers = [stepper.ask(ask(PREFIX, 1, priority=priority)) for priority in (-3, 4)]
    stepper.until(lambda: all(stepper.lives(one) == {Life.FOLLOWING} for one in followers))
    assert leader.life is Life.RUNNING
    assert leader.priority == -3
    assert running[0] is leader
    stepper.run_all()
    stepper.assert_right(low, other, *followers)


def test_a_preempted_leader_gives_its_inheritance_back() -> None:
    stepper = Stepper(SETUP)
    low = stepper.ask(ask(PREFIX, 1, priority=5))
    stepper.step()
    stepper.ask(ask(PREFIX, 1, priority=-3))
    stepper.step()
    (leader,) = stepper.sequences(low)
    assert leader.priority == -3
    stepper.scheduler.roster.preempt(leader)
    assert leader.priority == 5
    stepper.run_all()
    stepper.assert_right()


def test_branches_wait_only_as_far_as_they_share() -> None:
    stepper = Stepper(SETUP)
    long = stepper.ask(ask(PREFIX, 1))
    branch = stepper.ask(ask((*PREFIX[:200], *random_tokens(random.Random(9), 40)), 1))
    stepper.step()
    assert stepper.lives(branch) == {Life.FOLLOWING}
    while not branch.over:
        assert stepper.step()
    assert not long.over, "a branch waited for more than it shares"
    stepper.run_all()
    stepper.assert_right()
