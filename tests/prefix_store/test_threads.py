"""Several threads at once: no wrong page, no page of a drop that returned, no lost count."""

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prefix_store import Slab
from prefix_store.layout import SlotLayout
from prefix_store.slab_file import RUN_BYTES
from tests.prefix_store.fake_disk import FakeDisk
from tests.prefix_store.pages import SHAPE, get, name, open_store, write

THREADS = 6
NUMBERS = 60


@pytest.mark.parametrize("capacity", [150_000, 1 << 20], ids=["crowded", "roomy"])
@pytest.mark.parametrize("seed", range(3))
def test_threads_that_put_get_and_drop(tmp_path: Path, capacity: int, seed: int) -> None:
    print(f"seed {seed}")
    store = open_store(folder=tmp_path / "pages", capacity_bytes=capacity)
    slab = store.slab(SHAPE)

    def act(thread: int) -> int:
        dice = random.Random(f"{seed} {thread}")
        gets = 0
        # The last pages belong to one thread each: what it dropped is gone until it puts it again.
        own = NUMBERS + thread
        there = False
        for _ in range(150):
            first = dice.randrange(NUMBERS)
            match dice.randrange(6):
                case 0 | 1:
                    slab.put([write(n) for n in range(first, min(NUMBERS, first + 4))])
                case 2:
                    get(slab, first)
                    gets += 1
                case 3:
                    slab.drop([name(first), name((first + 7) % NUMBERS)])
                case 4:
                    slab.touch([name(first)])
                    assert 0 <= slab.find([name(n) for n in range(NUMBERS)]) <= NUMBERS
                case _ if there:
                    slab.drop([name(own)])
                    there = False
                    assert not get(slab, own)
                    gets += 1
                case _:
                    there = slab.put([write(own, run=1000)]) == [True]
        return gets

    with ThreadPoolExecutor(THREADS) as pool:
        gets = sum(pool.map(act, range(THREADS)))
    figures = slab.statistics()
    e, m = figures.evictions, figures.misses
    assert figures.hits + m.absent == gets
    assert m.authentication == m.io == figures.io_errors == 0
    assert figures.pages == figures.writes - e.space - e.age - e.orphan - e.forgotten - e.bad
    assert figures.pages == sum(get(slab, n) for n in range(NUMBERS + THREADS))
    store.close()
    again = open_store(folder=tmp_path / "pages", capacity_bytes=capacity)
    slab = again.slab(SHAPE)
    assert slab.statistics().pages == figures.pages
    assert figures.pages == sum(get(slab, n) for n in range(NUMBERS + THREADS))
    again.close()


class Gate:
    """Holds the write of the slots with page 1 back until told."""

    def __init__(self, disk: FakeDisk) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        disk.on_write = self._hold

    def _hold(self, offset: int, raw: bytes) -> None:
        if name(1) in raw and not self.reached.is_set():
            self.reached.set()
            assert self.opened.wait(30)


def test_a_drop_waits_for_the_put_in_flight_and_cancels_what_it_has_not_begun() -> None:
    disk = FakeDisk()
    slab = open_store(disk).slab(SHAPE)
    run = RUN_BYTES // SlotLayout(SHAPE).slot_bytes
    last = run + 4
    assert slab.put([write(last)]) == [True]
    gate = Gate(disk)
    results: list[bool] = []
    putting = threading.Thread(
        target=lambda: results.extend(slab.put([write(n) for n in range(last)]))
    )
    dropping = threading.Thread(target=lambda: slab.drop([name(1), name(run + 2)]))
    putting.start()
    assert gate.reached.wait(30)
    assert get(slab, last), "reading goes on"
    assert slab.put([write(1), write(run + 2)]) == [False, False], "another put is writing them"
    dropping.start()
    while not _cancelled(slab, [1, run + 2]):
        pass
    assert dropping.is_alive()
    gate.opened.set()
    putting.join()
    dropping.join()
    there = [n not in (1, run + 2) for n in range(last)]
    assert results == there
    assert [get(slab, n) for n in range(last)] == there
    for part in disk.on_disk():
        assert name(1) not in part
        assert name(run + 2) not in part


def _cancelled(slab: Slab, numbers: list[int]) -> bool:
    tickets = slab._writing.tickets  # pyright: ignore[reportPrivateUsage]
    return all(tickets[name(n)].cancelled for n in numbers)


def test_a_drop_waits_for_a_write_over_what_it_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FakeDisk()
    store = open_store(disk, capacity_bytes=150_000)
    slab = store.slab(SHAPE)
    for number in range(40):  # more than fit
        assert slab.put([write(number, run=1)]) == [True]
    store.gc()
    before = {number for number in range(40) if slab.contains(name(number))}
    reached, opened = threading.Event(), threading.Event()

    def hold(offset: int, raw: bytes) -> None:
        if name(100) in raw and not reached.is_set():
            reached.set()
            assert opened.wait(30)

    disk.on_write = hold
    putting = threading.Thread(target=lambda: slab.put([write(100, run=1)]))
    putting.start()
    assert reached.wait(30)
    (former,) = {number for number in before if not slab.contains(name(number))}
    assert any(name(former) in part for part in disk.on_disk()), "its slot is not overwritten yet"
    waits, wait_for = threading.Event(), slab._slots.lock.wait_for

    def waited(is_time: Callable[[], bool]) -> bool:
        if not is_time():
            waits.set()
        return wait_for(is_time)

    monkeypatch.setattr(slab._slots.lock, "wait_for", waited)
    dropping = threading.Thread(target=lambda: slab.drop([name(former)]))
    dropping.start()
    while dropping.is_alive() and not waits.wait(0.01):
        pass
    assert dropping.is_alive(), "it returned while the page was in its slot"
    opened.set()
    putting.join()
    dropping.join()
    assert get(slab, 100)
    assert not any(name(former) in part for part in disk.on_disk())
    store.close()
