"""PageMover: the bytes of a step's moves, between the device's pages and the host's slots.

On CUDA the copies run on a stream of their own, beside the step's forward pass: nobody in the step
reads or writes those pages but the moves themselves. Slots are then in page-locked memory, without
which a copy would keep its caller waiting.
"""

import contextlib
import time
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chatserve.cache.page_pool import PageId
from chatserve.engine.checksums import checksum_weights
from chatserve.engine.plan import Moves, PageMove
from chatserve.engine.populate import PopulatedAhead
from chatserve.engine.runner import OutOfMemory
from chatserve.model.device_memory import lock_pages, unlock_pages
from chatserve.model.layout import KVLayout
from chatserve_kernels import ops
from chatserve_kernels.packing import Fetched, fetched, sent


class HostMemory:
    """`slots` pages of a layout in the host's memory; page-locked for a CUDA device.

    fill: as in `KVLayout.allocate`. Raises OutOfMemory where it is not to be had.
    """

    def __init__(
        self,
        layout: KVLayout,
        *,
        slots: int,
        device: torch.device | str,
        fill: float | None = None,
    ) -> None:
        self._locked = torch.device(device).type == "cuda"
        try:
            self.pool = layout.allocate(slots, device="cpu", fill=fill)
            if self._locked:
                lock_pages(self.pool)
        except RuntimeError as error:
            raise OutOfMemory(f"{slots} pages do not fit in host memory") from error
        # For I/O threads, uint8 [slots, page_bytes]; it holds on to the memory.
        self._bytes = self.pool.view(torch.uint8).numpy()
        # What is page-locked is there already.
        self._populated = (
            None if self._locked else PopulatedAhead(self._bytes, page_size=layout.page_size)
        )

    def close(self) -> None:
        """Nobody copies to it, or from it, any more. A device that is gone cannot be told."""
        if self._locked:
            self._locked = False
            with contextlib.suppress(RuntimeError):
                unlock_pages(self.pool)

    def use(self, pages: Iterable[PageId]) -> None:
        """These slots are about to be written."""
        if self._populated is not None:
            self._populated.use(max(pages, default=0))

    def page_view(self, page: PageId) -> memoryview:
        """The slot's bytes, writable (`traffic.PageMemory`)."""
        self.use((page,))
        return memoryview(self._bytes[page])


class Moving:
    """Moves under way."""

    def __init__(
        self, sums: Fetched, saves: int, since: float, events: Sequence[torch.cuda.Event]
    ) -> None:
        self._sums = sums
        self._saves = saves
        self._since = since
        self._events = events
        self._until = time.monotonic()

    @property
    def host_seconds(self) -> float:
        """For how long the caller was kept from other work."""
        return self._until - self._since

    def let_go(self) -> None:
        """Wait until nothing of them touches a page any more: after a step that failed its pages
        are others'. A device that is gone touches nothing."""
        if self._events:
            with contextlib.suppress(RuntimeError):
                self._events[1].synchronize()

    def finish(self) -> tuple[tuple[int, ...], tuple[int, ...], float]:
        """Wait for them. Checksums of the saves' and of the promotions' pages; the seconds that it
        all took."""
        seconds = self.host_seconds
        sums = self._sums.wait()[0].tolist()
        if self._events:
            self._events[1].synchronize()
            seconds = self._events[0].elapsed_time(self._events[1]) / 1000.0
        return tuple(sums[: self._saves]), tuple(sums[self._saves :]), seconds


class PageMover:
    """Owned by the runner. pool: the device's pages [pages, page_elements]."""

    def __init__(self, pool: Tensor, host: HostMemory) -> None:
        self._pool = pool
        self._host = host
        page_bytes = pool.shape[1] * pool.element_size()
        weights = torch.from_numpy(checksum_weights(page_bytes).view(np.int64))
        self._weights = weights.to(pool.device)
        self._stream = torch.cuda.Stream(pool.device) if pool.is_cuda else None

    def begin(self, moves: Moves) -> Moving:
        """Start them. On the runner's thread, before the step's forward pass."""
        since = time.monotonic()
        self._host.use(move.target for move in moves.saves)
        if self._stream is None:
            return Moving(self._move(moves), len(moves.saves), since, ())
        # Whatever still writes to a page that is to be saved was queued before this.
        self._stream.wait_stream(torch.cuda.current_stream(self._pool.device))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        try:
            with torch.cuda.stream(self._stream):
                start.record(self._stream)
                sums = self._move(moves)
                end.record(self._stream)
        except BaseException:
            self._stream.synchronize()
            raise
        return Moving(sums, len(moves.saves), since, (start, end))

    def _move(self, moves: Moves) -> Fetched:
        """Page by page: each is one contiguous piece on both sides."""
        for move in moves.promotions:
            self._pool[move.target].copy_(self._host.pool[move.source], non_blocking=True)
        (touched,) = sent([_pages(moves)], self._pool.device)
        sums = ops.page_checksums(self._pool, touched, self._weights)
        for move in moves.saves:
            self._host.pool[move.target].copy_(self._pool[move.source], non_blocking=True)
        return fetched((sums,), self._pool.device)


def _pages(moves: Moves) -> NDArray[np.int64]:
    """The device's pages: of the saves, then of the promotions, int64."""
    saves: tuple[PageMove, ...] = moves.saves
    pages = [move.source for move in saves] + [move.target for move in moves.promotions]
    return np.asarray(pages, dtype=np.int64)
