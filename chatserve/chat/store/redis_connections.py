"""Connections: the connections to one server, made and used by tasks that outlive their callers.

It may not know what is said on them. Theory of operation: a server that is slow to answer is slower
to connect to (the handshakes, AUTH and SELECT are trips as well), so whoever gives up after a trip
would never have a connection, nor leave one. Hence a caller waits, and may give up at any point,
but the work goes on without it:

    take ─▶ idle? it, at once
       └──▶ wait for the first that is given back, or made for it   ─▶ exchange ─▶ given back
                                    │ refused                            │ broken, or too late
                                    └▶ whoever waits is told             └▶ closed

A connection whose exchange nobody waits for any more is given back in order once its answers have
come. Where one is found broken the idle ones are closed too: a server that was restarted has cut
them all. The tasks are in no TaskGroup, which would wrap up the errors of the block that uses the
connections; `close` awaits them.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from redis.exceptions import ResponseError

T = TypeVar("T")

CONNECTIONS_MAX = 16  # a trip takes a millisecond: thousands of calls a second
CONNECT_SECONDS_MAX = 3.0  # five trips of half a second, and some
EXCHANGE_SECONDS_MAX = 2.0  # a connection that is silent for longer is dead
# While one is being made no other is made for the same caller; after so long it is no hope.
HOPEFUL_SECONDS = 0.9

Argument = str | bytes | int | float
Command = tuple[Argument, ...]


class Connection(Protocol):
    """What the client library's connections are used for."""

    def connect(self) -> Awaitable[object]: ...

    def disconnect(self, nowait: bool = False) -> Awaitable[None]: ...

    def pack_commands(self, commands: Any) -> Any: ...

    def send_packed_command(self, command: Any, check_health: bool = True) -> Awaitable[None]: ...

    def read_response(self) -> Awaitable[object]: ...


class Connections:
    """At most CONNECTIONS_MAX. `close` ends all tasks."""

    def __init__(self, make: Callable[[], Connection], now: Callable[[], float]) -> None:
        """make: one that is not connected yet."""
        self._make = make
        self._now = now
        self._count = 0  # idle, lent or being made
        self._idle: list[Connection] = []
        self._waiters: deque[asyncio.Future[Connection]] = deque()
        self._making: dict[asyncio.Task[None], float] = {}  # since when
        self._exchanges: set[asyncio.Task[list[object]]] = set()

    async def exchange(self, commands: Sequence[Command]) -> list[object]:
        """The answers to commands in one trip; errors that the server answers with are among them.

        Raises what the client library does for a connection that breaks. Cancelling it leaves the
        exchange to itself: then the commands were carried out, or not.
        """
        connection = await self._take()
        return await asyncio.shield(
            self._spawn(self._exchanged(connection, commands), self._exchanges)
        )

    async def close(self) -> None:
        """End what is under way, and all connections."""
        tasks = (*self._making, *self._exchanges)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._close_idle()

    # Inside ----------------------------------------------------------------------------------

    async def _take(self) -> Connection:
        if self._idle:
            return self._idle.pop()
        waiter: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._make_for_waiters()
        try:
            return await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._give(waiter.result())
            raise
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _give(self, connection: Connection) -> None:
        """To who has waited longest."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return
        self._idle.append(connection)

    def _make_for_waiters(self) -> None:
        """One for each that waits and has no hope yet, as far as the number goes."""
        recent = self._now() - HOPEFUL_SECONDS
        hopes = sum(began > recent for began in self._making.values())
        for _ in range(min(len(self._waiters) - hopes, CONNECTIONS_MAX - self._count)):
            self._count += 1
            task = asyncio.create_task(self._made())
            self._making[task] = self._now()
            task.add_done_callback(self._making.pop)

    async def _made(self) -> None:
        connection = self._make()
        try:
            async with asyncio.timeout(CONNECT_SECONDS_MAX):
                await connection.connect()
        except Exception as error:
            await self._lose(connection)
            while self._waiters:
                waiter = self._waiters.popleft()
                if not waiter.done():
                    waiter.set_exception(error)
        except BaseException:
            await self._lose(connection)
            raise
        else:
            self._give(connection)

    async def _exchanged(self, connection: Connection, commands: Sequence[Command]) -> list[object]:
        answers: list[object] = []
        try:
            async with asyncio.timeout(EXCHANGE_SECONDS_MAX):
                packed = connection.pack_commands(commands)
                await connection.send_packed_command(packed, check_health=False)
                for _ in commands:
                    try:
                        answers.append(await connection.read_response())
                    except ResponseError as error:
                        answers.append(error)
        except BaseException:
            await self._lose(connection)
            await self._close_idle()
            self._make_for_waiters()
            raise
        self._give(connection)
        return answers

    async def _lose(self, connection: Connection) -> None:
        self._count -= 1
        await connection.disconnect(nowait=True)

    async def _close_idle(self) -> None:
        while self._idle:
            await self._lose(self._idle.pop())

    @staticmethod
    def _spawn(work: Coroutine[Any, Any, T], tasks: "set[asyncio.Task[T]]") -> "asyncio.Task[T]":
        task = asyncio.create_task(work)
        tasks.add(task)

        def over(task: "asyncio.Task[T]") -> None:
            tasks.discard(task)
            if not task.cancelled():
                task.exception()  # it counts as seen if nobody waits any more

        task.add_done_callback(over)
        return task
