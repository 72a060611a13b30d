"""A real server of conversations for tests, and a proxy that makes the way to it slow."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from redis.asyncio import Redis

from chatserve.chat.store.redis_link import RedisLink
from chatserve.chat.store.redis_store import RedisStore
from chatserve.errors import Unavailable
from chatserve.redis_binary import Binary, find_binaries
from chatserve.redis_server import OwnServer

T = TypeVar("T")

WAIT_SECONDS_MAX = 20.0


class RedisProcess:
    """A server in a folder, and what tests do to it. Not watched: what dies stays dead."""

    def __init__(self, folder: Path, binary: Binary | None = None) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self.server = OwnServer(folder.resolve(), None)
        self._binary = binary or find_binaries()[0]

    async def start(self) -> None:
        await self.server.start(self._binary)

    async def stop(self) -> None:
        self.signal(signal.SIGCONT)
        await self.server.stop()

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.server.pid, number)

    async def kill(self) -> None:
        """kill -9, and it is gone."""
        self.signal(signal.SIGKILL)
        assert await self.server._gone_within(WAIT_SECONDS_MAX)  # pyright: ignore[reportPrivateUsage]

    async def command(self, *words: str | bytes | int) -> object:
        """Straight to the server."""
        async with Redis(unix_socket_path=str(self.server.path)) as client:
            return await client.execute_command(*words)


@asynccontextmanager
async def redis_process(folder: Path) -> AsyncGenerator[RedisProcess]:
    process = RedisProcess(folder)
    await process.start()
    try:
        yield process
    finally:
        await process.stop()


@asynccontextmanager
async def redis_store(url: str) -> AsyncGenerator[RedisStore]:
    async with RedisLink(url) as link:
        yield RedisStore(link)


async def until_available(call: Callable[[], Awaitable[T]]) -> tuple[T, float]:
    """Call again while the store is away; what came of it, and after how many seconds."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while True:
        try:
            return await call(), loop.time() - began
        except Unavailable:
            assert loop.time() < began + WAIT_SECONDS_MAX, "it did not come back"
            await asyncio.sleep(0.02)


class SlowWay:
    """A proxy before a Unix socket: bytes of the answers come `seconds` later, in order."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path = path
        self.seconds = 0.0
        self._target = target
        self._ends: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> "SlowWay":
        self._server = await asyncio.start_unix_server(self._carry, str(self.path))
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.reset()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def reset(self) -> None:
        """Cut all connections."""
        for end in self._ends:
            end.transport.abort()
        self._ends.clear()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            there, back = await asyncio.open_unix_connection(str(self._target))
        except OSError:
            writer.transport.abort()
            return
        self._ends += [writer, back]
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(self._pump(reader, back, slow=False), self._pump(there, writer))

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, slow: bool = True
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                if slow and self.seconds:
                    await asyncio.sleep(self.seconds)
                sink.write(data)
                await sink.drain()
        sink.close()
