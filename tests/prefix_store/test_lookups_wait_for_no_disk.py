"""Look-ups and statistics, which an event loop asks for, wait for no disk: whatever is being done.

At each call of the disk another thread asks for them, while the one that works stands still.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace

import pytest

from prefix_store import PageStore
from prefix_store import slab as slab_module
from tests.prefix_store.fake_disk import FakeDisk
from tests.prefix_store.pages import FOLDER, SECRET, SHAPE, get, name, open_store, tokens, write

OTHER, THIRD = (replace(SHAPE, fingerprint=each * 32) for each in (b"o", b"t"))
PAGES = 60
PATIENCE_SECONDS = 20.0  # for a thread to have its turn; a lock that is held outlasts any


class House:
    """A store with one slab open, one left by an earlier process, and a look at each call."""

    def __init__(self, looker: ThreadPoolExecutor) -> None:
        self.now = 1_000.0
        self.disk = FakeDisk()
        before = open_store(self.disk)
        assert all(before.slab(OTHER).put([write(number, OTHER) for number in range(PAGES)]))
        before.close()
        self.store = PageStore.open(
            FOLDER,
            SECRET,
            capacity_bytes=1 << 20,
            max_age_seconds=60.0,
            files=self.disk,
            clock=lambda: self.now,
        )
        self.slab = self.store.slab(SHAPE)
        assert all(self.slab.put([write(number) for number in range(PAGES)]))
        self.looked = 0
        self._looker = looker
        self.disk.on_call = self.look

    def look(self, _: int, doing: str) -> None:
        def ask() -> None:
            self.store.statistics()
            self.slab.find([name(0)])
            self.slab.contains(name(1))
            self.slab.touch([name(9_999)])

        try:
            self._looker.submit(ask).result(PATIENCE_SECONDS)
        except FutureTimeout:
            self.disk.on_call = None  # let it end
            raise AssertionError(f"a look-up waits for the disk: {doing}") from None
        self.looked += 1


@pytest.fixture
def house() -> Iterator[House]:
    with ThreadPoolExecutor(1) as looker:
        yield House(looker)


def write_more(house: House) -> None:
    """Until others must go: the slab that nobody opened, and pages of this one."""
    for first in range(PAGES, 400, 4):
        house.slab.put([write(number) for number in range(first, first + 4)])
    assert house.store.statistics().reclaimed == 1
    assert house.slab.statistics().evictions.space


def expire(house: House) -> None:
    house.now += 3_600.0
    assert house.store.gc() == PAGES


def drop(house: House) -> None:
    assert house.store.drop([name(number) for number in range(5)]) == 10  # of both slabs


def open_another(house: House) -> None:
    assert all(house.store.slab(THIRD).put([write(number, THIRD) for number in range(PAGES)]))


def open_the_other(house: House) -> None:
    assert house.store.slab(OTHER).find([name(0)]) == 1


def read(house: House) -> None:
    assert get(house.slab, 3)
    assert house.slab.verify([name(4)], [bytearray(SHAPE.page_bytes)])
    assert house.slab.witnesses([name(5)])
    assert len(tokens(5)) == SHAPE.token_bytes
    assert house.store.others()


def shrink(house: House) -> None:
    house.slab.give_back(200_000)


def close(house: House) -> None:
    house.store.close()


DEEDS = (write_more, expire, drop, open_another, open_the_other, read, shrink, close)


@pytest.mark.parametrize("deed", DEEDS)
@pytest.mark.parametrize("part", [1024, 8])
def test_nobody_waits_for_the_disk_but_who_uses_it(
    house: House, deed: Callable[[House], None], part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slab_module, "GC_PAGES", part)
    before = house.disk.calls
    deed(house)
    assert house.looked == house.disk.calls - before >= 1


def test_old_pages_are_removed_by_parts_between_which_others_write(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slab_module, "GC_PAGES", 8)
    orders: list[bool] = []
    house.disk.on_call = None
    order = house.slab._slots.order
    expired = house.slab._index.expired

    def counted(before: float, most: int):
        orders.append(order.locked())
        found = expired(before, most)
        assert len(found) <= 8
        return found

    monkeypatch.setattr(house.slab._index, "expired", counted)
    house.now += 3_600.0
    assert house.store.gc() == PAGES
    assert orders == [True] * (PAGES // 8 + 1)
    assert house.slab.statistics().evictions.age == PAGES
    assert not any(get(house.slab, number) for number in range(PAGES))
    assert house.slab.put([write(0)]) == [True]
    assert get(house.slab, 0)
