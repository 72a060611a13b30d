"""One token from each row of logits: the checked door, and how torch does it.

May not know: requests, seeds. It sees numbers that say how each row's token is chosen.

Theory: in what order things happen: what `Adjustments` says of some logits; temperature 0 takes
the best, of equal ones the smallest id; else a token weighs exp((logit - best) / temperature), and
min_p, top_k and top_p take away all but the heaviest, of equal ones the smaller ids; then the token
is where the noise, a share of the whole, falls in what is left, in the order of ids. Machine code
does it on a CPU (`cpu/choosing.py`), Triton on a GPU (`gpu/sampling.py`). Torch, where neither
does, sorts all the weights of rows that a filter is for.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chatserve_kernels import gpu

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LateCounts:
    """Tokens that the device may still be choosing: each counts once more, in one row, than that
    row's adjustments say. In numpy, but for `chosen`: int64 [any] on the logits' device.

    rows: int64 [m], no row twice; sources: int64 [m], which of chosen the row's token is, which is
    passed over where it is outside the vocabulary. counts: int32 [n], how often the id of each
    adjustment counts without. repetition, presence, frequency: float32 [m], the rows' penalties.

    What the logit becomes: as `Adjustments` says, with the bias, or the ban, of the row's
    adjustment of that id, if there is one, with this repetition, and with
    `presence + frequency * (count + 1)` for `subtracted`, each operation rounded to float32.
    """

    rows: NDArray[np.int64]
    sources: NDArray[np.int64]
    chosen: Tensor
    counts: NDArray[np.int32]
    repetition: NDArray[np.float32]
    presence: NDArray[np.float32]
    frequency: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Adjustments:
    """Of some logits, in numpy: rows, ids int64 [n], no pair twice, inside the logits; bias,
    repetition, subtracted float32 [n]. What they become, each operation rounded to float32: bias is
    added, then a positive one divided by repetition and another one multiplied, then `subtracted`
    taken off; where that is infinity the token is banned, whatever its logit was. late: what counts
    beside that; with it they are in the order of rows."""

    rows: NDArray[np.int64]
    ids: NDArray[np.int64]
    bias: NDArray[np.float32]
    repetition: NDArray[np.float32]
    subtracted: NDArray[np.float32]
    late: LateCounts | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choices:
    """How the tokens of R rows are chosen, all float64 [R] in numpy. top_k: 0 for all; noise: in
    [0, 1). logarithms: 1 where the token's own probability is asked for, else 0."""

    temperature: Numbers
    min_p: Numbers
    top_k: Numbers
    top_p: Numbers
    noise: Numbers
    logarithms: Numbers
    adjustments: Adjustments | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """On the logits' device. tokens: int64 [R]; finite: bool [R], False where a row had NaN, +inf
    or nothing finite: its token is 0 and means nothing. Where asked for, of finite rows, and
    anything elsewhere: logprobs, float32 [R], the natural logarithm of the token's own probability
    before adjustments; logarithms, float64 [R]: what any logit of the row is more than its
    logarithm by."""

    tokens: Tensor
    finite: Tensor
    logprobs: Tensor
    logarithms: Tensor


def choose_tokens(logits: Tensor, choices: Choices) -> Chosen:
    """logits: float32 [R, vocabulary], neither of them 0; they are not changed. Triton does not
    wait for the device, torch does. Raises ValueError."""
    if logits.ndim != 2 or logits.dtype != torch.float32 or logits.numel() == 0:
        raise ValueError(f"logits are {logits.dtype} {tuple(logits.shape)}, not float32 [R, any]")
    rows, vocabulary = logits.shape
    for name in ("temperature", "min_p", "top_k", "top_p", "noise", "logarithms"):
        if getattr(choices, name).shape != (rows,):
            raise ValueError(f"{name} must be [{rows}]")
    _check_adjustments(choices.adjustments, logits)
    device = logits.device.type
    if gpu.serves(device):
        from chatserve_kernels.gpu import sampling as on_gpu

        if on_gpu.served(logits):
            return on_gpu.choose_tokens(logits, choices)
    if choices.adjustments is not None and choices.adjustments.late is not None:
        settled = _settled(choices.adjustments, choices.adjustments.late, vocabulary)
        choices = replace(choices, adjustments=settled)
    if device == "cpu":
        from chatserve_kernels.cpu import sampling as on_cpu

        if (chosen := on_cpu.choose_tokens(logits, choices)) is not None:
            return chosen
    return _by_torch(logits, choices)


def _check_adjustments(given: Adjustments | None, logits: Tensor) -> None:
    if given is None:
        return
    rows, vocabulary = logits.shape
    count = given.rows.shape
    if any(each.shape != count for each in (given.ids, given.bias, given.repetition)):
        raise ValueError("adjustments must be alike")
    if len(count) != 1 or given.subtracted.shape != count:
        raise ValueError("adjustments must be [any]")
    for name, values, limit in (("rows", given.rows, rows), ("ids", given.ids, vocabulary)):
        if count[0] and not 0 <= values.min() <= values.max() < limit:
            raise ValueError(f"{name} of adjustments must be under {limit}")
    if (late := given.late) is None:
        return
    if late.counts.shape != count or (given.rows[1:] < given.rows[:-1]).any():
        raise ValueError("adjustments must be in the order of rows and counted, to count late ones")
    chosen, each = late.chosen, (late.rows, late.sources)
    if chosen.ndim != 1 or chosen.dtype != torch.int64 or chosen.device != logits.device:
        raise ValueError(f"late tokens must be int64 [any] on {logits.device}")
    columns = (*each, late.repetition, late.presence, late.frequency)
    if late.rows.ndim != 1 or {column.shape for column in columns} != {late.rows.shape}:
        raise ValueError("late counts must be alike")
    for values, limit in zip(each, (rows, len(chosen)), strict=True):
        if not len(values) or not 0 <= values.min() <= values.max() < limit:
            raise ValueError("late counts must be some, of rows and tokens that there are")
    if len(np.unique(late.rows)) < len(late.rows):
        raise ValueError("late counts must be of no row twice")


def _settled(given: Adjustments, late: LateCounts, vocabulary: int) -> Adjustments:
    """The same with nothing late. Waits for the device."""
    tokens = late.chosen.cpu().numpy()[late.sources]
    starts, ends = (given.rows.searchsorted(late.rows, side) for side in ("left", "right"))
    found = np.full(len(tokens), -1)  # whose adjustment it is
    for at, (token, start, end) in enumerate(zip(tokens, starts, ends, strict=True)):
        for place in np.flatnonzero(given.ids[start:end] == token):
            found[at] = start + place
    old, new = found >= 0, (found < 0) & (tokens >= 0) & (tokens < vocabulary)
    counts = np.zeros(len(tokens), np.int32)
    counts[old] = late.counts[found[old]]
    taken = np.multiply(late.frequency, counts + 1, dtype=np.float32)
    taken += late.presence
    repetition, subtracted = given.repetition.copy(), given.subtracted.copy()
    repetition[found[old]] = late.repetition[old]
    is_banned = subtracted[found[old]] == np.inf
    subtracted[found[old]] = np.where(is_banned, np.float32(np.inf), taken[old])
    return Adjustments(
        rows=np.concatenate((given.rows, late.rows[new])),
        ids=np.concatenate((given.ids, tokens[new])),
        bias=np.concatenate((given.bias, np.zeros(new.sum(), np.float32))),
        repetition=np.concatenate((repetition, late.repetition[new])),
        subtracted=np.concatenate((subtracted, taken[new])),
    )


def _by_torch(logits: Tensor, choices: Choices) -> Chosen:
    """On any device."""
    best, tokens = logits.max(dim=-1)  # NaN wins a max, so `best` tells all three faults
    finite = best.isfinite()
    adjusted = logits
    if choices.adjustments is not None:
        adjusted = _adjusted(logits, choices.adjustments)
        best, tokens = adjusted.max(dim=-1)
        finite &= best.isfinite()
    wanted = np.flatnonzero(finite.cpu().numpy() & (choices.temperature > 0))
    if len(wanted):
        at = torch.from_numpy(wanted).to(logits.device)
        tokens[at] = _draw(adjusted[at], choices, wanted)
    tokens[~finite] = 0
    logarithms = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    asked = torch.from_numpy(choices.logarithms != 0).to(logits.device) & finite
    if bool(asked.any()):
        wide = logits[asked].double()
        logarithms[asked] = wide.amax(dim=-1) - wide.log_softmax(dim=-1).amax(dim=-1)
    logprobs = logits.gather(1, tokens[:, None])[:, 0].double() - logarithms
    return Chosen(tokens, finite, logprobs.float(), logarithms)


def _adjusted(logits: Tensor, given: Adjustments) -> Tensor:
    """A copy with the adjustments."""
    result = logits.clone()
    places = tuple(torch.from_numpy(each).to(logits.device) for each in (given.rows, given.ids))
    bias, repetition, subtracted = (
        torch.from_numpy(each).to(logits.device)
        for each in (given.bias, given.repetition, given.subtracted)
    )
    values = result[places] + bias
    values = torch.where(values > 0, values / repetition, values * repetition) - subtracted
    result[places] = values.masked_fill(subtracted == torch.inf, -torch.inf)
    return result


def _draw(logits: Tensor, choices: Choices, rows: NDArray[Any]) -> Tensor:
    """Tokens int64 [n] of finite logits [n, vocabulary]. rows: which of the choices are theirs."""
    logits = logits.double()

    def column(values: Numbers) -> Tensor:
        return torch.from_numpy(values[rows]).to(logits.device)[:, None]

    top = logits.max(dim=-1, keepdim=True).values
    # Relative to the best token: its weight is exactly 1, so it never rounds away.
    weights = torch.exp((logits - top) / column(choices.temperature))
    if choices.min_p[rows].any():
        weights.masked_fill_(weights < column(choices.min_p), 0.0)
    top_k, top_p = choices.top_k[rows], choices.top_p[rows]
    filtered = np.flatnonzero((top_k > 0) | (top_p < 1))
    if len(filtered):
        at = torch.from_numpy(filtered).to(logits.device)
        weights[at] = keep_top(weights[at], top_k[filtered], top_p[filtered])
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # The first token whose cumulative weight is over the target; it has weight of its own. The
    # product may round up to the total itself, beyond every token.
    target = column(choices.noise) * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def keep_top(weights: Tensor, top_k: Numbers, top_p: Numbers) -> Tensor:
    """weights [R, vocabulary] with zeros outside each row's top_k, then outside its top_p.

    Exactly top_k tokens stay, of equal ones the smaller ids. top_p keeps the fewest best tokens
    that reach it, always one. Only the weights are sorted, not their ids: what counts is the last
    weight that stays and how many stay.
    """
    vocabulary, device = weights.shape[1], weights.device
    ordered = weights.sort(dim=-1, descending=True).values
    most = torch.from_numpy(np.where(top_k > 0, top_k, vocabulary)).long().to(device)[:, None]
    shares = torch.from_numpy(top_p).to(device)[:, None]
    ranks = torch.arange(vocabulary, device=device)[None]
    cumulative = ordered.masked_fill_(ranks >= most, 0.0).cumsum(dim=-1)
    # A token stays while those before it do not reach top_p. At top_p 1 rounding could end that
    # too early.
    reached = (cumulative >= shares * cumulative[:, -1:]) & (shares < 1)
    stay = torch.minimum(most, vocabulary - reached.sum(dim=-1, keepdim=True) + 1)
    stay = stay.clamp(1, vocabulary)
    last = ordered.gather(1, stay - 1)
    better, equal = weights > last, weights == last
    room = stay - better.sum(dim=-1, keepdim=True)
    if bool((equal.sum(dim=-1, keepdim=True) > room).any()):
        equal &= equal.cumsum(dim=-1) <= room
    return weights.masked_fill(~(better | equal), 0.0)
