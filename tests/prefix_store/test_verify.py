"""Checking pages that nobody asked for: what is wrong is dropped, and no use is counted."""

import errno
import random

import pytest

from prefix_store import Verdict
from prefix_store.layout import SlotLayout
from tests.prefix_store.fake_disk import FakeDisk
from tests.prefix_store.pages import SHAPE, get_all, name, open_store, page, write

PAGES = 40
SLOT = SlotLayout(SHAPE)


def house():
    disk = FakeDisk()
    store = open_store(disk)
    slab = store.slab(SHAPE)
    assert all(slab.put([write(number) for number in range(PAGES)]))
    return disk, store, slab


def verified(slab, numbers) -> list[Verdict]:
    into = [bytearray(SHAPE.page_bytes) for _ in numbers]
    verdicts = slab.verify([name(number) for number in numbers], into)
    for number, verdict, buffer in zip(numbers, verdicts, into, strict=True):
        assert (buffer == page(number)) >= (verdict is Verdict.RIGHT)
    return verdicts


def test_good_pages_are_right_and_nothing_is_counted_as_a_use() -> None:
    _, store, slab = house()
    before = slab.statistics()
    uses = {entry.name: (entry.last_use, entry.uses) for entry in slab._index.entries.values()}
    assert verified(slab, range(PAGES)) == [Verdict.RIGHT] * PAGES
    assert verified(slab, [7, PAGES + 1]) == [Verdict.RIGHT, Verdict.ABSENT]
    assert slab.statistics() == before
    assert {e.name: (e.last_use, e.uses) for e in slab._index.entries.values()} == uses
    assert not any(entry.pins for entry in slab._index.entries.values())
    store.close()


@pytest.mark.parametrize("seed", range(12))
def test_one_flipped_bit_anywhere_in_a_page_is_found_and_the_page_dropped(seed: int) -> None:
    dice = random.Random(seed)
    print(f"seed {seed}")
    disk, store, slab = house()
    number = dice.randrange(PAGES)
    slot = slab._index.entries[name(number)].slot
    path = next(path for path in disk.contents() if path.suffix == ".slab")
    at = SLOT.offset(slot) + dice.randrange(SLOT.sealed_bytes)
    disk.entries[path].seen[at] ^= 1 << dice.randrange(8)
    wanted = [Verdict.RIGHT] * PAGES
    wanted[number] = Verdict.WRONG
    assert verified(slab, range(PAGES)) == wanted
    assert not slab.contains(name(number))
    assert slab.statistics().evictions.bad == 1
    assert get_all(slab, [number]) == [False]
    assert verified(slab, [number]) == [Verdict.ABSENT]
    store.close()


def test_a_page_that_the_disk_does_not_give_is_told_apart() -> None:
    disk, store, slab = house()

    def refuse(offset: int, size: int) -> None:
        raise OSError(errno.EIO, "a bad sector")

    disk.on_read = refuse
    assert verified(slab, [3]) == [Verdict.UNREADABLE]
    disk.on_read = None
    assert not slab.contains(name(3))
    assert slab.statistics().degraded is not None, "as after any error of the disk"
    assert slab.statistics().io_errors >= 1
    assert slab.probe()
    assert verified(slab, [2, 4]) == [Verdict.RIGHT] * 2
    store.close()


def test_a_sample_is_of_pages_that_are_here_and_has_none_twice() -> None:
    _, store, slab = house()
    seed = 5
    print(f"seed {seed}")
    every = {name(number) for number in range(PAGES)}
    for count in (0, 1, 10, PAGES, PAGES + 5):
        drawn = slab.sample(count, random.Random(seed))
        assert len(drawn) == len(set(drawn)) == min(count, PAGES)
        assert set(drawn) <= every
    seen: set[bytes] = set()
    dice = random.Random(seed)
    for _ in range(200):
        seen.update(slab.sample(3, dice))
    assert seen == every, "all have their turn"
    store.close()


def test_a_buffer_of_another_size_is_refused_before_anything_is_read() -> None:
    _, store, slab = house()
    for into in ([bytearray(SHAPE.page_bytes - 1)], []):
        with pytest.raises(ValueError, match=r"a page|a buffer"):
            slab.verify([name(1)], into)
    assert not any(entry.pins for entry in slab._index.entries.values())
    store.close()
    assert slab.verify([name(1)], [bytearray(SHAPE.page_bytes)]) == [Verdict.ABSENT], "closed"
