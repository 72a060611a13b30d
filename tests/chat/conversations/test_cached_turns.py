"""What a turn finds in the cache: chats through the real Conversations, History and Engine.

The simulated runner emits any id of the vocabulary, so replies end in every way there is and hold
what no tokenizer would choose. With n ids of a prompt P and the ids R that are kept of its reply:

    what ended the reply            ids of R that were computed: c
    length, a stop id               all but the last that was emitted, which was only sampled
    a stop string                   those wholly before it; the rest was encoded for this turn
    its reader                      those shown, or all but the last of them

and P + R[:c] is what the next turn finds, in whole pages: cached = ⌊(n + c) / page⌋ · page. That
is the statement of these tests, exactly. c is at least len(R) - 1 unless a token was cut in two.
"""

import asyncio
import hashlib
import json
import random
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from chatserve.api.chat_collaborators import TurnAsk
from chatserve.chat.audience import Clock
from chatserve.chat.conversations.conversations import Conversations
from chatserve.chat.conversations.history import History
from chatserve.chat.crowd import Crowd
from chatserve.chat.service import Workshop
from chatserve.chat.store.conversation import Role, Turn
from chatserve.chat.store.memory_store import MemoryStore
from chatserve.chat.text.prompt_ids import HistoryMode
from chatserve.chat.text.text_floor import TextFloor
from chatserve.engine.sequence import PreparedRequest
from chatserve.engine.stream import Stream
from chatserve.engine.values import Emission, Request
from tests.chat.conversations.spoken import SYSTEMS, common, kept_count, text_floor, user_text
from tests.engine.build import House, Setup, build, quiet, running

KINDS = ("byte_level", "metaspace", "prepending", "unigram")
FORMS = ("chatml", "llama3", "gemma", "mistral", "reasoning")
CHATS = 10  # of each kind and form: 200
TURNS = 5
PAGES, PAGE_SIZE = 4096, 8  # nothing is evicted
DEADLINE_SECONDS = 120.0  # only a test that fails waits as long
LETTERS = ("e", "t", " ", "o", "s", "\ufffd", "in", "\n")


@dataclass(slots=True)
class Heard:
    """A request, and what came of it. cut: a stop string was found."""

    prompt: tuple[int, ...]
    emitted: list[int] = field(default_factory=list[int])
    cut: bool = False


class WatchedEngine:
    """The engine's door; remembers requests by their replies' ids."""

    def __init__(self, house: House) -> None:
        self._engine = house.engine
        self.context_length = house.engine.context_length
        self.vocabulary_size = house.engine.vocabulary_size
        self.heard: dict[str, Heard] = {}

    def check_room(self, tenant: str, preparing: int, own: int) -> None:
        """On the loop."""
        self._engine.check_room(tenant, preparing, own)

    def prepare(self, request: Request) -> PreparedRequest:
        """In any thread."""
        self.heard[request.request_id] = Heard(request.tokens)
        return self._engine.prepare(request)

    def open(self, prepared: PreparedRequest) -> Stream:
        """On the loop."""
        stream = self._engine.open(prepared)
        heard = self.heard[prepared.request.request_id]
        put, finish = stream.put, stream.finish

        def hear(emission: Emission) -> None:
            heard.emitted += emission.tokens
            put(emission)

        def cut(sample: int, kept_tokens: int) -> None:
            heard.cut = True
            finish(sample, kept_tokens)

        stream.put, stream.finish = hear, cut
        return stream


@dataclass(slots=True)
class Room:
    """A server without its wires."""

    floor: TextFloor
    history: History
    engine: WatchedEngine
    chats: Conversations[PreparedRequest]
    store: MemoryStore


@dataclass(slots=True)
class Told:
    """A reply that has ended. kept: its turn's ids; computed: how many of them were. lines: the
    prompt and what was computed behind it, at least and at most."""

    prompt: tuple[int, ...]
    kept: tuple[int, ...]
    lines: tuple[tuple[int, ...], tuple[int, ...]]
    computed: int
    ended_by: str
    cached: int


@dataclass(slots=True)
class Talk:
    """One conversation of an owner of its own, so that it shares pages with itself alone."""

    room: Room
    owner: str
    id: str
    told: dict[str, Told] = field(default_factory=dict[str, Told])  # by the reply's id

    async def say(
        self,
        ask: str,
        content: str | None,
        *,
        sampling: dict[str, object],
        stop: bool = False,
        **where: str | None,
    ) -> Told:
        """A turn and all of its reply; checks what it found in the cache."""
        turn = TurnAsk(
            owner=self.owner,
            conversation=self.id,
            ask=ask,
            digest=hashlib.sha256(ask.encode()).digest(),
            content=content,
            at_leaf=not where,
            parent=where.get("parent"),
            sampling=sampling,
        )
        reply = await self.room.chats.send(turn)
        with reply.view() as viewing:
            async for _ in viewing:
                if stop and reply.length:
                    await self.room.chats.stop(self.owner, reply.id)
        told = await self._told(reply.id)
        least, most = self._found(told.prompt)
        assert least <= told.cached <= most, (self.owner, ask, told)
        self.told[reply.id] = told
        return told

    def _found(self, prompt: tuple[int, ...]) -> tuple[int, int]:
        """The bounds of what a prompt finds: the longest prefix that any reply computed."""

        def found(which: int) -> int:
            lines = [each.lines[which] for each in self.told.values()]
            most = max((common(prompt, line) for line in lines), default=0)
            return min(most // PAGE_SIZE * PAGE_SIZE, len(prompt) - 1)

        return found(0), found(1)

    async def turns(self) -> dict[str, Turn]:
        """The tree."""
        _, turns, _ = await self.room.store.tree(self.owner, self.id)
        return {turn.id: turn for turn in turns}

    async def _told(self, reply: str) -> Told:
        turn = (await self.turns())[reply]
        assert turn.final is not None
        final = json.loads(turn.final)
        usage, ended_by = final["usage"], final["finish_reason"]
        told, kept = usage["completion_tokens"], turn.token_ids
        heard = self.room.engine.heard[reply]
        assert len(heard.prompt) == usage["prompt_tokens"]
        assert kept is not None
        if ended_by == "stop":
            ended_by = "stop_string" if heard.cut else "stop_id"
        emitted = tuple(heard.emitted)
        most = told if heard.cut or ended_by == "abort" else len(emitted) - 1
        least = max(0, told - 1) if ended_by == "abort" else most
        # All that was computed and counts is kept: only the rest of a token that was cut, and what
        # ended the reply, can differ.
        same = least
        if heard.cut:
            same = kept_count(self.room.floor, emitted[:told], kept, turn.text)
        assert kept[:same] == emitted[:same]
        assert heard.cut or told - 1 <= len(kept) <= told
        lines = (heard.prompt + emitted[:least], heard.prompt + emitted[:most])
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return Told(heard.prompt, kept, lines, same, ended_by, cached)


NAMED_STOPS = frozenset(range(300, 320))


@asynccontextmanager
async def room(kind: str, form: str, mode: HistoryMode | None = None) -> AsyncIterator[Room]:
    """A server's chat and engine floors, for as long as the block lasts."""
    floor = text_floor(kind, form)
    vocabulary = max(floor.tokenizer.special_ids) + 1
    house = build(
        Setup(pages=PAGES, page_size=PAGE_SIZE, vocabulary=vocabulary, context_length=8192)
    )
    house.engine.on_step = lambda: None  # thousands of pages, and the invariants are not at stake
    engine, store = WatchedEngine(house), MemoryStore()
    history = History(floor, context_length=engine.context_length, reserve=64, mode=mode)
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(2) as executor:
        # The engine outlives the replies, whose tasks the group awaits.
        async with (
            asyncio.timeout(DEADLINE_SECONDS),
            running(house),
            asyncio.TaskGroup() as group,
        ):
            workshop = Workshop(
                task_group=group,
                executor=executor,
                crowd=Crowd(2),
                clock=Clock(loop.time, loop.call_later),
            )
            chats = Conversations(store, engine, history, text=floor, workshop=workshop)
            chats.start()
            yield Room(floor, history, engine, chats, store)
            await chats.close()
            await quiet(house)
    house.assert_baseline()


async def begin(made: Room, form: str, number: int, source: random.Random) -> Talk:
    """A new conversation."""
    owner = f"owner{number}"
    system = None if form == "gemma" else source.choice(SYSTEMS)
    kept = await made.chats.create(owner, title=None, system=system, settings={})
    return Talk(made, owner, kept.id)


def sampling(source: random.Random) -> dict[str, object]:
    """How to answer; one of the ways to end is likely before the others."""
    fields: dict[str, object] = {"temperature": 1.0, "seed": source.randrange(1 << 30)}
    fields["max_tokens"] = source.randrange(1, 40)
    if source.random() < 0.5:
        fields["stop"] = source.sample(LETTERS, 2)
    if source.random() < 0.5:
        fields["stop_token_ids"] = sorted(NAMED_STOPS)
    return fields


async def talk(made: Room, form: str, number: int, source: random.Random) -> Talk:
    """Turns at the leaf, each of which begins with all that was computed before."""
    chat = await begin(made, form, number, source)
    before: Told | None = None
    for ask in range(TURNS):
        stop = source.random() < 0.2
        fields = {**sampling(source), **({"max_tokens": 200} if stop else {})}
        told = await chat.say(str(ask), user_text(source), sampling=fields, stop=stop)
        if before is not None and made.history.mode == "as_computed":
            line = before.prompt + before.kept
            assert told.prompt[: len(line)] == line
            reached = len(before.prompt) + before.computed
            assert told.cached >= reached // PAGE_SIZE * PAGE_SIZE
        elif before is not None:
            assert told.prompt[: len(before.prompt)] == before.prompt
        before = told
    return chat


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
async def test_a_turn_finds_all_that_was_computed_before_it(kind: str, form: str):
    print(f"seed {kind} {form}")
    async with room(kind, form) as made, asyncio.TaskGroup() as group:
        talks = [
            group.create_task(talk(made, form, number, random.Random(f"{kind} {form} {number}")))
            for number in range(CHATS)
        ]
    ends = {told.ended_by for each in talks for told in each.result().told.values()}
    assert ends == {"length", "stop_id", "stop_string", "abort"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
async def test_a_branch_and_a_regenerated_reply_find_all_before_them(kind: str, form: str):
    source = random.Random(f"branches {kind} {form}")
    print(f"seed branches {kind} {form}")
    async with room(kind, form) as made:
        for number in range(3):
            chat = await talk(made, form, number, source)
            for ask in range(6):
                turns = await chat.turns()
                parent = source.choice([None, *turns.values()])
                asked = parent is not None and parent.role is Role.USER
                told = await chat.say(
                    f"branch {ask}",
                    None if asked else user_text(source),
                    sampling=sampling(source),
                    parent=None if parent is None else parent.id,
                )
                if parent is not None and asked:  # the very prompt again: all of its pages
                    full = len(told.prompt) // PAGE_SIZE * PAGE_SIZE
                    assert told.cached == min(full, len(told.prompt) - 1)
                elif parent is not None and made.history.mode == "as_computed":
                    before = chat.told[parent.id]
                    reached = len(before.prompt) + before.computed
                    assert told.cached >= reached // PAGE_SIZE * PAGE_SIZE
