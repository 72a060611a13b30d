"""SIGTERM: readiness goes first, streams end by themselves, late ones are told, then it ends."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncGenerator

import httpx
from starlette.applications import Starlette

from chatserve.api.server import Server, descriptor_limit, server_config
from chatserve.chat.values import Delta, Failed
from chatserve.errors import Unavailable
from tests.api.harness import (
    CHAT,
    LIMITS,
    PATIENCE_SECONDS,
    FakeHealth,
    FakeService,
    build,
    echo,
    free_socket,
    soon,
    until,
)


class Running:
    """A whole server, with a drain that a test can look at."""

    def __init__(self, shutdown_seconds: float) -> None:
        self.service, self.health = FakeService(), FakeHealth()
        self.began, self.expired = asyncio.Event(), asyncio.Event()
        self.ended: list[str] = []
        self.replies_run = False
        self.looks = 0
        app = build(self.service, self.health, lifespan=self._lifespan)
        config = server_config(app, LIMITS)
        self.server = Server(config, drain=self, shutdown_seconds=shutdown_seconds)
        self.sock = free_socket()
        self.url = f"http://127.0.0.1:{self.sock.getsockname()[1]}"
        self.started = asyncio.Event()
        self.serving: asyncio.Task[None]

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncGenerator[None]:
        self.sock.listen()
        self.started.set()
        yield
        self.ended.append("lifespan")

    @property
    def busy(self) -> bool:
        self.looks += 1
        return self.replies_run

    def begin(self) -> None:
        self.health.draining = True
        self.began.set()

    def expire(self) -> None:
        self.expired.set()
        for reply in self.service.left_open:
            reply.say(Failed(Unavailable("The server is stopping.")))

    def terminate(self) -> None:
        self.server.handle_exit(signal.SIGTERM, None)


@contextlib.asynccontextmanager
async def running(shutdown_seconds: float = PATIENCE_SECONDS) -> AsyncGenerator[Running]:
    whole = Running(shutdown_seconds)
    async with asyncio.TaskGroup() as group:
        whole.serving = group.create_task(whole.server.serve(sockets=[whole.sock]))
        await soon(whole.started)
        async with httpx.AsyncClient(base_url=whole.url) as client:
            assert (await client.get("/ready")).status_code == 200
        yield whole
        async with asyncio.timeout(PATIENCE_SECONDS):
            await whole.serving


@contextlib.asynccontextmanager
async def stream(whole: Running) -> AsyncGenerator[httpx.Response]:
    body = CHAT | {"stream": True}
    async with (
        httpx.AsyncClient(base_url=whole.url, timeout=PATIENCE_SECONDS) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as answer,
    ):
        yield answer


async def test_without_streams_it_ends_at_once_with_its_lifespan() -> None:
    async with running() as whole:
        whole.terminate()
    assert whole.began.is_set()
    assert whole.ended == ["lifespan"]


async def test_a_stream_under_way_is_finished_and_new_asks_are_refused() -> None:
    async with running() as whole:
        whole.service.script = lambda ask: [Delta(sample=0, seq=1, text="a")]
        async with stream(whole) as answer:
            reply = await whole.service.replies.get()
            whole.terminate()
            await soon(whole.began)
            async with httpx.AsyncClient(base_url=whole.url) as client:
                assert (await client.get("/ready")).status_code == 503
                assert (await client.get("/health")).status_code == 200
                refused = await client.post("/v1/chat/completions", json=CHAT)
                assert refused.status_code == 503
            reply.say(*echo(reply.ask))
            text = (await answer.aread()).decode()
    assert "three" in text
    assert text.endswith("data: [DONE]\n\n")
    assert whole.ended == ["lifespan"]


async def test_a_stream_that_is_too_long_gets_its_final_event() -> None:
    async with running(shutdown_seconds=0.2) as whole:
        whole.service.script = lambda ask: [Delta(sample=0, seq=1, text="a")]
        async with stream(whole) as answer:
            whole.terminate()
            text = (await answer.aread()).decode()
    assert whole.expired.is_set()
    assert '"code":"unavailable"' in text
    assert whole.ended == ["lifespan"]
    assert not whole.service.left_open


async def test_a_reply_that_nobody_looks_at_is_waited_for() -> None:
    async with running() as whole:
        whole.replies_run = True
        whole.terminate()
        await until(lambda: whole.looks == 3)
        assert not whole.expired.is_set()
        whole.replies_run = False
    assert whole.expired.is_set()
    assert whole.ended == ["lifespan"]


async def test_a_reply_that_nobody_looks_at_is_not_waited_for_longer_than_asked() -> None:
    async with running(shutdown_seconds=0.2) as whole:
        whole.replies_run = True
        whole.terminate()
    assert whole.ended == ["lifespan"]


async def test_a_second_signal_does_not_wait() -> None:
    async with running(shutdown_seconds=3_600.0) as whole:
        whole.service.script = lambda ask: [Delta(sample=0, seq=1, text="a")]
        async with stream(whole) as answer:
            whole.terminate()
            await soon(whole.began)
            whole.terminate()
            text = (await answer.aread()).decode()
            async with asyncio.timeout(PATIENCE_SECONDS):
                await whole.serving
    assert '"code":"unavailable"' in text, "the reply's one final event"


def test_the_descriptor_limit_is_one_that_can_be_used() -> None:
    assert 256 <= descriptor_limit() <= 32_768
