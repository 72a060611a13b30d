"""Rows of K and V as one byte an element: how they are rounded, and torch's way of doing it.

May not know: batches, page ids.

Theory: a page of `torch.float8_e4m3fn` (three bits behind the point, numbers up to 448) has a
float32 *scale* for each position and kv head of K, and one for each of V. With one scale for all,
K of models that have a few large channels would be cut off at 448; here only its own position's
small channels lose bits. What is stored is defined once, to the bit, for every backend:

    scale    the largest |x| of the head's elements, at least 2^-100, times float32's 1 / 448;
             NaN where an element is NaN or infinite: then everything read from there is NaN
    element  x / scale, rounded in float32, then to the nearest of e4m3, of two to the even one

Zeros have the scale of 2^-100. What is read is element * scale.
"""

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
# Of K and V before they are rounded, and of queries.
WIDE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NATIVE_CAPABILITY = (8, 9)  # compute capability of GPUs that convert fp8 themselves
LARGEST_INVERSE = 1 / 448
MOST_MIN = 2.0**-100  # so that no scale is so small that it has lost bits of its own


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Elements, of the shape of rows [any, kv_heads, head_dim], and scales [any, kv_heads]."""
    wide = rows.float()
    most = wide.abs().amax(dim=-1)
    scales = most.clamp_min(MOST_MIN) * LARGEST_INVERSE
    scales.masked_fill_(~most.isfinite(), float("nan"))
    return (wide / scales[..., None]).to(FP8), scales


def widened(elements: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What is read, in one of WIDE_DTYPES; elements [any, kv_heads, head_dim], scales
    [any, kv_heads]."""
    # Their bits in float16's places, whose exponents stand for 2^8 times less: torch converts fp8
    # one by one on a CPU, some forty times as slow. NaN becomes a number here, whose scale is NaN.
    bits = elements.view(torch.int8).to(torch.int16)
    halves = bits.bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)
    return halves.float().mul_(scales[..., None] * 256).to(dtype)


def write(rows: Tensor, kv: Tensor, scales: Tensor, pages: Tensor, offsets: Tensor) -> None:
    """Rows [any, kv_heads, head_dim] to their places in one of K and V: kv [pages, page_size,
    kv_heads, head_dim], scales [pages, kv_heads, page_size]."""
    elements, scale = rounded(rows)
    # What torch moves about is bytes: it has few operations on fp8 itself.
    kv.view(torch.uint8)[pages, offsets] = elements.view(torch.uint8)
    scales[pages, :, offsets] = scale


def check_scales(kv: Tensor, scales: Tensor | None) -> None:
    """scales: float32 [pages, 2, kv_heads, page_size] beside fp8 pages, on their device, one page's
    contiguous, no two pages' in the same place, and None beside others; else ValueError."""
    if scales is None:
        if kv.dtype == FP8:
            raise ValueError("pages of fp8 are nothing without scales")
        return
    if kv.dtype != FP8:
        raise ValueError(f"pages of {kv.dtype} have no scales")
    pages, _, page_size, kv_heads, _ = kv.shape
    if scales.shape != (pages, 2, kv_heads, page_size) or scales.dtype != torch.float32:
        raise ValueError(
            f"scales are {scales.dtype} {tuple(scales.shape)}, not torch.float32 "
            f"{(pages, 2, kv_heads, page_size)}"
        )
    if scales.device != kv.device:
        raise ValueError(f"scales are on '{scales.device}', their pages on '{kv.device}'")
    if not scales[:1].is_contiguous():
        raise ValueError("the scales of one page must be contiguous")
    if pages > 1 and scales.stride(0) < scales[0].numel():
        raise ValueError("each page has scales of its own")
