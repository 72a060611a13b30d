"""The folder of a store, on real files: lock, modes, links, other slabs, the cap, kill -9."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import prefix_store
from prefix_store import MasterSecret, PageRead, PageStore, StoreError, StoreLocked
from prefix_store.layout import SlotLayout, slab_stem
from tests.prefix_store.pages import (
    SECRET,
    SHAPE,
    folder_bytes,
    get,
    name,
    open_store,
    page,
    tokens,
    write,
)

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(prefix_store.__file__).parents[1])}


def stored(folder: Path, count: int = 8) -> None:
    store = open_store(folder=folder)
    assert all(store.slab(SHAPE).put([write(number) for number in range(count)]))
    store.close()


def test_pages_are_found_after_a_restart(tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    stored(folder)
    slab = open_store(folder=folder).slab(SHAPE)
    assert slab.find([name(number) for number in range(10)]) == 8
    assert all(get(slab, number) for number in range(8))
    assert not get(slab, 8)


def test_other_token_ids_are_a_miss_and_the_page_stays(tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    stored(folder)
    slab = open_store(folder=folder).slab(SHAPE)
    into = bytearray(SHAPE.page_bytes)
    assert slab.get([PageRead(name(1), tokens(2), into)]) == [False]
    assert slab.statistics().misses.tokens == 1
    assert get(slab, 1)


def test_no_plain_byte_of_a_page_is_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    stored(folder)
    raw = b"".join(path.read_bytes() for path in folder.iterdir())
    for number in range(8):
        assert page(number)[:16] not in raw
        assert tokens(number)[:16] not in raw
        assert name(number) in raw, "this test looks for what is there"


def test_a_second_owner_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    store = open_store(folder=folder)
    with pytest.raises(StoreLocked, match="in use"):
        open_store(folder=folder)
    code = (
        "import sys; from pathlib import Path; from prefix_store import *\n"
        "try: PageStore.open(Path(sys.argv[1]), MasterSecret(bytes(32)), capacity_bytes=10**6)\n"
        "except StoreLocked as error: print(error); sys.exit(7)"
    )
    command = [sys.executable, "-c", code, str(folder)]
    other = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert other.returncode == 7
    assert other.stdout.count("\n") == 1
    store.close()
    assert subprocess.run(command, env=ENVIRONMENT, check=False).returncode == 0


def test_a_lock_is_not_inherited_by_children(tmp_path: Path) -> None:
    store = open_store(folder=tmp_path / "pages")
    child = subprocess.Popen(["sleep", "60"])
    try:
        store.close()
        open_store(folder=tmp_path / "pages").close()
    finally:
        child.kill()
        child.wait()


def test_folder_and_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        stored(tmp_path / "pages")
    finally:
        os.umask(before)
    assert (tmp_path / "pages").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "pages").iterdir()} == {0o600}


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o701, 0o777])
def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages").chmod(mode)
    with pytest.raises(StoreError, match="0700"):
        open_store(folder=tmp_path / "pages")


@pytest.mark.parametrize("ending", [".slab", ".table", ".gone"])
def test_a_link_in_place_of_a_file_is_refused(tmp_path: Path, ending: str) -> None:
    folder = tmp_path / "pages"
    stored(folder)
    path = folder / (slab_stem(SHAPE) + ending)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    with pytest.raises(StoreError):
        open_store(folder=folder)
    assert (tmp_path / "elsewhere").read_bytes() == before


def test_a_link_or_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "pages").symlink_to(tmp_path / "real")
    with pytest.raises(StoreError, match="not a folder"):
        open_store(folder=tmp_path / "pages")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="not a folder"):
        open_store(folder=tmp_path / "file")


def test_a_slab_of_another_secret_begins_anew_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "pages"
    stored(folder)
    store = open_store(folder=folder, secret=MasterSecret(bytes(32)))
    slab = store.slab(SHAPE)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "another secret" in caplog.text
    assert slab.find([name(0)]) == 0
    assert slab.put([write(0)]) == [True]
    assert get(slab, 0)
    store.close()


def test_the_cap_holds_for_all_slabs_and_unopened_ones_go_first(tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    capacity = 400_000
    for fingerprint in (b"a", b"b"):
        store = open_store(folder=folder, capacity_bytes=capacity)
        old = replace(SHAPE, fingerprint=fingerprint * 32)
        assert all(store.slab(old).put([write(number, old) for number in range(24)]))
        store.close()
    store = open_store(folder=folder, capacity_bytes=capacity)
    slab = store.slab(SHAPE)
    assert store.statistics().unopened == 2
    reclaimed_at = None
    for number in range(120):
        assert slab.put([write(number)]) == [True]
        assert folder_bytes(folder) <= store.statistics().bytes <= capacity
        if store.statistics().reclaimed and reclaimed_at is None:
            reclaimed_at = number
    assert reclaimed_at is not None
    assert store.statistics().unopened == 0
    # Nothing of this slab went before those were gone.
    assert slab.statistics().evictions.space >= 120 - capacity // SlotLayout(SHAPE).slot_bytes
    store.close()


def test_two_open_slabs_share_the_cap(tmp_path: Path) -> None:
    folder, capacity = tmp_path / "pages", 600_000
    store = open_store(folder=folder, capacity_bytes=capacity)
    first = store.slab(SHAPE)
    assert all(first.put([write(number) for number in range(200)]))
    assert store.statistics().bytes > capacity * 0.9
    other = replace(SHAPE, fingerprint=b"o" * 32)
    second = store.slab(other)
    for number in range(40):
        second.put([write(number, other)])
        assert folder_bytes(folder) <= store.statistics().bytes <= capacity
    assert second.statistics().pages >= 30, "the second slab got no share"
    assert second.statistics().bytes <= capacity / 2 + 100_000
    for number in range(200):
        get(first, number)
    assert first.statistics().evictions.bad == 0
    store.close()
    store = open_store(folder=folder, capacity_bytes=capacity)
    again = store.slab(SHAPE)
    assert again.statistics().pages == sum(get(again, number) for number in range(200)) > 0


def test_a_second_slab_costs_the_first_no_page_where_both_fit(tmp_path: Path) -> None:
    # The first has claimed the whole cap for what it would write next, and uses a part of it.
    store = open_store(folder=tmp_path / "pages", capacity_bytes=2_000_000)
    first = store.slab(SHAPE)
    assert all(first.put([write(number) for number in range(40)]))
    other = replace(SHAPE, fingerprint=b"o" * 32)
    second = store.slab(other)
    assert all(second.put([write(number, other) for number in range(40)]))
    assert sum(get(first, number) for number in range(40)) == 40
    assert all(first.put([write(number) for number in range(40, 60)]))
    assert first.statistics().pages == 60
    assert second.statistics().pages == 40
    assert folder_bytes(tmp_path / "pages") <= 2_000_000
    store.close()


def test_a_smaller_cap_shrinks_the_slab_and_loses_no_page_needlessly(tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    stored(folder, 64)
    store = open_store(folder=folder, capacity_bytes=200_000)
    slab = store.slab(SHAPE)
    assert folder_bytes(folder) <= 200_000
    pages = slab.statistics().pages
    assert pages >= (200_000 - 60_000) // SlotLayout(SHAPE).slot_bytes
    assert sum(get(slab, number) for number in range(64)) == pages
    for number in range(64):  # no parent went before its child
        if number % 8 and slab.contains(name(number)):
            assert slab.contains(name(number - 1))
    store.close()


def test_a_cap_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    store = open_store(folder=tmp_path / "pages", capacity_bytes=10_000)
    with pytest.raises(StoreError, match="bytes at least"):
        store.slab(SHAPE)
    store.close()


def test_gc_removes_slabs_that_nobody_opened_for_too_long(tmp_path: Path) -> None:
    folder, now = tmp_path / "pages", [1000.0]

    def opened() -> PageStore:
        return PageStore.open(
            folder, SECRET, capacity_bytes=1 << 20, max_age_seconds=50.0, clock=lambda: now[0]
        )

    store = opened()
    store.slab(SHAPE).put([write(0)])
    store.close()
    store = opened()
    now[0] += 49
    store.gc()
    assert store.statistics().unopened == 1
    now[0] += 2
    store.gc()
    assert store.statistics().unopened == 0
    assert [path.name for path in folder.iterdir()] == ["lock"]
    store.close()


def test_a_page_goes_after_the_last_that_continues_it_and_not_after_the_first(
    tmp_path: Path,
) -> None:
    now = [1000.0]
    store = PageStore.open(
        tmp_path / "pages",
        SECRET,
        capacity_bytes=1 << 20,
        max_age_seconds=50.0,
        clock=lambda: now[0],
    )
    slab = store.slab(SHAPE)
    younger = replace(write(20), parent=name(0), position=1)
    assert slab.put([write(0), write(1)]) == [True, True]
    now[0] += 40
    assert slab.put([younger]) == [True]
    victims = [victim.entry.name for victim in slab._index.victims(3)]
    assert victims == [name(1), name(20), name(0)]
    now[0] += 20  # two of the three are too old
    assert store.gc() == 1
    assert [slab.contains(name(number)) for number in (0, 1, 20)] == [True, False, True]
    assert slab.statistics().orphans == 0
    now[0] += 40
    assert store.gc() == 2
    assert slab.statistics().pages == 0
    store.close()


def test_a_closed_store_says_no_and_closes_twice(tmp_path: Path) -> None:
    store = open_store(folder=tmp_path / "pages")
    slab = store.slab(SHAPE)
    slab.put([write(0)])
    store.close()
    store.close()
    assert not get(slab, 0)
    assert slab.put([write(1)]) == [False]
    assert not slab.probe()
    with pytest.raises(StoreError, match="closed"):
        slab.drop([name(0)])
    with pytest.raises(StoreError, match="closed"):
        store.slab(SHAPE)


@pytest.mark.parametrize(
    "bad",
    [
        replace(write(0), name=b"short"),
        replace(write(0), tokens=b"1234"),
        replace(write(0), page=b"1234"),
    ],
    ids=["name", "tokens", "page"],
)
def test_writes_of_the_wrong_size_are_refused(tmp_path: Path, bad: prefix_store.PageWrite) -> None:
    store = open_store(folder=tmp_path / "pages")
    slab = store.slab(SHAPE)
    with pytest.raises(ValueError, match="has"):
        slab.put([write(1), bad])
    assert slab.statistics().pages == 0
    with pytest.raises(ValueError, match="bytes"):
        slab.get([PageRead(name(0), tokens(0), bytearray(10))])
    store.close()


WRITER = """
import sys
from pathlib import Path
from tests.prefix_store.pages import *
slab = open_store(folder=Path(sys.argv[1]), capacity_bytes=400_000).slab(SHAPE)
for number in range(10**6):
    slab.put([write(number % 200)])
    if number % 7 == 3:
        slab.drop([name((number - 3) % 200)])
        print((number - 3) % 200, flush=True)
"""


def test_kill_9_of_a_writer_costs_no_more_than_pages(tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    for kill in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder)],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            text=True,
        ) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(3 + 5 * kill)]
            writer.send_signal(signal.SIGKILL)
            rest = writer.stdout.read().splitlines()
        last = int((rest or lines)[-1])
        store = open_store(folder=folder, capacity_bytes=400_000)
        slab = store.slab(SHAPE)
        hits = sum(get(slab, number) for number in range(200))
        assert hits == slab.statistics().pages > 0
        assert not get(slab, last), "a forgotten page came back"
        raw = b"".join(path.read_bytes() for path in folder.iterdir())
        assert name(last) not in raw
        assert folder_bytes(folder) <= 400_000
        store.close()
