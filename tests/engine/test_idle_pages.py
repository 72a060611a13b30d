"""Pages that nobody uses for long leave memory for the tier below, and come back from there."""

import asyncio
from collections.abc import Callable

from chatserve.cache.below import Below
from chatserve.cache.block_manager import BlockManager
from chatserve.cache.prefix_index import PrefixIndex
from chatserve.engine.tiers import RETIRE_PAGES, RETIRE_SECONDS, TierLimits
from tests.engine.build import Clock, Setup, ask, build, quiet, running
from tests.engine.fake_depot import FakeDepot
from tests.engine.oracle import listen
from tests.engine.stepper import Stepper

SIZE = 4
LONG, OTHER = tuple(range(40)), tuple(range(50, 66))
IDLE = TierLimits(idle_seconds=100.0)


def _maker(clock: Callable[[], float]) -> Callable[[Setup, Below | None], BlockManager]:
    def make(setup: Setup, below: Below | None) -> BlockManager:
        return BlockManager(
            pages=setup.pages,
            page_size=setup.page_size,
            below=below,
            order=lambda: PrefixIndex(clock=clock),
        )

    return make


def _house(**fields: object) -> tuple[Stepper, Clock]:
    time = Clock()
    fields = {"tiers": IDLE, **fields}
    stepper = Stepper(Setup(page_size=SIZE, make_blocks=_maker(time), **fields))  # type: ignore[arg-type]
    stepper.house.clock = time
    stepper.scheduler.tiers._clock = time
    return stepper, time


def _ask(stepper: Stepper, tokens: tuple[int, ...]):
    asked = stepper.ask(ask(tokens, 1))
    stepper.run_all()
    stepper.assert_right(asked)
    return asked.heard[0].receipts[0]


def test_what_was_not_used_for_long_goes_and_comes_back_from_below() -> None:
    depot = FakeDepot()
    stepper, time = _house(depot=depot)
    _ask(stepper, LONG)
    time.now += 60
    _ask(stepper, OTHER)
    time.now += 60
    stepper.order()
    cache = stepper.house.blocks.statistics()
    assert cache.named_pages == 4, "the one that was used a minute ago is there"
    assert (cache.evicted_by_age_total, cache.evicted_for_space_total) == (10, 0)
    assert cache.transit.lost_total == 0
    assert _ask(stepper, OTHER).device == 15
    assert _ask(stepper, LONG).disk == 39


def test_what_has_no_copy_stays() -> None:
    depot = FakeDepot(refusing=True)
    for below in (depot, None):
        stepper, time = _house(depot=below)
        _ask(stepper, LONG)
        time.now += 1e6
        stepper.order()
        assert stepper.house.blocks.statistics().named_pages == 10
        assert _ask(stepper, LONG).device == 39


def test_what_is_in_use_stays() -> None:
    stepper, time = _house(depot=FakeDepot())
    _ask(stepper, LONG)
    asked = stepper.ask(ask(LONG, 30))
    stepper.plan()
    time.now += 1e6
    stepper.order()
    assert stepper.house.blocks.statistics().named_pages == 10
    stepper.run_all()
    stepper.assert_right(asked)


def test_without_a_limit_only_pressure_counts() -> None:
    stepper, time = _house(depot=FakeDepot(), tiers=TierLimits())
    _ask(stepper, LONG)
    time.now += 1e9
    stepper.order()
    assert stepper.house.blocks.statistics().named_pages == 10


def test_it_looks_now_and_then_and_takes_few_at_a_time() -> None:
    stepper, time = _house(
        depot=FakeDepot(), pages=2 * RETIRE_PAGES, context_length=8 * RETIRE_PAGES
    )
    many = tuple(number % 97 for number in range(SIZE * (RETIRE_PAGES + 10)))
    _ask(stepper, many)
    time.now += 1e6
    counts: list[int] = []
    for _ in range(3):
        stepper.scheduler.tiers.retire()
        counts.append(stepper.house.blocks.statistics().named_pages)
    assert counts == [10, 0, 0]
    _ask(stepper, LONG)
    time.now += 99
    stepper.scheduler.tiers.retire()
    time.now += RETIRE_SECONDS - 1
    stepper.scheduler.tiers.retire()
    assert stepper.house.blocks.statistics().named_pages == 10, "not yet looked again"
    time.now += 1
    stepper.scheduler.tiers.retire()
    assert stepper.house.blocks.statistics().named_pages == 0


def test_host_memory_gives_way_to_the_disk_as_well() -> None:
    depot = FakeDepot()
    stepper, time = _house(depot=depot, slots=32)
    stepper.house.host._index._clock = time
    _ask(stepper, LONG)
    time.now += 200
    stepper.order()
    assert stepper.house.blocks.statistics().named_pages == 0
    assert stepper.house.host.statistics().cached == 0
    assert _ask(stepper, LONG).disk == 39


async def test_an_engine_that_nobody_asks_looks_by_itself(monkeypatch) -> None:
    monkeypatch.setattr("chatserve.engine.tiers.RETIRE_SECONDS", 0.01)
    time = Clock()
    house = build(Setup(depot=FakeDepot(), tiers=IDLE, make_blocks=_maker(time)))
    async with running(house) as engine:
        await listen(engine.open(house.prepare(ask(LONG, 1))))
        await quiet(house)
        time.now += 1e6
        house.clock.now += 1e6
        while house.blocks.statistics().named_pages:
            house.clock.now += 1
            await asyncio.sleep(0)
