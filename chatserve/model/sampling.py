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
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chatserve_kernels.packing import Fetched, fetched, sent
from chatserve_kernels.sampling import Adjustments, Choices, Chosen, choose_tokens

_MASK64 = (1 << 64) - 1

Ids = NDArray[np.int64]
Amounts = NDArray[np.float32]
Booleans = NDArray[np.bool_]


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


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> Samples:
    """One token for each row of logits, float32 [R, vocabulary]; they are not changed.

    Raises ValueError when rows and logits do not match.
    """
    if logits.ndim != 2 or logits.shape[0] != len(rows) or logits.dtype != torch.float32:
        raise ValueError(f"logits must be float32 [{len(rows)}, vocabulary]")
    if not rows:
        tokens = torch.empty(0, dtype=torch.int64, device=logits.device)
        return Samples(tokens, fetched((tokens, tokens), logits.device), (), ())
    chosen = choose_tokens(logits, _choices(rows, logits.shape[1]))
    wanted = [i for i, row in enumerate(rows) if row.top_logprobs is not None]
    best = _best(chosen, logits, rows, wanted) if wanted else ()
    there = fetched((chosen.tokens, chosen.finite, *best), logits.device)
    return Samples(chosen.tokens, there, rows, wanted)


def _choices(rows: Sequence[SampleRow], vocabulary: int) -> Choices:
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
        adjustments=_adjustments(rows, vocabulary),
    )


def _adjustments(rows: Sequence[SampleRow], vocabulary: int) -> Adjustments | None:
    """What the rows say of single logits, in the float32 that those are, in order of rows and ids.

    A place is a logit's index among those of all rows. What is said of it more than once meets by
    that.
    """
    numbers = [i for i, row in enumerate(rows) if row.changes_logits]
    if not numbers:
        return None

    def amounts(name: str, of: Ids) -> Amounts:
        each = np.asarray([getattr(row, name) for row in rows], dtype=np.float32)
        return each[of // vocabulary]

    biased, inside = _places(
        {i: np.asarray([token for token, _ in rows[i].logit_bias], np.int64) for i in numbers},
        vocabulary,
    )
    biases = np.asarray([value for i in numbers for _, value in rows[i].logit_bias], np.float32)
    banned, _ = _places({i: np.asarray(rows[i].banned, np.int64) for i in numbers}, vocabulary)
    seen, counted = dict[int, Ids](), dict[int, Ids]()
    for i in numbers:
        row = rows[i]
        is_counted = row.presence_penalty != 0.0 or row.frequency_penalty != 0.0
        if row.repetition_penalty != 1.0 or is_counted:
            history = np.fromiter(row.history, np.int64, len(row.history))
            # One row after the other: all of them in one go take three times as long to sort.
            if row.repetition_penalty != 1.0:
                seen[i] = np.sort(history)
            if is_counted:
                counted[i] = np.sort(history[row.prompt_length :])
    seen, _ = _distinct(_places(seen, vocabulary)[0])
    counted, counts = _distinct(_places(counted, vocabulary)[0])
    # Runs that are in order already.
    places, _ = _distinct(np.sort(np.concatenate((seen, counted, banned, biased)), kind="stable"))
    bias, repetition, subtracted = np.zeros((3, len(places)), dtype=np.float32)
    bias[places.searchsorted(biased)] = biases[inside]
    repetition[:] = 1
    repetition[places.searchsorted(seen)] = amounts("repetition_penalty", seen)
    frequencies = amounts("frequency_penalty", counted) * counts.astype(np.float32)
    subtracted[places.searchsorted(counted)] = amounts("presence_penalty", counted) + frequencies
    subtracted[places.searchsorted(banned)] = np.inf
    return Adjustments(places // vocabulary, places % vocabulary, bias, repetition, subtracted)


def _places(given: dict[int, Ids], vocabulary: int) -> tuple[Ids, Booleans]:
    """Of each row's ids in the vocabulary, and which these are."""
    if not given:
        return np.empty(0, np.int64), np.empty(0, np.bool_)
    ids = np.concatenate(list(given.values()))
    firsts = np.repeat(np.asarray(list(given)) * vocabulary, [len(each) for each in given.values()])
    inside = (ids >= 0) & (ids < vocabulary)
    return (firsts + ids)[inside], inside


def _distinct(places: Ids) -> tuple[Ids, Ids]:
    """Of places in order: each once, and how often it is there."""
    is_first = np.ones(len(places), np.bool_)
    np.not_equal(places[1:], places[:-1], out=is_first[1:])
    firsts = np.flatnonzero(is_first)
    return places[firsts], np.diff(firsts, append=len(places))


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
