"""What each operation means, in plain loops and float64. Slow and obviously right.

May not know: any faster way. Tests hold every backend against these functions; nothing else
calls them, but for the trial of choosing tokens.
"""

import bisect
import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chatserve_kernels.batch import AttentionBatch
from chatserve_kernels.sampling import Adjustments, Choices


def paged_attention(
    query: Tensor,
    kv: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """Causal attention of each query over the pages of its sequence.

    query: [rows, heads, head_dim]; kv: [pages, 2, page_size, kv_heads, head_dim]; sinks: [heads].
    Head h reads kv head h // (heads / kv_heads). The score s of a query at position p and a key
    at position t ≤ p is scale * q·k, then soft_cap * tanh(s / soft_cap); with a window only
    t > p - window counts; a sink adds exp(sink) to the softmax's denominator and nothing else.
    scales: [pages, 2, kv_heads, page_size], which K and V are multiplied by where they are fp8.
    Returns [rows, heads, head_dim] in the query's dtype.
    """
    result = torch.zeros_like(query)
    heads, kv_heads = query.shape[1], kv.shape[3]
    for sequence, context in enumerate(batch.context_lengths):
        first, end = batch.query_starts[sequence], batch.query_starts[sequence + 1]
        for row in range(first, end):
            position = context - (end - row)
            for head in range(heads):
                scores: list[float] = []
                values: list[Tensor] = []
                for t in range(position + 1):
                    if window is not None and t <= position - window:
                        continue
                    page = int(batch.page_tables[sequence, t // batch.page_size])
                    offset, kv_head = t % batch.page_size, head * kv_heads // heads
                    k, v = kv[page, :, offset, kv_head].double()
                    if scales is not None:
                        k = k * float(scales[page, 0, kv_head, offset])
                        v = v * float(scales[page, 1, kv_head, offset])
                    score = scale * float(query[row, head].double() @ k)
                    if soft_cap is not None:
                        score = soft_cap * math.tanh(score / soft_cap)
                    scores.append(score)
                    values.append(v)
                sink = -math.inf if sinks is None else float(sinks[head])
                top = max(*scores, sink)
                weights = [math.exp(score - top) for score in scores]
                total = sum(weights) + math.exp(sink - top)
                mixed = torch.zeros(query.shape[2], dtype=torch.float64, device=query.device)
                for weight, value in zip(weights, values, strict=True):
                    mixed += weight / total * value
                result[row, head] = mixed.to(query.dtype)
    return result


def append_kv(
    key: Tensor, value: Tensor, kv: Tensor, batch: AttentionBatch, scales: Tensor | None = None
) -> None:
    """Write rows of K and V into their pages, one by one.

    key, value: [rows, kv_heads, head_dim]; kv: [pages, 2, page_size, kv_heads, head_dim]; scales:
    [pages, 2, kv_heads, page_size], where kv is fp8.
    """
    rows = range(batch.rows) if batch.write_rows is None else batch.write_rows.tolist()
    for write, row in enumerate(rows):
        page, offset = int(batch.write_pages[write]), int(batch.write_offsets[write])
        for part, given in enumerate((key[row], value[row])):
            if scales is None:
                kv[page, part, offset] = given.to(kv.dtype)
                continue
            for head, vector in enumerate(given):
                kv[page, part, offset, head], scales[page, part, head, offset] = rounded(vector)


# What the codes 0 to 126 of e4m3 stand for: an exponent of four bits, above three of a fraction.
_E4M3 = [
    code / 512 if code < 8 else (8 + code % 8) / 8 * 2.0 ** (code // 8 - 7) for code in range(127)
]


def rounded(vector: Tensor) -> tuple[Tensor, Tensor]:
    """One head's elements of K or V [head_dim], as fp8 and with their scale, float32.

    The scale is the largest |x|, at least 2^-100, times float32's 1 / 448; NaN where an element is
    NaN or infinite, and then so are all elements. An element is x / scale in float32, rounded to
    the nearest of e4m3, of two that are as near to the one with the even code.
    """
    wide = vector.float().cpu().numpy()
    if not np.isfinite(wide).all():
        nan = torch.full(vector.shape, math.nan, device=vector.device)
        return nan.to(torch.float8_e4m3fn), nan[0]
    most = np.maximum(np.abs(wide).max(), np.float32(2.0**-100))
    scale = most * np.float32(1 / 448)
    codes: list[int] = []
    for quotient in (wide / scale).tolist():
        above = min(bisect.bisect(_E4M3, abs(quotient)), 126)
        below = above - 1
        beside = abs(quotient) - _E4M3[below], _E4M3[above] - abs(quotient)
        even = above if below % 2 else below
        nearest = even if beside[0] == beside[1] else below if beside[0] < beside[1] else above
        codes.append(nearest + (128 if math.copysign(1, quotient) < 0 else 0))
    elements = torch.tensor(codes, dtype=torch.uint8, device=vector.device)
    return elements.view(torch.float8_e4m3fn), torch.tensor(scale, device=vector.device)


def copy_pages(pool: Tensor, sources: Tensor, destinations: Tensor) -> None:
    """Copy whole pages of `pool` [pages, page_elements]; all reads happen before any write."""
    held = [pool[int(source)].clone() for source in sources]
    for destination, page in zip(destinations.tolist(), held, strict=True):
        pool[destination] = page


def rms_norm(rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x²) + epsilon) * weight of each row.

    rows: [any, columns]; weight: [columns].
    """
    result = torch.zeros(rows.shape, dtype=rows.dtype)
    for index, row in enumerate(rows.double()):
        mean = sum(float(value) ** 2 for value in row) / len(row)
        result[index] = (row / math.sqrt(mean + epsilon) * weight.double()).to(rows.dtype)
    return result


def rotated(
    heads: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None = None, epsilon: float = 0.0
) -> Tensor:
    """Rotary embedding of [rows, heads, head_dim], after RMSNorms of the heads by weight
    [head_dim], where there is one; cos, sin: [rows, head_dim]. Element i turns with element
    i + head_dim / 2, each by its own angle's cos and sin."""
    result, half = torch.zeros_like(heads), heads.shape[2] // 2
    for row in range(heads.shape[0]):
        c, s = cos[row].double().tolist(), sin[row].double().tolist()
        for head, vector in enumerate(heads[row]):
            x = vector.double().tolist()
            if weight is not None:
                root = math.sqrt(sum(each * each for each in x) / len(x) + epsilon)
                x = [each / root * float(by) for each, by in zip(x, weight, strict=True)]
            for i in range(half):
                j = i + half
                result[row, head, i] = x[i] * c[i] - x[j] * s[i]
                result[row, head, j] = x[j] * c[j] + x[i] * s[j]
    return result


def gated(gates: Tensor, ups: Tensor, *, gelu: bool) -> Tensor:
    """[rows, columns]: x / (1 + exp(-x)) * up, or with gelu
    x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x³))) * up."""
    result = torch.zeros(gates.shape, dtype=gates.dtype)
    for row in range(gates.shape[0]):
        for column in range(gates.shape[1]):
            x, up = float(gates[row, column]), float(ups[row, column])
            if gelu:
                cube = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
                result[row, column] = x / 2 * (1 + math.tanh(cube)) * up
            else:
                small = math.exp(-abs(x))
                result[row, column] = x * (1 if x >= 0 else small) / (1 + small) * up
    return result


def adjusted_logits(logits: Tensor, given: Adjustments) -> Tensor:
    """A copy of float32 [rows, vocabulary], one adjustment after the other."""
    raw, result = logits.numpy(), logits.numpy().copy()

    def adjust(row: int, token: int, bias: Any, penalty: Any, subtracted: Any) -> None:
        value = raw[row, token] + bias
        value = value / penalty if value > 0 else value * penalty
        result[row, token] = -np.inf if subtracted == np.inf else value - subtracted

    places: dict[tuple[int, int], int] = {}
    for at, (row, token) in enumerate(zip(given.rows, given.ids, strict=True)):
        places[int(row), int(token)] = at
        adjust(row, token, given.bias[at], given.repetition[at], given.subtracted[at])
    if (late := given.late) is not None:
        for each, row in enumerate(late.rows):
            token = int(late.chosen[late.sources[each]])
            if not 0 <= token < logits.shape[1]:
                continue
            at = places.get((int(row), token))
            bias, count, ban = np.float32(0), np.float32(1), False
            if at is not None:
                bias, count = given.bias[at], np.float32(late.counts[at] + 1)
                ban = given.subtracted[at] == np.inf
            subtracted = late.presence[each] + late.frequency[each] * count
            adjust(row, token, bias, late.repetition[each], np.inf if ban else subtracted)
    return torch.from_numpy(result)


def choose_token(logits: Tensor, choices: Choices, row: int) -> int:
    """Of float32 [vocabulary], none NaN or +inf, after adjustments."""
    values, temperature = logits.double().tolist(), float(choices.temperature[row])
    best = max(values)
    if temperature == 0:
        return values.index(best)
    weights = [math.exp((value - best) / temperature) for value in values]
    tokens = [token for token, weight in enumerate(weights) if weight >= choices.min_p[row]]
    tokens.sort(key=lambda token: -weights[token])  # of equal ones the smaller ids stay before
    tokens = tokens[: int(choices.top_k[row]) or None]
    if choices.top_p[row] < 1:
        reached = list(itertools.accumulate(weights[token] for token in tokens))
        share = choices.top_p[row] * reached[-1]
        tokens = tokens[: 1 + sum(total < share for total in reached)]
    tokens.sort()
    reached = list(itertools.accumulate(weights[token] for token in tokens))
    target = choices.noise[row] * reached[-1]
    return next(token for token, total in zip(tokens, reached, strict=True) if total > target)
