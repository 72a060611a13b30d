"""Exchange: all replies of a client over one WebSocket, and the next one when that is lost.

It may not know HTTP or conversations. Theory of operation: `run` is the one task. It connects when
there is something to say, and while it is connected one reader takes each frame to its reply
and one writer sends what the errands lack (`errand.py`); nothing that goes out is queued. A lost
connection puts every errand back, and the next one begins with `attach` at the last cursor, or the
same `send`.

    nothing to do ─▶ connect ─▶ converse ─▶ lost ─▶ wait (full jitter) ─▶ connect …

A refusal that time does not heal (a wrong key) ends all errands at once; other failures end an
errand when its patience does.
"""

import asyncio
import contextlib
import itertools
import json
import random
import ssl
from collections.abc import Callable, Mapping

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidMessage,
    InvalidStatus,
)
from websockets.typing import Subprotocol

from chatserve.client.backoff import Backoff
from chatserve.client.errand import Errand, Phase
from chatserve.client.errors import (
    BrokenProtocol,
    ChatError,
    ClientClosed,
    Refused,
    ReplyFailed,
    Unreachable,
    status_of,
)
from chatserve.client.limits import ClientLimits
from chatserve.client.reply import Reply
from chatserve.client.wire import (
    SUBPROTOCOL,
    JsonObject,
    cursor_of,
    decoded,
    field,
    final_of,
    optional,
    progress_of,
    refusal_of_answer,
    refusal_of_frame,
    seconds_of,
)

_TRANSIENT = frozenset({429, 500, 502, 503, 504})
_TOO_BIG = 1009


class Exchange:
    """One per client, on the event loop. headers: of the handshake. proxy: the environment's."""

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        proxy: bool,
        limits: ClientLimits,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.connections_total = 0
        self._url = url
        self._headers = headers
        self._proxy = proxy
        self._limits = limits
        self._jitter = jitter
        self._errands: list[Errand] = []
        self._focus: JsonObject | None = None
        self._draft: JsonObject | None = None
        self._draft_not_before = 0.0
        self._numbers = itertools.count(1)
        self._news = asyncio.Event()
        self._backoff = self._new_backoff()
        self._not_before = 0.0
        self._closed = False

    # What is to be said ----------------------------------------------------------------------

    def begin(self, reply: Reply, opening: JsonObject) -> None:
        """Ask for a reply; opening: its `send`, empty for one that is attached to."""
        self._forget()
        if self._closed:
            raise ClientClosed
        if sum(not errand.reply.over for errand in self._errands) >= self._limits.replies_max:
            raise Refused("This client looks at too many replies.", code="busy", status=429)
        if self._draft is not None and self._draft["conversation"] == reply.conversation:
            self._draft = None
        self._errands.append(Errand(reply=reply, opening=opening, backoff=self._new_backoff()))
        self._news.set()

    def reply_of(self, id: str) -> Reply | None:
        """The reply under way that has this id."""
        found = self._errand(lambda errand: errand.reply.id == id)
        return None if found is None else found.reply

    def has_ask(self, ask: str) -> bool:
        """A reply under way has this ask."""
        return self._errand(lambda errand: errand.reply.ask == ask) is not None

    def focus(self, conversation: str) -> None:
        """Tell the server which conversation is looked at; the last word counts."""
        self._focus = {"type": "focus", "conversation": conversation}
        self._news.set()

    def draft(self, conversation: str, parent: str | None, text: str) -> None:
        """Tell the server what is being typed; the last word counts."""
        if len(text) <= self._limits.draft_characters_max:
            self._draft = {
                "type": "draft",
                "conversation": conversation,
                "parent": parent,
                "text": text.encode(errors="replace").decode(),
            }
            self._news.set()

    def wake(self) -> None:
        """A reply wants something."""
        self._news.set()

    def close(self) -> None:
        """End every reply; nothing new is taken. Idempotent."""
        self._closed = True
        for errand in self._errands:
            errand.reply.fail(ClientClosed())

    # The one task ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._until_needed()
            await self._pause()
            try:
                socket = await self._connect()
            except ChatError as error:
                self._not_connected(error)
                continue
            try:
                reason = await self._converse(socket)
            finally:
                await socket.close()
            self._lost(reason, socket.close_code)

    async def _until_needed(self) -> None:
        while True:
            self._forget()
            if self._errands or self._focus or self._draft:
                return
            self._news.clear()
            await self._news.wait()

    async def _pause(self) -> None:
        """Wait for the next try, but not beyond the time when somebody is to be told."""
        troubled = [each for each in self._errands if each.trouble_since is not None]
        ends = [errand.patience_ends(self._limits) for errand in troubled]
        await asyncio.sleep(min([self._not_before, *ends]) - self._now())

    async def _connect(self) -> ClientConnection:
        """Raises Refused, Unreachable, BrokenProtocol."""
        limits = self._limits
        try:
            socket = await connect(
                self._url,
                subprotocols=[Subprotocol(SUBPROTOCOL)],
                additional_headers=self._headers,
                compression=None,
                proxy=True if self._proxy else None,
                open_timeout=limits.connect_seconds,
                close_timeout=limits.close_seconds,
                ping_interval=limits.ping_seconds,
                ping_timeout=limits.pong_seconds,
                max_size=limits.frame_bytes_max,
                max_queue=limits.frames_waiting_max,
            )
        except InvalidStatus as error:
            answer = error.response
            raise refusal_of_answer(
                answer.status_code, bytes(answer.body or b""), answer.headers.get("Retry-After")
            ) from error
        except ssl.SSLCertVerificationError as error:
            raise BrokenProtocol(f"The server's certificate is refused: {error}.") from error
        except (OSError, EOFError, InvalidMessage) as error:
            raise Unreachable(f"Nothing answers at {self._url}: {_reason(error)}.") from error
        except InvalidHandshake as error:
            raise BrokenProtocol(f"There is no chatserve at {self._url}: {error}.") from error
        if socket.subprotocol != SUBPROTOCOL:
            await socket.close()
            raise BrokenProtocol(f"There is no chatserve at {self._url}.")
        return socket

    async def _converse(self, socket: ClientConnection) -> str:
        """Until the connection is lost; says why."""
        self.connections_total += 1
        async with asyncio.TaskGroup() as group:
            writer = group.create_task(self._write(socket))
            try:
                return await self._read(socket)
            finally:
                writer.cancel()

    async def _read(self, socket: ClientConnection) -> str:
        try:
            while True:
                self._take(decoded(await socket.recv()))
        except ConnectionClosed as error:
            said = None if error.rcvd is None else error.rcvd.reason
            return said or "The connection was lost."
        except BrokenProtocol as error:
            self._end_all(error)
            return error.message

    async def _write(self, socket: ClientConnection) -> None:
        with contextlib.suppress(ConnectionClosed):  # the reader is told so too
            while True:
                self._news.clear()
                frame = self._next_frame()
                if frame is not None:
                    await socket.send(json.dumps(frame))
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(self._next_time()):
                        await self._news.wait()

    def _next_frame(self) -> JsonObject | None:
        """What is to go out now; it counts as gone."""
        now = self._now()
        for errand in self._errands:
            frame = errand.next_frame(now, f"r{next(self._numbers)}")
            if frame is not None:
                return frame
        frame, self._focus = self._focus, None
        if frame is None and self._draft is not None and self._draft_not_before <= now:
            frame, self._draft = self._draft, None
            self._draft_not_before = now + self._limits.draft_seconds_min
        return None if frame is None else {"request": f"r{next(self._numbers)}", **frame}

    def _next_time(self) -> float | None:
        """When there may be something to send that does not go out now."""
        now = self._now()
        times = [each.not_before for each in self._errands if not each.reply.over]
        if self._draft is not None:
            times.append(self._draft_not_before)
        return min((time for time in times if time > now), default=None)

    # What is heard ---------------------------------------------------------------------------

    def _take(self, frame: JsonObject) -> None:
        """One frame. What belongs to no reply under way is nobody's."""
        event, errand = field(frame, "event", str), None
        if event == "accepted" or (event == "failed" and frame.get("id") is None):
            request = optional(frame, "request", str)
            if request is not None and event == "failed":
                stopping = self._errand(lambda each: each.stop_request == request)
                if stopping is not None:
                    stopping.stop_refused(refusal_of_frame(frame), self._now())
                    self._news.set()
                    return
            errand = self._errand(lambda each: bool(request) and each.request == request)
            if errand is None:
                self._take_left(request, frame)
        else:
            reply = optional(frame, "reply", str)
            errand = self._errand(lambda each: bool(reply) and each.reply.id == reply)
        if errand is None:
            return
        try:
            self._tell(errand, event, frame)
        except BrokenProtocol as error:
            errand.reply.fail(error)
        self._news.set()

    def _take_left(self, request: str | None, frame: JsonObject) -> None:
        """The answer to what was asked for before it was left."""
        asked = (each for each in self._errands if each.is_left and each.request == request)
        errand = next(asked, None)
        if errand is not None and frame["event"] == "accepted" and frame.get("ended") is not True:
            errand.reply.id = field(frame, "reply", str)
            self._news.set()
        elif errand is not None:
            errand.not_shown()

    def _tell(self, errand: Errand, event: str, frame: JsonObject) -> None:
        reply = errand.reply
        match event:
            case "accepted":
                self._accept(errand, frame)
                return
            case "failed" if frame.get("id") is None:
                errand.refused(refusal_of_frame(frame), self._now(), self._limits)
                return
            case "progress":
                reply.show(progress_of(frame))
            case "delta":
                reply.take_delta(cursor_of(frame), field(frame, "text", str))
            case "snapshot":
                reply.take_snapshot(cursor_of(frame), field(frame, "text", str))
            case "done" | "failed":
                errand.not_shown()
                final = final_of(frame) if event == "done" else _failure(frame)
                reply.end(cursor_of(frame), final)
            case _:
                return
        errand.heard()
        self._backoff.reset()

    def _accept(self, errand: Errand, frame: JsonObject) -> None:
        id = field(frame, "reply", str)
        older = self._errand(lambda each: each.reply.id == id and each is not errand)
        if older is not None:  # the server shows one of two views of a reply
            older.not_shown()
            older.reply.fail(Refused("The reply is looked at anew.", code="conflict", status=409))
        errand.reply.accept(id, field(frame, "turn", str))
        errand.opened()
        if frame.get("ended") is True:
            errand.not_shown()
            raise BrokenProtocol("The reply had ended before its end was shown.")

    # Connections that are lost or never come ------------------------------------------------

    def _lost(self, reason: str, code: int | None) -> None:
        now = self._now()
        if code == _TOO_BIG:
            self._refuse_largest()
        for errand in self._errands:
            errand.lost(reason, now)
            errand.give_up(Unreachable(reason), now, self._limits)
        self._not_before = now + self._backoff.next()

    def _refuse_largest(self) -> None:
        """A message of ours was over the server's limit, which only it knows."""
        asked = [each for each in self._errands if each.phase is Phase.ASKED and each.opening]
        if asked:
            largest = max(asked, key=lambda each: len(str(each.opening.get("content"))))
            largest.reply.fail(
                Refused("The message is too large.", code="request_too_large", status=413)
            )

    def _not_connected(self, error: ChatError) -> None:
        now = self._now()
        self._focus = self._draft = None  # by then they will not be true
        if isinstance(error, BrokenProtocol) or (
            isinstance(error, Refused) and error.status not in _TRANSIENT
        ):
            self._end_all(error)
            return
        asked = min(error.retry_after or 0.0, self._limits.retry_after_seconds_max)
        self._not_before = now + max(self._backoff.next(), asked)
        for errand in self._errands:
            errand.reply.wait_for(error.message)
            errand.give_up(error, now, self._limits)

    def _end_all(self, error: ChatError) -> None:
        for errand in self._errands:
            errand.reply.fail(error)

    def _forget(self) -> None:
        """What is over, and left to nobody's care."""
        self._errands = [each for each in self._errands if not each.reply.over or each.is_left]

    def _errand(self, fits: Callable[[Errand], bool]) -> Errand | None:
        return next((each for each in self._errands if not each.reply.over and fits(each)), None)

    def _new_backoff(self) -> Backoff:
        limits = self._limits
        return Backoff(limits.reconnect_seconds_first, limits.reconnect_seconds_max, self._jitter)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _failure(frame: JsonObject) -> ReplyFailed:
    code = field(frame, "code", str)
    return ReplyFailed(
        field(frame, "message", str),
        code=code,
        status=status_of(code),
        retry_after=seconds_of(frame),
    )


def _reason(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, EOFError | InvalidMessage | ConnectionResetError):
        return "the connection was closed"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(error) or type(error).__name__
