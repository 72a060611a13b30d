"""A chat service under the test's control, and a real socket in front of the app.

The fake service answers with scripts of events, or waits until a test says go on: nothing sleeps.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import httpx
from starlette.applications import Starlette
from uvicorn.server import ServerState

from chatserve.api.app import build_app
from chatserve.api.collaborators import ModelInfo
from chatserve.api.connection import Connection
from chatserve.api.keys import KeyRing
from chatserve.api.limits import Limits
from chatserve.api.server import server_config
from chatserve.cache.claims import ClaimStatistics
from chatserve.cache.page_pool import PoolStatistics
from chatserve.cache.statistics import CacheStatistics
from chatserve.chat.conversations.conversations import ConversationStatistics
from chatserve.chat.conversations.reply_log import LogStatistics
from chatserve.chat.store.session_store import StoreStatistics
from chatserve.chat.text.known_ids import KnownStatistics
from chatserve.chat.values import (
    Ask,
    ChatPrompt,
    Delta,
    Done,
    ReplyEvent,
    SampleEnd,
    TextPrompt,
    Timings,
    TokenChance,
    Usage,
)
from chatserve.engine.statistics import EngineStatistics
from chatserve.engine.statistics import Histogram as EngineHistogram
from chatserve.engine.values import Receipt
from tests.api.fake_conversations import FakeConversations

MODEL = ModelInfo(name="tiny/model", created=1_700_000_000, context_length=4_096)
LIMITS = Limits(context_length=MODEL.context_length, samples_max=8, connections_max=200)
COOKIE_KEY = bytes(range(32))
PATIENCE_SECONDS = 10.0  # how long a test waits for what must happen; never reached when it does


@dataclass
class FakeHealth:
    ready: bool = True
    healthy: bool = True
    draining: bool = False
    retry_after: float = 2.0


def done(ask: Ask, completion_tokens: int = 2) -> Done:
    return Done(
        usage=Usage(
            prompt_tokens=10,
            completion_tokens=completion_tokens * ask.generation.samples,
            cached_tokens=6,
        ),
        receipt=Receipt(device=6, computed=4),
        timings=Timings(to_first_token=0.25, total=1.25),
    )


def chance(text: str, token_id: int, top: int) -> TokenChance:
    others = tuple(
        TokenChance(token_id + rank, f"{text}{rank}", text.encode(), -0.5 - rank)
        for rank in range(top)
    )
    return TokenChance(token_id, text, text.encode(), -0.5, others)


def echo(ask: Ask) -> list[ReplyEvent]:
    """Says the last message, or the prompt, back: word by word, in every sample."""
    match ask.prompt:
        case ChatPrompt(messages=messages):
            said = messages[-1].content
        case TextPrompt(text=text):
            said = text
        case prompt:
            said = " ".join(map(str, prompt.tokens))
    top = ask.generation.top_logprobs
    events: list[ReplyEvent] = []
    words = said.split(" ")
    for sample in range(ask.generation.samples):
        seq = 0
        for index, word in enumerate(words):
            text = word if index == 0 else f" {word}"
            seq += len(text)
            chances = () if top is None else (chance(text, index, top),)
            events.append(
                Delta(sample=sample, seq=seq, text=text, token_ids=(index,), chances=chances)
            )
        events.append(SampleEnd(sample=sample, finish_reason="stop"))
    events.append(done(ask, len(words)))
    return events


class FakeViewing:
    def __init__(self) -> None:
        self.events: asyncio.Queue[ReplyEvent | None] = asyncio.Queue()

    def __aiter__(self) -> "FakeViewing":
        return self

    async def __anext__(self) -> ReplyEvent:
        event = await self.events.get()
        if event is None:
            raise StopAsyncIteration
        return event


class FakeReply:
    """One viewing; `left` is set when it was left."""

    def __init__(self, ask: Ask, events: list[ReplyEvent]) -> None:
        self.ask = ask
        self.viewing = FakeViewing()
        self.entered = asyncio.Event()
        self.left = asyncio.Event()
        self.say(*events)

    def say(self, *events: ReplyEvent | None) -> None:
        """Give these events to the viewing; None ends it as no reply should."""
        for event in events:
            self.viewing.events.put_nowait(event)

    @contextlib.contextmanager
    def view(self) -> Generator[FakeViewing]:
        self.entered.set()
        try:
            yield self.viewing
        finally:
            self.left.set()


class FakeService:
    """`script` gives the events of a reply. `refusal` is raised instead of opening, `full` before
    anything is read; `hold` makes open wait."""

    def __init__(self) -> None:
        self.script: Callable[[Ask], list[ReplyEvent]] = echo
        self.refusal: Exception | None = None
        self.full: Exception | None = None
        self.hold: asyncio.Event | None = None
        self.asks: list[Ask] = []
        self.replies: asyncio.Queue[FakeReply] = asyncio.Queue()
        self.all_replies: list[FakeReply] = []
        self.asked = asyncio.Event()
        self.open_cancelled = asyncio.Event()

    def check_room(self, tenant: str) -> None:
        if self.full is not None:
            raise self.full

    async def open(self, ask: Ask) -> FakeReply:
        self.asks.append(ask)
        self.asked.set()
        if self.hold is not None:
            try:
                await self.hold.wait()
            except asyncio.CancelledError:
                self.open_cancelled.set()
                raise
        if self.refusal is not None:
            raise self.refusal
        reply = FakeReply(ask, self.script(ask))
        self.replies.put_nowait(reply)
        self.all_replies.append(reply)
        return reply

    @property
    def left_open(self) -> list[FakeReply]:
        return [reply for reply in self.all_replies if not reply.left.is_set()]


CACHE_STATISTICS = CacheStatistics(
    page_size=16,
    pages=PoolStatistics(
        total=100, free=60, open=2, loading=0, sealed=8, cached=30, leaving=0, references=12
    ),
    claims=ClaimStatistics(claimed=1, waiting=2, waited=3),
    named_pages=38,
    logical_pages=12,
    physical_pages=10,
    query_tokens=100,
    hit_tokens=64,
    sealed_total=40,
    twins_total=0,
    copies_total=1,
    evicted_for_space_total=5,
    evicted_by_flush_total=6,
    truncated_total=0,
)
ENGINE_STATISTICS = EngineStatistics(
    running=3,
    waiting=1,
    following=2,
    in_flight=1,
    budget_tokens=2_048,
    steps_total=7,
    step_tokens_total=90,
    step_seconds=EngineHistogram((0.1, 1.0), (5, 2, 0), 1.5),
    prompt_tokens_total=36,
    generated_tokens_total=50,
    preemptions_total=0,
    failed_steps_total=0,
    recoveries_total=0,
    quarantined=0,
    finished_total={"stop": 4, "length": 1},
    broken=None,
)


CONVERSATION_STATISTICS = ConversationStatistics(
    running=4,
    waiting=1,
    accepted_total=9,
    resumed_total=2,
    doubts=0,
    subscribers=3,
    draining=False,
    log=LogStatistics(replies=4, doubtful=0, trips_total=8, entries_total=20, failures_total=1),
)
STORE_STATISTICS = StoreStatistics(
    kind="valkey", available=True, durable=True, calls=40, failures=1, seconds_total=0.25
)
KNOWN_STATISTICS = KnownStatistics(links=3, bytes=2_048, asked=7, found=5, evicted=1)
STATISTICS: dict[str, object] = {
    "cache": CACHE_STATISTICS,
    "engine": ENGINE_STATISTICS,
    "conversations": CONVERSATION_STATISTICS,
    "store": STORE_STATISTICS,
    "known_ids": KNOWN_STATISTICS,
}


@dataclass
class Site:
    """A running app."""

    service: FakeService
    conversations: FakeConversations
    health: FakeHealth
    app: Starlette
    port: int
    server_state: ServerState

    @property
    def socket_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/api/socket"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=PATIENCE_SECONDS, **options)

    async def talk(self, *pieces: bytes) -> bytes:
        """Send raw bytes and give everything that comes until the server closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            return await read_to_end(reader)
        finally:
            await close(writer)


async def read_to_end(reader: asyncio.StreamReader) -> bytes:
    received = bytearray()
    async with asyncio.timeout(PATIENCE_SECONDS):
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(65_536):
                received += piece
    return bytes(received)


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the server has no event for."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def soon(event: asyncio.Event) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        await event.wait()


def build(service: FakeService, health: FakeHealth, **options: Any) -> Starlette:
    settings: dict[str, Any] = {
        "service": service,
        "describe_model": lambda: MODEL,
        "limits": LIMITS,
        "health": health,
        "keys": KeyRing(),
        "cookie_key": COOKIE_KEY,
        "statistics": lambda: STATISTICS,
    }
    return build_app(**(settings | options))


def free_socket() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


@contextlib.asynccontextmanager
async def site(limits: Limits = LIMITS, **options: Any) -> AsyncGenerator[Site]:
    """The app behind our connections, without uvicorn's main loop (and its ticks)."""
    service, health = FakeService(), FakeHealth()
    conversations = FakeConversations()
    settings: dict[str, Any] = {"limits": limits, "conversations": conversations}
    app = build(service, health, **(settings | options))
    config = server_config(app, limits)
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()
    sock = free_socket()
    server = await loop.create_server(
        lambda: Connection(config, state, {}, limits=limits), sock=sock
    )
    try:
        yield Site(service, conversations, health, app, sock.getsockname()[1], state)
    finally:
        server.close()
        for connection in list(state.connections):
            connection.transport.abort()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while state.tasks:
                await asyncio.wait(set(state.tasks))
            await server.wait_closed()


def quick(**limits: Any) -> Limits:
    """The usual limits with some of them changed."""
    return replace(LIMITS, **limits)


CHAT: dict[str, Any] = {
    "model": MODEL.name,
    "messages": [{"role": "user", "content": "one two three"}],
}
