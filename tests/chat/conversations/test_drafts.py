"""What is typed: its settled part is computed ahead, where it belongs, and only the newest."""

import asyncio
import random
from collections.abc import AsyncIterator, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest

from chatserve.chat.audience import Clock
from chatserve.chat.conversations import drafts as drafts_module
from chatserve.chat.conversations.changes import Changes
from chatserve.chat.conversations.draft_ask import DraftAsk
from chatserve.chat.conversations.drafts import DraftMeans, Drafts, settled_ids
from chatserve.chat.conversations.history import History
from chatserve.chat.store.conversation import Conversation, Role, Turn
from chatserve.chat.store.memory_store import MemoryStore
from chatserve.engine.values import FinishReason, Request
from chatserve.errors import ChatserveError, NotFound
from tests.chat.conftest import text_floor
from tests.chat.conversations import spoken
from tests.chat.conversations.chats import FaultyStore, answered, begun, process, until
from tests.chat.engine import ManualTime, ScriptedEngine

CONTEXT = 400
WORDS = (
    *spoken.PHRASES,
    " ",
    " a",
    "1",
    " 12",
    "3.14",
    "https://example.org/a/b?c=d&e=f#" + "x" * 30,
    "!",
    "...",
    "don",
    "'t",
    " 中文字符" * 12,
    "\t",
)


class DraftEngine(ScriptedEngine):
    """A scripted engine that keeps what it is told to draft."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.idle = asyncio.Event()
        self.idle.set()
        self.prepared: list[Request] = []
        self.drafted: list[Request] = []
        self.withdrawn: list[Hashable] = []

    def prepare(self, request: Request) -> Request:
        if not request.max_tokens:
            self.prepared.append(request)
        return super().prepare(request)

    def draft(self, key: Hashable, prepared: Request) -> bool:
        self.drafted.append(prepared)
        return True

    def withdraw(self, key: Hashable) -> None:
        self.withdrawn.append(key)

    async def wait_idle(self) -> None:
        await self.idle.wait()


class Holds:
    """What is held for who types."""

    def __init__(self) -> None:
        self.held: list[frozenset[bytes]] = []

    def hold(self, names: frozenset[bytes]) -> None:
        self.held.append(names)


class Desk:
    """A typist with all that it works with."""

    def __init__(self, executor: ThreadPoolExecutor, holds: Holds | None = None) -> None:
        self.store = FaultyStore(MemoryStore())
        self.engine = DraftEngine(context_length=CONTEXT)
        self.time = ManualTime()
        clock = Clock(self.time.now, self.time.call_later)
        self.changes = Changes(clock)
        self.history = History(text_floor(), context_length=CONTEXT, reserve=32)
        self.drafts = Drafts(
            DraftMeans(
                engine=self.engine,
                history=self.history,
                store=self.store,
                changes=self.changes,
                executor=executor,
                wishes=holds,
                clock=clock,
            )
        )
        self.typist = self.drafts.typist("ann")
        self.failures: list[tuple[Exception, str]] = []

    async def chat(self, *texts: str, system: str | None = None) -> list[Turn]:
        """A conversation 'c' of these turns, the user's first."""
        turns: list[Turn] = []
        for number, text in enumerate(texts):
            parent = turns[-1].id if turns else None
            role = (Role.USER, Role.ASSISTANT)[number % 2]
            turns.append(Turn(id=f"t{number}", parent=parent, role=role, text=text, created=1.0))
        made = Conversation(id="c", owner="ann", title="", created=1.0, updated=1.0, system=system)
        await self.store.store.create(replace(made, leaf=turns[-1].id if turns else None), turns)
        return turns

    async def draft(self, **said: object) -> Request:
        """Type, and give what the engine is told to draft."""
        count = len(self.engine.drafted)
        self.typist.take(DraftAsk(**{"request": "q", "conversation": "c"} | said))
        await until(lambda: len(self.engine.drafted) > count)
        return self.engine.drafted[-1]

    async def settle(self) -> None:
        """Nothing more comes of what was typed."""
        await until(lambda: self.typist._newest is None)

    def prompt(self, turns: list[Turn], text: str, *, system: str | None = None) -> tuple[int, ...]:
        """The prompt of a turn that is sent."""
        return self.history.prompt(system, (*turns, typed(text))).tokens


def typed(text: str) -> Turn:
    return Turn(id="new", parent=None, role=Role.USER, text=text, created=1.0)


@asynccontextmanager
async def typing(holds: Holds | None = None) -> AsyncIterator[Desk]:
    with ThreadPoolExecutor(2) as executor:
        desk = Desk(executor, holds)
        task = asyncio.create_task(
            desk.typist.run(lambda error, request: desk.failures.append((error, request)))
        )
        yield desk
        assert not task.done(), "the typist's task died"
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        desk.typist.close()
        assert desk.typist in desk.engine.withdrawn
        assert desk.drafts._held == 0, "texts that nobody has"
        assert not desk.changes._listeners


# What is settled -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["chatml", "llama3", "gemma", "mistral", "bare"])
@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "prepending", "unigram"])
def test_what_is_settled_stays_whatever_is_typed_behind_it(kind: str, form: str) -> None:
    history = History(spoken.text_floor(kind, form), context_length=1 << 20, reserve=16)
    source = random.Random(f"{kind} {form}")
    for _ in range(60):
        text = "".join(source.choice(WORDS) for _ in range(source.randrange(14)))
        more = "x".join(source.choice(WORDS) for _ in range(source.randrange(1, 4)))
        text = text[: source.choice([len(text), source.randrange(len(text) + 1)])]
        if (text + more).strip():
            settled = settled_ids(history, None, (), text)
            prompt = history.prompt(None, [typed(text + more)]).tokens
            assert prompt[: len(settled)] == settled, (text, more)


def test_all_but_the_end_of_a_text_is_settled() -> None:
    history = History(text_floor(), context_length=1 << 20, reserve=16)
    encode = text_floor().tokenizer.encode_rendered
    for text in ("the dog " * 200 + "barks", "z" * 900, "你好" * 300):
        prompt = history.prompt("be brief", [typed(text)]).tokens
        behind = len(prompt) - len(history.prompt("be brief", [typed("")]).tokens)
        behind -= len(encode(text, ()))
        missing = len(prompt) - len(settled_ids(history, "be brief", (), text))
        assert missing <= len(encode(text[-34:], ())) + 12 + max(0, behind)


# Where a text goes ---------------------------------------------------------------------------


async def test_a_draft_is_the_beginning_of_the_prompt_that_the_turn_will_have() -> None:
    async with typing() as desk:
        turns = await desk.chat("hi", "hello there", system="be brief")
        request = await desk.draft(text="the quick brown fox ju")
        sent = desk.prompt(turns, "the quick brown fox jumps", system="be brief")
        assert request.tokens == sent[: len(request.tokens)]
        assert len(request.tokens) > len(desk.prompt(turns, "the quick", system="be brief")) - 8
        assert (request.tenant, request.max_tokens) == ("ann", 0)


async def test_a_focus_is_a_draft_of_the_history() -> None:
    async with typing() as desk:
        turns = await desk.chat("hi", "hello there", "the quick brown fox", "the lazy dog")
        request = await desk.draft()
        for text in ("a", "1", "the"):
            sent = desk.prompt(turns, text)
            assert request.tokens == sent[: len(request.tokens)]
        assert len(request.tokens) > len(desk.prompt(turns[:2], "the quick brown fox")) - 8


async def test_a_parent_says_which_branch() -> None:
    async with typing() as desk:
        turns = await desk.chat("hi", "hello there", "what", "the lazy dog")
        first = await desk.draft(text="no, another one", at_leaf=False, parent="t1")
        assert first.tokens == desk.prompt(turns[:2], "no, another one")[: len(first.tokens)]
        anew = await desk.draft(text="no, another one", at_leaf=False, parent=None)
        assert anew.tokens == desk.prompt([], "no, another one")[: len(anew.tokens)]
        assert len(anew.tokens) < len(first.tokens)


async def test_a_new_chat_has_the_system_prompt_that_it_will_have() -> None:
    async with typing() as desk:
        text = "the quick brown fox jumps"
        request = await desk.draft(conversation=None, system="be a fox", text=text)
        sent = desk.prompt([], text, system="be a fox")
        assert request.tokens == sent[: len(request.tokens)]
        assert "tree" not in desk.store.calls


async def test_what_cannot_be_is_told_with_its_request_and_the_typist_goes_on() -> None:
    async with typing() as desk:
        await desk.chat("hi", "hello")
        made = Conversation(id="theirs", owner="bob", title="", created=1.0, updated=1.0)
        await desk.store.store.create(made)
        asks = [
            DraftAsk(request="1", conversation="theirs", text="the dog"),
            DraftAsk(request="2", conversation="nowhere"),
            DraftAsk(request="3", conversation="c", at_leaf=False, parent="nobody"),
        ]
        for number, ask in enumerate(asks):
            desk.typist.take(ask)
            await until(lambda count=number: len(desk.failures) > count)
        assert [request for _, request in desk.failures] == ["1", "2", "3"]
        assert all(isinstance(error, NotFound) for error, _ in desk.failures)
        messages = {str(error) for error, _ in desk.failures[:2]}
        assert len(messages) == 1, "another's conversation is told from none"
        await desk.draft(text="the dog barks")


async def test_a_text_behind_a_reply_under_way_is_computed_when_that_has_ended() -> None:
    async with typing() as desk:
        turns = await desk.chat("hi", "hello there", "what")
        desk.typist.take(DraftAsk(request="q", conversation="c", text="the quick brown fox"))
        await until(lambda: desk.typist._too_early)
        reply = Turn(id="r", parent="t2", role=Role.ASSISTANT, text="the dog", created=1.0)
        kept = desk.store.store._kept["c"]
        kept.turns["r"] = reply
        kept.conversation = replace(kept.conversation, leaf="r")
        assert not desk.engine.prepared
        desk.changes.publish("bob", "c", 2)
        desk.changes.publish("ann", "c", 2)
        await until(lambda: desk.engine.drafted)
        tokens = desk.engine.drafted[0].tokens
        assert tokens == desk.prompt([*turns, reply], "the quick brown fox")[: len(tokens)]


# What it costs -------------------------------------------------------------------------------


async def test_nothing_is_tokenized_while_requests_are_there_and_then_only_the_newest() -> None:
    async with typing() as desk:
        await desk.chat("hi", "hello")
        desk.engine.idle.clear()
        for number in range(5):
            text = f"the quick brown fox number {number} jumps high"
            desk.typist.take(DraftAsk(request="q", conversation="c", text=text))
            await until(lambda: desk.typist._path is not None)
        assert not desk.engine.prepared
        desk.engine.idle.set()
        await desk.settle()
        (request,) = desk.engine.prepared
        assert "4" in text_floor().tokenizer.decode(request.tokens)


async def test_the_store_is_asked_once_until_the_conversation_changes() -> None:
    async with typing() as desk:
        await desk.chat("hi", "hello")
        for number in range(4):
            await desk.draft(text=f"the quick brown {number} fox")
        assert desk.store.calls == ["tree"]
        desk.changes.publish("ann", "another", 1)
        await desk.draft(text="the dog barks")
        assert desk.store.calls == ["tree"]
        kept = desk.store.store._kept["c"]
        kept.conversation = replace(kept.conversation, system="be brief")
        desk.changes.publish("ann", "c", 2)
        request = await desk.draft(text="the dog barks")
        assert desk.store.calls == ["tree", "tree"]
        assert "be brief" in text_floor().tokenizer.decode(request.tokens)


async def test_a_conversation_that_changes_while_it_is_read_is_read_again() -> None:
    async with typing() as desk:
        await desk.chat("hi", "hello")
        desk.store.held["tree"] = asyncio.Event()
        desk.typist.take(DraftAsk(request="q", conversation="c", text="the dog barks"))
        await until(lambda: desk.store.calls)
        desk.changes.publish("ann", "c", 2)
        desk.store.held["tree"].set()
        await until(lambda: desk.engine.drafted)
        assert desk.store.calls == ["tree", "tree"]


async def test_a_store_that_is_away_costs_the_draft_and_nothing_else() -> None:
    async with typing() as desk:
        await desk.chat("hi", "hello")
        desk.store.away.add("tree")
        desk.typist.take(DraftAsk(request="q", conversation="c", text="the dog barks"))
        await desk.settle()
        assert not desk.engine.drafted
        assert not desk.failures
        desk.store.away.clear()
        await desk.draft(text="the dog barks")


async def test_what_the_context_cannot_hold_is_left_out() -> None:
    async with typing() as desk:
        await desk.chat("hi", "hello")
        desk.typist.take(DraftAsk(request="q", conversation="c", text="dog " * CONTEXT))
        await desk.settle()
        assert not desk.engine.drafted
        assert not desk.failures
        await desk.draft(text="the dog barks")


async def test_without_a_template_nothing_is_drafted() -> None:
    async with typing() as desk:
        bare = replace(text_floor(), template=None)
        means = replace(
            desk.drafts.means, history=History(bare, context_length=CONTEXT, reserve=32)
        )
        desk.typist._means = means
        desk.typist.take(DraftAsk(request="q", conversation=None, text="the dog barks"))
        await desk.settle()
        assert not desk.engine.drafted
        assert not desk.failures


async def test_a_fault_of_ours_is_told_and_the_typist_goes_on() -> None:
    async with typing() as desk:
        await desk.chat("hi", "hello")

        def fail() -> None:
            raise ZeroDivisionError

        desk.engine.on_prepare = fail
        desk.typist.take(DraftAsk(request="q7", conversation="c", text="the dog barks"))
        await until(lambda: desk.failures)
        ((error, request),) = desk.failures
        assert isinstance(error, ZeroDivisionError)
        assert request == "q7"
        desk.engine.on_prepare = lambda: None
        await desk.draft(text="the dog barks")


async def test_texts_that_wait_are_bounded_over_all_typists(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drafts_module, "TEXTS_MAX", 100)
    async with typing() as desk:
        desk.engine.idle.clear()
        other = desk.drafts.typist("bob")
        other.take(DraftAsk(request="q", conversation=None, text="x" * 70))
        desk.typist.take(DraftAsk(request="q", conversation=None, text="y" * 31))
        assert desk.typist._newest is None
        other.take(DraftAsk(request="q", conversation=None, text="x" * 69))
        desk.typist.take(DraftAsk(request="q", conversation=None, text="y" * 31))
        assert desk.typist._newest is not None
        other.close()
        assert desk.drafts._held == 31


@pytest.mark.parametrize("stage", ["reading", "waiting for a pause", "tokenizing"])
async def test_a_socket_that_goes_leaves_no_text_and_no_draft(stage: str) -> None:
    async with typing() as desk:
        await desk.chat("hi", "hello")
        if stage == "reading":
            desk.store.held["tree"] = asyncio.Event()
        elif stage == "waiting for a pause":
            desk.engine.idle.clear()
        else:
            await desk.drafts.places.acquire()
        desk.typist.take(DraftAsk(request="q", conversation="c", text="the dog barks"))
        await until(lambda: desk.store.calls)
        assert not desk.engine.drafted


# With the turns themselves -------------------------------------------------------------------


async def test_the_turn_that_is_sent_begins_with_what_was_drafted() -> None:
    engine = DraftEngine(context_length=CONTEXT)
    store = MemoryStore()
    async with process(store, engine=engine, drafts=engine) as life:
        chat = await life.conversation(system="be brief")
        await answered(life, chat, "the lazy dog")
        typist = life.chats.typist("ann")
        assert typist is not None
        failures: list[ChatserveError] = []
        task = asyncio.create_task(typist.run(lambda error, _: failures.append(error)))
        said = "what does the quick brown fox do then"
        for end in range(len(said) + 1):
            typist.take(DraftAsk(request="q", conversation=chat, text=said[:end]))
            await until(lambda: typist._newest is None)
        await life.send(chat, said, ask="t2")
        run = await begun(life, 1)
        lengths = [len(request.tokens) for request in engine.drafted]
        assert lengths == sorted(lengths)
        for request in engine.drafted:
            assert request.tokens == run.request.tokens[: len(request.tokens)]
        assert len(run.request.tokens) - lengths[-1] < 16
        run.give(life.ids("jump"), finish=FinishReason.LENGTH)
        task.cancel()
        await asyncio.wait({task})
        typist.close()
        assert not failures


async def test_without_an_engine_for_them_there_are_no_typists() -> None:
    async with process(MemoryStore()) as life:
        assert life.chats.typist("ann") is None
