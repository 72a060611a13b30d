"""A sample of what is below, checked: what is wrong is dropped, and nobody waits for it."""

import asyncio
import random
import threading

import pytest

from chatserve.engine.verifier import Verified
from chatserve.errors import Busy, Unavailable
from tests.engine.build import House, Setup, ask, build, quiet, random_tokens, running
from tests.engine.fake_depot import FakeDepot
from tests.engine.oracle import assert_right, listen

SIZE = 4
LONG = random_tokens(random.Random(7), 41)  # ten pages


class SlowDepot(FakeDepot):
    """Its threads wait in a check until they may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.let = threading.Event(), threading.Event()

    def verify(self, names, into):
        self.entered.set()
        assert self.let.wait(30)
        return super().verify(names, into)


def _house(depot: FakeDepot, **fields) -> House:
    return build(Setup(page_size=SIZE, depot=depot, **fields))


async def _told(house: House, tokens=LONG) -> None:
    request = ask(tokens, 1)
    heard = await listen(house.engine.open(house.prepare(request)))
    assert_right(request, heard, house.setup.vocabulary)
    await quiet(house)


def _names(house: House) -> tuple[bytes, ...]:
    return house.prepare(ask(LONG)).names


async def test_good_pages_are_checked_and_compared() -> None:
    house = _house(FakeDepot())
    async with running(house) as engine:
        await _told(house)
        assert await engine.verifier.verify(100) == Verified(checked=10, compared=10)
        assert await engine.verifier.verify(3) == Verified(checked=3, compared=3)
        house.blocks.flush()
        assert await engine.verifier.verify(100) == Verified(checked=10)
        house.assert_baseline()


async def test_a_wrong_page_is_dropped_and_computed_when_it_is_wanted() -> None:
    depot = FakeDepot()
    house = _house(depot)
    async with running(house) as engine:
        await _told(house)
        depot.torn.add(_names(house)[4])
        house.blocks.flush()
        assert await engine.verifier.verify(100) == Verified(checked=10, wrong=1)
        assert _names(house)[4] not in depot.kept
        depot.torn.clear()
        await _told(house)
        assert await engine.verifier.verify(100) == Verified(checked=10, compared=10)


@pytest.mark.parametrize("place", ["device", "below"])
async def test_what_differs_from_its_copy_is_forgotten_in_both_places(place: str) -> None:
    depot = FakeDepot()
    house = _house(depot)
    async with running(house) as engine:
        await _told(house)
        name = _names(house)[6]
        page = house.blocks._index.page(name)
        if place == "device":
            house.runner._pages[page, 2] += 1
        else:
            kept = bytearray(depot.kept[name].page)
            kept[5] ^= 1
            object.__setattr__(depot.kept[name], "page", bytes(kept))
        assert await engine.verifier.verify(100) == Verified(checked=10, compared=10, different=1)
        assert name not in depot.kept
        assert house.blocks.resident(_names(house)) == 6, "with what continues it"
        house.assert_baseline()
        await _told(house)
        assert house.blocks.resident(_names(house)) == 10


async def test_steps_go_on_and_pages_stay_while_a_check_reads_them() -> None:
    depot = SlowDepot()
    house = _house(depot, pages=14)
    async with running(house) as engine:
        await _told(house)
        checking = asyncio.create_task(engine.verifier.verify(100))
        await asyncio.to_thread(depot.entered.wait)
        with pytest.raises(Busy):
            await engine.verifier.verify(1)
        await _told(house, (1, 2, 3, 4, 5, 6, 7, 8))  # the loop is free, and steps run
        assert house.blocks.evict(_names(house)).stayed == 10
        depot.let.set()
        assert await checking == Verified(checked=10, compared=10)
        assert house.blocks.evict(_names(house)).left == 10
        house.assert_baseline()


async def test_a_caller_who_leaves_holds_no_page() -> None:
    depot = SlowDepot()
    house = _house(depot)
    async with running(house) as engine:
        await _told(house)
        checking = asyncio.create_task(engine.verifier.verify(100))
        await asyncio.to_thread(depot.entered.wait)
        checking.cancel()
        await asyncio.wait({checking})
        assert engine.verifier.under_way
        depot.let.set()
        while engine.verifier.under_way:  # noqa: ASYNC110
            await asyncio.sleep(0)
        house.assert_baseline()
        assert (await engine.verifier.verify(100)).checked == 10


async def test_a_thread_whose_caller_left_counts_while_another_check_comes_and_goes() -> None:
    first, second = threading.Event(), threading.Event()

    class TwoSpeeds(SlowDepot):
        """Its first check waits for one event, and all others for another."""

        def verify(self, names, into):
            mine = second if self.entered.is_set() else first
            self.entered.set()
            assert mine.wait(30)
            return FakeDepot.verify(self, names, into)

    depot = TwoSpeeds()
    house = _house(depot)
    async with running(house) as engine:
        await _told(house)
        checking = asyncio.create_task(engine.verifier.verify(100))
        await asyncio.to_thread(depot.entered.wait)
        checking.cancel()
        await asyncio.wait({checking})
        second.set()
        assert (await engine.verifier.verify(100)).checked == 10
        assert engine.verifier.under_way, "the first one's thread still reads"
        checking = asyncio.create_task(engine.verifier.close())
        for _ in range(20):
            await asyncio.sleep(0)
        assert not checking.done(), "who closes waits for it"
        first.set()
        await checking
        while engine.verifier.under_way:  # noqa: ASYNC110
            await asyncio.sleep(0)
        house.assert_baseline()


async def test_a_cache_that_begins_anew_waits_for_the_check() -> None:
    depot = SlowDepot()
    house = _house(depot)
    async with running(house, recoveries=1) as engine:
        await _told(house)
        checking = asyncio.create_task(engine.verifier.verify(100))
        await asyncio.to_thread(depot.entered.wait)
        engine._recovering = True
        engine._signal.set()
        for _ in range(20):
            await asyncio.sleep(0)
        assert house.scheduler.counts.recoveries == 0, "a thread has its pages"
        depot.let.set()
        assert await checking == Verified(checked=10, compared=10)
        while engine._recovering:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await _told(house)
        house.assert_baseline()


async def test_with_host_memory_pages_are_read_and_not_compared() -> None:
    house = _house(FakeDepot(), slots=32)
    async with running(house) as engine:
        await _told(house)
        assert await engine.verifier.verify(100) == Verified(checked=10)


async def test_without_a_disk_there_is_nothing_to_check() -> None:
    house = build(Setup(page_size=SIZE))
    async with running(house) as engine:
        await _told(house)
        assert await engine.verifier.verify(5) == Verified()


async def test_a_depot_that_raises_gives_the_pages_back() -> None:
    depot = FakeDepot()
    house = _house(depot)
    async with running(house) as engine:
        await _told(house)
        depot.raising = True
        with pytest.raises(OSError, match="breaks its word"):
            await engine.verifier.verify(5)
        depot.raising = False
        house.assert_baseline()
        assert (await engine.verifier.verify(100)).checked == 10


async def test_an_engine_that_has_stopped_checks_nothing() -> None:
    house = _house(FakeDepot())
    async with running(house) as engine:
        await _told(house)
    with pytest.raises(Unavailable):
        await engine.verifier.verify(5)
