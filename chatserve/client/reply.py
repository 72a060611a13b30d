"""Reply: one answer as it comes, over however many connections; a mailbox that merges.

It may not know sockets or frames: `exchange.py` feeds it. Theory of operation: the text only grows,
except by a snapshot, and each reader's step takes all that is new, so nothing queues. What
the text must be at each event is known from the event's cursor (`seq` code points are before it),
so a gap or a doubled text is noticed and never shown.

    Exchange ─▶ accept, show, take_delta, take_snapshot, wait_for, end | fail
    reader   ─▶ async for text in reply          text that follows what was given before
                async for event in reply.events()    progress, waits and replacements too
                await reply.wait()               the end

One reader at a time.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from enum import Enum
from typing import Self

from chatserve.client.errors import BrokenProtocol, ChatError, TextReplaced
from chatserve.client.values import (
    Final,
    ReplyEvent,
    ReplyProgress,
    ReplyWaiting,
    TextDelta,
    TextSnapshot,
)
from chatserve.client.wire import Cursor


class Leaf(Enum):
    """Where a turn goes that names no parent."""

    CURRENT = "current"


LEAF = Leaf.CURRENT


class Reply:
    """An answer under way, or ended. Use it inside the client's block.

    ask: the client's own id of the request. id, turn: the server's, None until it has accepted.
    final: None until the reply has ended as it should. `close` is synchronous and idempotent.
    """

    def __init__(
        self,
        conversation: str,
        *,
        ask: str | None,
        id: str | None = None,
        characters_max: int,
        wake: Callable[[], None],
    ) -> None:
        self.conversation = conversation
        self.ask = ask
        self.id = id
        self.turn: str | None = None
        self.final: Final | None = None
        self.progress: ReplyProgress | None = None
        self.cursor: Cursor | None = None
        self.stop_wanted = False
        self._wake_exchange = wake
        self._characters_max = characters_max
        self._texts: list[str] = []
        self._length = 0
        self._error: ChatError | None = None
        self._waiting = ReplyWaiting(reason=None)
        self._accepted = asyncio.Event()
        self._over = asyncio.Event()
        self._news = asyncio.Event()
        self._closed = False
        # The reader's place.
        self._reading = False
        self._texts_read = 0
        self._replaced = False
        self._progress_read: ReplyProgress | None = None
        self._waiting_read = self._waiting
        # Of the reader of texts: what it was given, and what of that has yet to come again.
        self._given: list[str] = []
        self._echo = ""

    # For the reader --------------------------------------------------------------------------

    @property
    def text(self) -> str:
        """All that was said so far."""
        return "".join(self._texts)

    @property
    def over(self) -> bool:
        """It has ended, as it should or not, or was closed."""
        return self._over.is_set()

    async def accepted(self) -> Self:
        """Wait until the server keeps the turn; from then on it is not lost. Raises ChatError."""
        await self._accepted.wait()
        if self._error is not None and self.turn is None:
            raise self._error
        return self

    async def wait(self) -> Final:
        """Wait for the end, which needs no reader. Raises ChatError."""
        await self._over.wait()
        if self._error is not None:
            raise self._error
        assert self.final is not None, "over without an end"
        return self.final

    def stop(self) -> None:
        """Have the server end it with what it has said; the final event follows."""
        self.stop_wanted = True
        self._wake_exchange()

    def close(self) -> None:
        """Look away: the reply goes on at the server."""
        if not self._closed:
            self._closed = True
            if not self.over:
                self.fail(ChatError("The reply was closed.", code="reply_closed"))
            self._wake_exchange()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        """Text that follows what was given. Raises ChatError, TextReplaced among them."""
        while True:
            event = await self._next()
            match event:
                case None:
                    if self._echo:
                        raise self._begin_again()
                    raise StopAsyncIteration
                case TextSnapshot(text=text):
                    self._echo = "".join(self._given)
                    new = self._beyond_echo(text)
                case TextDelta(text=text):
                    new = self._beyond_echo(text)
                case _:
                    continue
            if new:
                self._given.append(new)
                return new

    async def events(self) -> AsyncGenerator[ReplyEvent]:
        """All that happens, merged. Raises ChatError at its end, if the reply ends with one."""
        while (event := await self._next()) is not None:
            yield event

    async def _next(self) -> ReplyEvent | None:
        assert not self._reading, "a reply has one reader at a time"
        self._reading = True
        try:
            while True:
                event = self._take_news()
                if event is not None:
                    return event
                if self.over:
                    if self._error is not None:
                        raise self._error
                    return None
                self._news.clear()
                await self._news.wait()
        finally:
            self._reading = False

    def _take_news(self) -> ReplyEvent | None:
        if self._waiting != self._waiting_read:
            self._waiting_read = self._waiting
            return self._waiting
        if self._replaced or self._texts_read < len(self._texts):
            text = "".join(self._texts[self._texts_read :])
            self._texts_read = len(self._texts)
            if self._replaced:
                self._replaced = False
                return TextSnapshot(text=text)
            return TextDelta(text=text)
        if self.progress is not None and self.progress != self._progress_read and not self._length:
            self._progress_read = self.progress
            return self.progress
        return None

    def _beyond_echo(self, text: str) -> str:
        """What of this text the reader does not have."""
        if text.startswith(self._echo):
            new, self._echo = text[len(self._echo) :], ""
            return new
        if self._echo.startswith(text):
            self._echo = self._echo[len(text) :]
            return ""
        raise self._begin_again()

    def _begin_again(self) -> TextReplaced:
        self._given.clear()
        self._echo = ""
        self._texts_read = 0
        return TextReplaced()

    # For the exchange ------------------------------------------------------------------------

    def accept(self, id: str, turn: str) -> None:
        """The server has it."""
        self.id, self.turn = id, turn
        self._accepted.set()
        self.wait_for(None)

    def show(self, progress: ReplyProgress) -> None:
        """How far the prompt is."""
        self.progress = progress
        self._news.set()

    def wait_for(self, reason: str | None) -> None:
        """Why nothing comes, or None: it comes again."""
        self._waiting = ReplyWaiting(reason=reason)
        self._news.set()

    def take_delta(self, cursor: Cursor, text: str) -> None:
        """Text up to the cursor. Raises BrokenProtocol where it does not follow what is here."""
        if cursor.seq - len(text) != self._length:
            raise BrokenProtocol("The reply's text has a gap, or comes twice.")
        self._grow(cursor, text)

    def take_snapshot(self, cursor: Cursor, text: str) -> None:
        """The whole text up to the cursor."""
        if cursor.seq != len(text):
            raise BrokenProtocol("A snapshot is the whole text.")
        self._texts.clear()
        self._length = self._texts_read = 0
        self._replaced = True
        self._grow(cursor, text)

    def _grow(self, cursor: Cursor, text: str) -> None:
        if cursor.seq > self._characters_max:
            raise BrokenProtocol(f"A reply has at most {self._characters_max} characters.")
        self.cursor = cursor
        self._length = cursor.seq
        if text:
            self._texts.append(text)
        self._news.set()

    def end(self, cursor: Cursor, final: Final | ChatError) -> None:
        """The one final event. Raises BrokenProtocol if text before it is missing."""
        if cursor.seq != self._length + 1:
            raise BrokenProtocol("The reply's end does not follow its text.")
        if isinstance(final, ChatError):
            self.fail(final)
        else:
            self.final = final
            self._finish()

    def fail(self, error: ChatError) -> None:
        """It ends like this; the first end counts."""
        if not self.over:
            self._error = error
            self._finish()

    def _finish(self) -> None:
        self._over.set()
        self._accepted.set()
        self._news.set()
