"""Storms: in pools that hold little more than one request, askers come, leave and are cut off at
any point between plan, run and commit, while others are queued that do not fit, and faults of our
own strike. The auditor looks at every plan and every preemption; nobody hears a wrong token, and
in a storm without faults nobody's engine begins again.

What is drawn is written out by seed, so a storm that fails is replayed by its number.
"""

import random

import pytest

from chatserve.engine.values import FinishReason
from chatserve.errors import Busy, RequestError, StepFault
from tests.engine.build import Setup, ask, random_tokens
from tests.engine.faulty_blocks import METHODS, Trap, faulty_maker
from tests.engine.oracle import assert_right
from tests.engine.stepper import Asked, Stepper

EVENTS = 150
AT_ONCE = 4
FAULTS_MAX = 6  # of one storm: fewer than recoveries in a row that give the device up


class Storm:
    """One seed's events."""

    def __init__(self, seed: int, *, faults: int) -> None:
        self.source = random.Random(seed)
        self.faults = faults
        self.trap = Trap()
        choice = self.source.choice
        setup = Setup(
            pages=self.source.randrange(6, 20),
            page_size=choice([1, 2, 4]),
            caching=choice([True, True, True, False]),
            budget_min=1,
            budget_max=choice([2, 8, 64]),
            steps_in_flight=choice([1, 2, 2, 2]),
            sequences_max=choice([2, 4, 8]),
            preemptions_max=choice([1, 2, 8]),
            make_blocks=faulty_maker(self.trap),
            launched=choice([False, True]),
        )
        self.stepper = Stepper(setup)
        self.room = setup.pages * setup.page_size
        self.stem = random_tokens(self.source, self.room)

    def blow(self) -> None:
        """All events, then calm until everybody has had a final emission."""
        levers = [self.stepper.plan, self.stepper.plan, self.stepper.run, self.stepper.commit]
        for _ in range(EVENTS):
            chance = self.source.random()
            if chance < 0.15 and len(self.under_way()) < AT_ONCE:
                self.come()
            elif chance < 0.25 and self.under_way():
                self.leave(self.source.choice(self.under_way()))
            elif chance < 0.3 and self.under_way():
                self.cut(self.source.choice(self.under_way()))
            elif chance < 0.33:
                self.strike()
            else:
                self.stepper.survive(self.source.choice(levers))
            self.stepper.scheduler.check()
        self.trap.clear()
        self.stepper.run_all()

    def under_way(self) -> list[Asked]:
        return [one for one in self.stepper.asked.values() if not one.over]

    def come(self) -> None:
        """Most prompts are so long that two of them do not fit at once."""
        length = self.source.randrange(1, self.room - 1)
        shared = self.source.choice([0, 0, length // 2, length])
        tokens = (*self.stem[:shared], *random_tokens(self.source, length - shared))
        request = ask(
            tokens,
            self.source.randrange(1, min(12, self.room - length) + 1),
            samples=self.source.choice([1, 1, 1, 2, 3]),
            temperature=1.0,
            seed=self.source.randrange(3),
            priority=self.source.choice([0, 0, 1, -1]),
        )
        try:
            self.stepper.ask(request)
        except (Busy, RequestError) as refusal:
            assert refusal.retry_after or refusal.param == "n"  # noqa: PT017 - most are taken

    def leave(self, asked: Asked) -> None:
        """Often just when a fault is about to strike what is computed of it."""
        if self.source.random() < 0.3:
            self.strike()
        while not self.stepper.survive(lambda: self.stepper.abort(asked)):
            pass

    def cut(self, asked: Asked) -> None:
        """A stop string in the text of one sample, that ends before its last tokens."""
        heard = [(number, one) for number, one in enumerate(asked.heard) if one.tokens]
        if heard:
            sample, one = self.source.choice(heard)
            kept = max(0, len(one.tokens) - self.source.randrange(3))
            while not self.stepper.survive(lambda: self.stepper.cut(asked, sample, kept)):
                pass

    def strike(self) -> None:
        """A fault of our own, soon."""
        if self.faults:
            self.faults -= 1
            method = self.source.choice([name for name in METHODS if name != "settle"])
            when = self.source.choice(["before", "after"])
            self.trap.set(method, self.source.randrange(1, 4), when)


@pytest.mark.parametrize("seed", range(100))
def test_leaving_at_any_point_of_a_tiny_pool_harms_nobody_else(seed: int) -> None:
    storm = Storm(seed, faults=0)
    storm.blow()
    stepper = storm.stepper
    assert stepper.scheduler.counts.recoveries == 0
    stepper.assert_right()
    stepper.assert_pages_hold_what_their_names_say()
    stepper.house.assert_baseline()


@pytest.mark.parametrize("seed", range(100))
def test_faults_of_our_own_among_those_who_leave_end_nobody_but_who_was_at_hand_twice(
    seed: int,
) -> None:
    storm = Storm(seed, faults=FAULTS_MAX)
    storm.blow()
    stepper = storm.stepper
    assert stepper.scheduler.counts.recoveries <= FAULTS_MAX
    stepper.assert_right_so_far()
    for asked in stepper.asked.values():
        assert asked.over, "no final emission"
        lost = [one.error for one in asked.heard if one.finish is FinishReason.ERROR]
        assert all(isinstance(error, StepFault) for error in lost)
        if not lost and not asked.aborted and not asked.cut:
            assert_right(asked.request, asked.heard, stepper.house.setup.vocabulary)
    stepper.house.assert_baseline()
