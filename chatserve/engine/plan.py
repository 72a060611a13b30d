"""StepPlan and StepResult: the orders for one forward pass, and its outcome.

Frozen values between the event loop (`scheduler.py`) and the runner's thread (`model_runner.py`).
A plan names everything that touches device memory in its step: page copies first, then the slices.

    slices   s0: positions 32..48 of sequence 7      outputs
             s1: position  91     of sequence 9  ──▶ row 0
             s2: positions  0..5  of sequence 12 ──▶ rows 1, 2, 3   (three samples of one prompt)

Orders and slices are tuples, since a step makes one of each for every sequence.

A slice whose last token is not known yet (the step before is still in flight) names it by that
step's output row: `pending`.
"""

from dataclasses import dataclass
from typing import NamedTuple

from chatserve.cache.block_manager import PageCopy
from chatserve.engine.token_counts import NOTHING_COUNTED, TokenCounts
from chatserve.engine.values import Sampling, TokenLogprobs


class SampleOrder(NamedTuple):
    """Sample one token: for whom, how, and with what noise.

    position is the absolute position of the token to be sampled. banned: ids that may not be
    chosen. counts: of all tokens before it that are known, only where the sampling needs them; a
    pending one counts too.
    """

    sequence: int
    incarnation: int
    sampling: Sampling
    sample: int
    position: int
    banned: tuple[int, ...] = ()
    counts: TokenCounts = NOTHING_COUNTED


class Slice(NamedTuple):
    """Compute positions start .. start + len(tokens) (+ 1 if pending) of one sequence.

    tokens: their known ids. pending: output row of the step before whose token comes last.
    pages: the sequence's page table, int32 bytes. write False: a full hit; the row attends to
    its own sealed page and nothing is written. `incarnation` tells a result for an older life
    of the sequence (before a preemption, or after its end) from a current one.
    """

    sequence: int
    incarnation: int
    start: int
    tokens: tuple[int, ...]
    pending: int | None
    pages: bytes
    write: bool
    orders: tuple[SampleOrder, ...]

    @property
    def end(self) -> int:
        """The position after the last one that this slice computes."""
        return self.start + len(self.tokens) + (self.pending is not None)


class PageMove(NamedTuple):
    """Copy one page: from a page of the device to a slot of host memory, or the other way round."""

    source: int
    target: int


class Moves(NamedTuple):
    """Copies between the device and host memory that travel with a step, beside its slices: those
    touch no page of a promotion, and write to no page of a save. Both may be empty.

    saves: device page to host slot. promotions: host slot to device page.
    """

    saves: tuple[PageMove, ...] = ()
    promotions: tuple[PageMove, ...] = ()


NO_MOVES = Moves()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Numbers start at 1 and grow by 1. Without slices it only moves pages.

    after: the last step that had committed when this one was planned. A failure of a later one
    makes this plan void, since it counts on what that step should have written.
    """

    number: int
    after: int
    copies: tuple[PageCopy, ...]
    slices: tuple[Slice, ...]
    moves: Moves = NO_MOVES

    @property
    def token_count(self) -> int:
        """Positions that the step computes."""
        return sum(item.end - item.start for item in self.slices)


@dataclass(frozen=True, slots=True)
class StepFailure:
    """Why a step has no results.

    void: it was not run at all, since the step before it failed. fatal: the device is gone and no
    later step can succeed. out_of_memory: a smaller step may succeed.
    """

    reason: str
    void: bool = False
    fatal: bool = False
    out_of_memory: bool = False


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave, in the order of the plan's orders over all slices.

    tokens[i] is meaningless where finite[i] is False (NaN or infinite logits in that row).
    seconds: how long the runner was busy with it, its moves left out; move_seconds: with those.
    saved, promoted: in the order of the plan's moves, the checksum of each page as it is on the
    device, before it was saved and after it was brought up (`ops.page_checksums`).
    """

    number: int
    tokens: tuple[int, ...] = ()
    finite: tuple[bool, ...] = ()
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    seconds: float = 0.0
    move_seconds: float = 0.0
    saved: tuple[int, ...] = ()
    promoted: tuple[int, ...] = ()
    failure: StepFailure | None = None
