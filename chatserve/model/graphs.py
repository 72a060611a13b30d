"""Decode steps as recorded graphs: one launch in place of hundreds.

May not know: requests, page ownership. Nothing here is needed: `LoadedModel.forward` serves every
step.

Theory: with few rows a GPU computes a step faster than Python tells it to, kernel by kernel. A CUDA
graph is a step's launches, recorded once and told again at once; but each reads the same addresses,
and has the same number of programs. So a step whose sequences have one row each is filled into
tensors that stay (`chatserve_kernels/fixed.py`), of the least sizes that have room for it, and
there is a graph for each sizes. A graph is recorded when its sizes first come, behind the step,
which was computed as every other: what its logits are is known then, and the graph has to give the
same before it is used. In that trial it writes to no page.

    sizes not seen ─▶ the step by itself ─▶ record ─▶ trial against its logits ─▶ kept
                                              └ fails: a line in the log; such steps go as before

All graphs have one buffer of inputs, one of logits, and one pool of memory for what is between
them, since only one runs at a time.
"""

import logging
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from chatserve.model.layout import KVLayout
from chatserve.model.probe import agrees_within_rounding
from chatserve.model.step import StepInputs
from chatserve_kernels import AttentionBatch
from chatserve_kernels.fixed import (
    FixedSizes,
    FixedStep,
    Records,
    decode_records,
    spread_of,
)
from chatserve_kernels.gpu.tiles import TileKind
from chatserve_kernels.packing import sent

# With more rows a step of a model that is worth a GPU takes longer than its launches.
ROWS_MAX = 128
ROWS_STEP = 8
# Three spreads of 19 numbers of rows.
GRAPHS_MAX = 64
# What a graph takes beside its tensors is the driver's, some kilobytes for each of about a thousand
# launches. An estimate: no GPU has been asked.
GRAPH_BYTES = 8 << 20
# Of tables: more, for very long contexts of many rows, and the step goes by itself.
TABLE_BYTES_MAX = 16 << 20
# Records of tiles of any kind, rows and all: for 128 rows, some hundreds of kilobytes.
RECORD_BYTES_MAX = 4 << 20

_log = logging.getLogger(__name__)


class Recorder(Protocol):
    """Records work, so that it can be done again with other values in the same tensors."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What does it again. The work is done once or more, too. Raises whatever goes wrong."""
        ...


class Forwarding(Protocol):
    """What is recorded of a model (`LoadedModel`)."""

    layout: KVLayout
    dtype: torch.dtype
    device: torch.device
    vocabulary_size: int
    context_length: int

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attention: AttentionBatch,
        *,
        pool: Tensor,
        logit_rows: Tensor,
    ) -> Tensor:
        """As LoadedModel has it."""
        ...


class CudaRecorder:
    """CUDA graphs of one device, which share their memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._broken: list[torch.cuda.CUDAGraph] = []

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """As in Recorder. Work that waits for the device is refused before it is recorded."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                work()  # compiles and loads what is not yet there
                with _no_waiting():
                    work()
            return self._recorded(work).replay
        finally:
            # A recording that failed leaves its own stream behind; and what reads the tensors there
            # comes before what is filled into them next.
            torch.cuda.set_stream(current)
            current.wait_stream(self._stream)

    def _recorded(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may take memory meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                work()
        except BaseException:
            # Torch's allocator may go on asking a graph that it was not told the end of.
            self._broken.append(graph)
            raise
        return graph


@contextmanager
def _no_waiting() -> Generator[None]:
    """Operations that wait for the device raise."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def rows_max(sequences: int) -> int:
    """For how many rows there are graphs, of so many sequences at the most."""
    return min(ROWS_MAX, _rounded(sequences))


def graph_bytes(vocabulary_size: int, rows: int) -> int:
    """About what graphs of up to so many rows take of a device's memory in the end: the logits that
    they give, about thrice as much between their kernels, their inputs, and what drivers take."""
    logits = 4 * rows * vocabulary_size
    return 4 * logits + TABLE_BYTES_MAX + RECORD_BYTES_MAX + GRAPHS_MAX * GRAPH_BYTES


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    step: FixedStep
    replay: Callable[[], None]


@dataclass(frozen=True, slots=True, eq=False)
class _Tensors:
    """What all graphs have in common. every: int64 [rows], each row."""

    inputs: Tensor
    logits: Tensor
    every: Tensor


class DecodeGraphs:
    """The graphs of one model over one pool. On the runner's thread, in inference mode.

    pool: as `LoadedModel.forward` has it. rows: the most of a step.
    """

    def __init__(self, model: Forwarding, pool: Tensor, recorder: Recorder, *, rows: int) -> None:
        self._model, self._pool, self._recorder = model, pool, recorder
        self._rows = rows
        self._kinds: tuple[TileKind, ...] = ()
        self._graphs: dict[FixedSizes, _Graph] = {}
        self._refused: set[FixedSizes] = set()
        self._closed = False  # nothing more is recorded
        self._tensors: _Tensors | None = None
        self._counted: tuple[StepInputs, Records] | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    def logits(self, inputs: StepInputs) -> Tensor | None:
        """Logits [R, vocabulary] in float32, valid until the next step; None where there is no
        graph for such a step, and nothing was done."""
        if not self._graphs or not self._takes(inputs):
            return None
        records = self._records_of(inputs)
        graph = self._graphs.get(_sizes(inputs, records))
        if graph is None or not _fill(graph.step, inputs, records, writes=True):
            return None
        graph.replay()
        return self._wanted(inputs)

    def learn(self, inputs: StepInputs, attention: AttentionBatch, logits: Tensor) -> float:
        """Record a graph for steps like this one, which was computed with this attention to these
        logits, where there is none. Returns how many seconds that took."""
        if self._closed or not self._takes(inputs) or not len(inputs.logit_rows):
            return 0.0
        self._kinds = self._kinds or attention.kinds
        if not self._kinds:
            self._close("attention is not a kernel's on %s", self._model.device)
            return 0.0
        records = self._records_of(inputs)
        sizes = _sizes(inputs, records)
        if sizes in self._graphs or sizes in self._refused or not bool(logits.isfinite().all()):
            return 0.0
        started = time.monotonic()
        self._record(sizes, inputs, records, logits)
        return time.monotonic() - started

    def _takes(self, inputs: StepInputs) -> bool:
        return inputs.one_each and len(inputs.tokens) <= self._rows

    def _records_of(self, inputs: StepInputs) -> Records:
        """Counted once a step."""
        if self._counted is None or self._counted[0] is not inputs:
            rows = inputs.decode_rows(writes=True)
            records = decode_records(rows, self._kinds, page_size=inputs.page_size)
            self._counted = inputs, records
        return self._counted[1]

    def _record(
        self, sizes: FixedSizes, inputs: StepInputs, records: Records, expected: Tensor
    ) -> None:
        try:
            tensors = self._tensors = self._tensors or self._new_tensors()
            step = FixedStep(
                tensors.inputs, sizes, self._kinds, page_size=self._model.layout.page_size
            )
            # The step has written already, and a graph that is wrong is to spoil nothing.
            if not _fill(step, inputs, records, writes=False):
                self._refused.add(sizes)
                return
            replay = self._recorder.record(partial(self._work, step, tensors))
            tensors.logits.fill_(float("nan"))
            replay()
            right = agrees_within_rounding(self._wanted(inputs), expected, self._model.dtype)
        except Exception as error:  # a driver, a model that waits, no memory: graphs are a luxury
            self._refused.add(sizes)
            self._close("%s", " ".join(str(error).split())[:300] or type(error).__name__)
            return
        if not right:
            self._refused.add(sizes)
            _log.warning("a graph of %s gives other logits; such steps go without", _told(sizes))
            return
        self._graphs[sizes] = _Graph(step, replay)
        _log.info("steps of %s are a graph", _told(sizes))
        if len(self._graphs) >= GRAPHS_MAX:
            self._closed = True

    def _work(self, step: FixedStep, tensors: _Tensors) -> None:
        """What is recorded."""
        rows = step.sizes.rows
        logits = self._model.forward(
            step.tokens,
            step.positions,
            step.batch,
            pool=self._pool,
            logit_rows=tensors.every[:rows],
        )
        tensors.logits[:rows].copy_(logits)

    def _wanted(self, inputs: StepInputs) -> Tensor:
        """The logits that a step asks for, of those that its graph has given."""
        assert self._tensors is not None
        logits, wanted = self._tensors.logits, inputs.logit_rows
        if wanted.tolist() == list(range(len(wanted))):
            return logits[: len(wanted)]
        return logits[sent([wanted], logits.device)[0]]

    def _new_tensors(self) -> _Tensors:
        model, rows = self._model, _rounded(self._rows)
        pages = -(-model.context_length // model.layout.page_size)
        size = RECORD_BYTES_MAX + min(TABLE_BYTES_MAX, 4 * rows * pages)
        options: dict[str, Any] = {"device": model.device}
        return _Tensors(
            inputs=torch.zeros(size, dtype=torch.uint8, **options),
            logits=torch.zeros((rows, model.vocabulary_size), dtype=torch.float32, **options),
            every=torch.arange(rows, **options),
        )

    def _close(self, text: str, *values: object) -> None:
        """Nothing more is recorded: what failed once would cost every new size its time. What is
        recorded stays."""
        self._closed = True
        _log.warning("no more graphs of decode steps: " + text, *values)


def _fill(step: FixedStep, inputs: StepInputs, records: Records, *, writes: bool) -> bool:
    """Whether it fits."""
    if not step.fill(inputs.decode_rows(writes=writes), records):
        return False
    if inputs.late is not None:
        inputs.late.put(step.tokens)
    return True


def _sizes(inputs: StepInputs, records: Records) -> FixedSizes:
    return FixedSizes(_rounded(len(inputs.tokens)), spread_of(records))


def _rounded(rows: int) -> int:
    """The next number of rows that there are graphs for: 1, 2, 4, then multiples of a step."""
    if rows <= 4:
        return 4 if rows == 3 else rows
    return -(-rows // ROWS_STEP) * ROWS_STEP


def _told(sizes: FixedSizes) -> str:
    return f"{sizes.rows} rows ({sizes.spread.name.lower()} tiles)"
