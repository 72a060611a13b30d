"""A client of chats whose connection is cut after so many bytes, and that comes back.

It knows the wire protocol alone. Theory of operation: `ReplyView` is what one client has of one
reply, by the rules of ids and snapshots; each event is checked against them as it is taken. A view
outlives connections: `send_by_sse`, `resume_by_sse` and `by_socket` each open one, feed views with
what arrives, and end with the view, or raise.

    Severed    the connection is gone: cut at its limit by ourselves, or ended by the server
    Refused    the server answered, and not with events

Half an event at a cut is thrown away, as every client of Server-Sent Events does.
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import h11
from websockets.client import ClientProtocol
from websockets.frames import Opcode
from websockets.http11 import Response
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

SUBPROTOCOL = "chatserve.v1"
SILENCE_SECONDS_MAX = 120.0  # without a byte; pings come more often than that
STATUS = {"unavailable": 503, "busy": 429}  # what HTTP says for a code of a socket's refusal
_PIECE = 64 * 1024

Data = dict[str, Any]


class Severed(Exception):
    """The connection is gone. code: a WebSocket's, if it was closed by word."""

    def __init__(self, code: int | None = None) -> None:
        super().__init__(f"severed, code {code}")
        self.code = code


class Refused(Exception):
    """An answer without events."""

    def __init__(self, status: int, headers: Mapping[str, str], body: object) -> None:
        super().__init__(f"{status} {body}")
        self.status = status
        self.headers = headers
        self.body = body


@dataclass
class ReplyView:
    """What a client has of the answer to one ask."""

    conversation: str
    ask: str
    reply: str | None = None
    turn: str | None = None
    text: str = ""
    cursor: str | None = None
    kind: str | None = None  # of the final event
    final: Data | None = None
    put_off: bool = False  # the events ended without a final one: the reply goes on elsewhere
    resumptions: int = 0
    snapshots: int = 0
    epochs: set[int] = field(default_factory=set)
    watcher: Callable[[str], None] = lambda _: None  # told of each event's name
    _before: Data | None = None  # the final event before it was forgotten

    @property
    def ended(self) -> bool:
        return self.final is not None

    def take(self, name: str, cursor: str | None, data: Data) -> None:
        """One event, checked."""
        match name:
            case "accepted":
                assert cursor is None
                assert self.reply in (None, data["reply"]), "a retry has another reply"
                assert data["conversation"] == self.conversation
                self.reply, self.turn = data["reply"], data["turn"]
            case "progress":
                assert cursor is None
                assert not self.text
            case "delta" | "snapshot":
                self._take_text(name, cursor, data)
            case "done" | "failed":
                self._take_final(name, cursor, data)
            case _:
                raise AssertionError(f"an unknown event: {name}")
        self.watcher(name)

    def _take_text(self, name: str, cursor: str | None, data: Data) -> None:
        assert not self.ended, "text after the final event"
        assert data["text"] or name == "snapshot"
        if name == "snapshot":
            self.text, self.snapshots = "", self.snapshots + 1
        self.text += data["text"]
        assert data["seq"] == len(self.text), f"{name} to {data['seq']} makes {len(self.text)}"
        self._move(cursor, data["seq"])

    def _take_final(self, name: str, cursor: str | None, data: Data) -> None:
        assert self.final in (None, data), "two final events that differ"
        assert self._before in (None, data), "two final events that differ"
        self._move(cursor, len(self.text) + 1)
        self.kind, self.final = name, data

    def _move(self, cursor: str | None, seq: int) -> None:
        assert cursor is not None
        epoch, told = (int(part) for part in cursor.split("-"))
        assert told == seq, f"id {cursor} at {seq}"
        assert epoch >= max(self.epochs, default=1), "an epoch of before"
        self.epochs.add(epoch)
        self.cursor = cursor

    def forget(self) -> None:
        """Begin anew: a page that was loaded again. Which reply it is stays known."""
        self._before = self.final if self.ended else self._before
        self.text, self.cursor, self.put_off = "", None, False
        self.kind, self.final = None, None
        self.epochs.clear()


class Wire:
    """A TCP connection that is cut after `bytes_max` incoming bytes, None = never."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, bytes_max: int | None
    ) -> None:
        self._reader, self._writer = reader, writer
        self._left = bytes_max

    @classmethod
    async def open(cls, port: int, bytes_max: int | None) -> "Wire":
        try:
            return cls(*await asyncio.open_connection("127.0.0.1", port), bytes_max)
        except OSError as error:
            raise Severed from error

    async def write(self, data: bytes) -> None:
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise Severed from error

    async def read(self) -> bytes:
        """What arrives next; b"" at the peer's end. Raises Severed at the limit."""
        if self._left == 0:
            raise Severed
        most = _PIECE if self._left is None else min(_PIECE, self._left)
        try:
            async with asyncio.timeout(SILENCE_SECONDS_MAX):
                data = await self._reader.read(most)
        except TimeoutError as error:
            raise AssertionError("the server is silent") from error
        except OSError as error:
            raise Severed from error
        if self._left is not None:
            self._left -= len(data)
        return data

    def sever(self) -> None:
        """Without goodbye: a reset, as from a peer that is gone."""
        raw: socket.socket | None = self._writer.get_extra_info("socket")
        if raw is not None and raw.fileno() >= 0:
            linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._writer.transport.abort()


# By SSE -----------------------------------------------------------------------------------------


async def send_by_sse(
    port: int,
    view: ReplyView,
    turn: Mapping[str, object],
    *,
    bytes_max: int | None = None,
    on_sent: Callable[[], None] = lambda: None,
) -> None:
    """POST a turn (its id is the view's ask) and read its reply from the beginning."""
    body = json.dumps({"id": view.ask, **turn}).encode()
    path = f"/api/conversations/{view.conversation}/turns"
    head = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    request = _request("POST", path, head)
    await _read_events(port, view, (request, body), bytes_max=bytes_max, on_sent=on_sent)


async def resume_by_sse(port: int, view: ReplyView, *, bytes_max: int | None = None) -> None:
    """GET what follows the view's cursor. Nothing (204) if that is the final event's."""
    assert view.reply is not None
    view.resumptions += 1
    head = [] if view.cursor is None else [("Last-Event-ID", view.cursor)]
    request = _request("GET", f"/api/replies/{view.reply}/events", head)
    await _read_events(port, view, (request, b""), bytes_max=bytes_max)


def _request(method: str, path: str, headers: Sequence[tuple[str, str]]) -> h11.Request:
    return h11.Request(method=method, target=path, headers=[("Host", "localhost"), *headers])


async def _read_events(
    port: int,
    view: ReplyView,
    request: tuple[h11.Request, bytes],
    *,
    bytes_max: int | None,
    on_sent: Callable[[], None] = lambda: None,
) -> None:
    head, body = request
    wire = await Wire.open(port, bytes_max)
    try:
        protocol = h11.Connection(h11.CLIENT)
        data = protocol.send(head)
        data += protocol.send(h11.Data(data=body)) if body else b""
        data += protocol.send(h11.EndOfMessage())
        await wire.write(data)
        on_sent()
        answer = await _next(protocol, wire)
        assert isinstance(answer, h11.Response)
        headers = {name.decode(): value.decode() for name, value in answer.headers}
        if answer.status_code != 200:
            raw = b"".join([part async for part in _parts(protocol, wire)])
            if answer.status_code == 204:
                assert view.ended, "204 to a client that has not seen the end"
                return
            raise Refused(answer.status_code, headers, json.loads(raw))
        frames = EventFrames(view.take)
        async for part in _parts(protocol, wire):
            frames.feed(part)
        view.put_off = not view.ended
    finally:
        wire.sever()


async def _next(protocol: h11.Connection, wire: Wire) -> object:
    while True:
        try:
            event = protocol.next_event()
        except h11.RemoteProtocolError as error:  # ended in the middle of the answer
            raise Severed from error
        if isinstance(event, h11.ConnectionClosed):
            raise Severed
        if event is not h11.NEED_DATA:
            return event
        protocol.receive_data(await wire.read())


async def _parts(protocol: h11.Connection, wire: Wire) -> AsyncIterator[bytes]:
    while isinstance(event := await _next(protocol, wire), h11.Data):
        yield bytes(event.data)


class EventFrames:
    """Bytes of Server-Sent Events, in any pieces, to whole events."""

    def __init__(self, take: Callable[[str, str | None, Data], None]) -> None:
        self._take = take
        self._rest = b""

    def feed(self, data: bytes) -> None:
        *frames, self._rest = (self._rest + data).split(b"\n\n")
        for frame in frames:
            fields: dict[str, str] = {}
            for line in frame.decode().split("\n"):
                name, _, value = line.partition(": ")
                assert name in ("", "event", "id", "data"), line
                fields[name] = value
            if "data" in fields:
                self._take(fields["event"], fields.get("id"), json.loads(fields["data"]))
            else:
                assert set(fields) <= {""}, frame  # a comment


# By WebSocket -----------------------------------------------------------------------------------


class ChatSocket:
    """One WebSocket; `watch` feeds views with its frames."""

    def __init__(self, wire: Wire, protocol: ClientProtocol) -> None:
        self._wire, self._protocol = wire, protocol
        self._text = b""
        self._early: list[Any] = []  # frames that came with the handshake's answer
        self.changes: list[Data] = []

    @classmethod
    async def open(cls, port: int, bytes_max: int | None = None) -> "ChatSocket":
        """Raises Severed, or Refused where it does not come to a socket."""
        wire = await Wire.open(port, bytes_max)
        try:
            uri = parse_uri(f"ws://localhost:{port}/api/socket")
            protocol = ClientProtocol(uri, subprotocols=[Subprotocol(SUBPROTOCOL)])
            protocol.send_request(protocol.connect())
            made = cls(wire, protocol)
            answer, *made._early = await made._arrived()
            assert isinstance(answer, Response)
            if protocol.handshake_exc is not None:
                raise Refused(answer.status_code, dict(answer.headers), answer.body)
            return made
        except BaseException:
            wire.sever()
            raise

    def __enter__(self) -> "ChatSocket":
        return self

    def __exit__(self, *_: object) -> None:
        self._wire.sever()

    async def say(self, frame: Mapping[str, object]) -> None:
        if self._protocol.close_rcvd is not None:
            raise Severed(self._protocol.close_rcvd.code)
        self._protocol.send_text(json.dumps(frame).encode())
        await self._flush()

    async def frames(self) -> list[Data]:
        """The next ones. Raises Severed, with the code where the server said one."""
        found: list[Data] = []
        early, self._early = self._early, []
        for event in early or await self._arrived():
            if event.opcode in (Opcode.TEXT, Opcode.CONT):
                self._text += event.data
                if event.fin:
                    found.append(json.loads(self._text))
                    self._text = b""
        return found

    async def watch(self, views: Sequence[ReplyView]) -> None:
        """Until all have ended, or are put off. Raises Refused for a frame that was not met."""
        while not all(view.ended or view.put_off for view in views):
            for frame in await self.frames():
                self._dispatch(frame, views)

    def _dispatch(self, frame: Data, views: Sequence[ReplyView]) -> None:
        name, cursor = frame.pop("event"), frame.pop("id", None)
        request, reply = frame.pop("request", None), frame.pop("reply", None)
        if name == "changed":
            self.changes.append(frame)
            return
        if name == "accepted":
            (view,) = (each for each in views if each.ask == request)
            assert not frame.pop("ended", False) or view.ended
            view.take(name, cursor, {**frame, "reply": reply})
            return
        if name == "failed" and cursor is None:
            later = {"retry-after": str(frame["retry_after"])}
            raise Refused(STATUS.get(frame["code"], 400), later, frame)
        (view,) = (each for each in views if each.reply == reply)
        assert frame.pop("conversation") == view.conversation
        view.take(name, cursor, frame)

    async def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            if data:
                await self._wire.write(data)

    async def _arrived(self) -> list[Any]:
        await self._flush()
        while True:
            if self._protocol.close_rcvd is not None:
                raise Severed(self._protocol.close_rcvd.code)
            data = await self._wire.read()
            if data:
                self._protocol.receive_data(data)
            else:
                self._protocol.receive_eof()
            found = self._protocol.events_received()
            with suppress(Severed):  # what has arrived comes first
                await self._flush()
            if found:
                return found
            if not data:
                raise Severed


async def by_socket(
    port: int,
    views: Sequence[ReplyView],
    turns: Mapping[str, Mapping[str, object]],
    *,
    bytes_max: int | None = None,
    on_sent: Callable[[], None] = lambda: None,
) -> None:
    """One socket for several replies: attach to the known ones, send the others' turns (by ask)."""
    with await ChatSocket.open(port, bytes_max) as opened:
        for view in views:
            if view.reply is None:
                frame = {"type": "send", "conversation": view.conversation, "id": view.ask}
                await opened.say(frame | dict(turns[view.ask]) | {"request": view.ask})
                on_sent()
            else:
                view.resumptions += 1
                after = {} if view.cursor is None else {"after": view.cursor}
                frame = {"type": "attach", "reply": view.reply, "request": view.ask}
                await opened.say(frame | after)
        await opened.watch(views)
