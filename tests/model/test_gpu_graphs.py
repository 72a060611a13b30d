"""Decode steps as graphs over Triton's kernels: recorded on a GPU, else run again in Triton's
interpreter."""

from collections.abc import Callable
from pathlib import Path

import pytest

from chatserve.model import load_model
from chatserve.model.graphs import CudaRecorder, DecodeGraphs, Recorder
from chatserve_kernels import gpu
from chatserve_kernels.fixed import Spread
from chatserve_kernels.gpu import attention, tiles
from tests.model.decoding import Decoding, Reruns
from tests.model.families import build

DEVICE = "cpu" if gpu.interpreted() else "cuda"
LENGTHS = [150, 20, 1, 140, 33]
ROWS = [5, 2, 1, 4, 5, 2, 5]


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts of some tens of positions are read in pieces, by few programs."""
    monkeypatch.setattr(attention, "PROGRAMS_EACH", 1)
    monkeypatch.setattr(attention, "multiprocessors", lambda device: 9)
    monkeypatch.setattr(tiles, "PIECE_POSITIONS_MIN", 64)


@pytest.mark.parametrize(("family", "shared"), [("llama", 4), ("qwen3", 0), ("gemma3", 4)])
def test_logits_and_pages_are_those_of_the_step_by_itself(
    family: str, shared: int, folder_of: Callable[[str], Path]
) -> None:
    graphs, by_graph = stepped(folder_of(family), LENGTHS, ROWS, shared=shared)
    assert len(graphs) == len(ROWS) - by_graph
    assert by_graph >= 2
    kept = graphs._graphs  # pyright: ignore[reportPrivateUsage]
    assert max(sizes.spread for sizes in kept) is (Spread.SHARED if shared else Spread.PARTED)


def test_pages_of_fp8_are_written_and_read_by_graphs(tmp_path: Path) -> None:
    folder = build("llama", tmp_path, layers=1, num_key_value_heads=1)
    graphs, by_graph = stepped(folder, [20, 17], [2, 2], shared=1, kv_dtype="fp8")
    assert (len(graphs), by_graph) == (1, 1)


def stepped(
    folder: Path, lengths: list[int], rows: list[int], *, shared: int, kv_dtype: str = "auto"
) -> tuple[DecodeGraphs, int]:
    """Steps of so many rows each; how many of them a graph computed."""
    options = {"device": DEVICE, "dtype": "float32", "kv_dtype": kv_dtype}
    model = load_model(folder, page_size=16, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "serves", lambda device_type: False)  # prompts are not what is looked at
        drive = Decoding(model, lengths=lengths, shared=shared, seed=5)
    recorder: Recorder = Reruns(works=1) if gpu.interpreted() else CudaRecorder(model.device)
    graphs = DecodeGraphs(model, drive.pool, recorder, rows=8)
    return graphs, sum(drive.step(graphs, drive.decode(count)) for count in rows)
