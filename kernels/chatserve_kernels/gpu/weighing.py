"""What the tokens of each row of logits weigh, and which of them a filter may keep: bare Triton
kernels.

May not know: requests. `sampling.py` gives them tensors that its door has checked, and says what
each kernel is for. Weights are float64, relative to the best token's.

What is added up is added in an order that depends on the row's length alone, never by atomic
operations, so that a row gives the same token whatever rows come with it. Kernels that compare
weights must see the same bits: none may contract products and sums.
"""

import triton
import triton.language as tl

FIELDS = tl.constexpr(8)
TEMPERATURE = tl.constexpr(0)
MIN_P = tl.constexpr(1)
TOP_P = tl.constexpr(2)
NOISE = tl.constexpr(3)
TOP_K = tl.constexpr(4)
SLOT = tl.constexpr(5)
ADJUSTED = tl.constexpr(6)
LOGARITHM = tl.constexpr(7)

NO_TOKEN = tl.constexpr((1 << 31) - 1)
# Of sums in two orders, as a share of them, and more than they can differ.
ROUNDING = tl.constexpr(1e-9)


@triton.jit
def adjusted_value(x, bias, penalty, subtracted):
    """Each operation rounded to float32; of what is subtracted, infinity is a ban."""
    x += bias
    x = tl.where(x > 0.0, tl.div_rn(x, penalty), x * penalty)
    banned = subtracted == float("inf")
    return tl.where(banned, float("-inf"), x - tl.where(banned, 0.0, subtracted))


@triton.jit(do_not_specialize=["entries"])
def adjust(logits, row_stride, ids, numbers, entries, TOGETHER: tl.constexpr):
    """Program (some entries): a bias, a repetition penalty and what is subtracted.

    logits: float32 [rows, vocabulary], in place. ids: int32 [2, entries], row and token, no pair
    twice. numbers: float32 [3, entries].
    """
    entry = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)
    is_entry = entry < entries
    row = tl.load(ids + entry, mask=is_entry, other=0).to(tl.int64)
    token = tl.load(ids + entries + entry, mask=is_entry, other=0)
    place = logits + row * row_stride + token
    value = tl.load(place, mask=is_entry, other=0.0)
    bias = tl.load(numbers + entry, mask=is_entry, other=0.0)
    penalty = tl.load(numbers + entries + entry, mask=is_entry, other=1.0)
    subtracted = tl.load(numbers + 2 * entries + entry, mask=is_entry, other=0.0)
    tl.store(place, adjusted_value(value, bias, penalty, subtracted), mask=is_entry)


@triton.jit(do_not_specialize=["entries"])
def count_late(
    logits,
    adjusted,
    row_stride,
    ids,
    numbers,
    counts,
    late,
    penalties,
    chosen,
    entries,
    vocabulary,
    TOGETHER: tl.constexpr,
):
    """Program (late token): its logit anew, from the model's own, with one count more. Behind
    `adjust`.

    logits: float32 [rows, vocabulary], rows apart by row_stride. adjusted: a copy, side by side,
    in place. ids, numbers: as `adjust` had them; counts: int32 [entries]. late: int32
    [4, programs], no row twice: a row, which of chosen, int64 [any], its token is, and from where
    to where the row's entries are. penalties: float32 [3, programs]: repetition, presence,
    frequency.
    """
    each = tl.program_id(0)
    lates = tl.num_programs(0)
    row = tl.load(late + each).to(tl.int64)
    token = tl.load(chosen + tl.load(late + lates + each))
    begin = tl.load(late + 2 * lates + each)
    end = tl.load(late + 3 * lates + each)
    found = tl.full([], -1, tl.int32)
    for first in range(begin, end, TOGETHER):
        entry = first + tl.arange(0, TOGETHER)
        is_its = entry < end
        is_its &= tl.load(ids + entries + entry, mask=is_its, other=-1) == token
        found = tl.maximum(found, tl.max(tl.where(is_its, entry, -1), 0))
    bias = tl.load(numbers + found, mask=found >= 0, other=0.0)
    before = tl.load(numbers + 2 * entries + found, mask=found >= 0, other=0.0)
    count = tl.load(counts + found, mask=found >= 0, other=0) + 1
    presence = tl.load(penalties + lates + each)
    frequency = tl.load(penalties + 2 * lates + each)
    subtracted = presence + frequency * count.to(tl.float32)
    subtracted = tl.where(before == float("inf"), before, subtracted)
    is_token = (token >= 0) & (token < vocabulary)
    value = tl.load(logits + row * row_stride + token, mask=is_token, other=0.0)
    value = adjusted_value(value, bias, tl.load(penalties + each), subtracted)
    tl.store(adjusted + row * vocabulary + token, value, mask=is_token)


@triton.jit
def survey(
    logits,
    adjusted,
    records,
    row_stride,
    raw_tops,
    raw_sums,
    tops,
    best_ids,
    vocabulary,
    parts,
    PART: tl.constexpr,
):
    """Program (row, part): the best of the part, and the sum of the model's own exponentials.

    logits, adjusted: float32 [rows, vocabulary], rows apart by row_stride in logits and side by
    side in adjusted. raw_tops, raw_sums, tops: float32 [rows, parts], best_ids: int32. A top is NaN
    where the model gave, or penalties made, NaN or infinity.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    record = records + row * FIELDS
    token = part * PART + tl.arange(0, PART)
    is_token = token < vocabulary
    low = float("-inf")
    x = tl.load(logits + row * row_stride + token, mask=is_token, other=low)
    faulty = tl.max(((x != x) | (x == float("inf"))).to(tl.int32), 0)
    x = tl.where(x != x, low, x)
    top = tl.max(x, 0)
    place = row * parts + part
    if (tl.load(record + LOGARITHM) > 0.0) & (faulty == 0):
        base = tl.where(top == low, 0.0, top)
        tl.store(raw_tops + place, top)
        tl.store(raw_sums + place, tl.sum(tl.exp(x - base), 0))
    if tl.load(record + ADJUSTED) > 0.0:
        x = tl.load(adjusted + row * vocabulary + token, mask=is_token, other=low)
        faulty += tl.max(((x != x) | (x == float("inf"))).to(tl.int32), 0)
        x = tl.where(x != x, low, x)
        top = tl.max(x, 0)
    tl.store(tops + place, tl.where(faulty > 0, float("nan"), top))
    tl.store(best_ids + place, tl.min(tl.where(x == top, token, NO_TOKEN), 0))


@triton.jit
def best_of(tops, row, parts, PARTS: tl.constexpr):
    """The best logit of a row; -inf where it is not finite."""
    part = tl.arange(0, PARTS)
    top = tl.load(tops + row * parts + part, mask=part < parts, other=float("-inf"))
    faulty = tl.max((top != top).to(tl.int32), 0)
    best = tl.max(tl.where(top != top, float("-inf"), top), 0)
    return tl.where(faulty > 0, float("-inf"), best)


@triton.jit
def weights_of(x, best, temperature, min_p):
    """float64, relative to the best token: its weight is exactly 1, so it never rounds away."""
    weights = tl.exp((x.to(tl.float64) - best.to(tl.float64)) / temperature)
    return tl.where(weights >= min_p, weights, 0.0)


@triton.jit
def bins_of(weights, BINS: tl.constexpr):
    """By powers of two, the heaviest first: 1, then down to a half; the last has all the rest."""
    exponents = weights.to(tl.int64, bitcast=True) >> 52
    return tl.minimum(1023 - exponents, BINS - 1).to(tl.int32)


@triton.jit
def source_of(logits, adjusted, record, row, row_stride, vocabulary):
    """Where the row's logits begin, after penalties."""
    if tl.load(record + ADJUSTED) > 0.0:
        begin = adjusted + row * vocabulary
    else:
        begin = logits + row * row_stride
    return begin


@triton.jit
def weigh(
    logits,
    adjusted,
    records,
    row_stride,
    tops,
    masses,
    bin_counts,
    bin_masses,
    vocabulary,
    parts,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Program (row, part): what its tokens weigh together, and by bins where a filter asks.

    masses: float64 [rows, parts]. bin_counts: int32 [rows, parts, BINS], bin_masses: float64.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    record = records + row * FIELDS
    temperature = tl.load(record + TEMPERATURE)
    best = best_of(tops, row, parts, PARTS)
    if (temperature > 0.0) & (best > float("-inf")):
        min_p = tl.load(record + MIN_P)
        source = source_of(logits, adjusted, record, row, row_stride, vocabulary)
        filtered = tl.load(record + SLOT) >= 0.0
        bins = tl.arange(0, BINS)
        mass = tl.zeros([CHUNK], tl.float64)
        counts = tl.zeros([BINS], tl.int32)
        by_bin = tl.zeros([BINS], tl.float64)
        for begin in range(0, PART, CHUNK):
            token = part * PART + begin + tl.arange(0, CHUNK)
            x = tl.load(source + token, mask=token < vocabulary, other=float("-inf"))
            weights = weights_of(x, best, temperature, min_p)
            mass += weights
            if filtered:
                hot = (bins_of(weights, BINS)[:, None] == bins[None, :]) & (weights > 0.0)[:, None]
                counts += tl.sum(hot.to(tl.int32), 0)
                by_bin += tl.sum(tl.where(hot, weights[:, None], 0.0), 0)
        place = row * parts + part
        tl.store(masses + place, tl.sum(mass, 0))
        if filtered:
            tl.store(bin_counts + place * BINS + bins, counts)
            tl.store(bin_masses + place * BINS + bins, by_bin)


@triton.jit
def gather(
    logits,
    adjusted,
    records,
    row_stride,
    tops,
    bin_counts,
    bin_masses,
    candidates,
    sizes,
    vocabulary,
    parts,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Program (row, part): the ids of tokens that a filter may keep, behind those of the parts
    before it.

    candidates: int32 [slots, vocabulary], in vocabulary order. sizes: int32 [rows].
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    record = records + row * FIELDS
    slot = tl.load(record + SLOT).to(tl.int64)
    best = best_of(tops, row, parts, PARTS)
    if (slot >= 0) & (best > float("-inf")):
        each, bins = tl.arange(0, PARTS), tl.arange(0, BINS)
        place = (row * parts + each)[:, None] * BINS + bins[None, :]
        is_part = (each < parts)[:, None]
        counts = tl.load(bin_counts + place, mask=is_part, other=0)
        bin_mass = tl.sum(tl.load(bin_masses + place, mask=is_part, other=0.0), 0)
        top_k = tl.load(record + TOP_K).to(tl.int32)
        if top_k > 0:
            reached = tl.cumsum(tl.sum(counts, 0), 0) >= top_k
        else:
            share = tl.load(record + TOP_P) * tl.sum(bin_mass, 0)
            reached = tl.cumsum(bin_mass, 0) * (1.0 - ROUNDING) >= share
        last = tl.min(tl.where(reached, bins, BINS - 1), 0)
        counts = tl.sum(tl.where((bins <= last)[None, :], counts, 0), 1)
        at = tl.sum(tl.where(each < part, counts, 0), 0)
        if part == 0:
            tl.store(sizes + row, tl.sum(counts, 0))
        temperature = tl.load(record + TEMPERATURE)
        min_p = tl.load(record + MIN_P)
        source = source_of(logits, adjusted, record, row, row_stride, vocabulary)
        for begin in range(0, PART, CHUNK):
            token = part * PART + begin + tl.arange(0, CHUNK)
            x = tl.load(source + token, mask=token < vocabulary, other=float("-inf"))
            weights = weights_of(x, best, temperature, min_p)
            taken = (weights > 0.0) & (bins_of(weights, BINS) <= last)
            behind = at + tl.cumsum(taken.to(tl.int32), 0) - 1
            tl.store(candidates + slot * vocabulary + behind, token, mask=taken)
            at += tl.sum(taken.to(tl.int32), 0)
