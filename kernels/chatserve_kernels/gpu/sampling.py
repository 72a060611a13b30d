"""Choosing tokens on a GPU: tensors to the kernels of `weighing.py` and `choosing.py`.

May not know: requests. `chatserve_kernels/sampling.py` has checked what comes in.

Theory: nobody waits for the device before the last kernel's results are wanted, so how many
programs there are depends on what the host knows. A row is cut in *parts*, that a few long rows
keep all multiprocessors busy.

    adjust    some logits, in a copy of them, where any row has penalties, biases or bans;
              count_late does those of late tokens anew
    survey    of each part the best token, and whether all is finite
    weigh     what each part's tokens weigh together; with filters also by powers of two (*bins*)
    gather    with filters: the tokens of the heaviest bins that together hold all that can stay,
              side by side
    choose    one program a row: the last weight that stays, by digits of the logits' bits; then
              the token

Nothing is sorted: what a filter keeps is known from the last weight that stays and from how many
stay. So it is a selection, for which bucketSelect and radixSelect are known (Alabi et al.,
doi:10.1145/2133803.2345676): one round of buckets by all programs, and of the few tokens that are
left the digits. top_p asks for a weight where top_k asks for a number. Most rows leave some
hundreds of tokens after the buckets; in one that leaves all of them the last program is slow.

Weights are float64, as the engine defines them on a CPU. The same numbers are added in another
order here, and `exp` differs from the CPU's in its last bit. So the token is the same but where the
noise, a share of top_p, or min_p falls on a border between two tokens to about 1e-13 of the
distribution.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chatserve_kernels import gpu, reference
from chatserve_kernels.gpu import choosing, weighing
from chatserve_kernels.gpu.tiles import power_of_two
from chatserve_kernels.packing import sent
from chatserve_kernels.sampling import Adjustments, Choices, Chosen, LateCounts

PART = 4096  # tokens of a program
CHUNK = 512  # tokens that it holds at a time, by bins or digits
BINS = 32  # the last one: what weighs under 2^-30 of the best token
ADJUSTMENTS_EACH = 256
# Products are not contracted with sums, so that all kernels see the same weights.
OPTIONS: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}
TOLERANCE = 1e-4  # of a logprob, in a trial


def served(logits: Tensor) -> bool:
    """Whether the kernels take logits of this size, and have passed a trial with them."""
    return gpu.interpreted() or _trusted(logits.shape[1], logits.device)


def choose_tokens(logits: Tensor, choices: Choices) -> Chosen:
    """As `sampling.choose_tokens` has them, of at least one row and token."""
    rows, vocabulary = logits.shape
    parts = -(-vocabulary // PART)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    filtered = (choices.top_p < 1) | ((choices.top_k > 0) & (choices.top_k < vocabulary))
    filtered &= choices.temperature > 0
    slots = int(filtered.sum())
    adjusted = _adjusted(logits, choices.adjustments)
    (records,) = sent([_records(choices, filtered)], logits.device)

    def new(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    def launch(kernel: Any, grid: tuple[int, ...], *given: Tensor, **sizes: int) -> None:
        gpu.launched(kernel, grid)(
            logits, adjusted, records, logits.stride(0), *given, vocabulary,
            parts, PART=PART, **sizes, **OPTIONS,
        )  # fmt: skip

    wide: dict[str, int] = {"PARTS": power_of_two(parts), "CHUNK": CHUNK}
    raw_tops, raw_sums, tops = (new(torch.float32, rows, parts) for _ in range(3))
    best_ids, masses = new(torch.int32, rows, parts), new(torch.float64, rows, parts)
    counts = new(torch.int32, rows if slots else 0, parts, BINS)
    bin_masses = new(torch.float64, *counts.shape)
    candidates, sizes = new(torch.int32, slots, vocabulary), new(torch.int32, rows)
    launch(weighing.survey, (rows, parts), raw_tops, raw_sums, tops, best_ids)
    if (choices.temperature > 0).any():
        given = tops, masses, counts, bin_masses
        launch(weighing.weigh, (rows, parts), *given, BINS=BINS, **wide)
    if slots:
        given = tops, counts, bin_masses, candidates, sizes
        launch(weighing.gather, (rows, parts), *given, BINS=BINS, **wide)
    tokens, finite = new(torch.int64, rows), new(torch.int32, rows)
    logprobs, logarithms = new(torch.float32, rows), new(torch.float64, rows)
    given = raw_tops, raw_sums, tops, best_ids, masses, candidates, sizes
    launch(choosing.choose, (rows,), *given, tokens, finite, logprobs, logarithms, **wide)
    return Chosen(tokens, finite.bool(), logprobs, logarithms)


def _adjusted(logits: Tensor, given: Adjustments | None) -> Tensor:
    """A copy with the adjustments; the logits themselves where there are none."""
    if given is None or (len(given.rows) == 0 and given.late is None):
        return logits
    adjusted = logits.clone(memory_format=torch.contiguous_format)
    entries, late = len(given.rows), given.late
    arrays: list[NDArray[Any]] = [
        np.stack((given.rows, given.ids), dtype=np.int32, casting="unsafe"),
        np.stack((given.bias, given.repetition, given.subtracted)),
    ]
    if late is not None:
        ends = (given.rows.searchsorted(late.rows, side) for side in ("left", "right"))
        arrays += [late.counts, np.stack((late.rows, late.sources, *ends)).astype(np.int32)]
        arrays += [np.stack((late.repetition, late.presence, late.frequency))]
    ids, numbers, *others = sent(arrays, logits.device)
    if entries:
        gpu.launched(weighing.adjust, (-(-entries // ADJUSTMENTS_EACH),))(
            adjusted, adjusted.stride(0), ids, numbers, entries,
            TOGETHER=ADJUSTMENTS_EACH, **OPTIONS,
        )  # fmt: skip
    if late is not None:
        gpu.launched(weighing.count_late, (len(late.rows),))(
            logits, adjusted, logits.stride(0), ids, numbers, *others, late.chosen, entries,
            logits.shape[1], TOGETHER=ADJUSTMENTS_EACH, **OPTIONS,
        )  # fmt: skip
    return adjusted


def _records(choices: Choices, filtered: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[rows, 8], in the order that `weighing.py` has."""
    slots = np.where(filtered, np.cumsum(filtered) - 1, -1)
    is_adjusted = np.zeros(len(slots))
    if choices.adjustments is not None:
        is_adjusted[choices.adjustments.rows] = 1
        if choices.adjustments.late is not None:
            is_adjusted[choices.adjustments.late.rows] = 1
    columns = (
        *(choices.temperature, choices.min_p, choices.top_p, choices.noise),
        *(choices.top_k, slots, is_adjusted, choices.logarithms),
    )
    return np.stack(columns, axis=1).astype(np.float64)


@cache
def _trusted(vocabulary: int, device: torch.device) -> bool:
    return gpu.passes("choices of tokens", device, lambda: _agrees(vocabulary, device))


def _agrees(vocabulary: int, device: torch.device) -> bool:
    """Whether some rows get the tokens that plain arithmetic gives: the best, all of them, each
    filter, and equal ones with what is adjusted, of which one counts once more."""
    numbers = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn((5, vocabulary), generator=numbers)
    logits[4] = logits[4].round()
    some = np.arange(0, vocabulary, max(1, vocabulary // 100))
    adjustments = Adjustments(
        rows=np.full(len(some), 4),
        ids=some,
        bias=np.linspace(-3, 3, len(some), dtype=np.float32),
        repetition=np.full(len(some), 1.3, dtype=np.float32),
        subtracted=np.where(some % 2, np.inf, 0.3).astype(np.float32),
        late=LateCounts(
            rows=np.asarray([1, 4]),
            sources=np.asarray([4, 1]),
            chosen=logits.argmax(dim=-1).to(device),
            counts=np.arange(len(some), dtype=np.int32),
            repetition=np.full(2, 1.3, dtype=np.float32),
            presence=np.full(2, 0.3, dtype=np.float32),
            frequency=np.full(2, 0.1, dtype=np.float32),
        ),
    )
    choices = Choices(
        temperature=np.asarray([0.0, 0.8, 0.9, 1.1, 1.0]),
        min_p=np.asarray([0.0, 0.0, 1e-4, 0.0, 0.0]),
        top_k=np.asarray([0.0, 0.0, 0.0, 40.0, 7.0]),
        top_p=np.asarray([1.0, 1.0, 0.95, 0.9, 1.0]),
        noise=np.asarray([0.0, 0.3, 0.9, 0.6, 0.8]),
        logarithms=np.ones(5),
        adjustments=adjustments,
    )
    given = logits.to(device)
    chosen = choose_tokens(given, choices)
    tokens = chosen.tokens.tolist()
    adjusted = reference.adjusted_logits(logits, adjustments)
    right = [reference.choose_token(adjusted[row], choices, row) for row in range(len(logits))]
    logprobs = logits.log_softmax(dim=-1)[torch.arange(len(right)), torch.tensor(right)]
    difference = float((chosen.logprobs.cpu() - logprobs).abs().max())
    exact = torch.equal(_adjusted(given, adjustments).cpu(), adjusted)
    return tokens == right and exact and bool(chosen.finite.all()) and difference < TOLERANCE
