"""Whether pages are brought up or computed: by what each was measured to take."""

import pytest

from chatserve.engine.tiers import MANY, STALE_SECONDS, Rate
from tests.engine.build import Setup, ask
from tests.engine.fake_depot import FakeDepot
from tests.engine.stepper import Stepper

SIZE = 4
LONG = tuple(range(40))  # ten pages
SHORT = tuple(range(90, 98))  # two


def _left_over(*prompts: tuple[int, ...], slots: int = 0) -> tuple[Stepper, FakeDepot]:
    """A house whose pages of these are on the disk and nowhere else."""
    depot = FakeDepot()
    stepper = Stepper(Setup(depot=depot, page_size=SIZE, slots=slots))
    for each in prompts:
        stepper.ask(ask(each, 1))
        stepper.run_all()
    _flush(stepper)
    return stepper, depot


def _flush(stepper: Stepper) -> None:
    stepper.house.blocks.flush()
    stepper.scheduler.tiers.flush()


def _disk(stepper: Stepper, prompt: tuple[int, ...]) -> int:
    """Tokens that come from the disk for a prompt that is nowhere else."""
    _flush(stepper)
    asked = stepper.ask(ask(prompt, 1))
    stepper.run_all()
    stepper.assert_right(asked)
    return asked.heard[0].receipts[0].disk


def test_computing_is_chosen_where_it_is_quicker_and_loading_tried_again_later() -> None:
    stepper, depot = _left_over(LONG)
    tiers = stepper.scheduler.tiers
    tiers.observe_step(1000, 1.0)  # a millisecond a token: 40 ms for LONG
    stepper.job_seconds = 10.0
    stepper.ask(ask(LONG, 1))
    stepper.run_all()
    assert tiers.statistics().loads_total == 1, "never measured: tried"
    reads = depot.reads
    stepper.house.blocks.flush()
    slow = stepper.ask(ask(LONG, 1))
    stepper.run_all()
    assert depot.reads == reads
    assert slow.heard[0].receipts[0].computed == 40
    assert tiers.statistics().recomputes_total == 1
    stepper.house.blocks.flush()
    stepper.house.clock.now += STALE_SECONDS + 1
    stepper.job_seconds = 0.0
    for _ in range(2):
        again = stepper.ask(ask(LONG, 1))
        stepper.run_all()
        assert again.heard[0].receipts[0].disk == 39
        stepper.house.blocks.flush()
        stepper.job_seconds = 0.0


def test_what_a_few_pages_took_does_not_keep_many_from_being_loaded() -> None:
    stepper, _ = _left_over(SHORT, LONG)
    tiers = stepper.scheduler.tiers
    tiers.observe_step(1000, 1.0)  # a millisecond a token: 4 ms a page
    stepper.job_seconds = 0.01  # of any load: 5 ms a page of two, 1 ms a page of ten
    assert _disk(stepper, SHORT) == 7, "never measured: tried"
    assert _disk(stepper, SHORT) == 0, "as many as were measured: 8 ms are less than 10"
    assert _disk(stepper, LONG) == 39, "40 ms are more than 10, though not than five times 10"
    assert tiers.statistics().recomputes_total == 1


def test_loads_that_are_waited_for_count() -> None:
    stepper, depot = _left_over(LONG, SHORT)
    stepper.scheduler.tiers.observe_step(1000, 1.0)
    stepper.job_seconds = 0.02  # 2 ms a page: 4 ms for SHORT, 24 ms behind LONG
    assert _disk(stepper, LONG) == 39
    _flush(stepper)
    both = [stepper.ask(ask(prompt, 1)) for prompt in (LONG, SHORT)]
    reads = depot.reads
    stepper.run_all()
    assert [each.heard[0].receipts[0].disk for each in both] == [39, 0]
    assert depot.reads - reads == 10


def test_a_slow_disk_is_not_tried_for_the_sake_of_moves_that_nobody_has_measured() -> None:
    stepper, _ = _left_over(LONG, slots=64)
    tiers = stepper.scheduler.tiers
    tiers.observe_step(1000, 1.0)
    stepper.job_seconds = 10.0
    assert _disk(stepper, LONG) == 39
    stepper.job_seconds = 0.0
    tiers._move_rate = Rate(stepper.house.clock)
    assert _disk(stepper, LONG) == 0
    assert tiers.statistics().recomputes_total == 1


def test_chats_that_grow_try_a_slow_disk_seldom() -> None:
    rate = Rate(lambda: 0.0)
    tried = 0
    for pages in range(1, 10_000):
        if rate.estimate(pages) is None:
            rate.observe(pages, 1.0 * pages)
            tried += 1
    assert tried <= 9, "each tells of nearly twice as many, and at last of any number"


def test_a_rate_is_of_all_that_was_measured_and_fades() -> None:
    now = [0.0]
    rate = Rate(lambda: now[0])
    assert rate.seconds is None
    rate.observe(40, 1.0)
    rate.observe(1, 0.5)
    each = (0.7 * 1.0 + 0.5) / (0.7 * 40 + 1)
    assert rate.seconds == pytest.approx(each)
    assert rate.estimate(29, behind=10) == pytest.approx(39 * each)
    assert rate.estimate(30) is None
    rate.observe(MANY, 1.0)
    assert rate.estimate(100 * MANY) is not None
    now[0] += STALE_SECONDS + 1
    assert rate.estimate(1) is None
    assert rate.seconds is not None, "as measured last"
    rate.observe(2, 1.0)
    assert rate.seconds == 0.5
