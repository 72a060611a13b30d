"""Refused clients come back spread out, whatever their number and whatever the clock does."""

from chatserve.engine.refusals import RETURNS_PER_SECOND, SECONDS_MAX, SECONDS_MIN, Refusals


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_lone_refusal_asks_for_the_least() -> None:
    clock = Clock()
    refusals = Refusals(clock)
    for _ in range(5):
        assert refusals.refuse() == SECONDS_MIN
        clock.now += 60.0


def test_a_crowd_is_spread_to_a_bounded_rate() -> None:
    """Clients that do as they are told: after a while their rate stands near the wanted one."""
    clock = Clock()
    refusals = Refusals(clock)
    due = [0.0] * 400
    asked: list[float] = []
    while clock.now < 300.0:
        for client, when in enumerate(due):
            if when <= clock.now:
                due[client] = clock.now + refusals.refuse()
                asked.append(clock.now)
        clock.now += 0.05
    rate = sum(when > 150.0 for when in asked) / 150.0
    assert RETURNS_PER_SECOND / 4 <= rate <= 4 * RETURNS_PER_SECOND


def test_the_wait_is_bounded_and_a_clock_that_jumps_back_does_no_harm() -> None:
    clock = Clock()
    refusals = Refusals(clock)
    waits: list[float] = []
    for index in range(20_000):
        clock.now = (5.0, -100.0)[index % 2]
        waits.append(refusals.refuse())
    assert max(waits) <= SECONDS_MAX
    assert min(waits) >= SECONDS_MIN
