"""A disk that refuses: every call to it fails once, and from some call on for good."""

import errno
import random

import pytest

from prefix_store import PageStore, Slab, StoreError
from tests.prefix_store.fake_disk import FakeDisk, fail_at
from tests.prefix_store.pages import SHAPE, get, name, open_store, write

CODES = [errno.EIO, errno.ENOSPC, errno.EMFILE]
CAPACITY = 150_000
NUMBERS = 32


def begin(disk: FakeDisk) -> tuple[PageStore, Slab] | None:
    """An open store, or None where the disk refused: then nothing may be left open."""
    try:
        store = open_store(disk, capacity_bytes=CAPACITY)
    except StoreError:
        assert disk.open_descriptors == 0, "a descriptor was left open"
        return None
    try:
        return store, store.slab(SHAPE)
    except StoreError:
        store.close()
        assert disk.open_descriptors == 0, "a descriptor was left open"
        return None


def house(disk: FakeDisk, pages: int) -> tuple[PageStore, Slab]:
    """A store that is open, with so many pages that are certain."""
    opened = begin(disk)
    assert opened is not None
    store, slab = opened
    assert all(slab.put([write(number) for number in range(pages)]))
    store.gc()
    return store, slab


def use(store: PageStore, slab: Slab, dropped: set[int]) -> None:
    """A fixed run of everything; nothing but StoreError of a drop may come out."""
    for first in (0, 8, 16, 24, 4):
        slab.put([write(number) for number in range(first, first + 8)])
        for number in range(first, first + 8, 2):
            get(slab, number)
        dropped -= set(range(first, first + 8))
        wanted = {first + 1, first + 3}
        try:
            slab.drop([name(number) for number in wanted])
        except StoreError:
            assert slab.statistics().degraded is not None
        # Out of reach at once, whatever the disk said.
        assert not any(get(slab, number) for number in wanted)
        dropped |= wanted
    store.gc()


def calls_of_a_run() -> int:
    disk = FakeDisk()
    opened = begin(disk)
    assert opened is not None
    use(*opened, set())
    opened[0].close()
    return disk.calls


def survive(call: int, code: int, *, for_good: bool) -> bool:
    """Whether the fault came before the slab was open."""
    disk = FakeDisk()
    disk.on_call = fail_at(call, code, for_good=for_good)
    opened = begin(disk)
    if opened is None:
        disk.on_call = None
        opened = begin(disk)
        assert opened is not None, "the disk is well again"
        opened[0].close()
        return True
    store, slab = opened
    dropped: set[int] = set()
    use(store, slab, dropped)
    if disk.calls < call:
        store.close()  # the fault comes now
        assert disk.calls >= call
        assert disk.open_descriptors == 0, "a descriptor was left open"
        return False
    if for_good:
        assert slab.statistics().degraded is not None
        assert slab.statistics().io_errors > 0
        assert not any(slab.put([write(number) for number in range(NUMBERS, NUMBERS + 3)]))
        before = disk.calls
        assert not any(slab.put([write(NUMBERS)]))
        assert disk.calls == before, "a degraded slab asked the disk"
        assert not slab.probe()
    # The disk is well again: the store recovers without a restart, and does what it owed.
    disk.on_call = None
    assert slab.probe()
    assert slab.statistics().degraded is None
    slab.drop([])
    parts = disk.on_disk()
    for number in dropped:
        assert not any(name(number) in part for part in parts), f"name {number} is left"
    assert all(slab.put([write(number) for number in range(4)]))
    assert all(get(slab, number) for number in range(4))
    store.close()
    assert disk.open_descriptors == 0, "a descriptor was left open"
    disk.power_loss(random.Random(call))
    again = begin(disk)
    assert again is not None
    for number in range(NUMBERS + 3):
        assert not (get(again[1], number) and number in dropped - set(range(4)))
    assert all(get(again[1], number) for number in range(4)), "a synced page was lost"
    again[0].close()
    return False


@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for-good"])
@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.__getitem__)
def test_any_call_may_fail(code: int, for_good: bool) -> None:
    calls = calls_of_a_run()
    assert calls > 150
    early = sum(survive(call, code, for_good=for_good) for call in range(1, calls + 1))
    assert 0 < early < calls / 2


@pytest.mark.parametrize("seed", range(5))
def test_short_writes_are_continued(seed: int) -> None:
    disk = FakeDisk()
    disk.short_writes = random.Random(seed)
    opened = begin(disk)
    assert opened is not None
    store, slab = opened
    assert all(slab.put([write(number) for number in range(8)]))
    store.close()
    again = begin(disk)
    assert again is not None
    assert all(get(again[1], number) for number in range(8))


def test_a_failed_sync_makes_pages_since_the_last_one_misses() -> None:
    disk = FakeDisk()
    store, slab = house(disk, 4)
    assert all(slab.put([write(number) for number in range(8, 12)]))
    failed: list[int] = []

    def first_sync_fails(count: int, what: str) -> None:
        if what == "sync" and not failed:
            failed.append(count)
            raise OSError(errno.EIO, "EIO")

    disk.on_call = first_sync_fails
    store.gc()
    assert failed
    reason = slab.statistics().degraded
    assert reason is not None
    assert "Input/output error" in reason
    # Those that a sync had confirmed are read on; of the others nobody knows.
    assert all(get(slab, number) for number in range(4))
    assert not any(get(slab, number) for number in range(8, 12))
    assert slab.probe()
    assert all(slab.put([write(number) for number in range(8, 12)]))
    store.close()


def test_pages_that_are_being_written_while_a_sync_fails_are_not_there() -> None:
    disk = FakeDisk()
    store, slab = house(disk, 4)

    def sync_fails(_: int, what: str) -> None:
        if what == "sync":
            raise OSError(errno.EIO, "EIO")

    def meanwhile(_: int, what: str) -> None:
        if what == "pwrite":  # the pages' own: the upkeep comes just now
            disk.on_call = sync_fails
            slab.gc(None)
            disk.on_call = None

    disk.on_call = meanwhile
    assert slab.put([write(number) for number in range(8, 12)]) == [False] * 4
    assert disk.on_call is None, "no write was seen"
    assert slab.statistics().degraded is not None
    assert not any(get(slab, number) for number in range(8, 12)), "the sync may have lost them"
    assert all(get(slab, number) for number in range(4))
    assert slab.probe()
    assert all(slab.put([write(number) for number in range(8, 12)]))
    assert all(get(slab, number) for number in range(8, 12))
    store.close()


def test_a_full_disk_stops_growth_and_gives_space_back() -> None:
    disk = FakeDisk()
    store, slab = house(disk, 16)
    full_at = disk.total_bytes()

    def no_growth(count: int, what: str) -> None:
        if what == "pwrite" and disk.total_bytes() >= full_at:
            raise OSError(errno.ENOSPC, "ENOSPC")

    disk.on_call = no_growth
    assert not all(slab.put([write(number) for number in range(16, 24)]))
    reason = slab.statistics().degraded
    assert reason is not None
    assert "no space left" in reason
    assert sum(get(slab, number) for number in range(16)) == 16, "reading goes on"
    disk.on_call = None
    assert slab.probe()
    assert disk.total_bytes() < full_at, "space was given back"
    assert all(slab.put([write(24)]))
    store.close()
