"""Stream: the mailbox between the engine and the one consumer of a request.

A mailbox merges instead of growing: a consumer that is late finds one emission per sample, with
all tokens since the last look, so memory is bounded by what the request may generate at all.

Theory of operation: `put` is called by the engine on the event loop and never waits. `get` waits
until there is something. Each sample ends in exactly one emission with `finish` set; after the
last sample's the stream is over and `get` raises StopAsyncIteration through `async for`.
"""

from collections.abc import Callable
from typing import Self

from chatserve.bell import Bell
from chatserve.engine.values import Emission, Progress


class Stream:
    """Emissions of one request, in order within each sample.

    `close()` is synchronous and idempotent: it tells the engine that nobody will read on. It is
    harmless after the final emission. Used as a context manager it closes on the way out.
    """

    def __init__(
        self,
        *,
        request_id: str,
        samples: int,
        on_close: Callable[["Stream"], None],
        on_finish: Callable[["Stream", int, int], None],
        on_progress: Callable[["Stream"], Progress | None],
    ) -> None:
        self.request_id = request_id
        self.samples = samples
        self._on_close = on_close
        self._on_finish = on_finish
        self._on_progress = on_progress
        self._mail: dict[int, Emission] = {}
        self._arrived = Bell()
        self._ended: set[int] = set()
        self._delivered: set[int] = set()
        self._closed = False
        self._unread: dict[int, tuple[int, ...]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[Emission, ...]:
        batch = await self.get()
        if not batch:
            raise StopAsyncIteration
        return batch

    @property
    def over(self) -> bool:
        """True once every sample's final emission has been put."""
        return len(self._ended) == self.samples

    @property
    def unfinished(self) -> frozenset[int]:
        """Samples whose final emission has not been put."""
        return frozenset(range(self.samples)) - self._ended

    def put(self, emission: Emission) -> None:
        """Merge one emission. Called by the engine only."""
        sample = emission.sample
        assert sample not in self._ended, "an emission after the final one"
        if self._closed:
            self._unread[sample] = self.unread(sample) + emission.tokens
            if emission.finish is not None:
                self._ended.add(sample)
            return
        waiting = self._mail.get(sample)
        self._mail[sample] = emission if waiting is None else _merge(waiting, emission)
        if emission.finish is not None:
            self._ended.add(sample)
        self._arrived.ring()

    async def get(self) -> tuple[Emission, ...]:
        """Wait for mail and take all of it; an empty tuple means the stream is over."""
        if not self._mail:
            if self._closed or len(self._delivered) == self.samples:
                return ()
            await self._arrived.wait()
        self._arrived.mute()
        batch = tuple(self._mail.values())
        self._mail.clear()
        self._delivered.update(item.sample for item in batch if item.finish is not None)
        return batch

    def finish(self, sample: int, kept_tokens: int) -> None:
        """Stop a sample because its text is complete; it keeps its first `kept_tokens` tokens.

        Tokens after those are cut off and their pages lose their names. The sample's final
        emission (FinishReason.STOP) follows through the mailbox; what was already waiting there
        is unchanged, so the consumer ignores tokens after its own cut. Does nothing where the
        sample has already ended.
        """
        if sample not in self._ended:
            self._on_finish(self, sample, kept_tokens)

    def unread(self, sample: int) -> tuple[int, ...]:
        """Tokens of a sample that were generated, and that nobody has read of a closed stream."""
        return self._unread.get(sample, ())

    def progress(self) -> Progress | None:
        """The request's progress; None once it has ended."""
        return None if self.over else self._on_progress(self)

    def close(self) -> None:
        """Abort what has not ended. Synchronous, idempotent."""
        if self._closed:
            return
        self._closed = True
        self._unread = {sample: emission.tokens for sample, emission in self._mail.items()}
        self._mail.clear()
        self._arrived.ring()
        if not self.over:
            self._on_close(self)


def _merge(first: Emission, second: Emission) -> Emission:
    return first._replace(
        tokens=first.tokens + second.tokens,
        logprobs=first.logprobs + second.logprobs,
        finish=second.finish,
        error=second.error,
        receipt=first.receipt or second.receipt,
    )
