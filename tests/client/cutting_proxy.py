"""A TCP proxy that cuts connections after so many bytes of the server's, as a test says."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

_PIECE_BYTES = 65_536


class CuttingProxy:
    """`allowance` gives, for each new connection, the bytes that pass until it is cut; None: all.

    `cuts` counts the connections that were cut. `refusing`: new ones are cut at once.
    """

    def __init__(self, upstream_port: int, allowance: Callable[[], int | None]) -> None:
        self.allowance = allowance
        self.cuts = 0
        self.connections = 0
        self.refusing = False
        self.port = 0
        self._upstream_port = upstream_port
        self._open: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut_all(self) -> None:
        """Cut every connection now."""
        for writer in tuple(self._open):
            writer.transport.abort()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.refusing:
            writer.transport.abort()
            return
        left = self.allowance()
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        self._open |= {writer, up_writer}
        forward = asyncio.create_task(_copy(reader, up_writer, None))
        try:
            if await _copy(up_reader, writer, left):
                self.cuts += 1
        finally:
            forward.cancel()
            for each in (writer, up_writer):
                each.transport.abort()
                self._open.discard(each)
            await asyncio.wait({forward})


async def _copy(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: int | None
) -> bool:
    """True if the allowance was used up."""
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(_PIECE_BYTES):
            if left is not None and len(piece) > left:
                writer.write(piece[:left])
                await writer.drain()
                return True
            left = None if left is None else left - len(piece)
            writer.write(piece)
            await writer.drain()
    return False


@contextlib.asynccontextmanager
async def cutting_proxy(
    upstream_port: int, allowance: Callable[[], int | None] = lambda: None
) -> AsyncGenerator[CuttingProxy]:
    proxy = CuttingProxy(upstream_port, allowance)
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(proxy.handle(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.cut_all()
        if tasks:
            await asyncio.wait(tasks)
        await server.wait_closed()
