"""Random sequences in pages: what attention is asked for, in the grid and where it is timed."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chatserve_kernels import AttentionBatch

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Heads:
    """Of a layer. The defaults are those of Llama 3 with 8 B parameters."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def position_elements(self) -> int:
        """Of K and V of one position."""
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Common:
    """The first `tokens` of a sequence lie in the pages of an elder one."""

    sequence: int
    elder: int
    tokens: int


def page_tables(
    contexts: Sequence[int],
    page_size: int,
    *,
    common: Sequence[Common] = (),
    dice: random.Random | None = None,
) -> tuple[NDArray[np.int32], int]:
    """int32 [sequences, pages], and how many pages there are. dice: pages lie anywhere; without,
    one after the other."""
    counts = [-(-context // page_size) for context in contexts]
    order = list(range(sum(counts)))
    if dice is not None:
        dice.shuffle(order)
    tables = np.zeros((len(counts), max(counts)), dtype=np.int32)
    first = 0
    for sequence, count in enumerate(counts):
        tables[sequence, :count] = order[first : first + count]
        first += count
    for each in common:
        whole = each.tokens // page_size
        tables[each.sequence, :whole] = tables[each.elder, :whole]
    return tables, len(order)


def batch_of(
    tables: NDArray[np.int32],
    slices: Sequence[tuple[int, int]],
    page_size: int,
    device: torch.device,
    *,
    shares: bool = True,
) -> AttentionBatch:
    """slices: (queries, context) of each sequence; every query's K and V go where it stands.
    shares: whether pages in common are seen."""
    pages: list[NDArray[np.int32]] = []
    offsets: list[NDArray[np.int64]] = []
    for sequence, (queries, context) in enumerate(slices):
        positions = np.arange(context - queries, context)
        pages.append(tables[sequence, positions // page_size])
        offsets.append(positions % page_size)
    return AttentionBatch(
        query_starts=tuple(itertools.accumulate((each for each, _ in slices), initial=0)),
        context_lengths=tuple(context for _, context in slices),
        page_tables=torch.from_numpy(tables).to(device),
        write_pages=torch.from_numpy(np.concatenate(pages).astype(np.int64)).to(device),
        write_offsets=torch.from_numpy(np.concatenate(offsets)).to(device),
        write_rows=None,
        page_size=page_size,
        host_tables=tables if shares else None,
    )


def layer_views(pool: Tensor, heads: Heads, page_size: int, layers: int) -> list[Tensor]:
    """[pages, 2, page_size, kv_heads, head_dim] of each layer of a pool [pages, elements], whose
    pages hold all layers."""
    inner = page_size * heads.position_elements
    shape = (pool.shape[0], 2, page_size, heads.kv_heads, heads.head_dim)
    return [pool[:, at * inner : (at + 1) * inner].view(shape) for at in range(layers)]


def written(
    tables: NDArray[np.int32], contexts: Sequence[int], page_size: int
) -> NDArray[np.bool_]:
    """bool [pages, page_size]: where any sequence has a position."""
    places = np.zeros((int(tables.max()) + 1, page_size), dtype=np.bool_)
    for sequence, context in enumerate(contexts):
        positions = np.arange(context)
        places[tables[sequence, positions // page_size], positions % page_size] = True
    return places
