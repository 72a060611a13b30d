"""Memory is there before it is touched, and whoever has it already notices nothing."""

import mmap
from pathlib import Path

import numpy as np
import pytest

from chatserve.engine import populate
from chatserve.engine.model_runner import ModelRunner
from chatserve.engine.plan import Moves, PageMove, Slice, StepPlan
from chatserve.model import load_model
from tests.model.families import build

SIZE = 16 << 20


def _resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def _untouched(size: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)


def _ahead(memory: np.ndarray, page_bytes: int = 1 << 20) -> populate.PopulatedAhead:
    pages = memory[: len(memory) // page_bytes * page_bytes].reshape(-1, page_bytes)
    return populate.PopulatedAhead(pages, page_size=16)


def _joined(ahead: populate.PopulatedAhead) -> None:
    assert ahead.thread is not None
    ahead.thread.join()  # it has waited for those before it


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel has them without huge ones, so that what is resident can be counted."""
    monkeypatch.setattr(populate, "_MADV_HUGEPAGE", 15)  # MADV_NOHUGEPAGE


def test_memory_that_nobody_has_touched_is_there() -> None:
    memory = _untouched(SIZE)
    before = _resident()
    _joined(_ahead(memory))
    assert _resident() - before > SIZE * 0.9
    assert not memory.any()


def test_no_byte_is_changed_and_what_is_no_whole_page_is_left_alone() -> None:
    memory = _untouched(SIZE)[1 : 5 * mmap.PAGESIZE + 7]
    memory[:] = np.arange(len(memory), dtype=np.uint32).astype(np.uint8)
    kept = memory.copy()
    _joined(_ahead(memory, page_bytes=6))
    assert (memory == kept).all()
    _joined(_ahead(memory[:10], page_bytes=10))


def test_it_stays_ahead_of_the_highest_page_and_goes_no_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(populate, "AHEAD_BYTES_MIN", SIZE // 4)
    monkeypatch.setattr(populate, "AHEAD_BYTES_MAX", SIZE // 4)
    monkeypatch.setattr(populate, "PIECE_BYTES", 1 << 20)
    memory = _untouched(SIZE)
    before = _resident()
    ahead = _ahead(memory)
    for highest, megabytes in ((0, 4), (1, 4), (2, 6), (3, 6), (1, 6), (9, 13), (15, 16), (15, 16)):
        ahead.use(highest)
        _joined(ahead)
        assert megabytes - 0.5 < (_resident() - before) / (1 << 20) < megabytes + 0.5, highest


def test_a_long_chats_pages_are_ahead_whatever_their_size() -> None:
    memory = _untouched(64 << 20)
    before = _resident()
    _joined(_ahead(memory, page_bytes=48 << 10))
    assert 47 < (_resident() - before) / (1 << 20) < 49, "16,384 tokens are 48 MiB"


def test_where_the_kernel_cannot_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(populate, "_MADV_POPULATE_WRITE", 9999)
    memory = _untouched(SIZE)
    before = _resident()
    _joined(_ahead(memory))
    assert _resident() - before < SIZE // 2


def test_whatever_a_step_or_a_read_touches_is_ahead_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runner says so, of its own pages and of those in host memory."""
    used: list[int] = []
    monkeypatch.setattr(populate.PopulatedAhead, "use", lambda _, page: used.append(page))
    folder = build("llama", tmp_path, seed=1)
    model = load_model(folder, device="cpu", dtype="float32", page_size=8)
    runner = ModelRunner(model, pages=20, slots=20)
    assert runner.host is not None
    runner.page_view(7)
    runner.host.page_view(9)
    table = np.array([3, 11], dtype=np.int32).tobytes()
    item = Slice(1, 1, 0, tuple(range(4, 14)), None, table, True, ())
    moves = Moves(saves=(PageMove(3, 17), PageMove(3, 13)))
    runner.run(StepPlan(number=1, after=0, copies=(), slices=(item,), moves=moves))
    assert used == [0, 0, 7, 9, 17, 11]
    runner.close()
