"""Batches, queries and pages that attention is tested with."""

import itertools
import random

import torch
from torch import Tensor

from chatserve_kernels import AttentionBatch, fp8

# head_dim, heads, kv_heads, page_size
SIZES = [
    *((64, 14, 2, 16), (128, 16, 8, 16), (128, 4, 4, 8), (256, 8, 1, 64)),
    *((80, 6, 2, 24), (72, 9, 3, 16), (96, 32, 2, 256)),
]
LENGTHS = (300, 290, 1, 77, 205)


def decoding(
    lengths: tuple[int, ...], page_size: int, *, shared: int = 0
) -> tuple[AttentionBatch, int]:
    """One query each; all begin with the same pages. The batch, and how many pages there are."""
    numbers = random.Random(17)
    sizes = [-(-length // page_size) for length in lengths]
    free = list(range(shared + sum(sizes)))
    numbers.shuffle(free)
    beginning = [free.pop() for _ in range(shared)]
    tables = torch.zeros((len(lengths), max(sizes)), dtype=torch.int32)
    for row, size in enumerate(sizes):
        table = [*beginning, *(free.pop() for _ in range(size))][:size]
        tables[row, :size] = torch.tensor(table)
    last = [(length - 1) // page_size for length in lengths]
    batch = AttentionBatch(
        query_starts=tuple(range(len(lengths) + 1)),
        context_lengths=lengths,
        page_tables=tables,
        write_pages=tables[range(len(lengths)), last].long(),
        write_offsets=torch.tensor([(length - 1) % page_size for length in lengths]),
        write_rows=None,
        page_size=page_size,
    )
    return batch, shared + sum(sizes)


def in_fp8(kv: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Pages of any type as fp8 ones and their scales, in one pool of bytes; all bits are set
    behind each page, and both are NaN where kv is."""
    elements, scales = fp8.rounded(kv)
    size = elements[0].numel()
    pool = torch.full((len(kv), 16 + size + 4 * scales[0].numel() + 48), 0xFF, dtype=torch.uint8)
    pool = pool.to(device)
    pages = pool[:, 16 : 16 + size].view(kv.shape)
    pages.copy_(elements.view(torch.uint8))
    beside = pool[:, 16 + size : -48].view(torch.float32)
    beside = beside.view(len(kv), 2, kv.shape[3], kv.shape[2])
    beside.copy_(scales.transpose(2, 3))
    return pages.view(fp8.FP8), beside


def rounding_rows(
    rows: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """K [kv_heads, rows, head_dim] and V [rows, kv_heads, head_dim] of what is hard to round: all
    sizes, numbers between two others, zeros, and no numbers."""
    key = torch.randn(kv_heads, rows, head_dim) * torch.exp2(torch.arange(head_dim) % 30 - 20)
    # With the scale of float32's 1 / 448 on itself, these are codes and halves between codes.
    steps = torch.randint(-448 * 16, 448 * 16, (rows, kv_heads, head_dim)) / 16
    steps[..., 0] = 448
    value = steps * 2.0 ** torch.randint(-3, 4, (rows, kv_heads, 1))
    key[:, 1], value[2], key[0, 3, 7], value[9, -1, 1] = 0.0, -0.0, torch.nan, -torch.inf
    key[-1, 0] *= 2.0**-120
    return key.to(dtype), value.to(dtype)


def same_numbers(given: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    """Elements and scales, to the bit but for which NaN it is."""
    for one, other in zip(given, expected, strict=True):
        one, other = one.float().contiguous(), other.float().contiguous()
        numbers = ~other.isnan()
        same = one.view(torch.int32) == other.view(torch.int32)
        if not torch.equal(one.isnan(), other.isnan()) or not bool(same[numbers].all()):
            return False
    return True


def trial(
    size: tuple[int, int, int, int], dtype: torch.dtype, shared: int = 0
) -> tuple[Tensor, Tensor, AttentionBatch]:
    head_dim, heads, kv_heads, page_size = size
    batch, pages = decoding(LENGTHS, page_size, shared=shared)
    kv = torch.randn(pages, 2, page_size, kv_heads, head_dim).to(dtype)
    query = torch.randn(heads, batch.rows, head_dim).to(dtype).transpose(0, 1)
    return query, kv, batch


# Queries and contexts of one step: slices that begin anywhere, longer than a run, and decode rows.
PARTS = ((1, 290), (5, 77), (70, 205), (1, 1), (33, 33), (2, 140))


def parted(page_size: int) -> tuple[AttentionBatch, int]:
    """Slices and decode rows, and how many pages there are."""
    numbers = random.Random(18)
    batch, pages = decoding(tuple(context for _, context in PARTS), page_size)
    rows = sum(queries for queries, _ in PARTS)
    return AttentionBatch(
        query_starts=tuple(itertools.accumulate((n for n, _ in PARTS), initial=0)),
        context_lengths=batch.context_lengths,
        page_tables=batch.page_tables,
        write_pages=torch.tensor([numbers.randrange(pages) for _ in range(rows)]),
        write_offsets=torch.zeros(rows, dtype=torch.int64),
        write_rows=None,
        page_size=page_size,
    ), pages
