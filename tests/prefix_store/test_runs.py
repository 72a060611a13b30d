"""Slots that follow each other are read and written in one call, and stay pages of their own."""

import errno
import os
from dataclasses import replace

import pytest

from prefix_store import PageRead, Slab
from prefix_store.layout import SlotLayout
from prefix_store.slab_file import RUN_BYTES
from tests.prefix_store.fake_disk import FakeDisk
from tests.prefix_store.pages import SHAPE, get, get_all, name, open_store, page, tokens, write

LAYOUT = SlotLayout(SHAPE)
RUN = RUN_BYTES // LAYOUT.slot_bytes
CHAT = 24


def chat(disk: FakeDisk) -> Slab:
    """A slab with the pages 0 to 23, put in one call."""
    slab = open_store(disk).slab(SHAPE)
    assert all(slab.put([write(number) for number in range(CHAT)]))
    return slab


def slot_of(slab: Slab, number: int) -> int:
    return slab._slots.index.entries[name(number)].slot  # pyright: ignore[reportPrivateUsage]


def test_pages_of_one_call_lie_in_one_piece_and_are_read_and_written_in_one_call() -> None:
    disk = FakeDisk()
    writes: list[tuple[int, int]] = []
    disk.on_write = lambda offset, raw: writes.append((offset, len(raw)))
    slab = chat(disk)
    first = slot_of(slab, 0)
    assert [slot_of(slab, number) for number in range(CHAT)] == list(range(first, first + CHAT))
    assert (LAYOUT.offset(first), CHAT * LAYOUT.slot_bytes) in writes
    reads: list[tuple[int, int]] = []
    disk.on_read = lambda offset, length: reads.append((offset, length))
    assert all(get_all(slab, range(CHAT)))
    rest = LAYOUT.slot_bytes - LAYOUT.sealed_bytes
    assert reads == [(LAYOUT.offset(first), CHAT * LAYOUT.slot_bytes - rest)]


def test_the_order_asked_for_is_the_order_given() -> None:
    slab = chat(FakeDisk())
    numbers = [5, 30, 4, 5, 23, 0, 31, 12, 11]
    assert get_all(slab, numbers) == [number < CHAT for number in numbers]
    assert slab.statistics().misses.absent == 2


def test_more_than_one_run_in_a_call() -> None:
    disk = FakeDisk()
    slab = open_store(disk, capacity_bytes=4 << 20).slab(SHAPE)
    numbers = range(2 * RUN + 5)
    assert all(slab.put([write(number) for number in numbers]))
    reads: list[int] = []
    disk.on_read = lambda offset, length: reads.append(length)
    assert all(get_all(slab, numbers))
    assert len(reads) == 3


def test_a_bad_sector_costs_one_page() -> None:
    disk = FakeDisk()
    slab = chat(disk)
    bad = LAYOUT.offset(slot_of(slab, 7)) + 1000

    def refuse(offset: int, length: int) -> None:
        if offset <= bad < offset + length:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    disk.on_read = refuse
    assert get_all(slab, range(CHAT)) == [number != 7 for number in range(CHAT)]
    figures = slab.statistics()
    assert (figures.misses.io, figures.io_errors, figures.evictions.bad) == (1, 1, 1)


def test_a_disk_that_errs_once_costs_no_page_and_is_told_of() -> None:
    disk = FakeDisk()
    slab = chat(disk)
    errors = [OSError(errno.EIO, os.strerror(errno.EIO))]

    def refuse(offset: int, length: int) -> None:
        if errors:
            raise errors.pop()

    disk.on_read = refuse
    assert all(get_all(slab, range(CHAT)))
    figures = slab.statistics()
    assert (figures.misses.io, figures.io_errors) == (0, 1)
    assert figures.degraded is not None
    assert slab.probe()


def test_a_file_that_ends_too_soon_costs_the_pages_behind_its_end() -> None:
    disk = FakeDisk()
    slab = chat(disk)
    path = next(path for path in disk.entries if path.suffix == ".slab")
    end = LAYOUT.offset(slot_of(slab, 7)) + LAYOUT.sealed_bytes - 1
    disk.entries[path].cut(end)
    assert get_all(slab, range(CHAT)) == [number < 7 for number in range(CHAT)]
    figures = slab.statistics()
    assert (figures.misses.authentication, figures.io_errors) == (CHAT - 7, 0)


def test_wrong_token_ids_in_the_middle_cost_one_miss_and_no_page() -> None:
    slab = chat(FakeDisk())
    into = [bytearray(SHAPE.page_bytes) for _ in range(CHAT)]
    reads = [PageRead(name(n), tokens(n if n != 9 else 8), into[n]) for n in range(CHAT)]
    assert slab.get(reads) == [n != 9 for n in range(CHAT)]
    assert all(into[n] == page(n) for n in range(CHAT) if n != 9)
    assert slab.statistics().misses.tokens == 1
    assert get(slab, 9)


def test_a_buffer_that_cannot_be_written_leaves_the_slab_as_it_was() -> None:
    slab = chat(FakeDisk())
    reads = [PageRead(name(n), tokens(n), bytearray(SHAPE.page_bytes)) for n in range(3)]
    reads[1] = replace(reads[1], into=memoryview(bytes(SHAPE.page_bytes)))
    with pytest.raises((TypeError, BufferError)):
        slab.get(reads)
    assert all(get_all(slab, range(CHAT)))
    assert slab.drop([name(n) for n in range(CHAT)]) == CHAT


def test_a_write_that_fails_in_the_middle_keeps_what_was_written_before() -> None:
    disk = FakeDisk()
    slab = chat(disk)
    # Every second slot is free again: no two of the next pages follow each other.
    slab.drop([name(number) for number in range(0, CHAT, 2)])
    slab.gc(None)
    slots = sorted(slot_of(slab, number) - 1 for number in range(1, CHAT, 2))

    def refuse(offset: int, raw: bytes) -> None:
        if offset == LAYOUT.offset(slots[3]):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    disk.on_write = refuse
    results = slab.put([write(number) for number in range(100, 108)])
    assert results == [True] * 3 + [False] * 5
    assert slab.statistics().degraded is not None
    assert get_all(slab, range(100, 108)) == results
    disk.on_write = None
    assert slab.probe()
    slab.drop([name(number) for number in range(100, 108)])
    assert not any(name(n) in part for n in range(100, 108) for part in disk.on_disk())
    assert get_all(slab, range(CHAT)) == [number % 2 == 1 for number in range(CHAT)]


def test_a_name_that_comes_twice_in_a_call_is_written_once() -> None:
    slab = open_store(FakeDisk()).slab(SHAPE)
    assert slab.put([write(0), write(1), write(0)]) == [True, True, True]
    figures = slab.statistics()
    assert (figures.writes, figures.touched, figures.pages) == (2, 1, 2)


def test_a_call_with_more_pages_than_the_slab_has_slots_stores_each_and_keeps_the_last() -> None:
    slab = open_store(FakeDisk(), capacity_bytes=150_000).slab(SHAPE)
    numbers = range(0, 120, 8)  # first pages of chats: any may go
    for first in (0, 40):
        assert all(slab.put([write(number) for number in range(first, first + 40, 8)]))
    many = [write(number) for number in range(400, 400 + 8 * 60, 8)]
    assert slab.put(many) == [True] * 60
    assert get_all(slab, numbers) == [False] * len(numbers)
    assert get(slab, 400 + 8 * 59)


def test_what_cannot_be_sealed_leaves_its_slot_to_others() -> None:
    disk = FakeDisk()
    slab = open_store(disk).slab(SHAPE)
    scattered = memoryview(bytearray(2 * SHAPE.page_bytes))[::2]
    with pytest.raises(BufferError):
        slab.put([write(0), replace(write(1), page=scattered)])
    assert slab.drop([name(0), name(1)]) == 0, "nobody waits for it"
    assert all(slab.put([write(number) for number in range(CHAT)]))
    assert all(get_all(slab, range(CHAT)))
