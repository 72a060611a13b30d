"""A chat floor whose conversations are kept, for tests: its process can die and begin again.

`Process` is what ends with the process: the service, its tasks, its engine. The store stays.
"""

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from chatserve.api.chat_collaborators import TurnAsk
from chatserve.chat.audience import Clock, Patience
from chatserve.chat.conversations.assignment import AnswerOptions
from chatserve.chat.conversations.conversations import ConversationOptions, Conversations
from chatserve.chat.conversations.history import History
from chatserve.chat.conversations.reply_events import (
    ChatEvent,
    ReplyAccepted,
    ReplyDelta,
    ReplyFinal,
    ReplySnapshot,
)
from chatserve.chat.crowd import Crowd
from chatserve.chat.service import ChatService, Workshop
from chatserve.chat.store.conversation import ReplyCursor
from chatserve.chat.store.memory_store import MemoryStore
from chatserve.engine.values import FinishReason
from chatserve.errors import Unavailable
from tests.chat.conftest import text_floor
from tests.chat.engine import ManualTime, ScriptedEngine

PATIENCE = Patience(before_first_view=300.0, after_last_view=200.0)
OWNER = "ann"
DEADLINE_SECONDS = 20.0  # only a test that fails waits as long
WAIT_SECONDS_MAX = 1.0  # of waits for the store and the engine; patience is longer


class FaultyStore:
    """A store whose calls fail where a plot says so: 'before' the call, or 'after' its effect.

    plot: the method's name and its number from 0 on, to None, 'before' or 'after'. A name in
    `away` fails before every call; one in `held` waits until it is taken out and `release` called.
    """

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.plot: Callable[[str, int], str | None] = lambda name, number: None
        self.away: set[str] = set()
        self.calls: list[str] = []
        self.held: dict[str, asyncio.Event] = {}

    def __getattr__(self, name: str):
        method = getattr(self.store, name)
        if name == "statistics":
            return method

        async def call(*arguments, **options):
            number = self.calls.count(name)
            self.calls.append(name)
            if name in self.held:
                await self.held[name].wait()
            fate = "before" if name in self.away else self.plot(name, number)
            if fate == "before":
                raise Unavailable("The store is away.", retry_after=1.0)
            result = await method(*arguments, **options)
            if fate == "after":
                raise Unavailable("The store did not answer.", retry_after=1.0)
            return result

        return call


@dataclass(slots=True)
class Process:
    """One life of the server."""

    store: FaultyStore
    engine: ScriptedEngine
    chats: Conversations
    requests: ChatService
    time: ManualTime
    task: "asyncio.Task[None] | None" = None
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def ids(self, text: str) -> list[int]:
        return list(text_floor().tokenizer.encode_rendered(text, ()))

    async def conversation(self, **fields) -> str:
        made = await self.chats.create(
            OWNER, **{"title": None, "system": None, "settings": {}, **fields}
        )
        return made.id

    async def send(self, conversation: str, content: str | None = "hi", **fields):
        return await self.chats.send(turn(conversation, content, **fields))

    def die(self) -> None:
        """As by kill -9: nothing more is written."""
        assert self.task is not None
        self.store.away |= {"append", "end", "accept"}
        self.task.cancel()


def turn(
    conversation: str,
    content: str | None = "hi",
    *,
    ask: str = "t1",
    owner: str = OWNER,
    sampling: Mapping[str, object] | None = None,
    **where,
) -> TurnAsk:
    """A turn at the leaf unless a parent is named."""
    said = repr((content, sorted(where.items()), sampling)).encode()
    return TurnAsk(
        owner=owner,
        conversation=conversation,
        ask=ask,
        digest=hashlib.sha256(said).digest(),
        content=content,
        at_leaf="parent" not in where,
        parent=where.get("parent"),
        sampling=sampling or {},
    )


@asynccontextmanager
async def process(
    store: MemoryStore,
    *,
    engine=None,
    patience: Patience = PATIENCE,
    log=None,
    drafts=None,
    wishes=None,
    real_time: bool = False,
) -> AsyncIterator[Process]:
    """A process's life. Its task group must end by itself, unless it was killed."""
    ready: asyncio.Future[Process] = asyncio.get_running_loop().create_future()
    faulty = FaultyStore(store)

    async def lifespan() -> None:
        with ThreadPoolExecutor(2) as executor:
            async with asyncio.TaskGroup() as group:
                made = _build(
                    faulty,
                    engine,
                    group,
                    executor,
                    patience,
                    log,
                    real_time,
                    drafts=drafts,
                    wishes=wishes,
                )
                made.chats.start()
                ready.set_result(made)
                await made.over.wait()

    task = asyncio.create_task(lifespan())
    await asyncio.wait((task, ready), return_when=asyncio.FIRST_COMPLETED)
    found = ready.result()
    found.task = task
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            yield found
    finally:
        if not task.cancelling():
            for event in faulty.held.values():
                event.set()
            async with asyncio.timeout(DEADLINE_SECONDS):
                await found.chats.close()
        found.over.set()
        await asyncio.wait((task,), timeout=DEADLINE_SECONDS)
        assert task.done(), "something of the process outlived it"
        if not task.cancelled() and not task.cancelling():
            task.result()
        assert found.chats.statistics().running == 0


def _build(store, engine, group, executor, patience, log, real_time, *, drafts, wishes) -> Process:
    time = ManualTime()
    loop = asyncio.get_running_loop()
    clock = Clock(loop.time, loop.call_later) if real_time else Clock(time.now, time.call_later)
    engine = engine or ScriptedEngine(context_length=400)
    workshop = Workshop(task_group=group, executor=executor, crowd=Crowd(2), clock=clock)
    text = text_floor()
    options = ConversationOptions(answers=AnswerOptions(patience=patience))
    if log is not None:
        options = replace(options, log=log)
    chats = Conversations(
        store,
        engine,
        History(text, context_length=engine.context_length, reserve=32),
        text=text,
        workshop=workshop,
        options=options,
        drafts=drafts,
        wishes=wishes,
        wall=lambda: 1_000.0 + time.seconds,
    )
    return Process(store, engine, chats, ChatService(engine, text, workshop), time)


async def until(condition: Callable[[], object]) -> None:
    """Let others run until something is so."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def tick(process: Process, seconds: float | None = None) -> None:
    """Ring the timers of a length, or all those that are no patience with viewers."""
    for timer in process.time.due:
        if timer.seconds == seconds or (seconds is None and timer.seconds <= WAIT_SECONDS_MAX):
            timer.cancelled = True
            timer.call()
    for _ in range(10):
        await asyncio.sleep(0)


class Client:
    """What a browser makes of events: the text, its cursor, the final event."""

    def __init__(self) -> None:
        self.text = ""
        self.cursor: ReplyCursor | None = None
        self.final: ReplyFinal | None = None
        self.events: list[ChatEvent] = []
        self.places: list[tuple[ReplyCursor, str]] = []  # where it was

    def step_back(self, source: random.Random) -> None:
        """Forget what came after some place."""
        if self.places:
            del self.places[source.randrange(len(self.places)) + 1 :]
            self.cursor, self.text = self.places[-1]

    def take(self, event: ChatEvent) -> None:
        """One event. Fails where the order is wrong, or a cursor does not fit the text."""
        assert self.final is None, "an event after the final one"
        self.events.append(event)
        match event:
            case ReplyDelta():
                assert event.text, "an empty delta"
                self.text += event.text
            case ReplySnapshot():
                self.text = event.text
            case ReplyFinal():
                self.final = event
                assert event.cursor.seq == len(self.text) + 1
            case _:
                return
        if not isinstance(event, ReplyFinal):
            assert event.cursor.seq == len(self.text)
            self.places.append((event.cursor, self.text))
        self.cursor = event.cursor

    async def read(self, reply, *, most: int = 1 << 30) -> None:
        """Look at a reply from where we are, to its end or for so many events."""
        with reply.view(self.cursor) as viewing:
            first = await anext(viewing)
            assert isinstance(first, ReplyAccepted)
            assert first.reply == reply.id
            self.events.append(first)
            async for event in viewing:
                self.take(event)
                most -= 1
                if most <= 0:
                    return


async def begun(life: Process, number: int = 0):
    """The engine's run of a reply, once it is open."""
    await until(lambda: len(life.engine.runs) > number)
    return life.engine.runs[number]


async def answered(life: Process, conversation: str, text: str = "the dog", **fields):
    """A turn with its whole reply."""
    count = len(life.engine.runs)
    reply = await life.send(conversation, **fields)
    run = await begun(life, count)
    run.give(life.ids(text), finish=FinishReason.LENGTH)
    await until(lambda: reply.end is not None)
    return reply
