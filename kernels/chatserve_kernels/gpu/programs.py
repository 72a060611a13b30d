"""Attention over pages, and the joining of its parts: bare Triton kernels.

May not know: batches. `attention.py` gives them tensors that its doors have checked.

Theory: a program takes one tile and one kv head. Its rows are the tile's queries times the query
heads of that kv head, so a key is read once for all of them. It walks through the tile's positions
with an online softmax in float32, to base 2. What a tile does not name is never read into an
operation: positions past its end are loaded as zeros, and those that a row may not see weigh
nothing, so that of them only NaN or infinity shows, which the sequence itself wrote in this step.
Ids of pages become 64 bits wide before they meet a page's stride. A scale of fp8 belongs
to a position, so it multiplies a column of scores, or of weights, and not the elements of K and V.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
TILE_FIELDS = tl.constexpr(8)
MEMBER_FIELDS = tl.constexpr(4)
JOIN_FIELDS = tl.constexpr(4)


@triton.jit
def _tanh(x):
    """Of float32; with no overflow, and with no library, which the interpreter lacks."""
    small = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def _widened(code):
    """Codes of e4m3 as float16, exactly, for processors that do not know them: the same bits stand
    for 2^-8 of the number there."""
    bits = code.to(tl.int16)
    number = (((bits & 0x7F) << 7) | ((bits & 0x80) << 8)).to(tl.float16, bitcast=True) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), number)


@triton.jit(do_not_specialize=["tables_row"])
def attend(
    query,
    kv,
    scales,
    tables,
    tiles,
    members,
    result,
    parts,
    logarithms,
    sinks,
    query_row,
    query_head,
    query_element,
    page_elements,
    page_scales,
    tables_row,
    factor,
    cap,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ELEMENTS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    SCALED: tl.constexpr,
    CODES: tl.constexpr,
    OPERAND: tl.constexpr,
    VALUE_OPERAND: tl.constexpr,
):
    """Program (tile, kv head).

    query: [rows, heads, head_dim] of these strides. kv: [pages, 2, page_size, kv_heads, head_dim],
    pages apart by page_elements; with SCALED of fp8, with CODES of its codes as uint8, and scales
    float32 [pages, 2, kv_heads, page_size], pages apart by page_scales. tables: [sequences,
    tables_row]. tiles, members: as `tiles.Tiles` has them. result: [rows, heads, head_dim]. parts:
    float32 [slots, heads, head_dim], logarithms: float32 [slots, heads], to base 2. sinks: [heads],
    read with SINKS.
    factor: what scores are multiplied by to have base 2; with CAPPED what they are before tanh, and
    cap what it is multiplied by. ELEMENTS: a power of two, HEAD_DIM or more; HEIGHT: as many rows,
    WIDTH: positions at a time. OPERAND, VALUE_OPERAND: the types that products of matrices take.

    A tile without positions gives its members zeros, and one without members reads and writes
    nothing.
    """
    tile = tiles + tl.program_id(0) * TILE_FIELDS
    kv_head = tl.program_id(1)
    sequence = tl.load(tile).to(tl.int64)
    start = tl.load(tile + 1)
    stop = tl.load(tile + 2)
    line = tl.arange(0, HEIGHT)
    member = tl.load(tile + 3) + line // GROUP
    head = (kv_head * GROUP + line % GROUP).to(tl.int64)
    is_row = member < tl.load(tile + 4)
    record = members + member * MEMBER_FIELDS
    row = tl.load(record, mask=is_row, other=0).to(tl.int64)
    first = tl.load(record + 1, mask=is_row, other=0)
    end = tl.load(record + 2, mask=is_row, other=0)
    slot = tl.load(record + 3, mask=is_row, other=-1).to(tl.int64)
    element = tl.arange(0, ELEMENTS)
    is_element = element < HEAD_DIM
    is_place = is_row[:, None] & is_element[None, :]
    queries = tl.load(
        query
        + (row * query_row + head * query_head)[:, None]
        + element[None, :].to(tl.int64) * query_element,
        mask=is_place,
        other=0.0,
    ).to(OPERAND)

    most = tl.full([HEIGHT], float("-inf"), tl.float32)
    total = tl.zeros([HEIGHT], tl.float32)
    mixed = tl.zeros([HEIGHT, ELEMENTS], tl.float32)
    for begin in range(start, stop, WIDTH):
        position = begin + tl.arange(0, WIDTH)
        is_there = position < stop
        page = tl.load(
            tables + sequence * tables_row + position // PAGE_SIZE, mask=is_there, other=0
        ).to(tl.int64)
        place = page * page_elements + (position % PAGE_SIZE) * (KV_HEADS * HEAD_DIM)
        place += kv_head * HEAD_DIM
        key = tl.load(
            kv + place[None, :] + element[:, None],
            mask=is_there[None, :] & is_element[:, None],
            other=0.0,
        )
        key = (_widened(key) if CODES else key).to(OPERAND)
        scores = tl.dot(queries, key, input_precision="ieee") * factor
        if SCALED:
            scale_place = scales + page * page_scales + kv_head * PAGE_SIZE + position % PAGE_SIZE
            scores *= tl.load(scale_place, mask=is_there, other=0.0)[None, :]
        if CAPPED:
            scores = _tanh(scores) * cap
        seen = (position[None, :] >= first[:, None]) & (position[None, :] < end[:, None])
        scores = tl.where(seen & is_there[None, :], scores, float("-inf"))
        top = tl.maximum(most, tl.max(scores, 1))
        # A row that has seen nothing yet has no maximum to subtract.
        base = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(most - base)
        total = total * kept + tl.sum(weights, 1)
        value = tl.load(
            kv + PAGE_SIZE * KV_HEADS * HEAD_DIM + place[:, None] + element[None, :],
            mask=is_there[:, None] & is_element[None, :],
            other=0.0,
        )
        value = (_widened(value) if CODES else value).to(VALUE_OPERAND)
        if SCALED:
            scale_place += KV_HEADS * PAGE_SIZE
            weights *= tl.load(scale_place, mask=is_there, other=0.0)[None, :]
        mixed *= kept[:, None]
        mixed = tl.dot(weights.to(VALUE_OPERAND), value, mixed, input_precision="ieee")
        most = top

    is_part = slot >= 0
    if SINKS:
        # A sink belongs to the whole of a row: where there are parts, to their joining.
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        sink = tl.where(is_part, float("-inf"), sink)
        top = tl.maximum(most, sink)
        base = tl.where(top == float("-inf"), 0.0, top)
        kept = tl.exp2(most - base)
        total = total * kept + tl.exp2(sink - base)
        mixed = mixed * kept[:, None]
        most = top
    total = tl.where(total > 0.0, total, 1.0)  # lines that are no row's
    mixed = mixed / total[:, None]
    heads = GROUP * KV_HEADS
    tl.store(
        result + ((row * heads + head) * HEAD_DIM)[:, None] + element[None, :],
        mixed.to(result.dtype.element_ty),
        mask=is_place & ~is_part[:, None],
    )
    part = slot * heads + head
    tl.store(
        parts + (part * HEAD_DIM)[:, None] + element[None, :],
        mixed,
        mask=is_place & is_part[:, None],
    )
    tl.store(logarithms + part, most + tl.log2(total), mask=is_row & is_part)


@triton.jit
def join(
    parts,
    logarithms,
    joins,
    result,
    sinks,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ELEMENTS: tl.constexpr,
    TOGETHER: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Program (joined row, head): the parts of a row, weighted by what their weights came to.

    joins: as `tiles.Tiles` has them; the others as `attend` left them. TOGETHER: parts at a time.
    A join without parts writes nothing.
    """
    record = joins + tl.program_id(0) * JOIN_FIELDS
    head = tl.program_id(1)
    row = tl.load(record).to(tl.int64)
    first = tl.load(record + 1)
    end = tl.load(record + 2)
    element = tl.arange(0, ELEMENTS)
    is_element = element < tl.where(first < end, HEAD_DIM, 0)
    most = tl.load(logarithms + first.to(tl.int64) * HEADS + head)
    total = 0.0
    if SINKS:
        most = tl.maximum(most, tl.load(sinks + head).to(tl.float32) * LOG2_E)
        total = tl.exp2(tl.load(sinks + head).to(tl.float32) * LOG2_E - most)
    mixed = tl.zeros([ELEMENTS], tl.float32)
    for begin in range(first, end, TOGETHER):
        slot = begin + tl.arange(0, TOGETHER)
        is_part = slot < end
        part = slot.to(tl.int64) * HEADS + head
        logarithm = tl.load(logarithms + part, mask=is_part, other=float("-inf"))
        top = tl.maximum(most, tl.max(logarithm, 0))
        weights = tl.exp2(logarithm - top)
        kept = tl.exp2(most - top)
        total = total * kept + tl.sum(weights, 0)
        values = tl.load(
            parts + (part * HEAD_DIM)[:, None] + element[None, :],
            mask=is_part[:, None] & is_element[None, :],
            other=0.0,
        )
        mixed = mixed * kept + tl.sum(weights[:, None] * values, 0)
        most = top
    total = tl.where(first < end, total, 1.0)
    tl.store(
        result + (row * HEADS + head) * HEAD_DIM + element,
        (mixed / total).to(result.dtype.element_ty),
        mask=is_element,
    )
