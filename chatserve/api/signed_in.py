"""What goes on for long under a sign-in, ended when that is ended.

It may not know what is said. Theory of operation: a short answer runs to its end whatever happens
to its session. A socket that was accepted and a stream of events that has begun last, so those are
cancelled where they wait, as they are when their client leaves, and then said to be over: the
socket with a close code of its own, so that a page does not come back as after a lost connection;
the stream with its last, empty chunk, and whoever comes back is asked for a key.
"""

import asyncio
import contextlib

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatserve.api.session import Sessions

SIGNED_OUT = 4401  # a code of ours, after the status of what is asked without a key
_EVENTS = "text/event-stream"


class SignedIn:
    """One request under a session."""

    def __init__(self, send: Send, sessions: Sessions, cookie: str) -> None:
        self._send = send
        self._sessions = sessions
        self._cookie = cookie
        self._lasting = False  # begun, and not said to be over
        self._ended = False
        self._life = asyncio.timeout(None)

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive) -> None:
        """Run the app to its end, or to its session's."""
        try:
            async with self._life:
                with self._sessions.stay(self._cookie, self._end):
                    await app(scope, receive, self._watched)
        except TimeoutError:
            if not self._life.expired():
                raise
        if self._ended and self._lasting:
            with contextlib.suppress(OSError):  # the peer has gone by itself
                await self._send(_farewell(scope))

    async def _watched(self, message: Message) -> None:
        await self._send(message)
        match message["type"]:
            case "websocket.accept":
                self._lasting = True
            case "http.response.start":
                kind = Headers(raw=message.get("headers", [])).get("content-type", "")
                self._lasting = kind.startswith(_EVENTS)
            case "websocket.close":
                self._lasting = False
            case "http.response.body":
                self._lasting = self._lasting and message.get("more_body", False)
            case _:
                return
        if self._ended:
            self._end()

    def _end(self) -> None:
        self._ended = True
        if self._lasting:
            self._life.reschedule(asyncio.get_running_loop().time())


def _farewell(scope: Scope) -> Message:
    if scope["type"] == "websocket":
        return {"type": "websocket.close", "code": SIGNED_OUT, "reason": "Signed out."}
    return {"type": "http.response.body", "body": b"", "more_body": False}
