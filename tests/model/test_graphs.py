"""Decode steps as graphs: logits and pages as without, sizes, bounds, trials, and what fails.

Attention is machine code here, which reads lengths and tables back out of the graphs' tensors;
`test_gpu_graphs.py` has the kernels that read those tensors themselves.
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from chatserve.model import LoadedModel
from chatserve.model import graphs as module
from chatserve.model.graphs import DecodeGraphs, graph_bytes, rows_max
from chatserve_kernels.fixed import Spread
from chatserve_kernels.gpu import tiles as tiles_module
from tests.model.decoding import Decoding, ReadBack, Reruns
from tests.model.families import WINDOW

WINDOWS = {"llama": (None,), "qwen3": (None,), "mistral": (WINDOW,), "gemma3": (WINDOW, None)}
LENGTHS = [150, 20, 1, 33, 140, 64, 7, 131, 150, 90]
ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 10, 10, 6, 3, 2, 1, 9]


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts of some tens of positions are read in pieces."""
    monkeypatch.setattr(tiles_module, "PIECE_POSITIONS_MIN", 64)


def decoding(
    model: LoadedModel, family: str, *, shared: int = 0, seed: int = 1, lengths: Any = LENGTHS
) -> Decoding:
    return Decoding(ReadBack(model, *WINDOWS[family]), lengths=lengths, shared=shared, seed=seed)


def graphs_of(drive: Decoding, recorder: Any = None, rows: int = 16) -> DecodeGraphs:
    return DecodeGraphs(drive.model, drive.pool, recorder or Reruns(), rows=rows)


@pytest.mark.parametrize(
    ("family", "shared", "kv_dtype"),
    [*((family, shared, "auto") for family in WINDOWS for shared in (0, 4)), ("qwen3", 4, "fp8")],
)
def test_logits_and_pages_are_those_of_the_step_by_itself(
    family: str, shared: int, kv_dtype: str, model_of: Callable[..., LoadedModel]
) -> None:
    drive = decoding(model_of(family, kv_dtype), family, shared=shared, seed=2 + shared)
    reruns = Reruns()
    graphs = graphs_of(drive, reruns)
    by_graph = sum(drive.step(graphs, drive.decode(rows)) for rows in ROWS)
    assert reruns.recorded == len(graphs) == len(ROWS) - by_graph
    assert reruns.replayed == len(ROWS), "each in its trial, then in steps"
    assert by_graph > 4
    kept = set(graphs._graphs)  # pyright: ignore[reportPrivateUsage]
    assert {sizes.rows for sizes in kept} == {1, 2, 4, 8, 16}
    most = Spread.SHARED if shared else Spread.PARTED
    if None not in WINDOWS[family]:
        most = Spread.WHOLE  # a window is short, and nobody else's
    assert max(sizes.spread for sizes in kept) is most


def test_rows_that_write_nothing_and_logits_in_any_order(
    model_of: Callable[[str], LoadedModel],
) -> None:
    drive = decoding(model_of("llama"), "llama", seed=9)
    graphs = graphs_of(drive)
    drive.step(graphs, drive.decode(7))
    for wanted in ([0, 1, 2], [3, 0, 6, 6], [5], list(range(7))):
        for _ in range(2):
            inputs = drive.decode(7, logit_rows=np.asarray(wanted))
            drive.step(graphs, inputs)
    # Full hits: what they attend to is in their pages.
    inputs = drive.decode(7)
    drive._forward(inputs)
    written = np.asarray([True, False, True, False, False, True, True])
    again = {name: getattr(inputs, name) for name in inputs.__slots__} | {"written": written}
    assert drive.step(graphs, type(inputs)(**again))
    nothing = np.zeros(0, dtype=np.int64)
    assert drive.step(graphs, drive.decode(7, logit_rows=nothing))


def test_what_is_no_decode_step_is_left(model_of: Callable[[str], LoadedModel]) -> None:
    drive = decoding(model_of("llama"), "llama")
    graphs = graphs_of(drive, rows=4)
    drive.step(graphs, drive.decode(4))
    assert len(graphs) == 1
    for inputs in (drive.decode(5), drive._inputs(drive.lines[:2], 2)):
        assert not drive.step(graphs, inputs)
    nothing = np.zeros(0, dtype=np.int64)
    assert not drive.step(graphs, drive.decode(1, logit_rows=nothing)), "nothing to compare"
    assert len(graphs) == 1


def test_a_graph_that_gives_other_logits_is_not_used(
    model_of: Callable[[str], LoadedModel], caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong(Reruns):
        def record(self, work: Callable[[], None]) -> Callable[[], None]:
            replay = super().record(work)
            return replay if self.recorded != 2 else lambda: None

    drive = decoding(model_of("llama"), "llama", lengths=[30] * 9)
    recorder = Wrong()
    graphs = graphs_of(drive, recorder)
    with caplog.at_level(logging.WARNING):
        assert not drive.step(graphs, drive.decode(1))
        for _ in range(3):
            assert not drive.step(graphs, drive.decode(2))
    assert len(caplog.records) == 1
    assert "other logits" in caplog.text
    assert (len(graphs), recorder.recorded) == (1, 2)
    assert not drive.step(graphs, drive.decode(8))
    assert drive.step(graphs, drive.decode(8)), "others go on"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("operation not permitted when stream is capturing"),
        ValueError("another"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_fails_to_be_recorded_goes_on_by_itself(
    error: Exception, model_of: Callable[[str], LoadedModel], caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Reruns):
        def record(self, work: Callable[[], None]) -> Callable[[], None]:
            replay = super().record(work)
            if self.recorded == 2:
                raise error
            return replay

    drive = decoding(model_of("llama"), "llama", lengths=[30] * 9)
    recorder = Failing()
    graphs = graphs_of(drive, recorder)
    with caplog.at_level(logging.WARNING):
        for rows in (1, 8, 8, 8, 4, 2):
            assert not drive.step(graphs, drive.decode(rows))
    assert drive.step(graphs, drive.decode(1)), "what is recorded stays"
    assert (len(graphs), recorder.recorded) == (1, 2), "nothing more is tried"
    (record,) = caplog.records
    assert str(error) in record.getMessage()


def test_attention_that_is_no_kernels_has_no_graphs(
    model_of: Callable[[str], LoadedModel], caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of("llama")
    drive = Decoding(model, lengths=[9, 30], shared=0, seed=3)
    reruns = Reruns()
    graphs = graphs_of(drive, reruns)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert not drive.step(graphs, drive.decode(2))
    (record,) = caplog.records
    assert "not a kernel's" in record.getMessage()
    assert reruns.recorded == 0


def test_logits_that_are_no_numbers_teach_nothing(model_of: Callable[[str], LoadedModel]) -> None:
    drive = decoding(model_of("llama"), "llama", lengths=[20, 20])
    graphs = graphs_of(drive)
    inputs = drive.decode(1)
    attention, logits = drive._forward(inputs)
    assert graphs.learn(inputs, attention, logits * torch.nan) == 0.0
    assert len(graphs) == 0
    assert not drive.step(graphs, drive.decode(1))
    assert len(graphs) == 1


def test_there_are_only_so_many(
    model_of: Callable[[str], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRAPHS_MAX", 2)
    drive = decoding(model_of("llama"), "llama", lengths=[30] * 9)
    graphs = graphs_of(drive)
    used = [drive.step(graphs, drive.decode(rows)) for rows in (1, 2, 4, 4, 8, 1, 2)]
    assert used == [False] * 5 + [True] * 2
    assert len(graphs) == 2


def test_tables_that_there_is_no_room_for_go_by_themselves(
    model_of: Callable[[str], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RECORD_BYTES_MAX", 2600)
    monkeypatch.setattr(module, "TABLE_BYTES_MAX", 0)
    drive = decoding(model_of("llama"), "llama", lengths=[30] * 9)
    graphs = graphs_of(drive)
    assert [drive.step(graphs, drive.decode(1)) for _ in range(2)] == [False, True]
    drive.lines = drive.lines[1:2]
    room = graphs._tensors.inputs  # pyright: ignore
    assert room.shape == (2600,)
    step = next(iter(graphs._graphs.values())).step  # pyright: ignore[reportPrivateUsage]
    pages = (2600 - step._tables_start) // 4  # pyright: ignore[reportPrivateUsage]
    records = graphs._counted[1]  # pyright: ignore
    inputs = drive.decode(1)
    rows = inputs.decode_rows(writes=False)
    longer = rows._replace(
        lengths=[16 * (pages + 1)], tables=np.zeros((1, pages + 1), dtype=np.int32)
    )
    assert not step.fill(longer, records)


def test_the_numbers_of_rows_and_the_memory_are_bounded() -> None:
    assert [rows_max(count) for count in (1, 3, 5, 100, 128, 4096)] == [1, 4, 8, 104, 128, 128]
    sizes = {module._rounded(rows) for rows in range(1, module.ROWS_MAX + 1)}  # pyright: ignore
    assert len(sizes) * len(Spread) <= module.GRAPHS_MAX
    # Of a vocabulary of 128 Ki: under a share of a large device's memory.
    assert graph_bytes(1 << 17, module.ROWS_MAX) < 1 << 30
