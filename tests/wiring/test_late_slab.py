"""A page store that takes long to open: the server starts, and finds pages when it is there."""

import asyncio
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatserve import kept_pages
from chatserve.kept_pages import KeptPages
from chatserve.settings import Settings
from prefix_store import MasterSecret, PageRead, PageShape, PageStore, PageWrite, StoreError
from tests.wiring.test_settings import read

SHAPE = PageShape(fingerprint=b"f" * 32, page_bytes=4096, page_tokens=4)
NAME, TOKENS, PAGE = b"n" * 32, b"t" * 16, b"p" * 4096
SECRET = MasterSecret(b"s" * 32)


def _settings(folder: Path, *more: str) -> Settings:
    return read(["--data-dir", str(folder), "--disk-capacity", "64MiB", *more])


def _write() -> PageWrite:
    return PageWrite(NAME, None, 0, TOKENS, PAGE)


def test_it_has_what_was_kept_before(tmp_path: Path) -> None:
    kept = KeptPages.open(_settings(tmp_path), SECRET, SHAPE)
    assert kept is not None
    assert kept.depot.put([_write()]) == [True]
    kept.close()
    again = KeptPages.open(_settings(tmp_path), SECRET, SHAPE)
    assert again is not None
    into = bytearray(4096)
    assert again.depot.find([NAME]) == 1
    assert again.depot.get([PageRead(NAME, TOKENS, into)]) == [True]
    assert into == PAGE
    assert again.depot.drop([NAME]) == 1
    assert not again.depot.contains(NAME)
    statistics = again.statistics()
    assert statistics is not None
    assert statistics.slabs[0].pages == 0
    again.close()


def test_while_it_opens_nothing_is_found_and_nothing_waits_but_who_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    slab = PageStore.slab

    def slow(self: PageStore, shape: PageShape) -> Any:
        assert go_on.wait(60)
        return slab(self, shape)

    monkeypatch.setattr(kept_pages, "OPENING_SECONDS", 0.0)
    monkeypatch.setattr(PageStore, "slab", slow)
    kept = KeptPages.open(_settings(tmp_path), SECRET, SHAPE)
    assert kept is not None
    assert kept.statistics() is None
    assert kept.depot.find([NAME]) == 0
    assert not kept.depot.contains(NAME)
    assert kept.depot.get([PageRead(NAME, TOKENS, bytearray(4096))]) == [False]
    kept.depot.touch([NAME])
    done: list[list[bool]] = []
    writer = threading.Thread(target=lambda: done.append(kept.depot.put([_write()])))
    writer.start()
    go_on.set()
    writer.join(60)
    assert done == [[True]]
    assert kept.depot.find([NAME]) == 1
    kept.close()


@pytest.mark.parametrize("call", ["open", "slab"])
async def test_a_store_that_cannot_be_opened_is_told_and_tried_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
) -> None:
    tries: list[int] = []

    def broken(*_: object, **__: object) -> Any:
        tries.append(1)
        raise StoreError("the disk is on fire")

    monkeypatch.setattr(kept_pages, "PROBE_SECONDS", 0.0)
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(PageStore, call, broken)
        kept = KeptPages.open(_settings(tmp_path), SECRET, SHAPE)
        assert kept is not None
        assert kept.depot.find([NAME]) == 0
        assert kept.depot.put([_write()]) == [False]
        with pytest.raises(StoreError, match="could not be opened"):
            kept.depot.drop([NAME])
        statistics = kept.statistics()
        assert statistics is not None
        assert "on fire" in (statistics.degraded or "")
        upkeep = asyncio.create_task(kept.run())
        await _until(lambda: len(tries) > 3)
    assert caplog.text.count("on fire") == 1, "one line, however often it is tried"
    await _until(lambda: kept.depot.slab is not None)
    statistics = kept.statistics()
    assert statistics is not None
    assert statistics.degraded is None
    assert kept.depot.put([_write()]) == [True]
    upkeep.cancel()
    await asyncio.gather(upkeep, return_exceptions=True)
    kept.close()


async def test_what_could_not_be_dropped_is_not_found_when_the_store_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_pages, "PROBE_SECONDS", 0.0)
    others = [bytes([number]) * 32 for number in range(2)]
    before = KeptPages.open(_settings(tmp_path), SECRET, SHAPE)
    assert before is not None
    writes = [_write(), *(PageWrite(name, None, 0, TOKENS, PAGE) for name in others)]
    assert before.depot.put(writes) == [True] * 3
    before.close()

    def broken(self: PageStore, shape: PageShape) -> Any:
        raise StoreError("on fire")

    with monkeypatch.context() as patched:
        patched.setattr(PageStore, "slab", broken)
        kept = KeptPages.open(_settings(tmp_path), SECRET, SHAPE)
        assert kept is not None
        with pytest.raises(StoreError, match="could not be opened"):
            kept.depot.drop([NAME])
    upkeep = asyncio.create_task(kept.run())
    await _until(lambda: kept.depot.slab is not None)
    upkeep.cancel()
    await asyncio.gather(upkeep, return_exceptions=True)
    depot = kept.depot
    assert depot.find([others[0], NAME, others[1]]) == 1
    assert [depot.contains(name) for name in (NAME, *others)] == [False, True, True]
    read = PageRead(NAME, TOKENS, bytearray(4096))
    assert depot.get([read]) == [False]
    assert depot.get([PageRead(others[0], TOKENS, bytearray(4096))]) == [True]
    assert depot.drop([NAME]) == 1, "the call is made again"
    assert depot.find([others[0], others[1]]) == 2
    assert depot.put([_write()]) == [True]
    assert depot.get([read]) == [True], "computed anew since"
    kept.close()


@pytest.mark.parametrize("what", ["the folder", "the slab", "another slab", "the lock"])
async def test_a_store_that_is_removed_while_it_is_open_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    monkeypatch.setattr(kept_pages, "PROBE_SECONDS", 0.0)
    kept = KeptPages.open(_settings(tmp_path), SECRET, SHAPE)
    assert kept is not None
    assert kept.depot.put([_write()]) == [True]
    pages, before = tmp_path / "pages", kept.depot.slab
    (slab,) = pages.glob("*.slab")
    if what == "the folder":
        shutil.rmtree(pages)
    elif what == "the lock":
        (pages / "lock").unlink()
    else:
        slab.unlink()
        if what == "another slab":
            slab.touch(mode=0o600)
    upkeep = asyncio.create_task(kept.run())
    await _until(lambda: kept.depot.slab not in (before, None))
    statistics = kept.statistics()
    assert statistics is not None
    await _until(lambda: kept._trouble is None)
    assert caplog.text.count("begun anew") >= 1
    assert kept.depot.put([_write()]) == [True]
    upkeep.cancel()
    await asyncio.gather(upkeep, return_exceptions=True)
    kept.close()
    again = KeptPages.open(_settings(tmp_path), SECRET, SHAPE)
    assert again is not None
    assert again.depot.get([PageRead(NAME, TOKENS, bytearray(4096))]) == [True]
    again.close()


async def test_a_store_that_is_removed_and_cannot_be_made_again_is_degraded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_pages, "PROBE_SECONDS", 0.0)
    kept = KeptPages.open(_settings(tmp_path), SECRET, SHAPE)
    assert kept is not None
    shutil.rmtree(tmp_path / "pages")
    (tmp_path / "pages").touch()
    upkeep = asyncio.create_task(kept.run())
    await _until(lambda: "is not a folder" in (kept._trouble or ""))
    statistics = kept.statistics()
    assert statistics is not None
    assert "is not a folder" in (statistics.degraded or "")
    assert kept.depot.put([_write()]) == [False]
    (tmp_path / "pages").unlink()
    await _until(lambda: kept.depot.slab is not None)
    assert kept.depot.put([_write()]) == [True]
    upkeep.cancel()
    await asyncio.gather(upkeep, return_exceptions=True)
    kept.close()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


@pytest.mark.parametrize("off", [("--disk-capacity", "0"), ("--prefix-cache", "off")])
def test_it_can_be_turned_off(tmp_path: Path, off: tuple[str, str]) -> None:
    assert KeptPages.open(_settings(tmp_path, *off), SECRET, SHAPE) is None
    assert not (tmp_path / "pages").exists()


@pytest.mark.parametrize("off", [("--disk-capacity", "0"), ("--prefix-cache", "off")])
def test_turned_off_it_still_forgets(tmp_path: Path, off: tuple[str, str]) -> None:
    kept = KeptPages.open(_settings(tmp_path), SECRET, SHAPE)
    assert kept is not None
    assert kept.depot.put([_write()]) == [True]
    kept.close()
    kept = KeptPages.open(_settings(tmp_path, *off), SECRET, SHAPE)
    assert kept is not None
    assert kept.statistics() is None
    assert kept.others == ()
    assert kept.limits(_settings(tmp_path, *off)).keep_pages == 0
    assert kept.depot.find([NAME]) == 0
    assert kept.depot.put([_write()]) == [False]
    assert kept.depot.drop([NAME]) == 1
    kept.close()
    with pytest.raises(StoreError, match="closed"):
        kept.depot.drop([NAME])
    again = KeptPages.open(_settings(tmp_path), SECRET, SHAPE)
    assert again is not None
    assert not again.depot.contains(NAME)
    again.close()


def test_where_pages_have_no_way_down_it_only_forgets(tmp_path: Path) -> None:
    assert KeptPages.open(_settings(tmp_path), SECRET, SHAPE, passage=False) is None
    kept = KeptPages.open(_settings(tmp_path), SECRET, SHAPE)
    assert kept is not None
    assert kept.depot.put([_write()]) == [True]
    kept.close()
    kept = KeptPages.open(_settings(tmp_path), SECRET, SHAPE, passage=False)
    assert kept is not None
    assert kept.drops_only
    assert kept.depot.drop([NAME]) == 1
    kept.close()


def test_a_folder_that_others_can_read_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "pages").mkdir(mode=0o755)
    (tmp_path / "pages").chmod(0o755)
    with caplog.at_level(logging.WARNING):
        kept = KeptPages.open(_settings(tmp_path), SECRET, SHAPE)
    assert kept is not None
    assert "0700" in caplog.text
    assert kept.depot.put([_write()]) == [False]
    assert not any((tmp_path / "pages").iterdir())
    kept.close()


def test_who_is_closed_opens_no_more(tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir(mode=0o755)
    (tmp_path / "pages").chmod(0o755)
    kept = KeptPages.open(_settings(tmp_path), SECRET, SHAPE)
    assert kept is not None
    kept.close()
    (tmp_path / "pages").chmod(0o700)
    kept._probe()
    assert kept.depot.slab is None
