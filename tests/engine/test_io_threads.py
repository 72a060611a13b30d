"""Threads that move pages are struck by whatever there is: it is told, and others go on."""

import asyncio
import logging
import threading

import pytest

from chatserve.engine.tiers import LOADS_MAX, STALE_SECONDS
from chatserve.engine.traffic import THREADS
from tests.engine.build import Setup, ask, build, quiet, running
from tests.engine.fake_depot import FakeDepot
from tests.engine.oracle import assert_right, listen

SIZE = 4
LONG = tuple(range(40))  # ten pages


class Struck(BaseException):
    """Nothing that a thread expects."""


class StrikingDepot(FakeDepot):
    """The next so many calls end the thread that makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.strikes = 0
        self.turn = threading.Lock()

    def _strike(self) -> None:
        with self.turn:
            self.strikes -= 1
            if self.strikes >= 0:
                raise Struck

    def get(self, reads):
        self._strike()
        return super().get(reads)

    def put(self, writes):
        self._strike()
        return super().put(writes)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of threads that ended with an exception."""
    names: list[str] = []
    monkeypatch.setattr(
        threading,
        "excepthook",
        lambda given: names.append(given.thread.name) if given.exc_type is Struck else None,
    )
    return names


async def _until_kept(house, depot: FakeDepot, count: int) -> None:
    while len(depot.kept) < count:  # noqa: ASYNC110
        await asyncio.sleep(0)
    await quiet(house)


@pytest.mark.parametrize("strikes", [1, 2, 4])
async def test_a_load_whose_threads_die_is_tried_again_and_then_computed(
    strikes: int, ends: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    depot = StrikingDepot()
    house = build(Setup(depot=depot, pages=16))
    request = ask(LONG, 4)
    async with running(house) as engine:
        assert_right(request, await listen(engine.open(house.prepare(request))), 97)
        await _until_kept(house, depot, 10)
        house.blocks.flush()
        depot.strikes = strikes
        heard = await listen(engine.open(house.prepare(request)))
        assert_right(request, heard, 97)
        if strikes == LOADS_MAX * THREADS:
            assert heard[0].receipts[0].disk == 0, "no part of any try has arrived"
        await quiet(house)
        depot.strikes = 0
        house.clock.now += STALE_SECONDS + 1.0  # it is tried, however long the last time took
        house.blocks.flush()
        heard = await listen(engine.open(house.prepare(request)))
        assert_right(request, heard, 97)
        assert heard[0].receipts[0].disk == 39, "other threads are in their place"
        async with asyncio.timeout(10):
            while len(ends) < strikes:  # noqa: ASYNC110  # another is there before one has ended
                await asyncio.sleep(0)
        assert engine.statistics().io_faults_total == len(ends) == strikes
        assert set(ends) <= {"chatserve-io-0", "chatserve-io-1"}
    told = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert len(told) == strikes
    alive = [each.name for each in threading.enumerate() if each.name.startswith("chatserve-io")]
    assert not alive, "the engine has waited for those in their place, too"


async def test_pages_whose_thread_dies_are_kept_when_somebody_has_them_again(
    ends: list[str],
) -> None:
    depot = StrikingDepot()
    house = build(Setup(depot=depot, pages=16))
    depot.strikes = 1
    async with running(house) as engine:
        await listen(engine.open(house.prepare(ask(LONG, 1))))
        while not ends:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await quiet(house)
        await listen(engine.open(house.prepare(ask(LONG, 1))))
        await _until_kept(house, depot, 10)
    assert ends


async def test_a_depot_that_breaks_its_word_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    depot = FakeDepot(raising=True)
    house = build(Setup(depot=depot, pages=16))
    async with running(house) as engine:
        await listen(engine.open(house.prepare(ask(LONG, 1))))
        while not engine.statistics().io_faults_total:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await quiet(house)
    assert "could not be moved" in caplog.text
