"""Paged attention on a GPU: tensors, tiles and sizes to the kernels of `programs.py`.

May not know: layers. `ops.paged_attention` has checked what comes in.

Theory: before a model's sizes are used they must give what plain arithmetic gives on a small trial,
for which they are compiled; where they do not, or there is nothing to compile with, torch goes on,
and the log says so.
"""

import logging
import math
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from chatserve_kernels import fp8, gpu
from chatserve_kernels.batch import AttentionBatch
from chatserve_kernels.gpu import programs
from chatserve_kernels.gpu.tiles import TileShape, power_of_two
from chatserve_kernels.trial import Trial, agrees

# The least that a product of matrices takes on a side.
SIDE_MIN = 16
HEIGHT_MAX = 128
# Of queries that a program holds, and of keys, and of values, that it reads at a time: what a
# multiprocessor of 100 KB has room for, with the next keys and values on their way.
QUERY_BYTES = 32 << 10
KEY_BYTES = 16 << 10
WIDTH_MAX = 64
# Products of float32 are no work for tensor cores: larger ones do not fit into registers.
FLOAT32_HEIGHT_MAX = 16
FLOAT32_WIDTH_MAX = 32
# From so many elements of results on, eight warps: four would have no registers for them.
WARPS_ELEMENTS = 128 * 64
# Programs that a multiprocessor runs at a time.
PROGRAMS_EACH = 2
# More than a program holds, and no multiple of it: in the trial the largest are compiled as well.
TRIAL_QUERIES = HEIGHT_MAX + 7
# Parts that are joined at a time.
TOGETHER = 16

_log = logging.getLogger(__name__)

_OPERANDS: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def served(query: Tensor, kv: Tensor, *, soft_cap: float | None, sinks: Tensor | None) -> bool:
    """Whether the kernels take these tensors, `ops.paged_attention`'s own, and have passed their
    trial."""
    if not gpu.serves(query.device.type) or query.dtype not in _OPERANDS:
        return False
    page_size, kv_heads, head_dim = kv.shape[2:]
    group = query.shape[1] // kv_heads
    options = soft_cap is not None, sinks is not None
    return _trusted(head_dim, group, page_size, query.dtype, kv.dtype, *options, query.device)


def paged_attention(
    query: Tensor,
    kv: Tensor,
    batch: AttentionBatch,
    result: Tensor,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
    scales: Tensor | None = None,
) -> None:
    """Into `result`, contiguous [rows, heads, head_dim]; the others as `ops.paged_attention` has
    them."""
    heads, head_dim = query.shape[1:]
    kv_heads, page_size = kv.shape[3], kv.shape[2]
    group, elements = heads // kv_heads, max(SIDE_MIN, power_of_two(head_dim))
    row_bytes = elements * query.element_size()
    wide = query.dtype == torch.float32
    codes = scales is not None and not knows_fp8(query.device)
    height_max = FLOAT32_HEIGHT_MAX if wide else min(HEIGHT_MAX, QUERY_BYTES // row_bytes)
    if codes and not wide:
        height_max //= 2  # what codes become needs registers, too
    width = min(FLOAT32_WIDTH_MAX if wide else WIDTH_MAX, KEY_BYTES // row_bytes)
    shape = TileShape(
        group=group,
        kv_heads=kv_heads,
        height_max=height_max,
        programs=PROGRAMS_EACH * multiprocessors(query.device),
    )
    tiles = batch.tiles(window, shape)
    parts = torch.empty(
        (max(1, tiles.slots), heads, head_dim), dtype=torch.float32, device=query.device
    )
    logarithms = torch.empty(parts.shape[:2], dtype=torch.float32, device=query.device)
    given = logarithms if sinks is None else sinks.contiguous()
    # The interpreter multiplies bfloat16 as if it were integers.
    operand = tl.float32 if gpu.interpreted() else _OPERANDS[query.dtype]
    # Weights times scales may be smaller than float16's numbers, which would lose their bits.
    narrow = scales is not None and operand == tl.float16
    base_2 = math.log2(math.e)
    gpu.launched(programs.attend, (tiles.tiles.shape[0], kv_heads))(
        query,
        kv.view(torch.uint8) if codes else kv,
        logarithms if scales is None else scales,
        tiles.tables,
        tiles.tiles,
        tiles.members,
        result,
        parts,
        logarithms,
        given,
        *query.stride(),
        kv.stride(0),
        0 if scales is None else scales.stride(0),
        tiles.tables.stride(0),
        scale * base_2 if soft_cap is None else scale / soft_cap,
        0.0 if soft_cap is None else soft_cap * base_2,
        GROUP=group,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        ELEMENTS=elements,
        PAGE_SIZE=page_size,
        HEIGHT=tiles.height,
        WIDTH=max(SIDE_MIN, width),
        CAPPED=soft_cap is not None,
        SINKS=sinks is not None,
        SCALED=scales is not None,
        CODES=codes,
        OPERAND=operand,
        VALUE_OPERAND=tl.bfloat16 if narrow else operand,
        num_warps=8 if tiles.height * elements >= WARPS_ELEMENTS else 4,
        num_stages=2,
    )
    if tiles.joins.shape[0]:
        gpu.launched(programs.join, (tiles.joins.shape[0], heads))(
            parts,
            logarithms,
            tiles.joins,
            result,
            given,
            HEADS=heads,
            HEAD_DIM=head_dim,
            ELEMENTS=elements,
            TOGETHER=TOGETHER,
            SINKS=sinks is not None,
            num_warps=4,
        )


@cache
def _trusted(
    head_dim: int,
    group: int,
    page_size: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    soft_cap: bool,
    sinks: bool,
    device: torch.device,
) -> bool:
    """In the interpreter nothing is compiled, and a test wants to see what is wrong."""
    if gpu.interpreted():
        return True
    options = soft_cap, sinks, TRIAL_QUERIES, device, kv_dtype == fp8.FP8
    trial = Trial(head_dim, group, page_size, dtype, *options)
    try:
        right = agrees(paged_attention, trial)
    except Exception as error:  # a compiler, a driver, too little room: torch needs none of them
        _log.warning("attention is left to torch on %s: %s", device, error)
        return False
    if not right:
        _log.warning("attention by Triton is wrong on %s; torch does it", device)
    return right


@cache
def knows_fp8(device: torch.device) -> bool:
    """Whether its processors have the type; the interpreter has."""
    return (
        device.type != "cuda" or torch.cuda.get_device_capability(device) >= fp8.NATIVE_CAPABILITY
    )


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a device; one in the interpreter, which runs one program at a time."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
