"""One WebSocket: uvicorn's sans-I/O protocol, with limits on what a peer may do to us.

It may not know what is said. Theory of operation: `connection.py` has read the handshake's head
strictly and hands the transport over. From there on

    before we accept     any byte is refused: a client must wait for our answer
    a message            is whole in body_seconds and within the message limit (1009), or the peer
                         is cut off; all messages under way share one budget (1013)
    text, UTF-8          anything else ends the connection: 1003 binary, 1007 bad UTF-8
    the protocol         its violations end it with 1002; the library finds them
    our pings            unanswered for socket_pong_seconds: abort
    bytes for the peer   as in HTTP (`write_watch.py`); pongs nobody reads: abort
    our last word        a close frame; then half-closed, what comes is dropped for linger_seconds

`abort` and not `close` wherever the peer may be one that does not read. The app's `receive` also
gives a `DRAIN` message: finish what runs, take nothing new, then close with 1001.
"""

import asyncio
import logging
from http import HTTPStatus
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request

from chatserve.api.body import BodyBudget
from chatserve.api.limits import Limits
from chatserve.api.write_watch import WriteWatch

# The library's own name, not ours, whose lines go out from info up: it tells of each connection,
# which is the access log's to do.
_log = logging.getLogger("websockets.server")

DRAIN = "chatserve.drain"
_VERSION = "13"  # of the WebSocket protocol: RFC 6455
_EARLY = (
    b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-type: text/plain\r\n"
    b"content-length: 41\r\n\r\nA client waits for the handshake's answer"
)


class SocketConnection(WebSocketsSansIOProtocol):
    """One per socket, made by `Connection` at its upgrade."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: Limits,
        budget: BodyBudget,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn.logger = _log
        self.limits = limits
        self.close_timeout = limits.linger_seconds
        self._budget = budget
        self._held_bytes = 0
        self._message = bytearray()
        self._in_message = False  # its first frame is here, its last one is not
        self._message_deadline: asyncio.TimerHandle | None = None
        self._left = False  # our last word is said
        self._told_to_drain = False
        self._write_watch: WriteWatch

    # -- what the server tells us

    def drain(self) -> None:
        """Tell the app, once, that the server is about to end."""
        if not self._told_to_drain:
            self._told_to_drain = True
            self.queue.put_nowait({"type": DRAIN})  # type: ignore[arg-type]

    def shutdown(self) -> None:
        """The drain is over."""
        if self.handshake_complete and not self.close_sent and not self.transport.is_closing():
            self._fail(CloseCode.GOING_AWAY, "The server is shutting down.")
        elif not self._left:
            super().shutdown()

    # -- what the transport tells us

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._write_watch = WriteWatch(self.transport, self.limits)
        if self.transport.get_write_buffer_size():
            self.pause_writing()  # the rest of an HTTP answer; the transport has told our elder

    def data_received(self, data: bytes) -> None:
        if self._left:
            return
        if self.handshake_initiated and not self.handshake_complete:
            self._refuse_early_bytes()
            return
        self.conn.receive_data(data)
        if not self.handshake_initiated and self.conn.handshake_exc is not None:
            self._leave(CloseCode.ABNORMAL_CLOSURE)  # a head that is too large for the library
        else:
            self.handle_events()  # what came before a fault was said, however it was cut by TCP
            if self.conn.parser_exc is not None and not self._left:
                self.handle_parser_exception()
        self._account()

    def connection_lost(self, exc: Exception | None) -> None:
        self._write_watch.end()
        self._left = True
        self._message.clear()
        self._account()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_watch.begin()

    def resume_writing(self) -> None:
        self._write_watch.end()
        super().resume_writing()

    # -- what comes in

    def handle_connect(self, event: Request) -> None:
        """A version that is not ours is told ours; every other fault is the library's to find."""
        versions = event.headers.get_all("Sec-WebSocket-Version")
        if not versions or versions == [_VERSION]:
            super().handle_connect(event)
            return
        self.handshake_initiated = self.handshake_complete = self.close_sent = True
        answer = self.conn.reject(HTTPStatus.UPGRADE_REQUIRED, f"Version {_VERSION} only.\n")
        answer.headers["Upgrade"] = "websocket"
        answer.headers["Sec-WebSocket-Version"] = _VERSION
        self.conn.send_response(answer)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.transport.close()

    def handle_events(self) -> None:
        for event in self.conn.events_received():
            if self._left:
                return
            match event:
                case Request():
                    self.handle_connect(event)
                case Frame(opcode=Opcode.TEXT):
                    self._message = bytearray(event.data)
                    self._in_message = True
                    self._take(event)
                case Frame(opcode=Opcode.CONT):
                    self._message += event.data
                    self._take(event)
                case Frame(opcode=Opcode.BINARY):
                    self._fail(CloseCode.UNSUPPORTED_DATA, "Messages are text.")
                case Frame(opcode=Opcode.PING):
                    self.handle_ping()
                case Frame(opcode=Opcode.PONG):
                    self.handle_pong(event)
                case Frame(opcode=Opcode.CLOSE):
                    self.handle_close(event)
                case _:
                    raise AssertionError("the library knows no other events")
            if not self._in_message:
                self._disarm()  # what follows began in these very bytes

    def _take(self, event: Frame) -> None:
        """The bytes of a text message are here, up to this frame's end."""
        if not event.fin:
            return
        content, self._message, self._in_message = self._message, bytearray(), False
        if self.close_sent:
            return
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            self._fail(CloseCode.INVALID_DATA, "Text is UTF-8.")
            return
        self.queue.put_nowait({"type": "websocket.receive", "text": text})
        if not self.read_paused:
            self.read_paused = True
            self.transport.pause_reading()

    def handle_ping(self) -> None:
        super().handle_ping()
        if self.transport.get_write_buffer_size() > self.limits.socket_waiting_bytes_max:
            self.transport.abort()

    def keepalive_timeout(self) -> None:
        self.transport.abort()

    def handle_parser_exception(self) -> None:
        close = self.conn.close_sent
        self._leave(CloseCode.ABNORMAL_CLOSURE if close is None else close.code)

    # -- what goes out

    async def send(self, message: Any) -> None:
        """As ASGI wants it; a peer that has gone, or was sent away, raises an OSError."""
        await self.writable.wait()
        if self._left:
            raise ClientDisconnected
        await super().send(message)
        if message["type"] == "websocket.close" and self.close_timer is not None:
            self.close_timer.cancel()
            self.close_timer = self.loop.call_later(
                self.limits.linger_seconds, self.transport.abort
            )

    async def run_asgi(self) -> None:
        """The app answers its own failures; what comes up here has nobody else to be told."""
        try:
            await self.app(self.scope, self.receive, self.send)  # type: ignore[arg-type]
        except ClientDisconnected:
            pass
        except BaseException:
            self.transport.abort()
            raise
        if self.close_timer is None:
            self.transport.close()

    # -- the end

    def _fail(self, code: CloseCode, reason: str) -> None:
        self.conn.fail(code, reason)
        self._leave(code)

    def _refuse_early_bytes(self) -> None:
        self.transport.write(_EARLY)
        self.disconnected = True
        self._leave(CloseCode.ABNORMAL_CLOSURE)

    def _leave(self, code: int) -> None:
        """Say what the library has left to say, and close by halves: a peer that still sends would
        lose our last word to a reset."""
        self._left = True
        self.stop_keepalive()
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": ""})
        if self.close_timer is not None:
            self.close_timer.cancel()
        self.close_timer = self.loop.call_later(self.limits.linger_seconds, self.transport.abort)
        if self.transport.is_closing():
            return
        last_word = b"".join(self.conn.data_to_send())
        if last_word:
            self.transport.write(last_word)
        self.close_sent = True
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _account(self) -> None:
        """A message under way counts against the budget, and against its time."""
        under_way = not self._left and self.handshake_complete
        held = len(self._message) + len(self.conn.reader.buffer) if under_way else 0
        self._budget.bytes_held += held - self._held_bytes
        self._held_bytes = held
        if held > 0 and self._budget.bytes_held > self._budget.bytes_max:
            self._fail(CloseCode.TRY_AGAIN_LATER, "Too many large messages at once.")
            self._account()
        elif not under_way or (not held and self.conn.current_size is None):
            self._disarm()
        elif self._message_deadline is None:
            self._message_deadline = self.loop.call_later(
                self.limits.body_seconds, self._message_too_slow
            )

    def _disarm(self) -> None:
        if self._message_deadline is not None:
            self._message_deadline.cancel()
            self._message_deadline = None

    def _message_too_slow(self) -> None:
        self._message_deadline = None
        self._fail(CloseCode.POLICY_VIOLATION, "The message took too long to arrive.")
        self._account()
