"""Pages that settle while a checkpoint runs: the sync may have missed them, so it says nothing
about them."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from prefix_store import Slab
from tests.prefix_store.fake_disk import FakeDisk
from tests.prefix_store.pages import SHAPE, get, name, open_store, write

PATIENCE_SECONDS = 30.0  # for another thread to come to its write, or to its end
LATE = 100
# Of a checkpoint, in this order; what settles in any of them was not in the first.
SYNCS = ("of the slab", "of the records", "of the window")


class SyncsThatTakeTime(FakeDisk):
    """More happens between a sync's work and its return."""

    def __init__(self) -> None:
        super().__init__()
        self.after_sync: Callable[[], None] | None = None

    def sync(self, descriptor: int) -> None:
        super().sync(descriptor)
        if self.after_sync is not None:
            self.after_sync()


def settle_in_a_checkpoint(disk: SyncsThatTakeTime, slab: Slab, during: int) -> None:
    """Put page LATE: its slot is taken before a checkpoint, written and settled in that sync."""
    reached, opened = threading.Event(), threading.Event()
    syncs = 0

    def hold(_: int, raw: bytes) -> None:
        if name(LATE) in raw and not reached.is_set():
            reached.set()
            assert opened.wait(PATIENCE_SECONDS)

    with ThreadPoolExecutor(1) as other:
        disk.on_write = hold
        putting = other.submit(lambda: slab.put([write(LATE, run=1)]))

        def let_it_write() -> None:
            nonlocal syncs
            if syncs == during:
                opened.set()
                assert putting.result(PATIENCE_SECONDS) == [True]
            syncs += 1

        try:
            assert reached.wait(PATIENCE_SECONDS)
            disk.after_sync = let_it_write
            slab.gc(None)
        finally:
            opened.set()
        disk.on_write = disk.after_sync = None
    assert syncs == len(SYNCS), "other syncs than those this is about"
    assert slab.statistics().degraded is None
    assert get(slab, LATE)


@pytest.mark.parametrize("during", range(len(SYNCS)), ids=SYNCS)
def test_a_page_that_settles_in_a_sync_is_found_after_a_kill_and_can_be_dropped(
    during: int,
) -> None:
    disk = SyncsThatTakeTime()
    store = open_store(disk)
    slab = store.slab(SHAPE)
    assert slab.put([write(0)]) == [True]
    settle_in_a_checkpoint(disk, slab, during)
    disk.kill()
    assert any(name(LATE) in part for part in disk.on_disk())
    slab = open_store(disk).slab(SHAPE)
    assert slab.drop([name(LATE)]) == 1, "its slot counts as free, with the page in it"
    assert not any(name(LATE) in part for part in disk.on_disk())
    assert get(slab, 0)


@pytest.mark.parametrize("during", range(len(SYNCS)), ids=SYNCS)
def test_a_page_that_is_written_over_in_a_sync_is_off_the_disk_when_its_drop_returns(
    during: int,
) -> None:
    disk = SyncsThatTakeTime()
    store = open_store(disk, capacity_bytes=150_000)
    slab = store.slab(SHAPE)
    for number in range(40):  # more than fit
        assert slab.put([write(number, run=1)]) == [True]
    store.gc()
    before = {number for number in range(40) if slab.contains(name(number))}
    settle_in_a_checkpoint(disk, slab, during)
    (former,) = {number for number in before if not slab.contains(name(number))}
    assert any(name(former) in part for part in disk.on_disk()), "or this tests nothing"
    assert slab.drop([name(former)]) == 0, "another page has its slot"
    assert not any(name(former) in part for part in disk.on_disk())
    assert get(slab, LATE)
