"""`/api/socket`: many conversations over one WebSocket.

It may not know frames' bytes (`socket_connection.py`) nor shapes (`chat_events.py`). A client's
frame is `{"type", "request", …}`:

    send     conversation, and a turn's fields     accepted … the reply's events
    attach   reply, after?                         accepted … its events from the cursor on
    detach   reply                                 detached; no event of the reply after it
    stop     reply                                 (the reply's final event)
    focus    conversation?                         nothing: its history is computed ahead
    draft    conversation?, parent?, text          nothing: so is what is typed there
    ping                                           pong

Theory of operation: one reader always reads, so that pongs and closing are noticed whatever else
goes on; each frame that has to wait for something gets a task; one writer writes (`outbox.py`).
A viewing is one task that moves one frame at a time, so a socket that does not read lets its
viewings merge and nothing queues. All tasks live in the group that the endpoint's call awaits:
when it returns no viewing is left. A frame that cannot be met, or read, is answered with `failed`
and the socket goes on, since other replies are on it. A turn's text counts against the budget of
bodies until the turn is accepted, and is not kept while its reply is looked at. On a drain the
socket goes on until its last viewing has ended, and closes with 1001.
"""

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import cast

import orjson
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.types import Receive, Scope, Send

from chatserve.api.answer import Desk
from chatserve.api.chat_collaborators import ChatReply, Conversations, Typist
from chatserve.api.chat_events import (
    changed_frame,
    detached_frame,
    ended_frame,
    failed_frame,
    pieces,
    pong_frame,
    socket_frame,
)
from chatserve.api.chat_schema import ClientFrame, client_frame, draft_ask, request_of, turn_ask
from chatserve.api.failure_log import log_failure
from chatserve.api.gate import RequestGate
from chatserve.api.keys import Holder
from chatserve.api.outbox import Outbox
from chatserve.api.problems import ApiError
from chatserve.api.socket_connection import DRAIN
from chatserve.chat.conversations.draft_ask import DraftAsk
from chatserve.chat.conversations.reply_events import ReplyAccepted, ReplyFinal
from chatserve.chat.store.conversation import ReplyCursor
from chatserve.errors import Busy, ChatserveError, RequestError, Unavailable

SUBPROTOCOL = "chatserve.v1"

_GOING_AWAY = 1001
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
        if health.draining or not health.ready:
            why = "The server is stopping." if health.draining else "The server is not ready."
            raise Unavailable(why, retry_after=health.retry_after)
        if SUBPROTOCOL not in scope["subprotocols"]:
            raise RequestError(f"This socket speaks the subprotocol {SUBPROTOCOL} only.")
        holder: Holder = scope["state"]["holder"]
        with self._gate.enter(holder.name, limits.sockets_max):
            await send({"type": "websocket.accept", "subprotocol": SUBPROTOCOL})
            await Socket(self._desk, self._conversations, scope).live(receive, send)


class Look:
    """A request's look at a reply, made by its task."""

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.answered = False
        self.over = False

    def end(self) -> None:
        """A newer one takes its place, or none. What it has to say until then is at most its own
        `accepted`: each request is answered."""
        self.over = True
        if self.answered:
            self.task.cancel()


class Socket:
    """One accepted socket."""

    def __init__(self, desk: Desk, conversations: Conversations, scope: Scope) -> None:
        self._desk = desk
        self._conversations = conversations
        self._scope = scope
        self._holder: Holder = scope["state"]["holder"]
        self._outbox = Outbox(desk.limits.socket_answers_max)
        self._tasks: set[asyncio.Task[None]] = set()
        self._acting = 0  # `stop` and `detach` frames being acted on
        self._looking = 0  # `send` and `attach` frames, each a viewing or about to be one
        self._looks: dict[str, Look] = {}  # by reply; an `attach` from its beginning on
        self._typist: Typist | None = None  # once something was typed
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
                if self._typist is not None:
                    self._typist.close()

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
                    # One read from the kernel may hold thousands of frames: the writer, and the
                    # other sockets, have their turn between them.
                    await asyncio.sleep(0)
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
        if self._draining and not self._looking and not self._acting:
            self._outbox.finish(_GOING_AWAY, "The server is shutting down.")

    # -- a client's frames

    def _take(self, text: str, group: asyncio.TaskGroup) -> None:
        """Act on a frame, or leave that to a task; never waits."""
        request: str | None = None
        try:
            fields = _object(text)
            request = request_of(fields, self._desk.limits)
            if request is None:
                raise RequestError("A frame needs a request: a short string.", param="request")
            self._act(client_frame(fields, self._desk.limits), group, size=len(text))
        except ChatserveError as error:
            self._outbox.post(failed_frame(error, request=request))

    def _act(self, frame: ClientFrame, group: asyncio.TaskGroup, *, size: int) -> None:
        limits = self._desk.limits
        match frame.kind:
            case "ping":
                self._outbox.post(pong_frame(frame.request))
            case "stop" | "detach":
                if self._acting >= limits.socket_requests_max:
                    raise Busy("This socket asks for too much at once.", retry_after=1.0)
                self._acting += 1
                if frame.kind == "stop":
                    self._spawn(group, self._stop(frame))
                else:
                    # Here and not in the task: the next frame finds the viewing's place free.
                    self._spawn(group, self._detach(frame, self._end_look(frame.target)))
            case "focus" | "draft":
                self._type(draft_ask(frame), group)
            case _:
                if self._looking >= limits.socket_viewings_max:
                    raise Busy("This socket looks at too many replies.", retry_after=1.0)
                self._looking += 1
                self._spawn(group, self._look(frame, size))

    def _type(self, ask: DraftAsk, group: asyncio.TaskGroup) -> None:
        if self._typist is None:
            self._typist = self._conversations.typist(self._holder.name)
            if self._typist is not None:
                self._spawn(group, self._typist.run(self._fail))
        if self._typist is not None:
            self._typist.take(ask)

    async def _stop(self, frame: ClientFrame) -> None:
        try:
            await self._conversations.stop(self._holder.name, frame.target)
        except Exception as error:
            self._fail(error, frame.request)
        finally:
            self._acting -= 1
            self._go_if_idle()

    def _end_look(self, reply: str) -> Look | None:
        look = self._looks.get(reply)
        if look is not None:
            look.end()
        return look

    async def _detach(self, frame: ClientFrame, look: Look | None) -> None:
        try:
            if look is not None:
                await asyncio.wait({look.task})
            if look is None or not look.answered:  # it ended just now, or is not there at all
                await self._conversations.reply(self._holder.name, frame.target)
            self._outbox.post(detached_frame(frame.target, frame.request))
        except Exception as error:
            self._fail(error, frame.request)
        finally:
            self._acting -= 1
            self._go_if_idle()

    async def _look(self, frame: ClientFrame, size: int) -> None:
        """Send a turn, or come back to a reply, and show the reply. size: of the frame's text."""
        request, after, look = frame.request, frame.after, Look()
        places = self._holder.requests_max or self._desk.limits.connections_max
        reply: ChatReply | None = None
        try:
            if frame.kind == "attach":
                older = self._end_look(frame.target)
                self._looks[frame.target] = look
                if older is not None:  # the reply from another place: one look at it is enough
                    await asyncio.wait({older.task})
            with self._desk.gate.enter(self._holder.name, places):
                reply = await self._open(frame, size)
                del frame  # a turn's text, for as long as a reply takes
                await self._show(reply, after, request, look=look)
        except Exception as error:
            self._fail(error, request, reply=reply)
        finally:
            self._looks = {name: each for name, each in self._looks.items() if each is not look}
            self._looking -= 1
            self._go_if_idle()

    async def _open(self, frame: ClientFrame, size: int) -> ChatReply:
        if frame.kind == "attach":
            return await self._conversations.reply(self._holder.name, frame.target)
        with self._desk.budget.lease() as lease:
            lease.grow(size)
            turn = turn_ask(
                frame.turn,
                owner=self._holder.name,
                conversation=frame.target,
                limits=self._desk.limits,
            )
            return await self._conversations.send(turn)

    async def _show(
        self, reply: ChatReply, after: ReplyCursor | None, request: str, *, look: Look
    ) -> None:
        if after is not None and after == reply.end:
            accepted = ReplyAccepted(
                conversation=reply.conversation, turn=reply.turn, reply=reply.id
            )
            await self._outbox.put(ended_frame(accepted, request))
            return
        if self._looks.get(reply.id) is not look:
            self._end_look(reply.id)  # a turn that was sent once more
            self._looks[reply.id] = look
        with reply.view(after) as events:
            async for event in events:
                for piece in pieces(event, self._desk.limits.event_text_max):
                    await self._outbox.put(
                        socket_frame(
                            piece,
                            conversation=reply.conversation,
                            reply=reply.id,
                            request=request,
                        )
                    )
                look.answered = True  # `accepted` comes first
                if look.over or isinstance(event, ReplyFinal):
                    return
        if not self._draining:
            raise Unavailable("The reply goes on elsewhere: attach again.", retry_after=1.0)

    def _fail(self, error: Exception, request: str, *, reply: ChatReply | None = None) -> None:
        if not isinstance(error, ChatserveError) or error.status >= 500:
            log_failure(self._scope, error)
        told = (
            error if isinstance(error, ChatserveError) else ApiError("The server made a mistake.")
        )
        name = None if reply is None else reply.id
        self._outbox.post(failed_frame(told, request=request, reply=name))


def _object(text: str) -> dict[str, object]:
    try:
        value: object = orjson.loads(text)
    except orjson.JSONDecodeError:
        # The decoder's own words may quote the text, so they stay here.
        raise RequestError("A frame is a JSON object; this is no JSON.") from None
    if not isinstance(value, dict):
        raise RequestError("A frame is a JSON object.")
    return cast(dict[str, object], value)
