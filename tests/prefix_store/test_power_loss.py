"""Crashes at every call to the disk: no wrong page, and what was forgotten stays forgotten."""

import random
from collections import defaultdict

import pytest

from prefix_store import PageStore, Slab
from prefix_store.layout import SLOT_MAGIC, SlotLayout
from tests.prefix_store.fake_disk import SECTOR, Crash, FakeDisk, crash_at
from tests.prefix_store.pages import SHAPE, get, get_all, name, open_store, write

NUMBERS = 40
SLOT_BYTES = SlotLayout(SHAPE).slot_bytes
CAPACITY = 150_000  # 20 slots or so: everything moves all the time


class House:
    """A store on a fake disk, what was asked of it, and every sector that it wrote of a page."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.disk = FakeDisk()
        self.disk.on_write = self._see
        self.sectors: dict[int, set[bytes]] = defaultdict(set)
        self.dropped: set[int] = set()  # for good: the drop returned, and no put began after it
        self.store: PageStore | None = None
        self.slab: Slab
        self._numbers = {name(number): number for number in range(NUMBERS)}

    def _see(self, offset: int, raw: bytes) -> None:
        for begin in range(0, len(raw), SLOT_BYTES):
            slot = raw[begin : begin + SLOT_BYTES]
            number = self._numbers.get(slot[68:100]) if slot[:8] == SLOT_MAGIC else None
            if number is not None:
                # What a header says is where this test believes it is, or it would see nothing.
                pieces = [slot[at : at + SECTOR] for at in range(0, len(slot), SECTOR)]
                self.sectors[number].update(piece for piece in pieces if any(piece))

    def open(self) -> None:
        self.store = open_store(self.disk, capacity_bytes=CAPACITY)
        self.slab = self.store.slab(SHAPE)

    def act(self) -> None:
        """One random operation."""
        dice = self.dice
        match dice.choices(["put", "get", "drop", "gc", "reopen"], [10, 5, 3, 0.3, 0.5])[0]:
            case "put":
                first = dice.randrange(NUMBERS)
                numbers = range(first, min(NUMBERS, first + dice.randint(1, 6)))
                self.dropped.difference_update(numbers)
                self.slab.put([write(number) for number in numbers])
            case "get":
                first = dice.randrange(NUMBERS)
                get_all(self.slab, range(first, min(NUMBERS, first + dice.randint(1, 6))))
            case "drop":
                numbers = dice.sample(range(NUMBERS), dice.randint(1, 4))
                self.slab.drop([name(number) for number in numbers])
                self.dropped.update(numbers)
                self.check_forgotten()
            case "gc":
                assert self.store is not None
                self.store.gc()
            case _:
                assert self.store is not None
                self.store.close()
                self.open()
        assert self.disk.total_bytes() <= CAPACITY

    def run(self, operations: int) -> None:
        self.open()
        for _ in range(operations):
            self.act()

    def check(self) -> None:
        """After a crash and a new start."""
        for number in range(NUMBERS):
            hit = get(self.slab, number)
            assert not (hit and number in self.dropped), f"page {number} came back"
        self.check_forgotten()
        assert self.disk.total_bytes() <= CAPACITY

    def check_forgotten(self) -> None:
        """No sector of a forgotten page, and no name of one, is anywhere on the disk."""
        parts = self.disk.on_disk()
        on_disk = {part[at : at + SECTOR] for part in parts for at in range(0, len(part), SECTOR)}
        for number in self.dropped:
            assert not self.sectors[number] & on_disk, f"part of page {number} is left"
            assert not any(name(number) in part for part in parts), f"name {number} is left"


def survive(seed: int, operations: int, crash: int, *, power: bool) -> bool:
    """Crash in call `crash`, start again, crash in the start too, go on; False if there were fewer
    calls."""
    house = House(seed)
    house.disk.on_call = crash_at(crash)
    try:
        house.run(operations)
    except Crash:
        pass
    else:
        return False
    later = random.Random(f"{seed} {crash}")

    def end() -> None:
        if power:
            house.disk.power_loss(later)
        else:
            house.disk.kill()

    end()
    parts = house.disk.on_disk()
    for number in house.dropped:
        assert not any(name(number) in part for part in parts), f"name {number} is left"
    house.disk.on_call = crash_at(later.randint(1, 60))
    try:
        house.open()
    except Crash:
        end()
        house.open()
    house.disk.on_call = None
    assert house.sectors or crash < 100, "no slot was seen being written"
    if later.random() < 0.5:
        # Before any read could notice a torn slot: an older page's sectors may lie in its tail.
        wanted = later.sample(range(NUMBERS), NUMBERS // 2)
        house.slab.drop([name(number) for number in wanted])
        house.dropped.update(wanted)
        house.check_forgotten()
    house.check()
    for _ in range(12):
        house.act()
    house.slab.drop([name(number) for number in range(0, NUMBERS, 2)])
    house.dropped.update(range(0, NUMBERS, 2))
    house.check()
    return True


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
def test_a_crash_at_any_call_costs_no_more_than_pages(power: bool) -> None:
    points = 0
    for seed in (1, 2):
        print(f"seed {seed}")
        crash = 1
        while survive(seed, 40, crash, power=power):
            crash += 1
        points += crash - 1
    assert points >= 300


@pytest.mark.parametrize("seed", range(8))
def test_an_old_copy_of_a_forgotten_page_is_a_miss_after_a_power_loss(seed: int) -> None:
    disk = FakeDisk()
    store = open_store(disk)
    store.slab(SHAPE).put([write(number) for number in range(4)])
    store.close()
    before = disk.contents()
    store = open_store(disk)
    store.slab(SHAPE).drop([name(1)])
    disk.power_loss(random.Random(seed))
    after = disk.contents()
    for path, raw in before.items():
        if path.suffix != ".gone":
            after[path] = raw
    disk.restore(after)
    slab = open_store(disk).slab(SHAPE)
    assert [get(slab, number) for number in range(4)] == [True, False, True, True]
    assert not any(name(1) in part for part in disk.on_disk())


@pytest.mark.soak
@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
def test_crashes_at_random_calls_of_long_runs(power: bool) -> None:
    dice = random.Random(20)
    for round_number in range(3000):
        seed, crash = dice.randrange(1 << 30), dice.randint(1, 3000)
        print(f"round {round_number} seed {seed} crash {crash}")
        survive(seed, 200, crash, power=power)


@pytest.mark.parametrize("seed", range(3))
def test_a_shrink_that_the_power_cuts_short_loses_no_page_that_it_would_have_kept(
    seed: int,
) -> None:
    print(f"seed {seed}")
    source = FakeDisk()
    store = open_store(source)
    assert all(store.slab(SHAPE).put([write(number) for number in range(NUMBERS)]))
    store.slab(SHAPE).drop([name(number) for number in range(8)])  # holes at the beginning
    store.close()

    def shrunk(crash: int) -> tuple[FakeDisk, bool]:
        """A disk whose slab was shrunk up to this call; whether it was cut short."""
        disk = FakeDisk()
        disk.restore(source.contents())
        slab = open_store(disk).slab(SHAPE)
        disk.calls, disk.on_call = 0, crash_at(crash)
        try:
            slab.give_back(12 * SLOT_BYTES)
        except Crash:
            return disk, True
        disk.kill()
        return disk, False

    slab = open_store(shrunk(1 << 30)[0]).slab(SHAPE)
    kept = [number for number in range(NUMBERS) if get(slab, number)]
    assert 24 <= len(kept) < 32, "some have to go, and some move"
    crash, cut = 1, True
    while cut:
        disk, cut = shrunk(crash)
        disk.power_loss(random.Random(f"{seed} {crash}"))
        slab = open_store(disk).slab(SHAPE)
        assert all(get(slab, number) for number in kept), f"crash in call {crash}"
        crash += 1
    assert crash > 12
