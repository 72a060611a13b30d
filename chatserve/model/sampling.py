"""Logits to tokens: penalties, filters, counter-based noise, log-probabilities.

May not know: requests, pages, text. A row describes itself completely.

Theory: a sampled token is a function of its row alone. The noise is one number in [0, 1), a hash
of (seed, sample index, absolute position), and the token is where that number falls in the
cumulative filtered distribution, laid out in vocabulary order and summed in float64. So a token
does not depend on batch mates, on preemption, or on how its prompt was sliced (but for the
logits' own rounding).

The whole of it is one call of `chatserve_kernels/sampling.py`. The noise is hashed here, and what
is said of single logits is put together.

Order, as in vLLM: logprobs from the model's raw logits; then logit_bias, repetition, presence and
frequency penalties, banned ids; temperature 0 takes the best; else temperature, min_p, top_k,
top_p.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chatserve.model.step import LateTokens
from chatserve_kernels.packing import Fetched, fetched, sent
from chatserve_kernels.sampling import Adjustments, Choices, Chosen, LateCounts, choose_tokens

_MASK64 = (1 << 64) - 1

Ids = NDArray[np.int64]
Booleans = NDArray[np.bool_]
Counts = NDArray[np.int32]
_NO_IDS: Ids = np.empty(0, np.int64)
_NO_COUNTS: Counts = np.empty(0, np.int32)
_NAMED = -1  # in place of a count: of an id that is there for a bias or a ban alone


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleRow:
    """How one row's token is chosen. Neutral values: top_k 0, top_p 1, min_p 0, penalties 1, 0, 0.

    temperature: 0 is greedy. position: absolute, of the token being sampled.
    ids: those of all tokens so far, int64 [n], each once, in order; generated: how often each came
    after the prompt, int32 [n]. The repetition penalty is for all of them, presence and frequency
    for what was generated. May be empty where no penalty is set. logit_bias: no id twice. banned:
    ids that must not come. top_logprobs: None = no logprobs, k = the k best as well. Ids outside
    the vocabulary have no logit and are passed over.
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
    ids: Ids = field(default_factory=lambda: _NO_IDS)
    generated: Counts = field(default_factory=lambda: _NO_COUNTS)
    top_logprobs: int | None = None

    @property
    def counts_generated(self) -> bool:
        """Whether presence or frequency is at work."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def names_ids(self) -> bool:
        """Whether a bias or a ban is at work."""
        return bool(self.logit_bias) or bool(self.banned)

    @property
    def changes_logits(self) -> bool:
        """Whether anything but temperature and filters is at work."""
        return self.repetition_penalty != 1.0 or self.counts_generated or self.names_ids


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Natural logs of the model's own probabilities, before penalties and temperature.

    chosen: of the sampled token. top: (token id, logprob), best first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


class Samples:
    """One token a row, which its device may not have chosen yet: only `tokens` is there without
    waiting.

    tokens: int64 [R] on the logits' device. What is wrong with the rows, or with the device, is
    raised where the host asks for the rest.
    """

    def __init__(
        self, tokens: Tensor, fetched: Fetched, rows: Sequence[SampleRow], wanted: Sequence[int]
    ) -> None:
        """fetched: tokens, finite, and of the `wanted` rows what `_best` gives. rows: as `sample`
        was given them."""
        self.tokens = tokens
        self._fetched = fetched
        self._rows, self._wanted = rows, wanted

    @cached_property
    def ids(self) -> list[int]:
        """The tokens, on the host. Waits."""
        return self._fetched.wait()[0].tolist()

    @cached_property
    def finite(self) -> list[bool]:
        """False where a row had NaN, +inf, or nothing finite; its token is 0 and means nothing.
        Waits."""
        return self._fetched.wait()[1].tolist()

    @cached_property
    def logprobs(self) -> list[RowLogprobs | None]:
        """None where not asked for or not finite. Waits."""
        if not self._wanted:
            return [None] * len(self._rows)
        chosen, values, ids = (each.tolist() for each in self._fetched.wait()[2:])
        result: list[RowLogprobs | None] = [None] * len(self._rows)
        for i, value, best_ids, best in zip(self._wanted, chosen, ids, values, strict=True):
            if self.finite[i]:
                count = self._rows[i].top_logprobs or 0
                pairs = tuple(zip(best_ids[:count], best[:count], strict=True))
                result[i] = RowLogprobs(value, pairs)
        return result


def uniform(seed: int, sample: int, position: int) -> float:
    """The noise of one token: in [0, 1), a multiple of 2^-53, the same on every machine."""
    counter = struct.pack("<QQQ", seed & _MASK64, sample, position)
    digest = hashlib.blake2b(counter, digest_size=8, person=b"chatserve noise").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits: Tensor, rows: Sequence[SampleRow], late: LateTokens | None = None) -> Samples:
    """One token for each row of logits, float32 [R, vocabulary]; they are not changed.

    late: of some rows that have penalties, one more token that was generated, which nobody waits
    for. Raises ValueError when rows and logits do not match.
    """
    if logits.ndim != 2 or logits.shape[0] != len(rows) or logits.dtype != torch.float32:
        raise ValueError(f"logits must be float32 [{len(rows)}, vocabulary]")
    if not rows:
        tokens = torch.empty(0, dtype=torch.int64, device=logits.device)
        return Samples(tokens, fetched((tokens, tokens), logits.device), (), ())
    chosen = choose_tokens(logits, _choices(rows, logits.shape[1], late))
    wanted = [i for i, row in enumerate(rows) if row.top_logprobs is not None]
    best = _best(chosen, logits, rows, wanted) if wanted else ()
    there = fetched((chosen.tokens, chosen.finite, *best), logits.device)
    return Samples(chosen.tokens, there, rows, wanted)


def _choices(rows: Sequence[SampleRow], vocabulary: int, late: LateTokens | None) -> Choices:
    """What the rows say, in columns."""

    numbers = np.asarray(
        [
            (
                row.temperature,
                row.min_p,
                row.top_k,
                row.top_p,
                _noise(row) if row.temperature > 0 else 0.0,
                row.top_logprobs is not None,
            )
            for row in rows
        ],
        dtype=np.float64,
    )
    temperature, min_p, top_k, top_p, noise, logarithms = np.ascontiguousarray(numbers.T)
    return Choices(
        temperature=temperature,
        min_p=min_p,
        top_k=top_k,
        top_p=top_p,
        noise=noise,
        logarithms=logarithms,
        adjustments=adjustments_of(rows, vocabulary, late),
    )


def adjustments_of(
    rows: Sequence[SampleRow], vocabulary: int, late: LateTokens | None = None
) -> Adjustments | None:
    """What the rows say of single logits, in the float32 that those are, in order of rows and ids.
    late: as `sample` has it."""
    if not any(row.changes_logits for row in rows):
        return None
    said = [_said(row, vocabulary) for row in rows]
    lengths = np.asarray([len(ids) for ids, _ in said])
    ids = np.concatenate([ids for ids, _ in said])
    counts = np.concatenate([counts for _, counts in said])
    repetition, presence, frequency = (
        np.asarray([getattr(row, name) for row in rows], dtype=np.float32)
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
    )
    bias, subtracted = np.zeros((2, len(ids)), np.float32)
    if presence.any() or frequency.any():
        subtracted = frequency.repeat(lengths) * counts.astype(np.float32)
        subtracted = np.where(counts > 0, presence.repeat(lengths) + subtracted, np.float32(0))
    repeated = repetition.repeat(lengths)
    ends = lengths.cumsum()
    for row, start, end in zip(rows, ends - lengths, ends, strict=True):
        if row.names_ids:
            its = slice(start, end)
            repeated[its][counts[its] == _NAMED] = 1
            counts[its] = counts[its].clip(min=0)
            biased, inside = _places([token for token, _ in row.logit_bias], ids[its], vocabulary)
            values = np.asarray([value for _, value in row.logit_bias], np.float32)
            bias[its][biased] = values[inside]
            subtracted[its][_places(row.banned, ids[its], vocabulary)[0]] = np.inf
    counted = None
    if late is not None:
        counted = LateCounts(
            rows=late.rows,
            sources=late.sources,
            chosen=late.chosen,
            counts=counts,
            repetition=repetition[late.rows],
            presence=presence[late.rows],
            frequency=frequency[late.rows],
        )
    numbers = np.arange(len(rows)).repeat(lengths)
    return Adjustments(numbers, ids, bias, repeated, subtracted, counted)


def _said(row: SampleRow, vocabulary: int) -> tuple[Ids, Counts]:
    """Ids of the vocabulary that a row says something of, in order, and how often each was
    generated, or that it is named only."""
    ids, counts = row.ids, row.generated
    if row.repetition_penalty == 1.0:
        stay = counts > 0 if row.counts_generated else slice(0)
        ids, counts = ids[stay], counts[stay]
    if row.names_ids:
        named = np.unique([*row.banned, *(token for token, _ in row.logit_bias)])
        places = ids.searchsorted(named)
        is_new = places == ids.searchsorted(named, "right")
        ids = np.insert(ids, places[is_new], named[is_new])
        counts = np.insert(counts, places[is_new], _NAMED)
    inside = slice(*ids.searchsorted((0, vocabulary)))
    return ids[inside], counts[inside]


def _places(tokens: Sequence[int], ids: Ids, vocabulary: int) -> tuple[Ids, Booleans]:
    """Where those of the vocabulary are among ids, all of them, and which these are."""
    given = np.asarray(tokens, np.int64)
    inside = (given >= 0) & (given < vocabulary)
    return ids.searchsorted(given[inside]), inside


def _noise(row: SampleRow) -> float:
    return uniform(row.seed, row.sample, row.position)


def _best(
    chosen: Chosen, logits: Tensor, rows: Sequence[SampleRow], wanted: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of some rows: the chosen tokens' logprobs, float32 [wanted], and the best ones', float32
    [wanted, most], with their ids, int64. logits: as the model gave them, float32 [R, vocabulary].
    Anything in rows that are not finite."""
    most = min(max(rows[i].top_logprobs or 0 for i in wanted), logits.shape[1])
    logprobs, logarithms = chosen.logprobs, chosen.logarithms
    if len(wanted) < len(rows):
        (at,) = sent([np.asarray(wanted, dtype=np.int64)], logits.device)
        logits, logprobs, logarithms = logits[at], logprobs[at], logarithms[at]
    values, ids = logits.topk(most, dim=-1)
    return logprobs, (values.double() - logarithms[:, None]).float(), ids
