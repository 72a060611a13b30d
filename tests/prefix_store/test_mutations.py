"""Files of the store changed under its hands: every change is detected, and is a miss."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from prefix_store import MasterSecret, PageRead, PageShape
from prefix_store.layout import BLOCKS_OFFSET, SLOTS_OFFSET, SlotLayout
from tests.prefix_store.fake_disk import FakeDisk
from tests.prefix_store.pages import SHAPE, get, get_all, name, open_store, write

PAGES = 12
DROPPED = 4
LAYOUT = SlotLayout(SHAPE)
Contents = dict[Path, bytes]


class Source:
    """A closed store of pages 0 to 11, of which page 4 was dropped; an older state of the same
    files; the same pages in another store, with another secret, and in another slab."""

    def __init__(self) -> None:
        disk = FakeDisk()
        store = open_store(disk)
        slab = store.slab(SHAPE)
        assert all(slab.put([write(number) for number in range(PAGES)]))
        store.close()
        self.older = disk.contents()
        store = open_store(disk)
        assert store.slab(SHAPE).drop([name(DROPPED)]) == 1
        store.close()
        self.files = disk.contents()
        self.slab = next(path for path in self.files if path.suffix == ".slab")
        self.table = self.slab.with_suffix(".table")
        self.gone = self.slab.with_suffix(".gone")
        self.foreign = [self._elsewhere(MasterSecret(bytes(32))), self._elsewhere(None)]

    def _elsewhere(self, secret: MasterSecret | None) -> Contents:
        disk = FakeDisk()
        store = open_store(disk, secret=secret) if secret else open_store(disk)
        store.slab(SHAPE).put([write(number) for number in range(PAGES)])
        store.close()
        return disk.contents()


SOURCE = Source()


def slot_range(slot: int) -> slice:
    return slice(LAYOUT.offset(slot), LAYOUT.offset(slot + 1))


def flip_header(files: Contents, dice: random.Random) -> None:
    _flip(files, SOURCE.slab, dice, LAYOUT.offset(dice.randrange(PAGES)) + dice.randrange(160))


def flip_payload(files: Contents, dice: random.Random) -> None:
    inside = dice.randrange(160, LAYOUT.sealed_bytes)
    _flip(files, SOURCE.slab, dice, LAYOUT.offset(dice.randrange(PAGES)) + inside)


def flip_anywhere(files: Contents, dice: random.Random) -> None:
    path = dice.choice([SOURCE.slab, SOURCE.table, SOURCE.gone])
    for _ in range(dice.choice([1, 1, 1, 8])):
        _flip(files, path, dice, dice.randrange(len(files[path])))


def flip_record(files: Contents, dice: random.Random) -> None:
    _flip(files, SOURCE.table, dice, BLOCKS_OFFSET + dice.randrange(PAGES * 96))


def _flip(files: Contents, path: Path, dice: random.Random, offset: int) -> None:
    raw = bytearray(files[path])
    raw[offset] ^= 1 << dice.randrange(8)
    files[path] = bytes(raw)


def truncate(files: Contents, dice: random.Random) -> None:
    path = dice.choice([SOURCE.slab, SOURCE.table, SOURCE.gone])
    files[path] = files[path][: dice.randrange(len(files[path]))]


def lose_a_file(files: Contents, dice: random.Random) -> None:
    del files[dice.choice([SOURCE.slab, SOURCE.table, SOURCE.gone])]


def swap_slots(files: Contents, dice: random.Random) -> None:
    raw = bytearray(files[SOURCE.slab])
    one, other = (slot_range(slot) for slot in dice.sample(range(PAGES), 2))
    raw[one], raw[other] = raw[other], raw[one]
    files[SOURCE.slab] = bytes(raw)


def copy_slot(files: Contents, dice: random.Random) -> None:
    raw = bytearray(files[SOURCE.slab])
    one, other = (slot_range(slot) for slot in dice.sample(range(PAGES), 2))
    raw[one] = raw[other]
    files[SOURCE.slab] = bytes(raw)


def zero_sectors(files: Contents, dice: random.Random) -> None:
    path = dice.choice([SOURCE.slab, SOURCE.table, SOURCE.gone])
    raw = bytearray(files[path])
    at = dice.randrange(len(raw) // 512) * 512
    raw[at : at + 512] = bytes(512)
    files[path] = bytes(raw)


def replay_slot(files: Contents, dice: random.Random) -> None:
    """Old slots put back, with or without the old table."""
    raw = bytearray(files[SOURCE.slab])
    for slot in {DROPPED, dice.randrange(PAGES)}:
        raw[slot_range(slot)] = SOURCE.older[SOURCE.slab][slot_range(slot)]
    files[SOURCE.slab] = bytes(raw)
    match dice.randrange(3):
        case 0:
            files[SOURCE.table] = SOURCE.older[SOURCE.table]
        case 1:
            del files[SOURCE.table]
        case _:
            pass


def older_version(files: Contents, dice: random.Random) -> None:
    path = dice.choice([SOURCE.slab, SOURCE.table, SOURCE.gone])
    raw = bytearray(files[path])
    raw[8:10] = dice.choice([0, 2, 0xFFFF]).to_bytes(2, "little")
    files[path] = bytes(raw)


def foreign_file(files: Contents, dice: random.Random) -> None:
    path = dice.choice([SOURCE.slab, SOURCE.table, SOURCE.gone])
    files[path] = dice.choice(SOURCE.foreign)[path]


def foreign_slot(files: Contents, dice: random.Random) -> None:
    raw = bytearray(files[SOURCE.slab])
    where = slot_range(dice.randrange(PAGES))
    raw[where] = dice.choice(SOURCE.foreign)[SOURCE.slab][slot_range(dice.randrange(PAGES))]
    files[SOURCE.slab] = bytes(raw)


def noise(files: Contents, dice: random.Random) -> None:
    path = dice.choice([SOURCE.slab, SOURCE.table, SOURCE.gone])
    raw = bytearray(files[path])
    at = dice.randrange(len(raw))
    raw[at : at + 4096] = dice.randbytes(len(raw[at : at + 4096]))
    files[path] = bytes(raw)


Mutation = Callable[[Contents, random.Random], None]
MUTATIONS: tuple[Mutation, ...] = (
    flip_header,
    flip_payload,
    flip_anywhere,
    flip_record,
    truncate,
    lose_a_file,
    swap_slots,
    copy_slot,
    zero_sectors,
    replay_slot,
    older_version,
    foreign_file,
    foreign_slot,
    noise,
)


def mutate(mutation: Mutation, seed: int) -> int:
    """Read all pages from mutated files; how many are still there."""
    dice = random.Random(seed)
    files = dict(SOURCE.files)
    mutation(files, dice)
    disk = FakeDisk()
    disk.restore(files)
    store = open_store(disk)
    slab = store.slab(SHAPE)
    # One by one, or in one call: what is wrong with one page is the same to the others.
    if seed % 2:
        hits = sum(get_all(slab, range(PAGES)))
    else:
        hits = sum(get(slab, number) for number in range(PAGES))
    assert not get(slab, DROPPED), "a forgotten page came back"
    # What was missed can be kept again, and then it is there.
    assert all(slab.put([write(number) for number in range(PAGES)]))
    assert all(get(slab, number) for number in range(PAGES))
    store.close()
    return hits


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.__name__)
def test_no_change_of_the_files_gives_a_wrong_page(mutation: Mutation) -> None:
    hits = [mutate(mutation, seed) for seed in range(250)]
    if mutation in (flip_header, flip_payload):
        # Exactly the page of the flipped slot is a miss; the slot of page 4 holds none.
        assert set(hits) == {PAGES - 2, PAGES - 1}
        assert hits.count(PAGES - 1) < len(hits) / 4
    if mutation is replay_slot:
        # A slot that was not dropped is replayed as it still is.
        assert set(hits) == {PAGES - 1}
    if mutation is flip_record:
        # A record that is lost costs a look at the headers, and no page.
        assert set(hits) == {PAGES - 1}
    if mutation is swap_slots:
        # Two pages, or one and the slot that held page 4, are not where the table says.
        assert set(hits) == {PAGES - 3, PAGES - 2}


def test_every_bit_of_a_slot_counts() -> None:
    for bit in range(8 * LAYOUT.sealed_bytes):
        if bit >= 8 * 300 and bit % 97:
            continue  # all of the header and the ids; of the page, one bit in 97
        files = dict(SOURCE.files)
        raw = bytearray(files[SOURCE.slab])
        raw[LAYOUT.offset(7) + bit // 8] ^= 1 << bit % 8
        files[SOURCE.slab] = bytes(raw)
        disk = FakeDisk()
        disk.restore(files)
        slab = open_store(disk).slab(SHAPE)
        assert not get(slab, 7), f"bit {bit}"
        assert get(slab, 6)
        assert slab.statistics().misses.authentication == 1


@pytest.mark.soak
def test_a_hundred_thousand_changes() -> None:
    for seed in range(100_000 // len(MUTATIONS) + 1):
        print(f"seed {seed}")
        for mutation in MUTATIONS:
            mutate(mutation, 1_000_000 + seed)


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": b"g" * 32},
        {"page_bytes": SHAPE.page_bytes + 1},
        {"page_tokens": SHAPE.page_tokens + 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_shape_is_another_slab(change: dict[str, object]) -> None:
    fields = {"fingerprint": SHAPE.fingerprint, "page_bytes": 3000, "page_tokens": 16} | change
    other = PageShape(**fields)  # pyright: ignore[reportArgumentType]
    disk = FakeDisk()
    disk.restore(SOURCE.files)
    store = open_store(disk)
    assert store.slab(other).find([name(number) for number in range(PAGES)]) == 0
    assert not any(get(store.slab(other), number) for number in range(PAGES))
    assert get(store.slab(SHAPE), 0), "the first slab lost its pages"


def test_slots_begin_at_multiples_of_4096() -> None:
    assert SLOTS_OFFSET % 4096 == 0
    assert LAYOUT.slot_bytes % 4096 == 0


def test_a_page_with_the_same_token_ids_is_not_taken_for_another() -> None:
    disk = FakeDisk()
    store = open_store(disk)
    other = replace(write(1), tokens=write(0).tokens)
    assert store.slab(SHAPE).put([write(0), other]) == [True, True]
    store.close()
    files = disk.contents()
    raw = bytearray(files[SOURCE.slab])
    raw[slot_range(0)], raw[slot_range(1)] = raw[slot_range(1)], raw[slot_range(0)]
    disk.restore(files | {SOURCE.slab: bytes(raw)})
    slab = open_store(disk).slab(SHAPE)
    into = bytearray(SHAPE.page_bytes)
    assert slab.get([PageRead(name(0), write(0).tokens, into)]) == [False]
    assert slab.statistics().misses.authentication == 1
