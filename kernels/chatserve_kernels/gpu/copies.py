"""Rows into pages, pages into pages, and sums over pages: bare Triton kernels.

May not know: batches. `pages.py` gives them tensors that its doors have checked.
"""

import triton
import triton.language as tl


@triton.jit
def append(
    key,
    value,
    kv,
    rows,
    pages,
    offsets,
    key_row,
    key_head,
    key_element,
    value_row,
    value_head,
    value_element,
    page_elements,
    EVERY_ROW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Program (write, some elements): one row's K and V to their place.

    key, value: [rows, kv_heads, head_dim] of these strides. kv: [pages, 2, page_size, kv_heads,
    head_dim], pages apart by page_elements. rows, pages, offsets: [writes]; with EVERY_ROW the
    i-th write is of row i. A negative page: none. TOGETHER: elements of a program.
    """
    write = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    page = tl.load(pages + write).to(tl.int64)
    is_element = element < tl.where(page >= 0, KV_HEADS * HEAD_DIM, 0)
    head = (element // HEAD_DIM).to(tl.int64)
    inside = (element % HEAD_DIM).to(tl.int64)
    row = write if EVERY_ROW else tl.load(rows + write).to(tl.int64)
    offset = tl.load(offsets + write).to(tl.int64)
    place = kv + page * page_elements + offset * (KV_HEADS * HEAD_DIM) + element
    from_key = key + row * key_row + head * key_head + inside * key_element
    from_value = value + row * value_row + head * value_head + inside * value_element
    tl.store(place, tl.load(from_key, mask=is_element), mask=is_element)
    place += PAGE_SIZE * KV_HEADS * HEAD_DIM
    tl.store(place, tl.load(from_value, mask=is_element), mask=is_element)


@triton.jit
def _nearest(x):
    """The code of float32 in e4m3, in integers: to the even of two, the same on every processor and
    in the interpreter, whose own conversion is another one. Above 480: NaN's."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Below 2^-6 codes are 2^-9 apart, as the numbers from 2^14 are in float32.
    low = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    high = (size + 0x7FFFF + ((size >> 20) & 1) - (120 << 23)) >> 20
    code = tl.where(size < (121 << 23), low, high)
    code = tl.where(size >= 0x43F00000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _rounded(x, LARGEST_INVERSE: tl.constexpr, MOST_MIN: tl.constexpr):
    """Codes and scale of a head's elements, as `../fp8.py` says."""
    size = tl.abs(x)
    finite = tl.min(tl.where(size < float("inf"), 1, 0), 0)
    most = tl.maximum(tl.max(tl.where(size < float("inf"), size, 0.0), 0), MOST_MIN)
    scale = tl.where(finite == 1, most * LARGEST_INVERSE, float("nan"))
    return _nearest(tl.div_rn(x, tl.zeros_like(x) + scale)), scale


@triton.jit
def rounded_halves(low, high, LARGEST_INVERSE: tl.constexpr, MOST_MIN: tl.constexpr):
    """The same of a head in two halves, [1, half] each."""
    low_size, high_size = tl.abs(low), tl.abs(high)
    is_finite = (low_size < float("inf")) & (high_size < float("inf"))
    finite = tl.min(tl.where(is_finite, 1, 0))
    most = tl.max(tl.where(is_finite, tl.maximum(low_size, high_size), 0.0))
    most = tl.maximum(most, MOST_MIN)
    scale = tl.where(finite == 1, most * LARGEST_INVERSE, float("nan"))
    every = tl.zeros_like(low) + scale
    return _nearest(tl.div_rn(low, every)), _nearest(tl.div_rn(high, every)), scale


@triton.jit
def append_rounded(
    key,
    value,
    kv,
    scales,
    rows,
    pages,
    offsets,
    key_row,
    key_head,
    key_element,
    value_row,
    value_head,
    value_element,
    page_elements,
    page_scales,
    EVERY_ROW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ELEMENTS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    LARGEST_INVERSE: tl.constexpr,
    MOST_MIN: tl.constexpr,
):
    """Program (write, kv head): one head of a row's K and V, rounded to fp8, to their place.

    kv: uint8, otherwise as `append` has it. scales: float32 [pages, 2, kv_heads, page_size], pages
    apart by page_scales. ELEMENTS: a power of two, HEAD_DIM or more. The others as in `append`.
    """
    write = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    element = tl.arange(0, ELEMENTS)
    page = tl.load(pages + write).to(tl.int64)
    is_element = element < tl.where(page >= 0, HEAD_DIM, 0)
    row = write if EVERY_ROW else tl.load(rows + write).to(tl.int64)
    offset = tl.load(offsets + write).to(tl.int64)
    inside = element.to(tl.int64)
    from_key = key + row * key_row + head * key_head + inside * key_element
    from_value = value + row * value_row + head * value_head + inside * value_element
    place = kv + page * page_elements + (offset * KV_HEADS + head) * HEAD_DIM + element
    scale_place = scales + page * page_scales + head * PAGE_SIZE + offset
    wide = tl.load(from_key, mask=is_element, other=0.0).to(tl.float32)
    codes, scale = _rounded(wide, LARGEST_INVERSE, MOST_MIN)
    tl.store(place, codes, mask=is_element)
    tl.store(scale_place, scale, mask=page >= 0)
    wide = tl.load(from_value, mask=is_element, other=0.0).to(tl.float32)
    codes, scale = _rounded(wide, LARGEST_INVERSE, MOST_MIN)
    tl.store(place + PAGE_SIZE * KV_HEADS * HEAD_DIM, codes, mask=is_element)
    tl.store(scale_place + KV_HEADS * PAGE_SIZE, scale, mask=page >= 0)


@triton.jit(do_not_specialize=["copies"])
def copy(
    pool,
    sources,
    destinations,
    page_words,
    copies,
    COPIES: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Program (some words): those of all copies are read before any is written, and no other
    program touches them.

    pool: [pages, page_words]. sources, destinations: [copies], at most COPIES, a power of two.
    """
    index = tl.arange(0, COPIES)
    is_copy = index < copies
    source = tl.load(sources + index, mask=is_copy, other=0).to(tl.int64)
    destination = tl.load(destinations + index, mask=is_copy, other=0).to(tl.int64)
    word = tl.program_id(0).to(tl.int64) * TOGETHER + tl.arange(0, TOGETHER)
    is_place = is_copy[:, None] & (word < page_words)[None, :]
    held = tl.load(pool + (source * page_words)[:, None] + word[None, :], mask=is_place)
    tl.debug_barrier()
    tl.store(pool + (destination * page_words)[:, None] + word[None, :], held, mask=is_place)


@triton.jit(do_not_specialize=["parts"])
def weighted_sum(
    pool,
    pages,
    weights,
    sums,
    page_words,
    parts,
    TOGETHER: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Program (page, part): the sum of some of its words, each times its weight, modulo 2^64.

    pool: int64 [pages, page_words]. pages: [n]. weights: int64 [page_words]. sums: int64
    [n, parts], each of TOGETHER * STEPS words.
    """
    index = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    page = tl.load(pages + index).to(tl.int64)
    total = tl.zeros([TOGETHER], tl.int64)
    for step in range(STEPS):
        word = (part * STEPS + step) * TOGETHER + tl.arange(0, TOGETHER)
        is_word = word < page_words
        read = tl.load(pool + page * page_words + word, mask=is_word, other=0)
        total += read * tl.load(weights + word, mask=is_word, other=0)
    tl.store(sums + index * parts + part, tl.sum(total, 0))
