"""Names in slabs that nobody has opened: whether they were kept there."""

from dataclasses import replace
from pathlib import Path

import pytest

from prefix_store import MasterSecret, PageStore
from prefix_store.layout import BLOCKS_OFFSET, slab_stem
from prefix_store.others import OTHERS_MOST
from tests.prefix_store.pages import SECRET, SHAPE, get, name, open_store, write

OTHER = replace(SHAPE, fingerprint=b"g" * 32)
PAGES = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with pages of SHAPE."""
    keep(tmp_path / "pages")
    return tmp_path / "pages"


def keep(folder: Path, shape=SHAPE, **fields) -> None:
    store = open_store(folder=folder, **fields)
    assert all(store.slab(shape).put([write(number, shape) for number in range(PAGES)]))
    store.close()


def test_names_of_a_slab_that_is_not_opened_are_known(folder: Path) -> None:
    store = open_store(folder=folder)
    store.slab(OTHER)
    (pages,) = store.others()
    assert pages.shape == SHAPE
    assert [name(number) in pages for number in range(PAGES + 2)] == [True] * PAGES + [False] * 2
    store.close()


def test_what_is_opened_is_no_others_any_more_and_reading_has_changed_nothing(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    store = open_store(folder=folder)
    (pages,) = store.others()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    slab = store.slab(SHAPE)
    assert store.others() == ()
    assert name(0) not in pages
    assert all(get(slab, number) for number in range(PAGES))
    store.close()


def test_what_was_removed_is_not_said_to_be_there(folder: Path) -> None:
    store = PageStore.open(
        folder, SECRET, capacity_bytes=1 << 20, max_age_seconds=1.0, clock=lambda: 1e12
    )
    store.slab(OTHER)
    (pages,) = store.others()
    assert name(0) in pages
    store.gc()
    assert not (folder / f"{slab_stem(SHAPE)}.slab").exists()
    assert name(0) not in pages
    assert store.others() == ()
    store.close()


def test_a_slab_of_another_secret_says_nothing(folder: Path) -> None:
    store = open_store(folder=folder, secret=MasterSecret(b"x" * 32))
    assert store.others() == ()
    store.close()


def test_what_is_damaged_is_left_out(folder: Path) -> None:
    path = folder / f"{slab_stem(SHAPE)}.table"
    raw = bytearray(path.read_bytes())
    raw[BLOCKS_OFFSET + 5] ^= 1
    path.write_bytes(raw)
    store = open_store(folder=folder)
    assert not any(name(number) in pages for pages in store.others() for number in range(PAGES))
    store.close()
    slab = folder / f"{slab_stem(SHAPE)}.slab"
    slab.write_bytes(b"?" + slab.read_bytes()[1:])
    store = open_store(folder=folder)
    assert store.others() == ()
    store.close()
    path.unlink()
    slab.unlink()
    store = open_store(folder=folder)
    assert store.others() == ()
    store.close()


def test_of_many_slabs_those_used_last_are_looked_at(tmp_path: Path) -> None:
    shapes = [replace(SHAPE, fingerprint=bytes([65 + n]) * 32) for n in range(OTHERS_MOST + 2)]
    for when, shape in enumerate(shapes):
        store = PageStore.open(
            tmp_path / "pages", SECRET, capacity_bytes=8 << 20, clock=lambda when=when: 1e6 + when
        )
        assert store.slab(shape).put([write(0, shape)]) == [True]
        store.close()
    store = open_store(folder=tmp_path / "pages", capacity_bytes=8 << 20)
    assert [pages.shape for pages in store.others()] == shapes[:1:-1]
    store.close()
