"""One token from each row of logits: the checked door of the kernels on a GPU.

May not know: requests, seeds. It sees numbers that say how each row's token is chosen.

Theory: there is no way without a kernel, since whoever asks has one of its own (`choose_tokens`
says None). In what order things happen: what `Adjustments` says of some logits; temperature 0 takes
the best, of equal ones the smallest id; else a token weighs exp((logit - best) / temperature), and
min_p, top_k and top_p take away all but the heaviest, of equal ones the smaller ids; then the token
is where the noise, a share of the whole, falls in what is left, in the order of ids.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chatserve_kernels import gpu

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Adjustments:
    """Of some logits, in numpy: rows, ids int64 [n], no pair twice, inside the logits; bias,
    repetition, subtracted float32 [n]. What they become, each operation rounded to float32: bias is
    added, then a positive one divided by repetition and another one multiplied, then `subtracted`
    taken off; where that is infinity the token is banned, whatever its logit was."""

    rows: NDArray[np.int64]
    ids: NDArray[np.int64]
    bias: NDArray[np.float32]
    repetition: NDArray[np.float32]
    subtracted: NDArray[np.float32]


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


def choose_tokens(logits: Tensor, choices: Choices) -> Chosen | None:
    """logits: float32 [R, vocabulary]; they are not changed. None where no kernel serves. Raises
    ValueError."""
    if logits.ndim != 2 or logits.dtype != torch.float32:
        raise ValueError(f"logits are {logits.dtype} {tuple(logits.shape)}, not float32 [R, any]")
    for name in ("temperature", "min_p", "top_k", "top_p", "noise", "logarithms"):
        if getattr(choices, name).shape != (logits.shape[0],):
            raise ValueError(f"{name} must be [{logits.shape[0]}]")
    _check_adjustments(choices.adjustments, *logits.shape)
    if not gpu.serves(logits.device.type) or logits.numel() == 0:
        return None
    from chatserve_kernels.gpu import sampling as on_gpu

    return on_gpu.choose_tokens(logits, choices) if on_gpu.served(logits) else None


def _check_adjustments(given: Adjustments | None, rows: int, vocabulary: int) -> None:
    if given is None:
        return
    count = given.rows.shape
    if any(each.shape != count for each in (given.ids, given.bias, given.repetition)):
        raise ValueError("adjustments must be alike")
    if len(count) != 1 or given.subtracted.shape != count:
        raise ValueError("adjustments must be [any]")
    for name, values, limit in (("rows", given.rows, rows), ("ids", given.ids, vocabulary)):
        if count[0] and not 0 <= values.min() <= values.max() < limit:
            raise ValueError(f"{name} of adjustments must be under {limit}")
