"""Readers of streams that cost next to nothing, so that thousands of them fit on one core.

A stream is a TCP connection and what came on it: bytes, and when.  Nothing is decoded while the
streams run but the frames of WebSockets, whose pings want an answer; `text_of` and `final_of` read
everything afterwards.
"""

import asyncio
import re
import struct
import time
from abc import abstractmethod
from collections.abc import Iterator
from urllib.parse import urlsplit

import orjson

PING, PONG, TEXT = 0x89, 0x8A, 0x81
HEADER_END = b"\r\n\r\n"
# A server may know a repeated key of a handshake; nobody keeps secrets here.
HANDSHAKE_KEY = "AAAAAAAAAAAAAAAAAAAAAA=="


class Stream(asyncio.Protocol):
    """One connection. arrivals: when something came, by time.monotonic."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []
        self.ended = asyncio.get_running_loop().create_future()
        self.lost = False
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep it."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """By whomever."""
        self.lost = True
        if not self.ended.done():
            self.ended.set_result(None)

    def close(self) -> None:
        """Leave."""
        if self._transport is not None:
            self._transport.abort()

    @abstractmethod
    def events(self) -> Iterator[tuple[str, dict[str, object]]]:
        """Name and data of every event so far."""

    def text(self) -> str:
        """What the deltas say together."""
        return "".join(str(data["text"]) for name, data in self.events() if name == "delta")

    def final(self) -> tuple[str, dict[str, object]] | None:
        """The reply's last event."""
        for name, data in self.events():
            if name in ("done", "failed"):
                return name, data
        return None


class SseStream(Stream):
    """A turn sent by POST, and its events."""

    def __init__(self) -> None:
        super().__init__()
        self._pieces: list[bytes] = []

    def data_received(self, data: bytes) -> None:
        """Kept as it is."""
        self.arrivals.append(time.monotonic())
        self._pieces.append(data)
        if b"event: done" in data or b"event: failed" in data:
            self._end()

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def events(self) -> Iterator[tuple[str, dict[str, object]]]:
        """Name and data of every event so far."""
        _, _, body = b"".join(self._pieces).partition(HEADER_END)
        for block in _unchunked(body).split(b"\n\n"):
            named = re.search(rb"^event: (\w+)$", block, re.MULTILINE)
            data = re.search(rb"^data: (.*)$", block, re.MULTILINE)
            if named and data:
                yield named[1].decode(), orjson.loads(data[1])


class SocketStream(Stream):
    """A WebSocket: what came before the first frame is the answer to the handshake."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = asyncio.get_running_loop().create_future()
        self.messages: list[bytes] = []
        self._buffer = bytearray()
        self._shaken = False

    def data_received(self, data: bytes) -> None:
        """Frames are taken apart, pings answered."""
        self.arrivals.append(time.monotonic())
        self._buffer += data
        if not self._shaken:
            head, found, rest = bytes(self._buffer).partition(HEADER_END)
            if not found:
                return
            self._shaken = True
            self._buffer = bytearray(rest)
            good = head.startswith(b"HTTP/1.1 101 ")
            self.opened.set_result(good)
        while self._frame():
            pass

    def _frame(self) -> bool:
        buffer = self._buffer
        if len(buffer) < 2:
            return False
        size, start = buffer[1], 2
        if size == 126 and len(buffer) >= 4:
            (size,), start = struct.unpack_from("!H", buffer, 2), 4
        elif size == 127 and len(buffer) >= 10:
            (size,), start = struct.unpack_from("!Q", buffer, 2), 10
        elif size >= 126:
            return False
        if len(buffer) < start + size:
            return False
        kind, content = buffer[0], bytes(buffer[start : start + size])
        del buffer[: start + size]
        if kind == PING:
            self._write(PONG, content)
        elif kind == TEXT:
            self.messages.append(content)
            if b'"event":"done"' in content or b'"event":"failed"' in content:
                self._end()
        return True

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def send(self, frame: dict[str, object]) -> None:
        """A text frame."""
        self._write(TEXT, orjson.dumps(frame))

    def _write(self, kind: int, content: bytes) -> None:
        assert self._transport is not None
        assert len(content) < 1 << 16
        size = len(content)
        head = bytes((kind, 0x80 | size)) if size < 126 else struct.pack("!BBH", kind, 0xFE, size)
        self._transport.write(head + bytes(4) + content)  # a mask of zeros changes nothing

    def events(self) -> Iterator[tuple[str, dict[str, object]]]:
        """Name and data of every event so far."""
        for message in self.messages:
            data = orjson.loads(message)
            yield str(data["event"]), data


def post_head(url: str, path: str, body: bytes, *, last: bool = False) -> bytes:
    """A whole POST request. last: the server is asked to close the connection after it."""
    place = urlsplit(url).netloc
    closing = "Connection: close\r\n" if last else ""
    return (
        f"POST {path} HTTP/1.1\r\nHost: {place}\r\nContent-Type: application/json\r\n"
        f"{closing}Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def get_head(url: str, path: str) -> bytes:
    """A whole GET request."""
    return f"GET {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n\r\n".encode()


def handshake(url: str) -> bytes:
    """A WebSocket's opening."""
    return (
        f"GET /api/socket HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Key: {HANDSHAKE_KEY}\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: chatserve.v1\r\n\r\n"
    ).encode()


def _unchunked(body: bytes) -> bytes:
    parts: list[bytes] = []
    place = 0
    while True:
        end = body.find(b"\r\n", place)
        if end < 0:
            break
        size = int(body[place:end], 16)
        if not size:
            break
        parts.append(body[end + 2 : end + 2 + size])
        place = end + 2 + size + 2
    return b"".join(parts)
