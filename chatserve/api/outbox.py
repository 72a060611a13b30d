"""What goes out of one socket: one frame after the other, by one writer.

It may not know what frames say. Theory of operation: `put` waits until its frame is written, so a
source has at most one frame here while the rest of its text merges where it comes from; `post`
does not wait, for answers, of which only so many may be waiting. The writer takes frames in the
order of their coming; a source that finds nothing ahead of it and nothing under way writes by
itself, which saves two turns of the loop for nearly every token. `finish` ends it all: what came
before still goes out, then the close frame.
"""

import asyncio
import contextlib
from collections import deque

from starlette.types import Send

from chatserve.bell import Bell

_POLICY_VIOLATION = 1008


class Outbox:
    """One per socket."""

    def __init__(self, answers_max: int) -> None:
        self._answers_max = answers_max
        self._answers = 0
        self._frames: deque[tuple[str, asyncio.Future[None] | None]] = deque()
        self._close: tuple[int, str] | None = None
        self._news = Bell()
        self._send: Send | None = None  # once there is a writer
        self._writing = False  # a frame is on its way out

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
        self._news.ring()

    async def put(self, frame: str) -> None:
        """Take a frame and wait until it is written; cancelled while it waits, it is withdrawn."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._send is not None and not (self._writing or self._frames or self.finished):
            with contextlib.suppress(OSError):  # the peer has gone, and so will the source
                await self._write_one(self._send, frame)
                return
        elif not self.finished:
            self._frames.append((frame, written))
            self._news.ring()
        # After `finish` nothing is written: the source waits until the socket's end cancels it.
        await written

    def finish(self, code: int, reason: str) -> None:
        """Take nothing more, and close after what is here; the first word counts."""
        if not self.finished:
            self._close = (code, reason)
            self._news.ring()

    async def write(self, send: Send) -> None:
        """The writer: until the close frame is out. Raises OSError for a peer that has gone."""
        self._send = send
        while self._writing or self._frames or self._close is None:
            if self._writing or not self._frames:
                self._news.mute()
                await self._news.wait()
                continue
            frame, written = self._frames.popleft()
            if written is None:
                self._answers -= 1
            elif written.cancelled():
                continue
            await self._write_one(send, frame)
            if written is not None and not written.done():
                written.set_result(None)
        code, reason = self._close
        await send({"type": "websocket.close", "code": code, "reason": reason})

    async def _write_one(self, send: Send, frame: str) -> None:
        self._writing = True
        try:
            await send({"type": "websocket.send", "text": frame})
        finally:
            self._writing = False
            if self._frames or self.finished:
                self._news.ring()
