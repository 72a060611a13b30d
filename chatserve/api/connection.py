"""One client connection: uvicorn's h11 protocol, with limits on what a peer may do to us.

It may not know what is served. Theory of operation: bytes go through `HeadReader` until a head is
whole, then exactly the body's bytes go to h11, then heads again. At any time a connection is in
one phase, and each phase has its deadline:

    IDLE      nothing of a request has come             idle_seconds    close
    HEAD      part of a head has come                   head_seconds    408
    BODY      a body is under way                       body_seconds    408, or abort mid-answer
    ANSWER    the request is whole, the answer is not   none: that is the engine's time
    LINGER    we have said our last word, and drop      linger_seconds  abort
              what comes until the peer has read it
    UPGRADED  a WebSocket: `socket_connection.py`'s     none here

Apart from that, whenever bytes for the peer wait in our process a write deadline runs, and ends
in `abort` unless the peer takes some (`write_watch.py`). The kernel's buffer is kept small and
ours is allowed nothing (high water 0), so a reader that stalls holds little and is noticed.

Bytes that come before the answer to the request ahead of them are dropped, and the connection is
closed after that answer: nobody's client pipelines, except to smuggle. A chunked request is the
last one of its connection, so no two parsers can disagree about where the next one begins.

A handshake for a WebSocket has passed the same strict reading of its head; it may have no body and
nothing behind it, since its client must wait for our answer. Then the transport is handed over.
"""

import asyncio
import enum
import socket
from collections.abc import Callable
from typing import Any

import h11
import orjson
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from chatserve.api.head import Head, HeadReader, Refusal
from chatserve.api.limits import Limits
from chatserve.api.write_watch import WriteWatch


class Phase(enum.Enum):
    """Where a connection is; see the module's table."""

    IDLE = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()
    ANSWER = enum.auto()
    LINGER = enum.auto()
    UPGRADED = enum.auto()


_OVER = (Phase.LINGER, Phase.UPGRADED)  # nothing more is read here


class Connection(H11Protocol):
    """One per socket, made by uvicorn's server."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: Limits,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.limits = limits
        self.phase = Phase.IDLE
        self._head = HeadReader(limits)
        self._body_bytes_left: int | None = 0
        self._deadline: asyncio.TimerHandle | None = None
        self._bytes_behind = 0  # what came behind the head that is being acted on
        self._write_watch: WriteWatch

    # -- what the transport tells us

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._write_watch = WriteWatch(transport, self.limits)
        self._set_socket_options(transport)
        if len(self.connections) > self.limits.connections_max:
            self._refuse(Refusal(503, "busy", "Too many connections; come back later."))
        else:
            self._enter(Phase.IDLE)

    def data_received(self, data: bytes) -> None:
        # uvicorn's own timer knows idle time only after a first request; ours covers it all.
        self._unset_keepalive_if_required()
        while data and self.phase not in _OVER and not self.transport.is_closing():
            if self.conn.their_state is h11.IDLE:
                data = self._take_head(data)
            elif self.conn.their_state is h11.SEND_BODY:
                data = self._take_body(data)
            else:
                self.cycle.keep_alive = False
                break
        self._follow()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._write_watch.end()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_watch.begin()

    def resume_writing(self) -> None:
        self._write_watch.end()
        super().resume_writing()

    # -- what uvicorn's request cycle tells us

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and self._body_bytes_left is None:
            # Answered before a chunked body ended: h11 must not look for a request behind it.
            self._linger()
        else:
            self._follow()

    def send_400_response(self, msg: str) -> None:
        """h11 found a fault, in a body's chunks since heads are checked before."""
        self._refuse(Refusal(400, "bad_request", "The request is not valid HTTP/1.1."))

    def _unsupported_upgrade_warning(self) -> None:
        """Not worth a line in the log: anybody may ask for any upgrade."""

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Hand the connection over, or refuse a handshake that hides something behind its head."""
        if self._body_bytes_left != 0 or self._bytes_behind:
            self._refuse(Refusal(400, "bad_request", "A handshake has no body."))
        elif event.method != b"GET" or event.http_version != b"1.1":
            self._refuse(Refusal(400, "bad_request", "A handshake is a GET of HTTP/1.1."))
        else:
            self._disarm()
            self._write_watch.end()
            self.phase = Phase.UPGRADED
            super().handle_websocket_upgrade(event)

    # -- the parts of a request

    def _take_head(self, data: bytes) -> bytes:
        outcome = self._head.feed(data)
        match outcome:
            case None:
                return b""
            case Refusal():
                self._refuse(outcome)
                return b""
            case Head():
                self._head = HeadReader(self.limits)
                self._body_bytes_left = outcome.body_bytes
                self._bytes_behind = len(outcome.rest)
                self.conn.receive_data(outcome.raw)
                self.handle_events()
                return b"" if self.phase in _OVER else outcome.rest

    def _take_body(self, data: bytes) -> bytes:
        if self._body_bytes_left is None:
            self.conn.receive_data(data)
            self.handle_events()
            if self.conn.their_state is not h11.SEND_BODY:
                # h11 may hold bytes after the last chunk. It will never be asked for them, and
                # reading goes on, or the peer's leaving would not be noticed.
                self.cycle.keep_alive = False
                self.flow.resume_reading()
            return b""
        body, rest = data[: self._body_bytes_left], data[self._body_bytes_left :]
        self._body_bytes_left -= len(body)
        self.conn.receive_data(body)
        self.handle_events()
        return rest

    # -- phases and their deadlines

    def _follow(self) -> None:
        """Enter the phase that h11's state says we are in."""
        if self.phase in _OVER or self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE:
            self._enter(Phase.HEAD if self._head.started else Phase.IDLE)
        elif self.conn.their_state is h11.SEND_BODY:
            self._enter(Phase.BODY)
        else:
            self._enter(Phase.ANSWER)

    def _enter(self, phase: Phase) -> None:
        if phase is self.phase and self._deadline is not None:
            return
        self._disarm()
        self.phase = phase
        limits = self.limits
        ends: dict[Phase, tuple[float, Callable[[], None]]] = {
            Phase.IDLE: (limits.idle_seconds, self.transport.close),
            Phase.HEAD: (limits.head_seconds, self._too_slow),
            Phase.BODY: (limits.body_seconds, self._too_slow),
            Phase.LINGER: (limits.linger_seconds, self.transport.abort),
        }
        if phase in ends:
            self._deadline = self.loop.call_later(*ends[phase])

    def _too_slow(self) -> None:
        self._refuse(Refusal(408, "too_slow", "The request took too long to arrive."))

    def _refuse(self, refusal: Refusal) -> None:
        """Say no, and close once the peer has read it."""
        if self.transport.is_closing():
            return
        cycle = getattr(self, "cycle", None)
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started:
                self.transport.abort()
                return
            # The app waits for the rest of a body: for it the client has gone.
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.write(_refusal_bytes(refusal))
        self._linger()

    def _linger(self) -> None:
        """Close by halves: a peer that still sends would lose our last word to a reset."""
        if self.transport.is_closing():
            return
        self._enter(Phase.LINGER)
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _set_socket_options(self, transport: asyncio.Transport) -> None:
        sock = transport.get_extra_info("socket")
        if sock is None:
            return
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.limits.send_buffer_bytes)
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            return
        # asyncio sets this only on sockets that name their protocol, and a listener made without
        # it passes that on: then every answer waits 40 ms for the peer's delayed acknowledgement.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # Bytes that a vanished machine does not acknowledge end the connection too.
            milliseconds = int(self.limits.write_seconds * 1_000)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def _refusal_bytes(refusal: Refusal) -> bytes:
    kind = "server_error" if refusal.status >= 500 else "invalid_request_error"
    error = {"message": refusal.message, "type": kind, "param": None, "code": refusal.code}
    body = orjson.dumps({"error": error})
    retry = b"retry-after: 1\r\n" if refusal.status == 503 else b""
    return (
        b"HTTP/1.1 %d %s\r\n" % (refusal.status, STATUS_PHRASES[refusal.status])
        + b"content-type: application/json\r\nconnection: close\r\n"
        + retry
        + b"content-length: %d\r\n\r\n" % len(body)
        + body
    )
