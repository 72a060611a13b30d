"""One token of each row, from what its tokens weigh: bare Triton kernels.

May not know: requests. `sampling.py` gives them tensors that its door has checked; `weighing.py`
has computed most of them.
"""

import triton
import triton.language as tl

from chatserve_kernels.gpu.weighing import (
    FIELDS,
    LOGARITHM,
    MIN_P,
    NO_TOKEN,
    NOISE,
    SLOT,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    best_of,
    source_of,
    weights_of,
)

DIGIT_BITS = tl.constexpr(4)
DIGITS = tl.constexpr(16)
SIGN = tl.constexpr(1 << 31)


@triton.jit
def _logit(key):
    """What has this key, as `_select` makes them."""
    size = tl.where(key >= SIGN, key - SIGN, SIGN - 1 - key)
    size = size.to(tl.int32).to(tl.float32, bitcast=True)
    return tl.where(key >= SIGN, size, -size)


@triton.jit
def _select(source, ids, size, best, temperature, min_p, most, share, CHUNK: tl.constexpr):
    """The largest logit with which, and all above it, so many tokens, or such a weight, are
    reached; the least of all where they never are.

    By digits of their keys, the highest first: at each, how many there are in the digit found so
    far, and what they weigh. A key is 32 bits in int64, in the order of float32. Who asks compares
    weights in the end, since logits that differ, as the two zeros do, may weigh the same. ids:
    int32 [size]. Returns the logit's weight, how many have it, how many are above it, and what
    those weigh.
    """
    digits = tl.arange(0, DIGITS)
    key = tl.full([], 0, tl.int64)
    above = tl.full([], 0, tl.int32)
    mass = tl.full([], 0.0, tl.float64)
    equal = tl.full([], 0, tl.int32)
    no_counts, no_masses = tl.zeros([DIGITS], tl.int32), tl.zeros([DIGITS], tl.float64)
    for step in range(32 // DIGIT_BITS):
        shift = (32 - DIGIT_BITS) - step * DIGIT_BITS
        counts, masses = no_counts, no_masses
        for begin in range(0, size, CHUNK):
            index = begin + tl.arange(0, CHUNK)
            is_there = index < size
            token = tl.load(ids + index, mask=is_there, other=0)
            x = tl.load(source + token, mask=is_there, other=float("-inf"))
            bits = x.to(tl.int32, bitcast=True).to(tl.int64)
            keys = tl.where(bits >= 0, bits + SIGN, SIGN - 1 - (bits & (SIGN - 1)))
            found = is_there & ((keys >> shift >> DIGIT_BITS) == (key >> shift >> DIGIT_BITS))
            digit = ((keys >> shift) & (DIGITS - 1)).to(tl.int32)
            hot = found[:, None] & (digit[:, None] == digits[None, :])
            weights = weights_of(x, best, temperature, min_p)
            counts += tl.sum(hot.to(tl.int32), 0)
            masses += tl.sum(tl.where(hot, weights[:, None], 0.0), 0)
        reached = above + tl.cumsum(counts, 0, reverse=True) >= most
        reached |= mass + tl.cumsum(masses, 0, reverse=True) >= share
        # A sum that goes on over an empty digit may round in another way.
        taken = tl.max(tl.where(reached & (counts > 0), digits, -1), 0)
        least = tl.min(tl.where(counts > 0, digits, DIGITS - 1), 0)
        taken = tl.where(taken < 0, least, taken)
        above += tl.sum(tl.where(digits > taken, counts, 0), 0)
        mass += tl.sum(tl.where(digits > taken, masses, 0.0), 0)
        equal = tl.sum(tl.where(digits == taken, counts, 0), 0)
        key |= taken.to(tl.int64) << shift
    return weights_of(_logit(key), best, temperature, min_p), equal, above, mass


@triton.jit
def _drawn(
    source,
    ids,
    begin,
    end,
    best,
    temperature,
    min_p,
    last,
    room,
    running,
    target,
    CHUNK: tl.constexpr,
    BY_ID: tl.constexpr,
):
    """The first token with which the cumulative weight is over the target, of those that weigh more
    than `last`, and the first `room` that weigh as much. It has weight of its own, and where the
    sum ends before the target, by rounding, it is the last one that has.

    begin, end: of ids with BY_ID, else of tokens. running: what weighs before them.
    """
    drawn = tl.full([], NO_TOKEN, tl.int32)
    latest = tl.full([], 0, tl.int32)
    equals = tl.full([], 0, tl.int32)
    for at in range(begin, end, CHUNK):
        index = at + tl.arange(0, CHUNK)
        is_there = index < end
        token = index
        if BY_ID:
            token = tl.load(ids + index, mask=is_there, other=0)
        x = tl.load(source + token, mask=is_there, other=float("-inf"))
        weights = weights_of(x, best, temperature, min_p)
        equal = is_there & (weights == last)
        rank = equals + tl.cumsum(equal.to(tl.int32), 0)
        weights = tl.where((weights > last) | (equal & (rank <= room)), weights, 0.0)
        over = (running + tl.cumsum(weights, 0) > target) & (weights > 0.0)
        drawn = tl.minimum(drawn, tl.min(tl.where(over, token, NO_TOKEN), 0))
        latest = tl.maximum(latest, tl.max(tl.where(weights > 0.0, token, 0), 0))
        equals += tl.sum(equal.to(tl.int32), 0)
        running += tl.sum(weights, 0)
    return tl.where(drawn == NO_TOKEN, latest, drawn)


@triton.jit
def _kept(source, ids, size, best, record, mass, CHUNK: tl.constexpr):
    """What of the candidates stays: the weight of the last one, and how many tokens there are
    together. mass: of all tokens."""
    temperature = tl.load(record + TEMPERATURE)
    min_p = tl.load(record + MIN_P)
    top_p = tl.load(record + TOP_P)
    stay = size
    last = tl.full([], 0.0, tl.float64)
    top_k = tl.load(record + TOP_K).to(tl.int32)
    if top_k > 0:
        none = tl.full([], float("inf"), tl.float64)
        last, equal, above, over = _select(
            source, ids, size, best, temperature, min_p, top_k, none, CHUNK
        )
        stay = tl.minimum(top_k, above + equal)
        mass = over + (stay - above).to(tl.float64) * last
    if top_p < 1.0:
        share = top_p * mass
        last, equal, above, over = _select(
            source, ids, size, best, temperature, min_p, stay, share, CHUNK
        )
        equal = tl.minimum(equal, stay - above)
        # The fewest of equal ones that reach the share, always one.
        count = tl.minimum(tl.maximum(tl.floor((share - over) / last), 0.0), equal.to(tl.float64))
        count = tl.where(over + count * last < share, count + 1.0, count).to(tl.int32)
        stay = above + tl.minimum(tl.maximum(count, 1), equal)
    return last, stay


@triton.jit
def _of_candidates(source, ids, size, best, record, mass, CHUNK: tl.constexpr):
    """The token of a row with filters. mass: of all its tokens."""
    temperature = tl.load(record + TEMPERATURE)
    min_p = tl.load(record + MIN_P)
    last, stay = _kept(source, ids, size, best, record, mass, CHUNK)
    better = tl.zeros([CHUNK], tl.int32)
    over = tl.zeros([CHUNK], tl.float64)
    for begin in range(0, size, CHUNK):
        index = begin + tl.arange(0, CHUNK)
        is_there = index < size
        token = tl.load(ids + index, mask=is_there, other=0)
        x = tl.load(source + token, mask=is_there, other=float("-inf"))
        weights = weights_of(x, best, temperature, min_p)
        better += (weights > last).to(tl.int32)
        over += tl.where(weights > last, weights, 0.0)
    room = stay - tl.sum(better, 0)
    target = tl.load(record + NOISE) * (tl.sum(over, 0) + room.to(tl.float64) * last)
    nothing = tl.full([], 0.0, tl.float64)
    return _drawn(
        source, ids, 0, size, best, temperature, min_p, last, room, nothing, target, CHUNK, True
    )


@triton.jit
def _of_all(
    source,
    mass,
    best,
    record,
    vocabulary,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The token of a row without filters, but for min_p. mass: [PARTS], of its parts."""
    each = tl.arange(0, PARTS)
    target = tl.load(record + NOISE) * tl.sum(mass, 0)
    over = (tl.cumsum(mass, 0) > target) & (mass > 0.0)
    part = tl.min(tl.where(over, each, PARTS), 0)
    latest = tl.max(tl.where(mass > 0.0, each, 0), 0)
    part = tl.where(part == PARTS, latest, part)
    before = tl.sum(tl.where(each < part, mass, 0.0), 0)
    begin = part * PART
    end = tl.minimum(begin + PART, vocabulary)
    temperature = tl.load(record + TEMPERATURE)
    min_p = tl.load(record + MIN_P)
    nothing = tl.full([], 0.0, tl.float64)
    return _drawn(
        source,
        source,
        begin,
        end,
        best,
        temperature,
        min_p,
        nothing,
        0,
        before,
        target,
        CHUNK,
        False,
    )


@triton.jit
def choose(
    logits,
    adjusted,
    records,
    row_stride,
    raw_tops,
    raw_sums,
    tops,
    best_ids,
    masses,
    candidates,
    sizes,
    tokens,
    finite,
    chosen,
    logarithms,
    vocabulary,
    parts,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program (row): its token.

    tokens: int64 [rows]. finite: int32 [rows]. chosen: float32 [rows], the natural logarithm of the
    token's own probability; logarithms: float64 [rows], what it is less than the logit by.
    """
    row = tl.program_id(0).to(tl.int64)
    record = records + row * FIELDS
    best = best_of(tops, row, parts, PARTS)
    each = tl.arange(0, PARTS)
    is_part = each < parts
    place = row * parts + each
    token = tl.full([], 0, tl.int32)
    if best > float("-inf"):
        temperature = tl.load(record + TEMPERATURE)
        source = source_of(logits, adjusted, record, row, row_stride, vocabulary)
        if temperature > 0.0:
            slot = tl.load(record + SLOT).to(tl.int64)
            mass = tl.load(masses + place, mask=is_part, other=0.0)
            if slot >= 0:
                ids = candidates + slot * vocabulary
                size = tl.load(sizes + row)
                token = _of_candidates(source, ids, size, best, record, tl.sum(mass, 0), CHUNK)
            else:
                token = _of_all(source, mass, best, record, vocabulary, PART, PARTS, CHUNK)
        else:
            top = tl.load(tops + place, mask=is_part, other=float("-inf"))
            best_id = tl.load(best_ids + place, mask=is_part, other=NO_TOKEN)
            token = tl.min(tl.where(top == best, best_id, NO_TOKEN), 0)
        if tl.load(record + LOGARITHM) > 0.0:
            raw = tl.load(raw_tops + place, mask=is_part, other=float("-inf"))
            top = tl.max(raw, 0)
            sums = tl.load(raw_sums + place, mask=is_part, other=0.0)
            total = tl.sum(sums.to(tl.float64) * tl.exp((raw - top).to(tl.float64)), 0)
            logarithm = top.to(tl.float64) + tl.log(total)
            tl.store(logarithms + row, logarithm)
            value = tl.load(logits + row * row_stride + token).to(tl.float64) - logarithm
            tl.store(chosen + row, value.to(tl.float32))
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(finite + row, (best > float("-inf")).to(tl.int32))
