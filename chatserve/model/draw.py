"""One token from one row of logits on a CPU, without sorting or weighing what cannot come.

May not know: batches, penalties, requests.

Theory: filters keep the best tokens, and a softmax falls off so fast that these are few. So only
tokens within reach of the best, exp(-20) of its weight and more, are weighed in float64 and sorted;
what the others weigh together, in float32, counts towards the share that top_p speaks of. Where a
filter could keep tokens beyond that reach, all are taken within it. What is kept is laid out in
vocabulary order, and the token is where the noise falls in the cumulative weight.
"""

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

REACH = 20.0  # in units of temperature, of logits below the best one
_ROUNDING = 2.0  # of weights at the edge of the reach, as a factor, and more than it can be

Weights = NDArray[np.float64]
Ids = NDArray[np.int64]


class Filters(Protocol):
    """What of a `SampleRow` is needed here."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...


# By a temperature next to nothing all but the best become -inf, which weighs 0, as it should.
@np.errstate(divide="ignore", over="ignore", invalid="ignore")
def draw(logits: NDArray[np.float32], row: Filters, noise: float) -> int:
    """The token that the noise falls on, a number as `sampling.uniform` gives it.

    logits: [vocabulary], none NaN or +inf, at least one finite; row.temperature is not 0.
    """
    best = float(logits.max())
    ids: Ids | None = None
    if row.top_k > 0 or row.top_p < 1 or row.min_p > 0:
        ids, weights = _kept(logits, best, row, REACH) or _all_kept(logits, best, row)
    else:
        weights = _weights(logits, best, row)
    cumulative = weights.cumsum()
    # A noise of 53 bits leaves the product below the sum: it is always in some token's part.
    place = int(cumulative.searchsorted(noise * cumulative[-1], side="right"))
    return place if ids is None else int(ids[place])


def _weights(logits: NDArray[np.float32], best: float, row: Filters) -> Weights:
    """Relative to the best token: its weight is exactly 1, so it never rounds away."""
    return np.exp((logits.astype(np.float64) - best) / row.temperature)


def _all_kept(logits: NDArray[np.float32], best: float, row: Filters) -> tuple[Ids, Weights]:
    kept = _kept(logits, best, row, math.inf)
    assert kept is not None, "everything is within reach"
    return kept


def _kept(
    logits: NDArray[np.float32], best: float, row: Filters, reach: float
) -> tuple[Ids, Weights] | None:
    """The tokens that stay, in vocabulary order, and their weights; None where tokens out of reach
    could be among them."""
    near = np.flatnonzero(logits >= best - reach * row.temperature)
    weights = _weights(logits[near], best, row)
    complete = len(near) == len(logits)
    if row.min_p > 0:
        complete = complete or row.min_p > _ROUNDING * math.exp(-reach)
        strong = weights >= row.min_p
        near, weights = near[strong], weights[strong]
    if row.top_k > 0:
        complete = complete or row.top_k <= len(near)
    rest = 0.0
    if not complete and row.top_k == 0 and row.min_p == 0:
        far = np.exp((logits - np.float32(best)) / np.float32(row.temperature))
        far[near] = 0.0
        rest = float(far.sum(dtype=np.float64))
        complete = row.top_p * (float(weights.sum()) + rest) < float(weights.sum())
    if not complete:
        return None
    chosen = keep_top(weights, rest, top_k=row.top_k, top_p=row.top_p)
    return near[chosen], weights[chosen]


def keep_top(weights: Weights, rest: float, *, top_k: int, top_p: float) -> Ids:
    """Which of the weights [n] are the best top_k (0: all), and of these the fewest best that reach
    top_p of their sum and `rest`, always one: indices in order. Of equal ones the first stay."""
    ordered = np.sort(weights)[::-1]
    if top_k > 0:
        ordered = ordered[:top_k]
    stay = len(ordered)
    if top_p < 1:  # at 1 rounding could end too early
        cumulative = ordered.cumsum()
        share = top_p * (float(cumulative[-1]) + rest)
        # Two ways to add may differ in the last bit.
        stay = min(stay, 1 + int(cumulative.searchsorted(share, side="left")))
    last = ordered[stay - 1]
    better = weights > last
    equal = np.flatnonzero(weights == last)
    better[equal[: stay - int(better.sum())]] = True
    return np.flatnonzero(better)
