"""AttentionBatch: which query rows attend to which pages, and where new K and V go.

May not know: layers, models, the meaning of a token. One value serves every layer of a step.

Theory: the rows of a step are the slices of several sequences laid end to end.

    row            0  1  2  3 | 4 | 5  6            query_starts = (0, 4, 5, 7)
    sequence            0       1    2
    position       8  9 10 11   40   0  1           context_lengths = (12, 41, 2)

The last query of a slice sits at position context_length - 1, the ones before it count back from
there, and each attends to the positions up to its own. Lengths are host integers, so that shapes
are known without waiting for a device. A sequence with one query is a *decode row*; decode rows
are computed together, in groups of like context length, the groups being worked out once a step.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chatserve_kernels.gpu.tiles import TileKind, Tiles, TileShape, made_tiles
from chatserve_kernels.runs import MATRIX_ROWS_MIN, Runs, find_runs, laid_out, slice_runs

# On a CPU gathered pages should still be in its cache when they are read: at 4 kv heads of 64 in
# float32 this many positions are 4 MiB of K. A GPU rather wants few and large launches.
GATHER_POSITIONS_MAX = 1 << 12
GATHER_POSITIONS_MAX_GPU = 1 << 18


@dataclass(frozen=True, eq=False)
class DecodeGroup:
    """Decode rows whose contexts fill about the same number of pages.

    rows: int64 [n], row of the flattened batch of each; tables: int64 [n, pages], where `pages`
    covers the longest of them; lengths: int64 [n], tokens attended to; padding: int64 [any],
    where, among the n * pages * page_size gathered positions, no context is.
    """

    rows: Tensor
    tables: Tensor
    lengths: Tensor
    padding: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionBatch:
    """The step's metadata, the same for all layers. Raises ValueError when it contradicts itself.

    query_starts: sequences + 1 host integers, from 0, strictly growing; the last is the number of
        rows in the flattened batch.
    context_lengths: host integers, tokens attended to by each slice's last query, itself included.
    page_tables: int32 or int64 [sequences, max_pages], padded with 0.
    write_pages, write_offsets: int64 [writes], where appended rows go.
    write_rows: int64 [writes], the rows to append; None means every row, in order. A row that is
        left out (a full hit) still attends to its own position, which is already in its page.
    host_tables: int32, the page tables again where Python reads them without waiting for a device.
        Without them decode rows of a batch on a GPU are not seen to share pages.
    """

    query_starts: tuple[int, ...]
    context_lengths: tuple[int, ...]
    page_tables: Tensor
    write_pages: Tensor
    write_offsets: Tensor
    write_rows: Tensor | None
    page_size: int
    host_tables: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        sequences = len(self.context_lengths)
        if len(self.query_starts) != sequences + 1 or self.query_starts[0] != 0:
            raise ValueError("query_starts must begin with 0 and have sequences + 1 entries")
        if self.page_tables.ndim != 2 or self.page_tables.shape[0] != sequences:
            raise ValueError(f"page_tables must be [{sequences}, max_pages]")
        if self.page_tables.dtype not in (torch.int32, torch.int64):
            raise ValueError("page_tables must be int32 or int64")
        capacity = self.page_tables.shape[1] * self.page_size
        for sequence, context in enumerate(self.context_lengths):
            queries = self.query_starts[sequence + 1] - self.query_starts[sequence]
            if not 1 <= queries <= context <= capacity:
                raise ValueError(
                    f"sequence {sequence}: {queries} queries, context {context}, "
                    f"room for {capacity} tokens in its page table"
                )
        if self.host_tables is not None and self.host_tables.shape != self.page_tables.shape:
            raise ValueError("host_tables must be as page_tables are")
        writes = self.rows if self.write_rows is None else self.write_rows.shape[0]
        if self.write_pages.shape != (writes,) or self.write_offsets.shape != (writes,):
            raise ValueError(f"write_pages and write_offsets must be [{writes}]")

    @property
    def rows(self) -> int:
        """Rows of the flattened batch."""
        return self.query_starts[-1]

    @cached_property
    def slices(self) -> tuple[int, ...]:
        """The sequences with more than one query."""
        starts = self.query_starts
        return tuple(s for s in range(len(starts) - 1) if starts[s + 1] - starts[s] > 1)

    @cached_property
    def decode_groups(self) -> tuple[DecodeGroup, ...]:
        """The sequences with one query, grouped so that padding at most doubles the work, and
        so that a group gathers a bounded number of positions.
        """
        starts = self.query_starts
        by_size: defaultdict[int, list[int]] = defaultdict(list)
        for sequence, context in enumerate(self.context_lengths):
            if starts[sequence + 1] - starts[sequence] == 1:
                pages = -(-context // self.page_size)
                by_size[(pages - 1).bit_length()].append(sequence)
        on_cpu = self.page_tables.device.type == "cpu"
        most = GATHER_POSITIONS_MAX if on_cpu else GATHER_POSITIONS_MAX_GPU
        groups: list[DecodeGroup] = []
        for size, sequences in sorted(by_size.items()):
            together = max(1, most // (self.page_size << size))
            for first in range(0, len(sequences), together):
                groups.append(self._group(sequences[first : first + together]))
        return tuple(groups)

    def runs(self, window: int | None, *, slices: bool) -> Runs:
        """What is read for which rows: the sequences with one query each by the pages that they
        have in common, and where wanted the slices. On a CPU."""
        known = self._runs.get((window, slices))
        if known is not None:
            return known
        starts, lengths = self.query_starts, self.context_lengths
        tables = np.ascontiguousarray(self.page_tables.numpy(), dtype=np.int32)
        rows = {
            sequence: starts[sequence]
            for sequence in range(len(lengths))
            if starts[sequence + 1] - starts[sequence] == 1
        }
        found = find_runs(
            *(tables, lengths, rows),
            page_size=self.page_size,
            window=window,
            apart=MATRIX_ROWS_MIN if slices else None,
        )
        for sequence in self.slices if slices else ():
            first, end = starts[sequence : sequence + 2]
            found += slice_runs(sequence, first, end - first, lengths[sequence], window)
        runs = self._runs[window, slices] = laid_out(tables, found)
        return runs

    def tiles(self, window: int | None, shape: TileShape) -> Tiles:
        """What each program of a GPU's attention reads, for all layers of a window and a shape: on
        the device, where nothing waits for it."""
        kind = TileKind(window, shape)
        known = self._tiles.get(kind)
        if known is not None:
            return known
        host = self.host_tables
        if host is None and self.page_tables.device.type == "cpu":
            host = self.page_tables.numpy().astype(np.int32, copy=False)
        tiles = self._tiles[kind] = made_tiles(
            self.page_tables,
            self.query_starts,
            self.context_lengths,
            host_tables=host,
            page_size=self.page_size,
            window=window,
            shape=shape,
        )
        return tiles

    @property
    def readable(self) -> bool:
        """Whether it tells Python what it tells kernels."""
        return True

    @property
    def kinds(self) -> tuple[TileKind, ...]:
        """Which tiles were asked for so far: of a model, the same in each step."""
        return tuple(self._tiles)

    @cached_property
    def has_decode_rows(self) -> bool:
        """Whether any sequence has one query."""
        return len(self.slices) < len(self.context_lengths)

    @cached_property
    def write_arrays(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Rows to append, their pages and offsets: int64, contiguous. On a CPU."""
        every = torch.arange(self.rows) if self.write_rows is None else self.write_rows
        rows, pages, offsets = (
            np.ascontiguousarray(tensor.numpy(), dtype=np.int64)
            for tensor in (every, self.write_pages, self.write_offsets)
        )
        return rows, pages, offsets

    @cached_property
    def pages_named(self) -> int:
        """All page ids are below this: ValueError where a pool has fewer pages, or an id, an offset
        or a row of a write is not one. On a CPU, whose programs read wherever they are told."""
        rows, pages, offsets = self.write_arrays
        tables = self.page_tables.numpy()
        lowest = [int(each.min()) for each in (tables, rows, pages, offsets) if each.size]
        if min(lowest) < 0 or (rows.size and int(rows.max()) >= self.rows):
            raise ValueError("a page, an offset or a row of the batch is out of range")
        if offsets.size and int(offsets.max()) >= self.page_size:
            raise ValueError(f"an offset is not in a page of {self.page_size}")
        return 1 + max(int(each.max()) for each in (tables, pages) if each.size)

    @cached_property
    def _runs(self) -> dict[tuple[int | None, bool], Runs]:
        return {}

    @cached_property
    def _tiles(self) -> dict[TileKind, Tiles]:
        return {}

    def _group(self, sequences: list[int]) -> DecodeGroup:
        device = self.page_tables.device
        lengths = [self.context_lengths[sequence] for sequence in sequences]
        pages = -(-max(lengths) // self.page_size)
        room = pages * self.page_size
        padding = [
            torch.arange(index * room + length, (index + 1) * room)
            for index, length in enumerate(lengths)
        ]

        def tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return DecodeGroup(
            rows=tensor([self.query_starts[sequence] for sequence in sequences]),
            tables=self.page_tables[tensor(sequences), :pages].long(),
            lengths=tensor(lengths),
            padding=torch.cat(padding).to(device),
        )
