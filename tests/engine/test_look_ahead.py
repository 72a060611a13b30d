"""Pages of those who still wait for their turn are brought up meanwhile."""

import random

from chatserve.cache.transit import Load
from chatserve.engine.sequence import Life
from tests.engine.build import Setup, ask
from tests.engine.fake_depot import FakeDepot
from tests.engine.stepper import Stepper
from tests.seeds import drawn_seed

LONG = tuple(range(40))  # ten pages


def _left_over(**fields: object) -> tuple[Stepper, FakeDepot]:
    """A house whose pages of LONG are below and nowhere else, and nothing else is."""
    depot = FakeDepot()
    stepper = Stepper(Setup(depot=depot, page_size=4, **fields))  # type: ignore[arg-type]
    stepper.ask(ask(LONG, 1))
    stepper.run_all()
    stepper.house.blocks.flush()
    return stepper, depot


def test_pages_of_those_who_wait_for_a_seat_come_up_meanwhile() -> None:
    stepper, depot = _left_over(sequences_max=1, pages=200)
    first = stepper.ask(ask((80, 81), 60))
    stepper.plan()
    before = stepper.ask(ask((70, 71), 1))
    waiting = stepper.ask(ask(LONG, 1))
    again = stepper.ask(ask((*LONG, 3), 1))
    stepper.house.clock.now += 1
    stepper.plan()
    assert stepper.lives(waiting) == {Life.FOLLOWING}, "it is third in the queue"
    assert stepper.lives(again) == {Life.QUEUED}
    stepper.order()
    assert isinstance(stepper.move(), Load)
    stepper.deliver()
    assert stepper.lives(waiting) == {Life.QUEUED}
    assert not first.over
    reads = depot.reads
    stepper.run_all()
    stepper.assert_right()
    assert [len(one.heard[0].receipts) for one in (before, waiting, again)] == [1, 1, 1]
    assert waiting.heard[0].receipts[0].disk == 39
    assert again.heard[0].receipts[0].cached == 40
    assert depot.reads == reads == 10, "each page once"
    assert stepper.scheduler.statistics().tiers.recomputes_total == 0


def test_who_waits_for_a_seat_takes_no_pages_that_others_need() -> None:
    stepper, _ = _left_over(sequences_max=1, pages=24)
    stepper.ask(ask((80, 81), 60))
    stepper.plan()
    waiting = stepper.ask(ask(LONG, 1))
    stepper.house.clock.now += 1
    stepper.plan()
    assert stepper.lives(waiting) == {Life.QUEUED}, "a quarter of what is left does not hold it"
    stepper.run_all()
    stepper.assert_right()


def test_looking_ahead_where_computing_is_quicker_changes_and_counts_nothing() -> None:
    stepper, depot = _left_over(sequences_max=1)
    stepper.job_seconds = 1e6
    stepper.ask(ask(LONG, 1))
    stepper.run_all()
    stepper.house.blocks.flush()
    stepper.ask(ask(LONG[:21], 1))  # five of its pages are on the device
    stepper.run_all()
    reads, before = depot.reads, stepper.scheduler.statistics().tiers
    stepper.ask(ask((80, 81), 9))
    stepper.plan()
    waiting = stepper.ask(ask(LONG, 1))
    for _ in range(5):
        stepper.house.clock.now += 0.1
        stepper.plan()
        stepper.commit()
    assert stepper.lives(waiting) == {Life.QUEUED}
    assert stepper.scheduler.statistics().tiers == before
    assert depot.reads == reads
    stepper.run_all()
    assert waiting.heard[0].receipts[0].computed == 20


def test_who_is_taken_out_of_the_middle_leaves_the_others_in_their_order() -> None:
    seed = drawn_seed()
    dice = random.Random(seed)
    stepper = Stepper(Setup(page_size=4, sequences_max=1))
    for number in range(60):
        stepper.ask(ask((number,), 1, name=str(number)))
    waiting = stepper.scheduler.roster.waiting
    queued = waiting.sequences()
    for sequence in queued:
        waiting.pop(sequence)
    dice.shuffle(queued)
    for sequence in queued:
        waiting.push(sequence)
    for sequence in dice.sample(queued, 30):
        waiting.pop(sequence)
        queued.remove(sequence)
        waiting.check()
    assert [each.id for each in waiting.ahead(4)] == sorted(each.id for each in queued)[:4]
    order: list[int] = []
    while (sequence := waiting.peek(0.0)) is not None:
        waiting.pop(sequence)
        order.append(sequence.id)
    assert order == sorted(each.id for each in queued)
