"""Append, copies and checksums of pages on a GPU: tensors to the kernels of `copies.py`.

May not know: what pages mean. The doors in `ops.py` have checked what comes in.
"""

from functools import cache

import torch
from torch import Tensor

from chatserve_kernels import fp8, gpu
from chatserve_kernels.batch import AttentionBatch
from chatserve_kernels.gpu import copies
from chatserve_kernels.gpu.tiles import power_of_two

APPEND_ELEMENTS_MAX = 1024  # of one program
# What one program holds of all copies at a time: 64 words of 8 bytes for each of so many.
COPIES_MAX = 32
COPY_WORDS = 64
SUM_WORDS = 1024  # of one program's step
SUM_STEPS = 8

WORD_BYTES = 8


@cache
def served(device: torch.device) -> bool:
    """Whether the kernels take tensors of this device, and have passed a trial there."""
    if not gpu.serves(device.type):
        return False
    if gpu.interpreted():
        return True
    return gpu.passes("copies of pages", device, lambda: _agrees(device))


@cache
def rounds(device: torch.device) -> bool:
    """The same of `append_rounded`."""
    if not gpu.serves(device.type):
        return False
    if gpu.interpreted():
        return True
    return gpu.passes("pages of fp8", device, lambda: _rounds_right(device))


def append_kv(key: Tensor, value: Tensor, kv: Tensor, batch: AttentionBatch) -> None:
    """As `ops.append_kv` has them."""
    page_size, kv_heads, head_dim = kv.shape[2:]
    writes, elements = batch.write_pages.shape[0], kv_heads * head_dim
    if writes == 0:
        return
    together = min(APPEND_ELEMENTS_MAX, power_of_two(elements))
    rows = batch.write_pages if batch.write_rows is None else batch.write_rows
    gpu.launched(copies.append, (writes, -(-elements // together)))(
        key,
        value,
        kv,
        rows.contiguous(),
        batch.write_pages.contiguous(),
        batch.write_offsets.contiguous(),
        *key.stride(),
        *value.stride(),
        kv.stride(0),
        EVERY_ROW=batch.write_rows is None,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        TOGETHER=together,
        num_warps=4,
    )


def append_rounded(
    key: Tensor, value: Tensor, kv: Tensor, batch: AttentionBatch, scales: Tensor
) -> None:
    """As `ops.append_kv` has them, into pages of fp8."""
    page_size, kv_heads, head_dim = kv.shape[2:]
    writes = batch.write_pages.shape[0]
    if writes == 0:
        return
    rows = batch.write_pages if batch.write_rows is None else batch.write_rows
    gpu.launched(copies.append_rounded, (writes, kv_heads))(
        key,
        value,
        kv.view(torch.uint8),
        scales,
        rows.contiguous(),
        batch.write_pages.contiguous(),
        batch.write_offsets.contiguous(),
        *key.stride(),
        *value.stride(),
        kv.stride(0),
        scales.stride(0),
        EVERY_ROW=batch.write_rows is None,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        ELEMENTS=power_of_two(head_dim),
        PAGE_SIZE=page_size,
        LARGEST_INVERSE=fp8.LARGEST_INVERSE,
        MOST_MIN=fp8.MOST_MIN,
        num_warps=1,
    )


def copies_pages(pool: Tensor, sources: Tensor) -> bool:
    """Whether `copy_pages` takes them: pages of whole words, and no more than a program holds."""
    words = pool.shape[1] * pool.element_size() % WORD_BYTES == 0
    return words and pool.data_ptr() % WORD_BYTES == 0 and 0 < sources.shape[0] <= COPIES_MAX


def copy_pages(pool: Tensor, sources: Tensor, destinations: Tensor) -> None:
    """As `ops.copy_pages` has them, where `copies_pages`."""
    words = pool.view(torch.int64)
    gpu.launched(copies.copy, (-(-words.shape[1] // COPY_WORDS),))(
        words,
        sources.contiguous(),
        destinations.contiguous(),
        words.shape[1],
        sources.shape[0],
        COPIES=power_of_two(sources.shape[0]),
        TOGETHER=COPY_WORDS,
        num_warps=4,
    )


def page_checksums(pool: Tensor, pages: Tensor, weights: Tensor) -> Tensor:
    """As `ops.page_checksums` has them, of at least one page."""
    words = pool.view(torch.int64)
    parts = -(-words.shape[1] // (SUM_WORDS * SUM_STEPS))
    sums = torch.empty((pages.shape[0], parts), dtype=torch.int64, device=pool.device)
    gpu.launched(copies.weighted_sum, (pages.shape[0], parts))(
        words,
        pages.contiguous(),
        weights.contiguous(),
        sums,
        words.shape[1],
        parts,
        TOGETHER=SUM_WORDS,
        STEPS=SUM_STEPS,
        num_warps=4,
    )
    return sums.sum(dim=1)


def _agrees(device: torch.device) -> bool:
    """Whether some rows, copies that overlap and sums come out as torch has them."""
    numbers = torch.arange(4 * 2 * 8 * 2 * 8, device=device)
    pool = numbers.mul_(0x5851F42D4C957F2D).view(4, -1)
    pages, weights = torch.tensor([3, 1], device=device), pool[2] | 1
    sums = torch.equal(page_checksums(pool, pages, weights), (pool[pages] * weights).sum(dim=1))
    expected = pool.clone()
    expected[[1, 2, 0]] = pool[[0, 1, 3]]
    places = torch.tensor([[0, 1, 3], [1, 2, 0]], device=device)
    copy_pages(pool, places[0], places[1])
    copied = torch.equal(pool, expected)
    kv = torch.zeros((4, 2, 8, 2, 8), device=device)
    rows = torch.randn((2, 3, 2, 8), device=device)
    batch = AttentionBatch(
        query_starts=(0, 3),
        context_lengths=(3,),
        page_tables=torch.tensor([[2]], device=device),
        write_pages=torch.tensor([2, 3], device=device),
        write_offsets=torch.tensor([7, 0], device=device),
        write_rows=torch.tensor([2, 1], device=device),
        page_size=8,
    )
    append_kv(rows[0], rows[1], kv, batch)
    wanted = torch.zeros_like(kv)
    wanted[2, :, 7], wanted[3, :, 0] = rows[:, 2], rows[:, 1]
    return sums and copied and torch.equal(kv, wanted)


def _rounds_right(device: torch.device) -> bool:
    """Whether rows of all sizes, zeros and no numbers come out as torch has them."""
    pages, offsets = torch.tensor([[2, 3, 0, 1], [7, 0, 3, 3]], device=device)
    batch = AttentionBatch(
        query_starts=(0, 4),
        context_lengths=(4,),
        page_tables=pages[None, :1],
        write_pages=pages,
        write_offsets=offsets,
        write_rows=None,
        page_size=8,
    )
    spread = torch.arange(-31, 33, device=device, dtype=torch.float32).view(2, 2, 1, 16)
    rows = torch.randn((2, 4, 2, 16), device=device) * torch.exp2(spread).repeat(1, 2, 2, 1)
    rows[0, 1, 1], rows[1, 2, 0, 5] = 0.0, float("inf")
    given, expected = (torch.zeros((4, 2, 8, 2, 16), device=device).to(fp8.FP8) for _ in range(2))
    scales, wanted = (torch.zeros((4, 2, 2, 8), device=device) for _ in range(2))
    append_rounded(rows[0], rows[1], given, batch, scales)
    for part in (0, 1):
        fp8.write(rows[part], expected[:, part], wanted[:, part], pages, offsets)
    same = torch.equal(scales.nan_to_num(-1.0), wanted.nan_to_num(-1.0))
    return same and torch.equal(given.float().nan_to_num(1e3), expected.float().nan_to_num(1e3))
