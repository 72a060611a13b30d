"""Logits to tokens: penalties, filters, counter-based noise, log-probabilities.

May not know: requests, pages, text. A row describes itself completely.

Theory: a sampled token is a function of its row alone. The noise is one number in [0, 1), a hash
of (seed, sample index, absolute position), and the token is where that number falls in the
cumulative filtered distribution, laid out in vocabulary order and summed in float64. So a token
does not depend on batch mates, on preemption, or on how its prompt was sliced (but for the
logits' own rounding).

On a GPU the whole of it is one call of kernels (`chatserve_kernels/sampling.py`); where they do not
serve it is torch's. The noise is hashed here.

Order, as in vLLM: logprobs from the model's raw logits; then logit_bias, repetition, presence and
frequency penalties, banned ids; temperature 0 takes the best; else temperature, min_p, top_k,
top_p.
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chatserve.model.draw import draw
from chatserve_kernels import gpu
from chatserve_kernels.sampling import Adjustments, Choices, Chosen, choose_tokens

_MASK64 = (1 << 64) - 1

Ids = NDArray[np.int64]
Amounts = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """How one row's token is chosen. Neutral values: top_k 0, top_p 1, min_p 0, penalties 1, 0, 0.

    temperature: 0 is greedy. position: absolute, of the token being sampled.
    history: all tokens so far, of which the first prompt_length are the prompt; the repetition
    penalty counts all, presence and frequency what follows the prompt. May be empty where no
    penalty is set. logit_bias: no id twice. banned: ids that must not come. top_logprobs: None = no
    logprobs, k = the k best as well. Ids outside the vocabulary have no logit and are passed over.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    banned: tuple[int, ...] = ()
    seed: int = 0
    sample: int = 0
    position: int = 0
    history: tuple[int, ...] = ()
    prompt_length: int = 0
    top_logprobs: int | None = None

    @property
    def changes_logits(self) -> bool:
        """Whether anything but temperature and filters is at work."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or bool(self.logit_bias)
            or bool(self.banned)
        )


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Natural logs of the model's own probabilities, before penalties and temperature.

    chosen: of the sampled token. top: (token id, logprob), best first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """tokens: int64 [R] on the logits' device. finite: False where a row had NaN, +inf, or nothing
    finite; its token is 0 and means nothing. logprobs: None where not asked for or not finite.
    """

    tokens: Tensor
    finite: list[bool]
    logprobs: list[RowLogprobs | None]


def uniform(seed: int, sample: int, position: int) -> float:
    """The noise of one token: in [0, 1), a multiple of 2^-53, the same on every machine."""
    counter = struct.pack("<QQQ", seed & _MASK64, sample, position)
    digest = hashlib.blake2b(counter, digest_size=8, person=b"chatserve noise").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> Samples:
    """One token for each row of logits, float32 [R, vocabulary]; they are not changed.

    Raises ValueError when rows and logits do not match.
    """
    if logits.ndim != 2 or logits.shape[0] != len(rows) or logits.dtype != torch.float32:
        raise ValueError(f"logits must be float32 [{len(rows)}, vocabulary]")
    if not rows:
        return Samples(torch.empty(0, dtype=torch.int64, device=logits.device), [], [])
    if (samples := _by_kernels(logits, rows)) is not None:
        return samples
    best, tokens = logits.max(dim=-1)  # NaN wins a max, so `best` tells all three faults
    finite: list[bool] = best.isfinite().tolist()
    changed = [i for i, row in enumerate(rows) if row.changes_logits and finite[i]]
    adjusted = logits
    if changed:
        adjusted = logits.clone()
        for i in changed:
            _adjust(adjusted[i], rows[i])
        best, tokens = adjusted.max(dim=-1)
        for i in changed:
            finite[i] = bool(best[i].isfinite())
    noisy = [i for i, row in enumerate(rows) if row.temperature > 0 and finite[i]]
    if noisy:
        drawn = _draw_by_rows if logits.device.type == "cpu" else _draw_together
        chosen = drawn(adjusted[noisy], [rows[i] for i in noisy])
        tokens[torch.tensor(noisy, device=tokens.device)] = chosen
    if not all(finite):
        tokens[[i for i, good in enumerate(finite) if not good]] = 0
    return Samples(tokens, finite, _logprobs(logits, tokens, rows, finite))


def _by_kernels(logits: Tensor, rows: Sequence[SampleRow]) -> Samples | None:
    """None where there are none, as on every CPU."""
    if not gpu.serves(logits.device.type):
        return None
    chosen = choose_tokens(logits, _choices(rows, logits.shape[1]))
    if chosen is None:
        return None
    finite: list[bool] = chosen.finite.tolist()
    return Samples(chosen.tokens, finite, _logprobs_of(chosen, logits, rows, finite))


def _choices(rows: Sequence[SampleRow], vocabulary: int) -> Choices:
    """What the rows say, in columns."""

    def column(values: Iterable[float]) -> NDArray[np.float64]:
        return np.asarray(list(values), dtype=np.float64)

    return Choices(
        temperature=column(row.temperature for row in rows),
        min_p=column(row.min_p for row in rows),
        top_k=column(row.top_k for row in rows),
        top_p=column(row.top_p for row in rows),
        noise=column(_noise(row) if row.temperature > 0 else 0.0 for row in rows),
        logarithms=column(row.top_logprobs is not None for row in rows),
        adjustments=_adjustments(rows, vocabulary),
    )


def _adjustments(rows: Sequence[SampleRow], vocabulary: int) -> Adjustments | None:
    """What `_adjust` does to each row."""
    changed = [(i, _adjustment(row)) for i, row in enumerate(rows) if row.changes_logits]
    if not changed:
        return None
    ids, bias, repetition, subtracted = map(
        np.concatenate, zip(*(columns for _, columns in changed), strict=True)
    )
    at = np.repeat([i for i, _ in changed], [len(columns[0]) for _, columns in changed])
    inside = (ids >= 0) & (ids < vocabulary)
    return Adjustments(
        at[inside], ids[inside], bias[inside], repetition[inside], subtracted[inside]
    )


def _adjustment(row: SampleRow) -> tuple[Ids, Amounts, Amounts, Amounts]:
    """Ids, bias, repetition and what is subtracted, in the float32 that torch rounds them to."""
    biased = np.asarray([token for token, _ in row.logit_bias], dtype=np.int64)
    banned = np.asarray(row.banned, dtype=np.int64)
    seen = row.history if row.repetition_penalty != 1.0 else ()
    seen = np.unique(np.asarray(seen, dtype=np.int64))
    is_counted = row.presence_penalty != 0.0 or row.frequency_penalty != 0.0
    counted = row.history[row.prompt_length :] if is_counted else ()
    counted, counts = np.unique(np.asarray(counted, dtype=np.int64), return_counts=True)
    ids = np.unique(np.concatenate((biased, banned, seen, counted)))
    bias, repetition, subtracted = np.zeros((3, len(ids)), dtype=np.float32)
    bias[ids.searchsorted(biased)] = [value for _, value in row.logit_bias]
    repetition[:] = 1
    repetition[ids.searchsorted(seen)] = row.repetition_penalty
    amounts = row.presence_penalty + row.frequency_penalty * counts.astype(np.float32)
    subtracted[ids.searchsorted(counted)] = amounts
    subtracted[ids.searchsorted(banned)] = np.inf
    return ids, bias, repetition, subtracted


def _adjust(logits: Tensor, row: SampleRow) -> None:
    """Bias, penalties and bans on one row of logits [vocabulary], in place."""
    vocabulary, device = logits.shape[0], logits.device
    for token, bias in row.logit_bias:
        if 0 <= token < vocabulary:
            logits[token] += bias
    if row.repetition_penalty != 1.0:
        seen, _ = _counts(row.history, vocabulary, device)
        at = logits[seen]
        logits[seen] = torch.where(at > 0, at / row.repetition_penalty, at * row.repetition_penalty)
    if row.presence_penalty != 0.0 or row.frequency_penalty != 0.0:
        seen, counts = _counts(row.history[row.prompt_length :], vocabulary, device)
        logits[seen] -= row.presence_penalty + row.frequency_penalty * counts
    banned = [token for token in row.banned if 0 <= token < vocabulary]
    if banned:
        logits[banned] = float("-inf")


def _counts(
    tokens: tuple[int, ...], vocabulary: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Distinct ids inside the vocabulary, int64 [n], and how often each occurs, float32 [n]."""
    ids, counts = np.unique(np.asarray(tokens, dtype=np.int64), return_counts=True)
    inside = (ids >= 0) & (ids < vocabulary)
    return (
        torch.from_numpy(ids[inside]).to(device),
        torch.from_numpy(counts[inside].astype(np.float32)).to(device),
    )


def _draw_by_rows(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Tokens int64 [R] from float32 logits [R, vocabulary] in the process's memory."""
    pairs = zip(logits.numpy(), rows, strict=True)
    return torch.tensor([draw(values, row, _noise(row)) for values, row in pairs])


def _noise(row: SampleRow) -> float:
    return uniform(row.seed, row.sample, row.position)


def _draw_together(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """The same on any device, in tensors of all rows."""
    logits = logits.double()

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    top = logits.max(dim=-1, keepdim=True).values
    # Relative to the best token: its weight is exactly 1, so it never rounds away.
    weights = torch.exp((logits - top) / column([row.temperature for row in rows]))
    if any(row.min_p > 0 for row in rows):
        weights.masked_fill_(weights < column([row.min_p for row in rows]), 0.0)
    filtered = [i for i, row in enumerate(rows) if row.top_k > 0 or row.top_p < 1]
    if filtered:
        kept = _keep_top(weights[filtered], [rows[i] for i in filtered])
        weights[torch.tensor(filtered, device=weights.device)] = kept
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    noise = column([_noise(row) for row in rows])
    # The first token whose cumulative weight is over the target; it has weight of its own. The
    # product may round up to the total itself, beyond every token.
    target = torch.minimum(noise * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def _keep_top(weights: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """weights [R, vocabulary] with zeros outside each row's top_k, then outside its top_p.

    Exactly top_k tokens stay, of equal ones the smaller ids. top_p keeps the fewest best tokens
    that reach it, always one. Only the weights are sorted, not their ids: what counts is the last
    weight that stays and how many stay.
    """
    vocabulary, device = weights.shape[1], weights.device
    ordered = weights.sort(dim=-1, descending=True).values
    most = torch.tensor([row.top_k or vocabulary for row in rows], device=device)[:, None]
    shares = torch.tensor([row.top_p for row in rows], dtype=torch.float64, device=device)[:, None]
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


def _logprobs(
    logits: Tensor, tokens: Tensor, rows: Sequence[SampleRow], finite: Sequence[bool]
) -> list[RowLogprobs | None]:
    """Of the R rows, those that are finite and asked for them. logits: as the model gave them,
    float32 [R, vocabulary]; tokens: what was chosen, int64 [R]."""
    wanted = [i for i, row in enumerate(rows) if row.top_logprobs is not None and finite[i]]
    if not wanted:
        return [None] * len(rows)
    everything = torch.log_softmax(logits[wanted], dim=-1)
    chosen: list[float] = everything.gather(1, tokens[wanted][:, None])[:, 0].tolist()
    most = min(max(rows[i].top_logprobs or 0 for i in wanted), logits.shape[1])
    values, ids = everything.topk(most, dim=-1)
    return _paired(rows, wanted, chosen, values, ids)


def _logprobs_of(
    chosen: Chosen, logits: Tensor, rows: Sequence[SampleRow], finite: Sequence[bool]
) -> list[RowLogprobs | None]:
    """The same from what the kernels gave."""
    wanted = [i for i, row in enumerate(rows) if row.top_logprobs is not None and finite[i]]
    if not wanted:
        return [None] * len(rows)
    most = min(max(rows[i].top_logprobs or 0 for i in wanted), logits.shape[1])
    values, ids = logits[wanted].topk(most, dim=-1)
    values = (values.double() - chosen.logarithms[wanted][:, None]).float()
    return _paired(rows, wanted, chosen.logprobs[wanted].tolist(), values, ids)


def _paired(
    rows: Sequence[SampleRow],
    wanted: Sequence[int],
    chosen: Sequence[float],
    values: Tensor,
    ids: Tensor,
) -> list[RowLogprobs | None]:
    """chosen: of each wanted row; values, ids: [wanted, any], its best tokens."""
    result: list[RowLogprobs | None] = [None] * len(rows)
    for i, value, best_ids, best in zip(wanted, chosen, ids.tolist(), values.tolist(), strict=True):
        count = rows[i].top_logprobs or 0
        pairs = tuple(zip(best_ids[:count], best[:count], strict=True))
        result[i] = RowLogprobs(value, pairs)
    return result
