"""Older bytes of the slab that come back: what was dropped since stays a miss."""

import random

import pytest

from prefix_store import PageRead, PageWrite
from prefix_store.layout import GONE_OFFSET
from tests.prefix_store.fake_disk import Crash, FakeDisk, crash_at
from tests.prefix_store.pages import SHAPE, get, name, open_store, page, tokens, write

PAGES = 4
SMALL = 150_000  # 20 slots or so


def settled(numbers: range, capacity_bytes: int = 1 << 20) -> FakeDisk:
    """A disk with these pages, of a store that was closed."""
    disk = FakeDisk()
    store = open_store(disk, capacity_bytes=capacity_bytes)
    assert all(store.slab(SHAPE).put([write(number) for number in numbers]))
    store.close()
    return disk


def put_back(disk: FakeDisk, before: FakeDisk) -> None:
    """All files as they were, but for the tombstones."""
    old = {path: raw for path, raw in before.contents().items() if path.suffix != ".gone"}
    disk.restore(disk.contents() | old)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_of_a_page_is_overwritten_before_its_tombstone_is_on_the_disk(seed: int) -> None:
    print(f"seed {seed}")
    before = settled(range(PAGES))
    (slab_path,) = (path for path in before.contents() if path.suffix == ".slab")
    overwritten = crashes = 0
    while True:
        disk = FakeDisk()
        disk.restore(before.contents())
        slab = open_store(disk).slab(SHAPE)
        begun = disk.contents()[slab_path]
        disk.calls = 0
        disk.on_call = crash_at(crashes + 1)
        try:
            slab.drop([name(1), name(2)])
        except Crash:
            crashes += 1
        else:
            break
        was_touched = disk.contents()[slab_path] != begun
        disk.power_loss(random.Random(f"{seed} {crashes}"))
        put_back(disk, before)
        slab = open_store(disk).slab(SHAPE)
        found = [get(slab, number) for number in range(PAGES)]
        assert (found[0], found[3]) == (True, True)
        if was_touched:
            overwritten += 1
            assert found == [True, False, False, True], f"crash in call {crashes}"
    assert overwritten >= 3, "the wipes of two slots and what follows"


def test_a_page_that_was_just_written_over_is_dropped_for_good_as_well() -> None:
    before = settled(range(12), SMALL)
    disk = FakeDisk()
    disk.restore(before.contents())
    store = open_store(disk, capacity_bytes=SMALL)
    slab = store.slab(SHAPE)
    evicted: list[int] = []
    number = 100
    while not evicted:
        assert slab.put([write(number, run=1)]) == [True]
        evicted = [old for old in range(12) if not slab.contains(name(old))]
        number += 1
        assert number < 200, "nothing is ever evicted"
    slab.drop([name(old) for old in evicted])  # its slot is another page's already
    disk.kill()
    put_back(disk, before)
    slab = open_store(disk, capacity_bytes=SMALL).slab(SHAPE)
    for old in range(12):
        assert get(slab, old) == (old not in evicted), old


def test_a_slot_with_an_older_write_of_the_same_page_is_a_miss() -> None:
    disk = settled(range(PAGES))
    before = disk.contents()
    (slab_path,) = (path for path in before if path.suffix == ".slab")
    store = open_store(disk)
    slab = store.slab(SHAPE)
    old = slab._index.entries[name(2)].slot
    slab.drop([name(2)])
    newer = bytes(reversed(page(2)))  # as computed anew, rounded otherwise
    assert slab.put([PageWrite(name(2), name(1), 2, tokens(2), newer)]) == [True]
    assert slab._index.entries[name(2)].slot == old, "the same slot, or this tests nothing"
    store.close()

    def read() -> tuple[list[bool], bytes]:
        into = bytearray(SHAPE.page_bytes)
        hits = open_store(disk).slab(SHAPE).get([PageRead(name(2), tokens(2), into)])
        return hits, bytes(into)

    after = disk.contents()
    assert read() == ([True], newer)
    disk.restore(after | {slab_path: before[slab_path]})
    assert read()[0] == [False], "an older write, which the table does not know"


def test_a_damaged_tombstone_is_no_tombstone_and_the_others_stay() -> None:
    before = settled(range(PAGES))
    disk = FakeDisk()
    disk.restore(before.contents())
    store = open_store(disk)
    store.slab(SHAPE).drop([name(1)])
    store.slab(SHAPE).drop([name(2)])
    store.close()
    (path,) = (path for path in before.contents() if path.suffix == ".gone")
    raw = bytearray(disk.contents()[path])
    raw[GONE_OFFSET] ^= 1  # of the first tombstone
    disk.restore(disk.contents() | {path: bytes(raw)})
    put_back(disk, before)
    slab = open_store(disk).slab(SHAPE)
    assert slab.statistics().tombstones == 1
    # Whoever can put old files back can put back the tombstones of that day as well (README).
    assert [get(slab, number) for number in range(PAGES)] == [True, True, False, True]


def test_what_was_written_over_a_dropped_page_is_on_the_disk_when_the_drop_returns() -> None:
    disk = FakeDisk()
    store = open_store(disk, capacity_bytes=SMALL)
    slab = store.slab(SHAPE)
    for number in range(40):  # more than fit
        assert slab.put([write(number, run=1)]) == [True]
    store.gc()
    before = {number for number in range(40) if slab.contains(name(number))}
    assert slab.put([write(100, run=1)]) == [True]
    (former,) = {number for number in before if not slab.contains(name(number))}
    assert slab.drop([name(former)]) == 0, "another page has its slot"
    assert not any(name(former) in part for part in disk.on_disk())
    assert get(slab, 100)


def test_a_page_dropped_before_stays_away_when_the_tombstones_are_deleted() -> None:
    before = settled(range(PAGES))
    disk = FakeDisk()
    disk.restore(before.contents())
    store = open_store(disk)
    assert store.slab(SHAPE).drop([name(1)]) == 1
    store.close()
    put_back(disk, before)
    disk.restore({p: raw for p, raw in disk.contents().items() if p.suffix != ".gone"})
    slab = open_store(disk).slab(SHAPE)
    # Nobody knows any more what was dropped, so nothing of that slab is read again.
    assert [get(slab, number) for number in range(PAGES)] == [False] * PAGES
    assert not any(name(number) in part for number in range(PAGES) for part in disk.on_disk())
    assert slab.put([write(0)]) == [True]
    assert get(slab, 0)
