"""Memory is there before it is touched, and whoever has it already notices nothing."""

import mmap
from pathlib import Path

import numpy as np
import pytest

from chatserve.engine import populate

SIZE = 16 << 20


def _resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def _untouched(size: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)


def test_memory_that_nobody_has_touched_is_there() -> None:
    memory = _untouched(SIZE)
    before = _resident()
    populate.populate(memory).join()
    assert _resident() - before > SIZE * 0.9
    assert not memory.any()


def test_no_byte_is_changed_and_what_is_no_whole_page_is_left_alone() -> None:
    memory = _untouched(SIZE)[1 : 5 * mmap.PAGESIZE + 7]
    memory[:] = np.arange(len(memory), dtype=np.uint32).astype(np.uint8)
    kept = memory.copy()
    populate.populate(memory).join()
    assert (memory == kept).all()
    populate.populate(memory[:10]).join()
    populate.populate(memory[:0]).join()


def test_only_the_beginning_of_a_large_pool_is_populated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(populate, "POPULATE_BYTES", SIZE // 4)
    monkeypatch.setattr(populate, "PIECE_BYTES", 1 << 20)
    memory = _untouched(SIZE)
    before = _resident()
    populate.populate(memory).join()
    assert SIZE // 4 * 0.9 < _resident() - before < SIZE // 2


def test_where_the_kernel_cannot_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(populate, "_MADV_POPULATE_WRITE", 9999)
    memory = _untouched(SIZE)
    before = _resident()
    populate.populate(memory).join()
    assert _resident() - before < SIZE // 2
