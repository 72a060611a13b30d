"""SimulatedRunner: a model whose next token is a hash of everything before it.

For simulations, load tests and figures of the host's own time: it needs no model and no tensors,
and one wrong, stale, missing or misplaced page changes every token after it. What a real runner
keeps as K and V of a position, this one keeps as the position's token id; each row reads all of
its context through its page table, as attention does.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from chatserve.cache.page_pool import PageId
from chatserve.engine.checksums import checksum
from chatserve.engine.plan import Moves, SampleOrder, Slice, StepPlan, StepResult
from chatserve.engine.values import TokenLogprobs

_UNWRITTEN = -1
_MIX = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1

_NOISE = 0x2545F4914F6CDD1D

Tokens = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


class SimulatedRunner:
    """A runner (`runner.py`) over `pages` pages of `page_size` token ids.

    step_seconds: how long a step takes at the least. slots: of host memory; move_seconds: what a
    step's moves are said to take. before_step may raise to make a step fail; after_row may return
    False to make a row's logits count as not finite. Raises AssertionError when a row reads a
    position that nobody wrote.
    """

    def __init__(
        self,
        *,
        pages: int,
        page_size: int,
        vocabulary_size: int = 1000,
        step_seconds: float = 0.0,
        slots: int = 0,
    ) -> None:
        self.before_step: Callable[[StepPlan], None] = _nothing
        self.after_row: Callable[[SampleOrder], bool] = _finite
        self.computed_positions = 0
        self.move_seconds = 0.0
        self._pages: Tokens = np.full((pages, page_size), _UNWRITTEN, dtype=np.int64)
        self.host = SimulatedSlots(slots, page_size)
        self._vocabulary_size = vocabulary_size
        self._step_seconds = step_seconds
        self._last: tuple[int, ...] = ()
        self._weights = _position_weights(pages * page_size)

    def start(self, plan: StepPlan, computing: Callable[[], None] | None = None) -> StepResult:
        """One step: copies, then writes, then reads and samples."""
        started = time.monotonic()
        if computing is not None:
            computing()
        self.before_step(plan)
        saved, promoted = self._move(plan.moves)
        for copy in plan.copies:
            self._pages[copy.target] = self._pages[copy.source]
        self._write(plan.slices)
        asked = [item for item in plan.slices if item.orders]
        counts = np.array([len(item.orders) for item in asked], dtype=np.int64)
        digests = np.repeat(self._digests(asked), counts)
        orders = [order for item in asked for order in item.orders]
        tokens = _choose(digests, orders, self._vocabulary_size)
        finite = [self.after_row(order) for order in orders]
        wanted = [order.sampling.top_logprobs for order in orders]
        logprobs = [None if each is None else TokenLogprobs(-1.0) for each in wanted]
        self._last = tuple(tokens)
        self.computed_positions += plan.token_count
        if self._step_seconds:
            time.sleep(max(0.0, self._step_seconds - (time.monotonic() - started)))
        return StepResult(
            plan.number,
            tokens=self._last,
            finite=tuple(finite),
            logprobs=tuple(logprobs),
            seconds=time.monotonic() - started,
            move_seconds=self.move_seconds,
            saved=saved,
            promoted=promoted,
        )

    def close(self) -> None:
        """Nothing to give back."""

    def page_view(self, page: PageId) -> memoryview:
        """The bytes of a page's token ids, writable (`traffic.PageMemory`)."""
        return memoryview(self._pages[page]).cast("B")

    @property
    def page_bytes(self) -> int:
        """Size of a page."""
        return self._pages.strides[0]

    def _move(self, moves: Moves) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Saves, then promotions; the checksums of each page on the device."""
        slots = self.host.tokens
        for move in moves.saves:
            slots[move.target] = self._pages[move.source]
        for move in moves.promotions:
            self._pages[move.target] = slots[move.source]
        saved = tuple(checksum(self.page_view(move.source)) for move in moves.saves)
        return saved, tuple(checksum(self.page_view(move.target)) for move in moves.promotions)

    def _write(self, slices: Sequence[Slice]) -> None:
        """All of them at once: a step of thousands of rows must not take the interpreter's time
        that the loop needs."""
        written = [item for item in slices if item.write]
        if not written:
            return
        tokens: list[int] = []
        for item in written:
            tokens += item.tokens
            if item.pending is not None:
                tokens.append(self._last[item.pending])
        pages, first = _tables(written)
        ends = np.array([item.end for item in written], dtype=np.int64)
        counts = ends - np.array([item.start for item in written], dtype=np.int64)
        # Row i of the flat arrays is position `positions[i]` of the slice that it came from.
        positions = _steps_up(counts) + np.repeat(ends - counts, counts)
        size = self._pages.shape[1]
        where = pages[np.repeat(first, counts) + positions // size]
        self._pages[where, positions % size] = tokens

    def _digests(self, slices: Sequence[Slice]) -> Hashes:
        """A 64-bit hash, uint64 [slices], of each slice's whole context: of token ids and their
        positions, read through its page table."""
        if not slices:
            return np.empty(0, dtype=np.uint64)
        pages, first = _tables(slices)
        ends = np.array([item.end for item in slices], dtype=np.int64)
        positions = _steps_up(ends)
        size = self._pages.shape[1]
        tokens = self._pages[pages[np.repeat(first, ends) + positions // size], positions % size]
        assert int(tokens.min()) >= 0, "a row read a position that nobody wrote"
        hashes = (tokens.astype(np.uint64) + np.uint64(1)) * self._weights[positions]
        return np.add.reduceat(hashes, np.cumsum(ends) - ends)


class SimulatedSlots:
    """Host memory of as many pages (`traffic.PageMemory`)."""

    def __init__(self, slots: int, page_size: int) -> None:
        self.tokens: Tokens = np.full((slots, page_size), _UNWRITTEN, dtype=np.int64)

    def page_view(self, page: PageId) -> memoryview:
        """The bytes of a slot's token ids, writable."""
        return memoryview(self.tokens[page]).cast("B")


def _tables(slices: Sequence[Slice]) -> tuple[npt.NDArray[np.int32], Tokens]:
    """All page tables end to end, and where each begins."""
    lengths = np.array([len(item.pages) // 4 for item in slices], dtype=np.int64)
    flat = np.frombuffer(b"".join([item.pages for item in slices]), dtype=np.int32)
    return flat, np.cumsum(lengths) - lengths


def _steps_up(counts: Tokens) -> Tokens:
    """0, 1, .. for each count, end to end."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)


def _choose(digests: Hashes, orders: Sequence[SampleOrder], vocabulary_size: int) -> list[int]:
    """The token for each context: of the context alone if greedy, else of seed and sample too."""
    noise = [
        (order.sampling.seed * _NOISE + order.sample * _MIX) & _MASK
        if order.sampling.temperature > 0.0
        else 0
        for order in orders
    ]
    value = digests ^ np.array(noise, dtype=np.uint64)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    tokens = ((value ^ (value >> np.uint64(31))) % np.uint64(vocabulary_size)).tolist()
    for row, order in enumerate(orders):
        while tokens[row] in order.banned:
            tokens[row] = (tokens[row] + 1) % vocabulary_size
    return tokens


def _position_weights(count: int) -> Hashes:
    """Odd, position-dependent weights: Weyl's sequence, mixed."""
    positions = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_MIX)
    mixed = (positions ^ (positions >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    return mixed | np.uint64(1)


def _nothing(plan: StepPlan) -> None:
    del plan


def _finite(order: SampleOrder) -> bool:
    del order
    return True
