"""Reply: one answer under way, with its task and its viewers.

It may not know requests before they were accepted, HTTP, or pages. Theory of operation: the
reply's task is the one consumer of the engine's Stream. It feeds each sample's log (`sample.py`)
and wakes the viewers; a Viewing reads the logs from its own position, so it is a mailbox that
merges: a late or slow viewer finds one Delta per sample, and nothing grows for it.

    Stream ─▶ Reply.run (a task of the lifespan's TaskGroup) ─▶ SampleText 0..n ─▶ Viewing, Viewing
                                                                     final ─────▶

    state       left by                                      viewers get
    unviewed    the first view()                             -
                patience.before_first_view seconds           as abandoned
    viewed      the last viewing closed, and then
                patience.after_last_view seconds             as abandoned
    abandoned   the stream is closed, the engine aborts      SampleEnd 'abort' each, Done
    ended       every sample has ended                       Done, or Failed if all had errors
    broken      a mistake of ours, or the server stops       Failed

Every reply has exactly one final event, whatever happens to its task. A viewer that comes after
it gets the whole text and the same final event.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Self

from chatserve.bell import Bell
from chatserve.chat.audience import Audience, Clock, Patience
from chatserve.chat.text.sample import Cursor, SampleText
from chatserve.chat.values import Delta, Done, Failed, ReplyEvent, Timings, Usage
from chatserve.engine.stream import Stream
from chatserve.engine.values import Emission, Receipt
from chatserve.errors import ChatserveError, EngineError, Unavailable

_log = logging.getLogger(__name__)

# Whoever opens a reply looks at it in the same breath; the exception is a caller that was
# cancelled just when `open` returned.
API_PATIENCE = Patience(before_first_view=5.0, after_last_view=0.0)


class Reply:
    """A generation in flight. `run` is its task; `view` is for the response that shows it."""

    def __init__(
        self,
        stream: Stream,
        samples: Sequence[SampleText],
        *,
        prompt_tokens: int,
        accepted_at: float,
        clock: Clock,
        patience: Patience = API_PATIENCE,
        on_done: Callable[[Sequence[SampleText]], None] | None = None,
    ) -> None:
        """on_done: called when all samples have ended, before anybody can know it."""
        self.request_id = stream.request_id
        self.samples = tuple(samples)
        self.final: Done | Failed | None = None
        self._stream = stream
        self._prompt_tokens = prompt_tokens
        self._accepted_at = accepted_at
        self._on_done = on_done
        self._first_token_at: float | None = None
        self._receipt: Receipt | None = None
        self._clock = clock
        self._audience: Audience[Viewing] = Audience(clock, patience, self.abandon)

    # For the response ------------------------------------------------------------------------

    def view(self) -> "Viewing":
        """Look at the reply for as long as the `with` block lasts."""
        return Viewing(self)

    def abandon(self) -> None:
        """Nobody wants the rest. Synchronous, idempotent; the task ends by itself."""
        self._audience.rest()
        if self.final is None:
            self._stream.close()

    # The task --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Consume the stream to its end. A mistake of ours ends this reply and no other."""
        try:
            with self._stream:
                async for batch in self._stream:
                    for emission in batch:
                        self._take(emission)
            self._end()
        except asyncio.CancelledError:
            self._fail(Unavailable("The server is shutting down."))
            raise
        except Exception:
            _log.exception("reply %s failed", self.request_id)
            self._fail(EngineError("The server failed on this reply."))

    def start(self, task_group: asyncio.TaskGroup) -> None:
        """Give the reply its task. Raises Unavailable where no task may start any more."""
        work = self.run()
        try:
            task = task_group.create_task(work, name=f"reply {self.request_id}")
        except RuntimeError as error:
            work.close()
            self._settle()
            raise Unavailable("The server is shutting down.") from error
        # A task that is cancelled before its first step never enters `run`.
        task.add_done_callback(self._settle)

    def _settle(self, _: object = None) -> None:
        self._stream.close()
        self._fail(Unavailable("The server is shutting down."))

    def _take(self, emission: Emission) -> None:
        sample = self.samples[emission.sample]
        if emission.receipt is not None and self._receipt is None:
            self._receipt = emission.receipt  # later samples share the first one's prompt
        if emission.tokens and self._first_token_at is None:
            self._first_token_at = self._clock.now()
        if sample.feed(emission):
            assert sample.kept_tokens is not None
            self._stream.finish(emission.sample, sample.kept_tokens)
        self._wake(emission.sample)

    def _end(self) -> None:
        for sample in self.samples:
            sample.break_off("abort")
        errors = [sample.end.error for sample in self.samples if sample.end is not None]
        first = next((error for error in errors if error is not None), None)
        if first is not None and None not in errors:
            self._conclude(Failed(first))
            return
        if self._on_done is not None:
            self._on_done(self.samples)
        receipt = self._receipt or Receipt()
        now, first_at = self._clock.now(), self._first_token_at
        usage = Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=sum(len(sample.token_ids) for sample in self.samples),
            cached_tokens=receipt.cached,
        )
        timings = Timings(
            to_first_token=None if first_at is None else first_at - self._accepted_at,
            total=now - self._accepted_at,
        )
        self._conclude(Done(usage=usage, receipt=receipt, timings=timings))

    def _fail(self, error: ChatserveError) -> None:
        if self.final is None:
            self._conclude(Failed(error))

    def _conclude(self, final: Done | Failed) -> None:
        assert self.final is None, "a second final event"
        self.final = final
        self._audience.close()
        self._wake(*range(len(self.samples)))

    def _wake(self, *samples: int) -> None:
        for viewing in self._audience.viewings:
            viewing.wake(samples)

    # Viewers ---------------------------------------------------------------------------------

    def attach(self, viewing: "Viewing") -> None:
        """Called by a viewing as its block begins."""
        self._audience.join(viewing)

    def detach(self, viewing: "Viewing") -> None:
        """Called by a viewing as its block ends. The last one decides what becomes of us."""
        self._audience.leave(viewing)


class Viewing:
    """One viewer's place in a reply: iterates over its events, up to the final one.

    Use it as a context manager, once. `close()` is synchronous and idempotent; a reader that
    waits finds the iteration at its end.
    """

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._cursors = [Cursor() for _ in reply.samples]
        self._shown = [0 for _ in reply.samples]  # code points given so far
        self._ended: set[int] = set()
        # Samples that may have something new, in the order in which they got it.
        self._news: dict[int, None] = dict.fromkeys(range(len(reply.samples)))
        self._arrived = Bell()
        self._over = False

    def __enter__(self) -> Self:
        assert not self._over, "a viewing is entered once"
        self._reply.attach(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Look away."""
        self._over = True
        self._news.clear()
        self._arrived.ring()
        self._reply.detach(self)

    def wake(self, samples: Sequence[int]) -> None:
        """Called by the reply: these samples have news."""
        if not self._over:
            self._news.update(dict.fromkeys(samples))
            self._arrived.ring()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ReplyEvent:
        while True:
            event = self._next()
            if event is not None:
                return event
            if self._over:
                raise StopAsyncIteration
            self._arrived.mute()
            await self._arrived.wait()

    def _next(self) -> ReplyEvent | None:
        while self._news:
            sample = next(iter(self._news))
            event = self._next_of(self._reply.samples[sample])
            if event is not None:
                # To the back of the queue, so that no sample waits for another's.
                del self._news[sample]
                self._news[sample] = None
                return event
            del self._news[sample]
        if self._over or self._reply.final is None:
            return None
        self._over = True
        return self._reply.final

    def _next_of(self, sample: SampleText) -> ReplyEvent | None:
        index = sample.sample
        cursor = self._cursors[index]
        end = Cursor(len(sample.texts), len(sample.token_ids))
        if cursor != end:
            text = "".join(sample.texts[cursor.texts :])
            self._cursors[index] = end
            self._shown[index] += len(text)
            return Delta(
                sample=index,
                seq=self._shown[index],
                text=text,
                token_ids=tuple(sample.token_ids[cursor.tokens :]),
                chances=sample.chances_from(cursor.tokens),
            )
        if sample.end is not None and index not in self._ended:
            self._ended.add(index)
            return sample.end
        return None
