"""What goes out of one socket: one frame after the other, by one writer.

It may not know what frames say. Theory of operation: `put` waits until its frame is written, so a
source has at most one frame here while the rest of its text merges where it comes from; `post`
does not wait, for answers, of which only so many may be waiting. The writer takes frames in the
order of their coming. `finish` ends it all: what came before still goes out, then the close frame.
"""

import asyncio
from collections import deque

from starlette.types import Send

_POLICY_VIOLATION = 1008


class Outbox:
    """One per socket."""

    def __init__(self, answers_max: int) -> None:
        self._answers_max = answers_max
        self._answers = 0
        self._frames: deque[tuple[str, asyncio.Future[None] | None]] = deque()
        self._close: tuple[int, str] | None = None
        self._news = asyncio.Event()

    @property
    def finished(self) -> bool:
        """Nothing is taken any more."""
        return self._close is not None

    def post(self, frame: str) -> None:
        """Take an answer. A peer that asks for more answers than it reads is sent away."""
        if self.finished:
            return
        if self._answers >= self._answers_max:
            self.finish(_POLICY_VIOLATION, "Answers are not read.")
            return
        self._answers += 1
        self._frames.append((frame, None))
        self._news.set()

    async def put(self, frame: str) -> None:
        """Take a frame and wait until it is written; cancelled while it waits, it is withdrawn."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not self.finished:
            self._frames.append((frame, written))
            self._news.set()
        # After `finish` nothing is written: the source waits until the socket's end cancels it.
        await written

    def finish(self, code: int, reason: str) -> None:
        """Take nothing more, and close after what is here; the first word counts."""
        if not self.finished:
            self._close = (code, reason)
            self._news.set()

    async def write(self, send: Send) -> None:
        """The writer: until the close frame is out. Raises OSError for a peer that has gone."""
        while self._frames or self._close is None:
            if not self._frames:
                self._news.clear()
                await self._news.wait()
                continue
            frame, written = self._frames.popleft()
            if written is None:
                self._answers -= 1
            elif written.cancelled():
                continue
            await send({"type": "websocket.send", "text": frame})
            if written is not None and not written.done():
                written.set_result(None)
        code, reason = self._close
        await send({"type": "websocket.close", "code": code, "reason": reason})
