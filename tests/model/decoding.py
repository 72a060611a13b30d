"""Random decode steps of one model, by itself and by graphs that are run again on a CPU."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chatserve.model import LoadedModel
from chatserve.model.graphs import DecodeGraphs
from chatserve.model.step import StepInputs
from chatserve_kernels import AttentionBatch, fp8
from chatserve_kernels.fixed import FixedBatch
from chatserve_kernels.gpu.tiles import TileKind, TileShape
from tests.model.rounded import ROUNDED_TOLERANCE

SHAPE = TileShape(group=2, kv_heads=2, height_max=32, programs=9)
TOLERANCE = 1e-4


class Reruns:
    """A recorder for a CPU: what was recorded is done again, with what its tensors hold then.
    works: how often it is done when it is recorded."""

    def __init__(self, works: int = 3) -> None:
        self._works = works
        self.recorded = 0
        self.replayed = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        for _ in range(self._works):
            work()

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


class ReadBack:
    """A model whose attention needs lengths and tables in Python: it takes them out of the tensors
    of fixed sizes again. windows: of its layers."""

    def __init__(self, model: LoadedModel, *windows: int | None) -> None:
        self._model = model
        self._kinds = [TileKind(window, SHAPE) for window in windows]
        self.layout, self.device, self.dtype = model.layout, model.device, model.dtype
        self.vocabulary_size = model.vocabulary_size
        self.context_length = model.context_length
        self.parameter_count = model.parameter_count

    def forward(
        self, tokens: Tensor, positions: Tensor, attention: AttentionBatch, **options: Any
    ) -> Tensor:
        if isinstance(attention, FixedBatch):
            attention = self._read(attention)
        else:
            for kind in self._kinds:
                attention.tiles(*kind)
        return self._model.forward(tokens, positions, attention, **options)

    def _read(self, batch: FixedBatch) -> AttentionBatch:
        kind = min(self._kinds, key=lambda each: each.window is not None)
        tiles, size = batch.tiles(*kind), batch.page_size
        lengths, tables = [1] * batch.rows, [[0] for _ in range(batch.rows)]
        for start, _, stop, first, last, *_ in tiles.tiles.tolist():
            for row, _, end, _ in tiles.members[first:last].tolist():
                # Where a row reads its last position, it reads from its own table.
                if 0 < end == stop:
                    lengths[row] = end
                    tables[row] = tiles.tables[start : start - -end // size, 0].tolist()
        longest = max(map(len, tables))
        written = torch.nonzero(batch.write_pages >= 0)[:, 0]
        return AttentionBatch(
            query_starts=batch.query_starts,
            context_lengths=tuple(lengths),
            page_tables=torch.tensor([each + [0] * (longest - len(each)) for each in tables]),
            write_pages=batch.write_pages[written],
            write_offsets=batch.write_offsets[written],
            write_rows=written,
            page_size=size,
        )


@dataclass
class Line:
    """A sequence: its pages, and how many tokens are computed."""

    pages: list[int] = field(default_factory=list[int])
    length: int = 0


class Decoding:
    """Some sequences over a pool full of NaN, some of which begin with the same pages."""

    def __init__(self, model: Any, *, lengths: list[int], shared: int, seed: int) -> None:
        print(f"seed {seed}")
        self.model, self.numbers = model, random.Random(seed)
        self.size = model.layout.page_size
        most = sum(-(-(length + 40) // self.size) for length in lengths) + 3
        self.free = list(range(most))
        self.numbers.shuffle(self.free)
        self.pool = model.layout.allocate(most, model.device, fill=float("nan"))
        self.lines: list[Line] = []
        for index, length in enumerate(lengths):
            line = Line()
            if index and shared and length > shared * self.size:
                line.pages = self.lines[0].pages[:shared]
                line.length = shared * self.size
            self.lines.append(line)
            self._forward(self._inputs([line], length - line.length))

    def _inputs(self, lines: list[Line], count: int, **changes: Any) -> StepInputs:
        """The next tokens of each."""
        starts, positions, pages = [0], list[int](), list[int]()
        for line in lines:
            end = line.length + count
            while len(line.pages) * self.size < end:
                line.pages.append(self.free.pop())
            positions += range(line.length, end)
            pages += [line.pages[at // self.size] for at in range(line.length, end)]
            starts.append(starts[-1] + count)
            line.length = end
        tables = np.zeros((len(lines), max(len(line.pages) for line in lines)), dtype=np.int32)
        for row, line in enumerate(lines):
            tables[row, : len(line.pages)] = line.pages
        fields: dict[str, Any] = {
            "tokens": np.asarray([self.numbers.randrange(4, 200) for _ in positions]),
            "positions": np.asarray(positions),
            "starts": tuple(starts),
            "lengths": tuple(line.length for line in lines),
            "tables": tables,
            "pages": np.asarray(pages),
            "written": np.ones(len(positions), dtype=np.bool_),
            "logit_rows": np.arange(len(positions)),
            "page_size": self.size,
        }
        return StepInputs(**(fields | changes))

    def decode(self, rows: int, **changes: Any) -> StepInputs:
        """A step of some of them, one token each."""
        return self._inputs(self.numbers.sample(self.lines, rows), 1, **changes)

    def _forward(self, inputs: StepInputs) -> tuple[AttentionBatch, Tensor]:
        given = inputs.on(self.model.device)
        with torch.inference_mode():
            logits = self.model.forward(
                given.tokens, given.positions, given.attention, pool=self.pool,
                logit_rows=given.logit_rows,
            )  # fmt: skip
        return given.attention, logits

    def step(self, graphs: DecodeGraphs, inputs: StepInputs) -> bool:
        """By a graph if there is one, and by itself; both are right. Returns whether there was."""
        before = self.pool.clone()
        with torch.inference_mode():
            by_graph = graphs.logits(inputs)
        logits = None if by_graph is None else by_graph.clone()
        after = self.pool.clone()
        self.pool.copy_(before)
        attention, right = self._forward(inputs)
        if logits is None:
            assert bits_equal(before, after), "no graph, and yet something was written"
            with torch.inference_mode():
                self._nudge(inputs)
                after.copy_(self.pool)
                graphs.learn(inputs, attention, right)
            assert bits_equal(self.pool, after), "a trial wrote"
            return False
        assert logits.shape == right.shape
        assert self._close(logits, right)
        self._check_pages(before, after, inputs)
        return True

    def _nudge(self, inputs: StepInputs) -> None:
        """What the step wrote becomes the next larger number: who writes it again is seen."""
        kv, scales = self._layer(self.pool, 0)
        for page, offset in self._places(inputs):
            # The next element of fp8 would be another number to the model.
            own = kv[page, :, offset] if scales is None else scales[page, ..., offset]
            own.copy_(torch.nextafter(own, torch.full_like(own, torch.inf)))

    def _places(self, inputs: StepInputs) -> list[tuple[int, int]]:
        """Pages and offsets that a step writes to."""
        every = zip(inputs.pages, inputs.positions, inputs.written, strict=True)
        return [(int(page), int(at) % self.size) for page, at, written in every if written]

    def _check_pages(self, before: Tensor, after: Tensor, inputs: StepInputs) -> None:
        """What was written is what is written without a graph; all else is as it was."""
        for layer in range(len(self.model.layout.layers)):
            was, now, right = (self._layer(pool, layer) for pool in (before, after, self.pool))
            for page, offset in self._places(inputs):
                assert self._close(*(_stored(*each, page, offset) for each in (now, right)))
                now[0][page, :, offset] = was[0][page, :, offset]
                if now[1] is not None and was[1] is not None:
                    now[1][page, ..., offset] = was[1][page, ..., offset]
        assert bits_equal(before, after), "a neighbour's"

    def _layer(self, pool: Tensor, layer: int) -> tuple[Tensor, Tensor | None]:
        layout = self.model.layout
        return layout.layer_view(pool, layer), layout.layer_scales(pool, layer)

    def _close(self, one: Tensor, other: Tensor) -> bool:
        # Of fp8 two neighbours, where one way through float32 came to either side.
        tolerance = ROUNDED_TOLERANCE if self.model.layout.scaled else TOLERANCE
        return bool(torch.allclose(one, other, rtol=tolerance, atol=tolerance))


def _stored(kv: Tensor, scales: Tensor | None, page: int, offset: int) -> Tensor:
    """[2, kv_heads, head_dim] of one position, as it is read."""
    if scales is None:
        return kv[page, :, offset]
    return fp8.widened(kv[page, :, offset], scales[page, ..., offset], torch.float32)


def bits_equal(one: Tensor, other: Tensor) -> bool:
    """NaN and all."""
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
