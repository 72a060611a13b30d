"""A small trial of compiled attention against plain arithmetic, before it is trusted."""

import itertools
import random
from typing import Any

import torch
from torch import Tensor

from chatserve_kernels.batch import AttentionBatch
from chatserve_kernels.cpu.sizes import Sizes

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
KV_HEADS = 2
SOFT_CAP = 5.0


SLICE = 7  # queries of the last of three sequences, where slices are computed


def agrees(run: Any, sizes: Sizes) -> bool:
    """Whether two rows, which share pages and go on apart, and a slice get what softmax says. run:
    as `native.Attention.run`; sizes: what it was compiled for."""
    dtype = torch.bfloat16 if sizes.bfloat16 else torch.float32
    page_size, heads = sizes.page_size, KV_HEADS * sizes.group
    shared = -(-64 // page_size)
    numbers = torch.Generator().manual_seed(random.Random(0).getrandbits(32))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers).to(dtype)

    pages = normal(shared + 3, 2, page_size, KV_HEADS, sizes.head_dim)
    beginning = list(range(shared))
    tables = torch.tensor(
        [[*beginning, shared, shared + 1], [*beginning, shared + 2, 0], [*beginning, shared, 0]],
        dtype=torch.int32,
    )
    queries = (1, 1, SLICE) if sizes.matrices else (1, 1)
    lengths = ((shared + 1) * page_size + 3, shared * page_size + 5, shared * page_size + 4)
    lengths = lengths[: len(queries)]
    pages[shared + 1, :, 3:] = pages[shared + 2, :, 5:] = float("nan")  # nobody wrote there
    rows = sum(queries)
    batch = AttentionBatch(
        query_starts=tuple(itertools.accumulate(queries, initial=0)),
        context_lengths=lengths,
        page_tables=tables[: len(queries)],
        write_pages=torch.zeros(rows, dtype=torch.int64),
        write_offsets=torch.zeros(rows, dtype=torch.int64),
        write_rows=None,
        page_size=page_size,
    )
    query, scale = normal(rows, heads, sizes.head_dim), sizes.head_dim**-0.5
    soft_cap = SOFT_CAP if sizes.soft_cap else None
    sinks = normal(heads) if sizes.sinks else None
    result = torch.empty_like(query)
    run(
        query, pages, batch, result, scale=scale, window=None, soft_cap=soft_cap, sinks=sinks,
    )  # fmt: skip
    seen = [
        (sequence, length - number + 1 + index)
        for sequence, (number, length) in enumerate(zip(queries, lengths, strict=True))
        for index in range(number)
    ]
    for row, (sequence, length) in enumerate(seen):
        mine = pages[tables[sequence].long()].transpose(0, 1).flatten(1, 2)[:, :length].double()
        key, value = mine.repeat_interleave(sizes.group, dim=2).unbind()
        scores = torch.einsum("hd,thd->ht", query[row].double(), key) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        if sinks is not None:
            scores = torch.cat((scores, sinks.double()[:, None]), dim=1)
        weights = torch.softmax(scores, dim=1)[:, :length]
        expected = torch.einsum("ht,thd->hd", weights, value)
        if not torch.allclose(result[row].double(), expected, rtol=0, atol=TOLERANCE[dtype]):
            return False
    return True
