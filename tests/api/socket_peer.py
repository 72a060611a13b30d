"""Clients of `/api/socket`: `Tab` behaves, and `Peer` does what a test tells it to.

A Tab speaks through the websockets library, so what we send is checked by somebody else's parser.
A Peer is a plain TCP connection with a hand-made codec: it sends any frame, or half of one, and
reads only when it is told to.
"""

import asyncio
import contextlib
import itertools
import os
import socket
import struct
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import orjson
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from chatserve.api.socket import SUBPROTOCOL
from tests.api.fake_conversations import FakeChatReply, FakeConversations
from tests.api.harness import PATIENCE_SECONDS, Site, until

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
# What the kernel keeps for a reader that does not read, ours and the peer's together.
RECEIVE_BUFFER_BYTES = 64 * 1024

Heard = dict[str, Any]


class Served(Protocol):
    """A running server, as its clients see it."""

    conversations: FakeConversations

    @property
    def socket_url(self) -> str: ...


class Tab:
    """A page's socket. `changes` collects what comes of the kind `changed`, on the way; `unheard`
    what came before the server closed."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.changes: list[Heard] = []
        self.unheard: list[Heard] = []
        self._requests = itertools.count(1)

    async def tell(self, kind: str, **fields: object) -> str:
        """Send a frame; gives its `request`."""
        request = f"q{next(self._requests)}"
        await self.say({"type": kind, "request": request} | fields)
        return request

    async def say(self, frame: object) -> None:
        await self.connection.send(orjson.dumps(frame).decode())

    async def hear(self) -> Heard:
        """The next frame that is no `changed`."""
        while (heard := await self.hear_any())["event"] == "changed":
            self.changes.append(heard)
        return heard

    async def hear_any(self) -> Heard:
        async with asyncio.timeout(PATIENCE_SECONDS):
            text = await self.connection.recv()
        assert isinstance(text, str)
        return orjson.loads(text)

    async def hear_until(self, event: str) -> list[Heard]:
        """Frames up to the first of this kind."""
        heard = [await self.hear()]
        while heard[-1]["event"] != event:
            heard.append(await self.hear())
        return heard

    async def ask(self, kind: str, **fields: object) -> Heard:
        """Send a frame, and give its answer, which must be what comes next."""
        request = await self.tell(kind, **fields)
        heard = await self.hear()
        assert heard["request"] == request
        return heard

    async def send_turn(self, conversation: str, ask: str = "t1", **fields: object) -> Heard:
        """Send a turn, and give its `accepted`."""
        turn = {"conversation": conversation, "id": ask, "content": "x"} | fields
        heard = await self.ask("send", **turn)
        assert heard["event"] == "accepted", heard
        return heard

    async def closed_by_server(self) -> tuple[int, str]:
        """The code and reason that the server closes with."""
        with pytest.raises(ConnectionClosed) as closed:
            await self._hear_out()
        word = closed.value.rcvd
        assert word is not None, "it went without a word"
        return word.code, word.reason

    async def _hear_out(self) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                self.unheard.append(orjson.loads(await self.connection.recv()))


@contextlib.asynccontextmanager
async def tab(running: Served, **options: Any) -> AsyncGenerator[Tab]:
    """A Tab; leaving the block closes it."""
    settings: dict[str, Any] = {
        "subprotocols": [Subprotocol(SUBPROTOCOL)],
        "open_timeout": PATIENCE_SECONDS,
        "close_timeout": PATIENCE_SECONDS,
        "ping_interval": None,
        "max_size": None,
    }
    async with connect(running.socket_url, **(settings | options)) as connection:
        yield Tab(connection)


async def conversation(running: Served, owner: str = "local") -> str:
    """The id of a new one."""
    made = await running.conversations.create(owner, title=None, system=None, settings={})
    return made.id


async def reply_in(running: Site, name: str, ask: str = "t1") -> FakeChatReply:
    """The reply to a turn of this conversation, once it is there."""
    asks = running.conversations.asks
    await until(lambda: (name, ask) in asks)
    return asks[name, ask][1]


# -- by hand


def handshake(headers: Mapping[str, str | None] | None = None, line: str | None = None) -> bytes:
    """The head of a good handshake, but for these headers; None leaves one out."""
    fields: dict[str, str | None] = {
        "Host": "localhost",
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Protocol": SUBPROTOCOL,
    }
    fields |= headers or {}
    lines = [f"{name}: {value}\r\n" for name, value in fields.items() if value is not None]
    return f"{line or 'GET /api/socket HTTP/1.1'}\r\n{''.join(lines)}\r\n".encode()


def frame(
    opcode: int, payload: bytes = b"", *, fin: bool = True, masked: bool = True, reserved: int = 0
) -> bytes:
    """Any frame. reserved: the three bits behind `fin`."""
    head = bytes([fin << 7 | reserved << 4 | opcode])
    mask_bit, size = masked << 7, len(payload)
    if size < 126:
        head += bytes([mask_bit | size])
    elif size < 1 << 16:
        head += struct.pack("!BH", mask_bit | 126, size)
    else:
        head += struct.pack("!BQ", mask_bit | 127, size)
    if not masked:
        return head + payload
    key = os.urandom(4)
    whole = int.from_bytes((key * (size // 4 + 1))[:size], "big")
    return head + key + (int.from_bytes(payload, "big") ^ whole).to_bytes(size, "big")


def text(fields: object) -> bytes:
    """A text frame of JSON."""
    return frame(TEXT, orjson.dumps(fields))


@dataclass(frozen=True)
class Frame:
    """One that the server sent."""

    opcode: int
    payload: bytes
    fin: bool = True

    @property
    def fields(self) -> Heard:
        assert self.opcode == TEXT
        return orjson.loads(self.payload)

    @property
    def code(self) -> int | None:
        assert self.opcode == CLOSE
        return struct.unpack("!H", self.payload[:2])[0] if self.payload else None


class Peer:
    """A connection that has shaken hands. Nothing is read unless a test asks for it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @property
    def address(self) -> tuple[str, int]:
        """As the server sees this connection."""
        return self.writer.get_extra_info("sockname")[:2]

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    def go_on_reading(self) -> None:
        """After having stalled."""
        self.writer.transport.resume_reading()

    async def read_frame(self) -> Frame:
        """Raises IncompleteReadError where the server has closed."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            first, size = await self.reader.readexactly(2)
            assert first & 0x70 == 0, "the server uses no reserved bits"
            assert size & 0x80 == 0, "the server's frames have no mask"
            if size == 126:
                (size,) = struct.unpack("!H", await self.reader.readexactly(2))
            elif size == 127:
                (size,) = struct.unpack("!Q", await self.reader.readexactly(8))
            return Frame(first & 0x0F, await self.reader.readexactly(size), bool(first & 0x80))

    async def read_all(self) -> list[Frame]:
        """Every frame until the server closes the connection, in order or by abort."""
        frames: list[Frame] = []
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                frames.append(await self.read_frame())
        return frames

    async def close_code(self) -> int | None:
        """The last frame's; it must be a close frame, and the connection's end follows it."""
        return (await self.read_all())[-1].code

    async def pong(self, payload: bytes = b"still there?") -> None:
        """See that the connection lives: nothing else must be on its way."""
        await self.send(frame(PING, payload))
        assert await self.read_frame() == Frame(PONG, payload)


@contextlib.asynccontextmanager
async def peer(
    running: Site, *, stalled: bool = False, headers: Mapping[str, str] | None = None
) -> AsyncGenerator[Peer]:
    """A Peer; leaving the block aborts it. stalled: with small buffers, and not reading at all
    once its hands are shaken."""
    sock = socket.socket(proto=socket.IPPROTO_TCP)  # or asyncio would leave Nagle on
    if stalled:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", running.port))
    reader, writer = await asyncio.open_connection(sock=sock)
    writer.write(handshake(headers))
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head
        if stalled:
            writer.transport.pause_reading()
        yield Peer(reader, writer)
    finally:
        writer.transport.abort()
