"""StepInputs: what a forward pass is told, before it is on a device.

May not know: requests, page ownership. Rows are slices of several sequences laid end to end, as
`chatserve_kernels/batch.py` draws them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chatserve_kernels import AttentionBatch
from chatserve_kernels.fixed import DecodeRows
from chatserve_kernels.packing import sent

NOWHERE = -1  # the page of a row that is not written


class OnDevice(NamedTuple):
    """What `LoadedModel.forward` takes."""

    tokens: Tensor
    positions: Tensor
    attention: AttentionBatch
    logit_rows: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LateTokens:
    """Tokens that the host does not know yet: the step before chose them, or is still at it.

    rows: int64 [n], whose they are. chosen: int64 [any], on the device; sources: int64 [n], which
    of those.
    """

    rows: NDArray[np.int64]
    sources: NDArray[np.int64]
    chosen: Tensor

    def put(self, tokens: Tensor) -> None:
        """Into a step's tokens, int64 [T], behind whatever is to choose them."""
        rows, sources = sent([self.rows, self.sources], tokens.device)
        tokens.index_copy_(0, rows, self.chosen.index_select(0, sources))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StepInputs:
    """tokens, positions: int64 [T]; what the tokens of `late` rows say means nothing. starts,
    lengths: `query_starts` and `context_lengths` of an
    AttentionBatch. tables: int32 [sequences, pages]. pages: int64 [T], where each row's position
    lies; written: bool [T], whether the row writes there. logit_rows: int64 [R]."""

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    tables: NDArray[np.int32]
    pages: NDArray[np.int64]
    written: NDArray[np.bool_]
    logit_rows: NDArray[np.int64]
    page_size: int
    late: LateTokens | None = None

    @property
    def one_each(self) -> bool:
        """Whether every sequence has one row."""
        return len(self.lengths) == len(self.tokens)

    def on(self, device: torch.device) -> OnDevice:
        """As tensors of a device."""
        kept = None if self.written.all() else np.flatnonzero(self.written)
        where = slice(None) if kept is None else kept
        arrays = [self.tokens, self.positions, self.tables, self.logit_rows]
        arrays += [self.pages[where], self.positions[where] % self.page_size]
        arrays += [] if kept is None else [kept]
        tokens, positions, tables, logit_rows, pages, offsets, *rows = sent(arrays, device)
        if self.late is not None:
            self.late.put(tokens)
        attention = AttentionBatch(
            query_starts=self.starts,
            context_lengths=self.lengths,
            page_tables=tables,
            write_pages=pages,
            write_offsets=offsets,
            write_rows=rows[0] if rows else None,
            page_size=self.page_size,
            host_tables=self.tables,
        )
        return OnDevice(tokens, positions, attention, logit_rows)

    def decode_rows(self, *, writes: bool) -> DecodeRows:
        """Where there is one row each, its tokens without the late ones. writes: whether those
        write that are to."""
        assert self.one_each
        written = self.written if writes else np.zeros_like(self.written)
        return DecodeRows(
            tokens=self.tokens,
            positions=self.positions,
            write_pages=np.where(written, self.pages, NOWHERE),
            write_offsets=self.positions % self.page_size,
            lengths=self.lengths,
            tables=self.tables,
        )
