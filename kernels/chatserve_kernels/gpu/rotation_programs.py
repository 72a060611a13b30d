"""Rotary embedding of rows on their way into pages: bare Triton kernel.

May not know: batches. `rotation.py` gives it tensors that its doors have checked.
"""

import triton
import triton.language as tl

from chatserve_kernels.gpu.copies import rounded_halves


@triton.jit
def _normed(low, high, weight, half, is_half, epsilon, HALF: tl.constexpr):
    """Halves of heads, [any, half] each, by an RMSNorm's float32 weight [2 * HALF]."""
    mean = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF)
    factor = tl.rsqrt(mean + epsilon)[:, None]
    of_low = tl.load(weight + half, mask=is_half, other=0.0)
    of_high = tl.load(weight + HALF + half, mask=is_half, other=0.0)
    return low * factor * of_low[None, :], high * factor * of_high[None, :]


@triton.jit
def rotate(
    query,
    key,
    value,
    cos,
    sin,
    query_weight,
    key_weight,
    kv,
    scales,
    pages,
    offsets,
    query_row,
    query_head,
    key_row,
    key_head,
    value_row,
    value_head,
    cos_row,
    sin_row,
    page_elements,
    page_scales,
    epsilon,
    NORMED: tl.constexpr,
    WRITTEN: tl.constexpr,
    ROUNDED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROOM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_ROOM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    LARGEST_INVERSE: tl.constexpr,
    MOST_MIN: tl.constexpr,
):
    """Program (row, kv head): the query heads of that kv head, in place, and its K.

    query: [rows, KV_HEADS * GROUP, 2 * HALF], key and value: [rows, KV_HEADS, 2 * HALF], of these
    strides, elements side by side; cos, sin: [rows, 2 * HALF], likewise. NORMED: heads are normed
    before, by float32 weights [2 * HALF]. WRITTEN: K and V go to kv [pages, 2, PAGE_SIZE, KV_HEADS,
    2 * HALF], pages apart by page_elements, at pages and offsets [rows], to none for a negative
    page; otherwise K is changed in place. ROUNDED: kv is uint8, codes of fp8, whose scales are
    float32 [pages, 2, KV_HEADS, PAGE_SIZE], pages apart by page_scales. GROUP_ROOM, HALF_ROOM:
    powers of two, GROUP and HALF or more.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    half = tl.arange(0, HALF_ROOM)
    is_half = half < HALF
    cos += row * cos_row + half
    sin += row * sin_row + half
    cos_low = tl.load(cos, mask=is_half, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + HALF, mask=is_half, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin, mask=is_half, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + HALF, mask=is_half, other=0.0).to(tl.float32)[None, :]

    member = tl.arange(0, GROUP_ROOM)
    is_place = (member < GROUP)[:, None] & is_half[None, :]
    place = query + row * query_row + (head * GROUP + member)[:, None] * query_head + half[None, :]
    low = tl.load(place, mask=is_place, other=0.0).to(tl.float32)
    high = tl.load(place + HALF, mask=is_place, other=0.0).to(tl.float32)
    if NORMED:
        low, high = _normed(low, high, query_weight, half, is_half, epsilon, HALF)
    kind = query.dtype.element_ty
    tl.store(place, (low * cos_low - high * sin_low).to(kind), mask=is_place)
    tl.store(place + HALF, (high * cos_high + low * sin_high).to(kind), mask=is_place)

    place = key + row * key_row + head * key_head + half[None, :]
    low = tl.load(place, mask=is_half[None, :], other=0.0).to(tl.float32)
    high = tl.load(place + HALF, mask=is_half[None, :], other=0.0).to(tl.float32)
    if NORMED:
        low, high = _normed(low, high, key_weight, half, is_half, epsilon, HALF)
    key_low = (low * cos_low - high * sin_low).to(kind)
    key_high = (high * cos_high + low * sin_high).to(kind)
    if WRITTEN:
        page = tl.load(pages + row).to(tl.int64)
        offset = tl.load(offsets + row).to(tl.int64)
        is_kept = (half < tl.where(page >= 0, HALF, 0))[None, :]
        given = value + row * value_row + head * value_head + half[None, :]
        value_low = tl.load(given, mask=is_kept, other=0.0)
        value_high = tl.load(given + HALF, mask=is_kept, other=0.0)
        kept = kv + page * page_elements + (offset * KV_HEADS + head) * (2 * HALF) + half[None, :]
        values = PAGE_SIZE * KV_HEADS * 2 * HALF
        if ROUNDED:
            scale_place = scales + page * page_scales + head * PAGE_SIZE + offset
            key_low, key_high, scale = rounded_halves(
                key_low.to(tl.float32), key_high.to(tl.float32), LARGEST_INVERSE, MOST_MIN
            )
            tl.store(scale_place, scale, mask=page >= 0)
            value_low, value_high, scale = rounded_halves(
                value_low.to(tl.float32), value_high.to(tl.float32), LARGEST_INVERSE, MOST_MIN
            )
            tl.store(scale_place + KV_HEADS * PAGE_SIZE, scale, mask=page >= 0)
        tl.store(kept, key_low, mask=is_kept)
        tl.store(kept + HALF, key_high, mask=is_kept)
        tl.store(kept + values, value_low, mask=is_kept)
        tl.store(kept + values + HALF, value_high, mask=is_kept)
    else:
        tl.store(place, key_low, mask=is_half[None, :])
        tl.store(place + HALF, key_high, mask=is_half[None, :])
