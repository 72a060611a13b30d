"""`/api/socket`: many conversations over one WebSocket.

It may not know frames' bytes (`socket_connection.py`) nor shapes (`chat_events.py`). A client's
frame is `{"type", "request", …}`:

    send     conversation, and a turn's fields     accepted … the reply's events
    attach   reply, after?                         accepted … its events from the cursor on
    stop     reply                                 (the reply's final event)
    ping                                           pong

Theory of operation: one reader always reads, so that pongs and closing are noticed whatever else
goes on; each frame that has to wait for something gets a task; one writer writes (`outbox.py`).
A viewing is one task that moves one frame at a time, so a socket that does not read lets its
viewings merge and nothing queues. All tasks live in the group that the endpoint's call awaits:
when it returns no viewing is left. A frame that cannot be met is answered with `failed`, and the
socket goes on; what is no JSON at all ends it (1007). On a drain the socket goes on until its last
viewing has ended, and closes with 1001.
"""

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import cast

import orjson
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.types import Receive, Scope, Send

from chatserve.api.access_log import log_failure
from chatserve.api.answer import Desk
from chatserve.api.chat_collaborators import ChatReply, Conversations
from chatserve.api.chat_events import (
    changed_frame,
    ended_frame,
    failed_frame,
    pieces,
    pong_frame,
    socket_frame,
)
from chatserve.api.chat_schema import ClientFrame, client_frame, request_of, turn_ask
from chatserve.api.gate import RequestGate
from chatserve.api.keys import Holder
from chatserve.api.outbox import Outbox
from chatserve.api.problems import ApiError
from chatserve.api.socket_connection import DRAIN
from chatserve.chat.conversations.reply_events import ReplyAccepted, ReplyFinal
from chatserve.chat.store.conversation import ReplyCursor
from chatserve.errors import Busy, ChatserveError, RequestError, Unavailable

SUBPROTOCOL = "chatserve.v1"

_GOING_AWAY = 1001
_INVALID_DATA = 1007
_INTERNAL_ERROR = 1011


def socket_routes(desk: Desk, conversations: Conversations) -> list[BaseRoute]:
    """The one socket."""
    return [WebSocketRoute("/api/socket", SocketEndpoint(desk, conversations))]


class SocketEndpoint:
    """An ASGI app. The door has checked Host, Origin and key before."""

    def __init__(self, desk: Desk, conversations: Conversations) -> None:
        self._desk = desk
        self._conversations = conversations
        self._gate = RequestGate()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        health, limits = self._desk.health, self._desk.limits
        if (await receive())["type"] != "websocket.connect":
            return
        if health.draining:
            raise Unavailable("The server is stopping.", retry_after=health.retry_after)
        if SUBPROTOCOL not in scope["subprotocols"]:
            raise RequestError(f"This socket speaks the subprotocol {SUBPROTOCOL} only.")
        holder: Holder = scope["state"]["holder"]
        with self._gate.enter(holder.name, limits.sockets_max):
            await send({"type": "websocket.accept", "subprotocol": SUBPROTOCOL})
            await Socket(self._desk, self._conversations, scope).live(receive, send)


class Socket:
    """One accepted socket."""

    def __init__(self, desk: Desk, conversations: Conversations, scope: Scope) -> None:
        self._desk = desk
        self._conversations = conversations
        self._scope = scope
        self._holder: Holder = scope["state"]["holder"]
        self._outbox = Outbox(desk.limits.socket_answers_max)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = 0  # `stop` frames being acted on
        self._looking = 0  # `send` and `attach` frames, each a viewing or about to be one
        self._viewings: dict[str, asyncio.Task[None]] = {}  # by reply
        self._draining = False

    async def live(self, receive: Receive, send: Send) -> None:
        """Until the peer has gone, or has been told to go."""
        async with asyncio.TaskGroup() as group:
            self._spawn(group, self._write(send))
            self._spawn(group, self._tell_changes())
            try:
                await self._read(receive, group)
            finally:
                for task in self._tasks:
                    task.cancel()

    def _spawn(
        self, group: asyncio.TaskGroup, work: Coroutine[object, object, None]
    ) -> asyncio.Task[None]:
        task = group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- the reader and the writer

    async def _read(self, receive: Receive, group: asyncio.TaskGroup) -> None:
        while True:
            message = await receive()
            match message["type"]:
                case "websocket.receive":
                    if not self._outbox.finished:
                        self._take(message["text"], group)
                case kind if kind == DRAIN:
                    self._draining = True
                    self._go_if_idle()
                case _:
                    return

    async def _write(self, send: Send) -> None:
        with contextlib.suppress(OSError):  # the peer has gone; the reader is told so too
            await self._outbox.write(send)

    async def _tell_changes(self) -> None:
        try:
            with self._conversations.changes(self._holder.name) as changes:
                async for change in changes:
                    await self._outbox.put(changed_frame(change))
        except Exception as error:
            log_failure(self._scope, error)
            self._outbox.finish(_INTERNAL_ERROR, "The server made a mistake.")

    def _go_if_idle(self) -> None:
        if self._draining and not self._looking:
            self._outbox.finish(_GOING_AWAY, "The server is shutting down.")

    # -- a client's frames

    def _take(self, text: str, group: asyncio.TaskGroup) -> None:
        """Act on a frame, or leave that to a task; never waits."""
        try:
            value: object = orjson.loads(text)
        except orjson.JSONDecodeError:
            self._outbox.finish(_INVALID_DATA, "A frame is a JSON object.")
            return
        request: str | None = None
        try:
            if not isinstance(value, dict):
                raise RequestError("A frame is a JSON object.")
            fields = cast(dict[str, object], value)
            request = request_of(fields, self._desk.limits)
            if request is None:
                raise RequestError("A frame needs a request: a short string.", param="request")
            self._act(client_frame(fields, self._desk.limits), group)
        except ChatserveError as error:
            self._outbox.post(failed_frame(error, request=request))

    def _act(self, frame: ClientFrame, group: asyncio.TaskGroup) -> None:
        limits = self._desk.limits
        match frame.kind:
            case "ping":
                self._outbox.post(pong_frame(frame.request))
            case "stop":
                if self._stopping >= limits.socket_requests_max:
                    raise Busy("This socket asks for too much at once.", retry_after=1.0)
                self._stopping += 1
                self._spawn(group, self._stop(frame))
            case _:
                if self._looking >= limits.socket_viewings_max:
                    raise Busy("This socket looks at too many replies.", retry_after=1.0)
                self._looking += 1
                self._spawn(group, self._look(frame))

    async def _stop(self, frame: ClientFrame) -> None:
        try:
            await self._conversations.stop(self._holder.name, frame.target)
        except Exception as error:
            self._fail(error, frame)
        finally:
            self._stopping -= 1

    async def _look(self, frame: ClientFrame) -> None:
        """Send a turn, or come back to a reply, and show the reply."""
        places = self._holder.requests_max or self._desk.limits.connections_max
        try:
            older = self._viewings.get(frame.target)
            if older is not None:  # the same reply from another place: one look at it is enough
                older.cancel()
                await asyncio.wait({older})
            with self._desk.gate.enter(self._holder.name, places):
                await self._show(await self._open(frame), frame.after, frame)
        except Exception as error:
            self._fail(error, frame)
        finally:
            self._looking -= 1
            self._go_if_idle()

    async def _open(self, frame: ClientFrame) -> ChatReply:
        if frame.kind == "attach":
            return await self._conversations.reply(self._holder.name, frame.target)
        turn = turn_ask(
            frame.turn,
            owner=self._holder.name,
            conversation=frame.target,
            limits=self._desk.limits,
        )
        return await self._conversations.send(turn)

    async def _show(self, reply: ChatReply, after: ReplyCursor | None, frame: ClientFrame) -> None:
        if after is not None and after == reply.end:
            accepted = ReplyAccepted(
                conversation=reply.conversation, turn=reply.turn, reply=reply.id
            )
            await self._outbox.put(ended_frame(accepted, frame.request))
            return
        own = asyncio.current_task()
        assert own is not None
        older = self._viewings.get(reply.id)
        if older is not None:  # a turn that was sent once more
            older.cancel()
        self._viewings[reply.id] = own
        try:
            with reply.view(after) as events:
                async for event in events:
                    for piece in pieces(event, self._desk.limits.event_text_max):
                        await self._outbox.put(
                            socket_frame(
                                piece,
                                conversation=reply.conversation,
                                reply=reply.id,
                                request=frame.request,
                            )
                        )
                    if isinstance(event, ReplyFinal):
                        return
            if not self._draining:
                raise Unavailable("The reply goes on elsewhere: attach again.", retry_after=1.0)
        except ChatserveError as error:
            self._outbox.post(failed_frame(error, request=frame.request, reply=reply.id))
        finally:
            if self._viewings.get(reply.id) is own:
                del self._viewings[reply.id]

    def _fail(self, error: Exception, frame: ClientFrame) -> None:
        if not isinstance(error, ChatserveError) or error.status >= 500:
            log_failure(self._scope, error)
        told = (
            error if isinstance(error, ChatserveError) else ApiError("The server made a mistake.")
        )
        self._outbox.post(failed_frame(told, request=frame.request))
