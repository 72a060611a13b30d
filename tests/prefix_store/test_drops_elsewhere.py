"""`PageStore.drop`: pages are forgotten in slabs too that nobody has opened."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from prefix_store import MasterSecret, PageStore, StoreError
from prefix_store import store as store_module
from prefix_store.files import LocalFiles
from prefix_store.layout import slab_stem
from prefix_store.proof import noted, search
from tests.prefix_store.pages import SECRET, SHAPE, get, name, open_store, write

OTHER = replace(SHAPE, fingerprint=b"g" * 32)
PAGES = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with pages 0 to 7 as one model's and 4 to 11 as another's."""
    for shape, first in ((SHAPE, 0), (OTHER, 4)):
        store = open_store(folder=tmp_path / "pages", capacity_bytes=8 << 20)
        numbers = range(first, first + PAGES)
        assert all(store.slab(shape).put([write(number, shape) for number in numbers]))
        store.close()
    return tmp_path / "pages"


def stay(folder: Path, shape=SHAPE) -> list[int]:
    store = open_store(folder=folder, capacity_bytes=8 << 20)
    slab = store.slab(shape)
    found = [number for number in range(16) if slab.contains(name(number)) and get(slab, number)]
    store.close()
    return found


def test_a_drop_finds_its_pages_in_every_slab(folder: Path) -> None:
    dropped = [name(number) for number in (1, 5, 9)]
    before = noted(folder, dropped)
    assert len(before) == 4, "one of them lies in both"
    store = open_store(folder=folder, capacity_bytes=8 << 20)
    store.slab(SHAPE)
    assert store.drop(dropped) == 4
    assert not list(search([folder], before)), "while the store is open"
    assert store.drop(dropped) == 0
    store.close()
    assert not list(search([folder], before))
    assert stay(folder) == [0, 2, 3, 4, 6, 7]
    assert stay(folder, OTHER) == [4, 6, 7, 8, 10, 11]


def test_a_drop_needs_no_slab_that_is_open(folder: Path) -> None:
    store = PageStore.open(folder, SECRET, capacity_bytes=1 << 62)
    (pages,) = [pages for pages in store.others() if pages.shape == OTHER]
    assert name(9) in pages
    assert store.drop([name(9)]) == 1
    assert name(9) not in pages, "nobody is told that it is there"
    assert name(10) in pages
    assert store.statistics().unopened == 2
    slab = store.slab(OTHER)
    assert not get(slab, 9)
    assert get(slab, 10)
    store.close()


def test_a_slab_is_opened_once_and_again_only_where_it_has_a_page(folder: Path) -> None:
    store = open_store(folder=folder, capacity_bytes=8 << 20)
    with mock.patch.object(store_module, "open_slots", wraps=store_module.open_slots) as opened:
        assert store.drop([name(1)]) == 1
        assert opened.call_count == 2
        assert store.drop([name(99)]) == 0
        assert opened.call_count == 2
        assert store.drop([name(9)]) == 1
        assert opened.call_count == 3
    store.close()


def test_what_a_server_that_was_killed_had_written_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    killed = open_store(folder=folder, capacity_bytes=8 << 20)
    assert killed.slab(SHAPE).put([write(0)]) == [True]
    # As kill -9 leaves it: no checkpoint, and the lock is free.
    descriptor, killed._lock_descriptor = killed._lock_descriptor, None
    assert descriptor is not None
    LocalFiles().close(descriptor)
    store = open_store(folder=folder, capacity_bytes=8 << 20)
    assert store.drop([name(0)]) == 1
    store.close()
    assert stay(folder) == []


def test_a_disk_that_refuses_is_told_and_asked_again(folder: Path) -> None:
    store = open_store(folder=folder, capacity_bytes=8 << 20)
    with (
        mock.patch.object(LocalFiles, "pwrite", side_effect=OSError(5, "no")),
        pytest.raises(StoreError),
    ):
        store.drop([name(9)])
    with (
        mock.patch.object(LocalFiles, "pread_into", side_effect=OSError(5, "no")),
        pytest.raises(StoreError, match="cannot be opened"),
    ):
        store.drop([name(9)])
    before = noted(folder, [name(9)])
    assert before, "it is still there"
    assert store.drop([name(9)]) in (0, 1), "or its tombstone was all that was written"
    assert not list(search([folder], before))
    store.close()
    assert stay(folder, OTHER) == [4, 5, 6, 7, 8, 10, 11]
    with pytest.raises(StoreError, match="closed"):
        store.drop([name(1)])


def test_pages_of_another_secret_are_left_alone(folder: Path) -> None:
    store = open_store(folder=folder, secret=MasterSecret(b"x" * 32))
    assert store.drop([name(1), name(9)]) == 0
    store.close()
    assert stay(folder) == list(range(PAGES))


def test_a_table_without_its_slab_goes(folder: Path) -> None:
    (folder / f"{slab_stem(OTHER)}.slab").unlink()
    store = open_store(folder=folder, capacity_bytes=8 << 20)
    assert store.drop([name(9)]) == 0
    assert not list(folder.glob(f"{slab_stem(OTHER)}.*")), "it says names"
    assert store.statistics().unopened == 1
    store.close()
    assert stay(folder) == list(range(PAGES))


def test_a_folder_that_was_taken_away_has_nothing(folder: Path) -> None:
    store = open_store(folder=folder, capacity_bytes=8 << 20)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert store.drop([name(1)]) == 0
    assert store.statistics().bytes == 0
    store.close()


def test_pages_that_are_too_old_go_with_it(folder: Path) -> None:
    store = PageStore.open(
        folder, SECRET, capacity_bytes=8 << 20, max_age_seconds=60, clock=lambda: 1e12
    )
    assert store.drop([name(1)]) == 1
    store.close()
    assert stay(folder) == []
