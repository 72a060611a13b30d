"""Connections to a server: who waits for one, who has one, and what becomes of it."""

import asyncio
from collections.abc import AsyncGenerator, Callable

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from chatserve.chat.store.redis_connections import (
    CONNECTIONS_MAX,
    HOPEFUL_SECONDS,
    Connections,
)


class FakeConnection:
    """Answers what a test hands it. lines: of commands that were sent."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.refusal: Exception | None = None
        self.answers: asyncio.Queue[object] = asyncio.Queue()
        self.sent: list[object] = []
        self.closed = False

    async def connect(self) -> None:
        await self.ready.wait()
        if self.refusal is not None:
            raise self.refusal

    async def disconnect(self, nowait: bool = False) -> None:
        assert nowait
        self.closed = True

    def pack_commands(self, commands: object) -> object:
        return commands

    async def send_packed_command(self, command: object, check_health: bool = True) -> None:
        assert not check_health
        assert not self.closed
        self.sent.append(command)

    async def read_response(self) -> object:
        answer = await self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer


class Server:
    """Hands out connections, and keeps the time."""

    def __init__(self) -> None:
        self.made: list[FakeConnection] = []
        self.time = 0.0
        self.connections = Connections(self._make, lambda: self.time)

    def _make(self) -> FakeConnection:
        self.made.append(FakeConnection())
        return self.made[-1]

    def ask(self, *words: str) -> "asyncio.Task[list[object]]":
        """A call in a task of its own."""
        return asyncio.create_task(self.connections.exchange([(word,) for word in words]))

    async def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(1_000):
            if condition():
                return
            await asyncio.sleep(0)
        raise AssertionError("it did not happen")

    async def connected(self, word: str = "HELLO") -> FakeConnection:
        """One that is idle."""
        call = self.ask(word)
        await self.until(lambda: bool(self.made))
        self.made[-1].ready.set()
        self.made[-1].answers.put_nowait(b"OK")
        assert await call == [b"OK"]
        return self.made[-1]


@pytest.fixture
async def server() -> AsyncGenerator[Server]:
    server = Server()
    yield server
    await server.connections.close()
    assert all(connection.closed for connection in server.made), "none is left open"


async def test_a_connection_is_used_again(server: Server) -> None:
    first = await server.connected()
    for _ in range(3):
        first.answers.put_nowait(b"yes")
        assert await server.ask("EXISTS") == [b"yes"]
    assert server.made == [first]


async def test_errors_that_the_server_answers_with_are_answers(server: Server) -> None:
    first = await server.connected()
    error = ResponseError("WRONGTYPE")
    for answer in (b"1", error, b"2"):
        first.answers.put_nowait(answer)
    assert await server.ask("A", "B", "C") == [b"1", error, b"2"]
    assert not first.closed


async def test_connecting_goes_on_when_the_caller_has_given_up(server: Server) -> None:
    call = server.ask("A")
    await server.until(lambda: bool(server.made))
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    server.made[0].ready.set()
    server.made[0].answers.put_nowait(b"next")
    assert await server.ask("B") == [b"next"]
    assert len(server.made) == 1, "the next caller has it"
    assert server.made[0].sent == [[("B",)]], "nothing was asked for who had gone"


async def test_an_exchange_goes_on_when_the_caller_has_given_up(server: Server) -> None:
    first = await server.connected()
    late = server.ask("LATE")
    await server.until(lambda: len(first.sent) == 2)
    late.cancel()
    await asyncio.gather(late, return_exceptions=True)
    call = server.ask("B")
    await server.until(lambda: len(server.made) == 2)  # meanwhile it takes another
    first.answers.put_nowait(b"late")
    await server.until(first.answers.empty)
    first.answers.put_nowait(b"own")
    assert await call == [b"own"], "the late answer was nobody's, and the connection is sound"
    assert not first.closed


async def test_there_are_so_many_and_no_more(server: Server) -> None:
    calls = [server.ask(f"C{number}") for number in range(CONNECTIONS_MAX + 5)]
    await server.until(lambda: len(server.made) == CONNECTIONS_MAX)
    for connection in server.made:
        connection.ready.set()
        for _ in calls:
            connection.answers.put_nowait(b"OK")
    assert await asyncio.gather(*calls) == [[b"OK"]] * len(calls)
    assert len(server.made) == CONNECTIONS_MAX


async def test_a_refusal_is_told_to_all_who_wait(server: Server) -> None:
    calls = [server.ask(f"C{number}") for number in range(3)]
    await server.until(lambda: len(server.made) == 3)
    server.made[0].refusal = RedisConnectionError("refused")
    server.made[0].ready.set()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, RedisConnectionError) for outcome in outcomes)
    assert server.made[0].closed


async def test_where_one_is_broken_the_idle_ones_are_not_trusted(server: Server) -> None:
    calls = [server.ask("A"), server.ask("B")]
    await server.until(lambda: len(server.made) == 2)
    for connection in server.made:
        connection.ready.set()
        connection.answers.put_nowait(b"OK")
    await asyncio.gather(*calls)
    for connection in server.made:
        connection.answers.put_nowait(RedisConnectionError("reset"))
    with pytest.raises(RedisConnectionError):
        await server.ask("C")
    assert all(connection.closed for connection in server.made)
    fresh = server.ask("C")
    await server.until(lambda: len(server.made) == 3)
    server.made[2].ready.set()
    server.made[2].answers.put_nowait(b"OK")
    assert await fresh == [b"OK"]


async def test_one_that_hangs_is_not_waited_for_by_later_callers(server: Server) -> None:
    hung = server.ask("A")
    await server.until(lambda: len(server.made) == 1)
    hung.cancel()
    soon = server.ask("B")
    await asyncio.gather(hung, return_exceptions=True)
    await asyncio.sleep(0)
    assert len(server.made) == 1, "there is hope yet"
    server.time += HOPEFUL_SECONDS * 1.5
    later = server.ask("C")
    await server.until(lambda: len(server.made) > 1)
    server.made[1].ready.set()
    for _ in range(2):
        server.made[1].answers.put_nowait(b"OK")
    assert await soon == await later == [b"OK"]


async def test_closing_ends_what_is_under_way(server: Server) -> None:
    first = await server.connected()
    exchange = server.ask("A")
    await server.until(lambda: len(first.sent) == 2)
    waiting = server.ask("B")
    await server.until(lambda: len(server.made) == 2)
    await server.connections.close()
    assert first.closed
    assert server.made[1].closed
    waiting.cancel()  # as the end of its own task group does
    outcomes = await asyncio.gather(exchange, waiting, return_exceptions=True)
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
