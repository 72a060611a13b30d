"""A small trial of attention that was compiled here, before it is trusted."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from chatserve_kernels import fp8
from chatserve_kernels.batch import AttentionBatch

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
KV_HEADS = 2
SOFT_CAP = 5.0

SLICE_SEEN = 7  # queries of a slice that are looked at


@dataclass(frozen=True, slots=True)
class Trial:
    """What attention was compiled for. group: query heads that share a kv head. queries: of a
    slice, the last of three sequences; 0 where slices are not computed. rounded: whether pages are
    fp8."""

    head_dim: int
    group: int
    page_size: int
    dtype: torch.dtype
    soft_cap: bool
    sinks: bool
    queries: int
    device: torch.device
    rounded: bool = False


def agrees(run: Callable[..., None], trial: Trial) -> bool:
    """Whether two rows, which share pages and go on apart, and a slice get what softmax says. run:
    (query, kv, batch, result, *, scale, window, soft_cap, sinks), as `ops.paged_attention` has
    them, and `scales` where pages are fp8, into a contiguous result."""
    dtype, page_size, heads = trial.dtype, trial.page_size, KV_HEADS * trial.group
    shared = -(-max(64, trial.queries) // page_size)
    numbers = torch.Generator().manual_seed(random.Random(0).getrandbits(32))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers).to(dtype)

    pages = normal(shared + 3, 2, page_size, KV_HEADS, trial.head_dim)
    beginning = list(range(shared))
    tables = torch.tensor(
        [[*beginning, shared, shared + 1], [*beginning, shared + 2, 0], [*beginning, shared, 0]],
        dtype=torch.int32,
    )
    queries = (1, 1, trial.queries) if trial.queries else (1, 1)
    lengths = ((shared + 1) * page_size + 3, shared * page_size + 5, shared * page_size + 4)
    lengths = lengths[: len(queries)]
    pages[shared + 1, :, 3:] = pages[shared + 2, :, 5:] = float("nan")  # nobody wrote there
    rows = sum(queries)
    batch = AttentionBatch(
        query_starts=tuple(itertools.accumulate(queries, initial=0)),
        context_lengths=lengths,
        page_tables=tables[: len(queries)].to(trial.device),
        write_pages=torch.zeros(rows, dtype=torch.int64),
        write_offsets=torch.zeros(rows, dtype=torch.int64),
        write_rows=None,
        page_size=page_size,
        host_tables=tables[: len(queries)].numpy(),
    )
    given, more = pages.to(trial.device), dict[str, Tensor]()
    if trial.rounded:
        elements, scales = fp8.rounded(pages)
        pages = fp8.widened(elements, scales, torch.float32)
        given = elements.to(trial.device)
        more["scales"] = scales.transpose(2, 3).contiguous().to(trial.device)
    query, scale = normal(rows, heads, trial.head_dim), trial.head_dim**-0.5
    soft_cap = SOFT_CAP if trial.soft_cap else None
    sinks = normal(heads) if trial.sinks else None
    result = torch.full_like(query, float("nan"), device=trial.device)
    run(
        query.to(trial.device),
        given,
        batch,
        result,
        scale=scale,
        window=None,
        soft_cap=soft_cap,
        sinks=None if sinks is None else sinks.to(trial.device),
        **more,
    )
    result = result.cpu()
    seen = [
        (sequence, length - number + 1 + index)
        for sequence, (number, length) in enumerate(zip(queries, lengths, strict=True))
        for index in range(number)
    ]
    some = {*range(2), *range(2, rows, max(1, trial.queries // SLICE_SEEN)), rows - 1}
    for row, (sequence, length) in enumerate(seen):
        if row not in some:
            continue
        mine = pages[tables[sequence].long()].transpose(0, 1).flatten(1, 2)[:, :length].double()
        key, value = mine.repeat_interleave(trial.group, dim=2).unbind()
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
