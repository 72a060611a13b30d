"""The short form of the long run in `tests/soak`."""

from tests.engine.churn import churn


async def test_after_many_requests_and_departures_everything_is_at_the_baseline() -> None:
    house = await churn(500, leaving=0.1, seed=1, check_every=7)
    assert house.scheduler.counts.preemptions > 0
