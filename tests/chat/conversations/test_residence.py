"""An admin names a conversation: what is wished of which names, whoever owns it."""

import pytest

from chatserve.chat.store.memory_store import MemoryStore
from chatserve.engine.values import FinishReason, Request
from chatserve.engine.wishes import Dismissed, Leased, Warmth
from chatserve.errors import NotFound
from tests.chat.conversations.chats import Process, answered, begun, process, turn, until
from tests.chat.conversations.test_deletion import names_of
from tests.chat.conversations.test_drafts import DraftEngine


class Wishes:
    """Keeps what it is asked for; each answer tells how much that was."""

    def __init__(self) -> None:
        self.leased: list[tuple[frozenset[bytes], float]] = []
        self.evicted: list[frozenset[bytes]] = []
        self.warmed: list[Request] = []

    def lease(self, names, seconds: float) -> Leased:
        self.leased.append((names, seconds))
        return Leased(len(names))

    def evict(self, names) -> Dismissed:
        self.evicted.append(names)
        return Dismissed(len(names))

    def warm(self, prepared: Request) -> Warmth:
        self.warmed.append(prepared)
        return Warmth(coming=len(prepared.tokens))

    def hold(self, names) -> None:
        raise AssertionError("nobody types")


@pytest.fixture
def wishes() -> Wishes:
    return Wishes()


@pytest.fixture
async def life(wishes: Wishes):
    async with process(MemoryStore(), wishes=wishes) as made:
        yield made


async def test_all_names_of_a_conversation_are_meant_and_no_others(
    life: Process, wishes: Wishes
) -> None:
    other = await life.conversation()
    await answered(life, other, content="something else entirely")
    name = await life.conversation(system="You are kind.")
    await answered(life, name, "the dog barks at the fox", ask="a")
    await answered(life, name, "the quick dog", ask="b", content="hello", parent=None)
    wanted = names_of(life, 1, "the dog barks at the fox") | names_of(life, 2, "the quick dog")
    assert await life.chats.residence.lease(name, 60.0) == Leased(len(wanted))
    assert await life.chats.residence.evict(name) == Dismissed(len(wanted))
    assert wishes.leased == [(wanted, 60.0)]
    assert wishes.evicted == [wanted]


async def test_a_reply_under_way_has_names_too(life: Process, wishes: Wishes) -> None:
    name = await life.conversation()
    reply = await life.chats.send(turn(name, "the quick brown fox jumps"))
    run = await begun(life)
    run.give(life.ids("over the lazy dog"))
    wanted = names_of(life, 0, "over the lazy dog")
    await until(lambda: set(life.chats._live.by_id[reply.id].page_names()) == wanted)
    await life.chats.residence.evict(name)
    assert wishes.evicted == [wanted]
    run.give((), finish=FinishReason.LENGTH)
    await until(lambda: reply.end is not None)


async def test_what_was_drafted_has_names_too(wishes: Wishes) -> None:
    engine = DraftEngine(context_length=400)
    async with process(MemoryStore(), wishes=wishes, engine=engine, drafts=engine) as life:
        name = await life.conversation()
        life.chats._drafts.note(name, [b"d" * 32])
        await life.chats.residence.lease(name, 1.0)
        assert wishes.leased == [({b"d" * 32}, 1.0)]


async def test_warming_is_for_the_prompt_that_the_next_turn_begins_with(
    life: Process, wishes: Wishes
) -> None:
    name = await life.conversation(system="You are kind.")
    await answered(life, name, "the dog barks at the fox", ask="a")
    found = await life.chats.residence.warm(name)
    assert found.coming == len(wishes.warmed[0].tokens)
    assert wishes.warmed[0].tenant == "ann"
    await answered(life, name, "the fox", ask="b", content="and then?")
    tokens = wishes.warmed[0].tokens
    prompt = life.engine.runs[1].request.tokens
    assert prompt[: len(tokens)] == tokens
    assert len(tokens) > len(life.engine.runs[0].request.tokens)


async def test_while_a_reply_is_written_what_came_before_is_warmed(
    life: Process, wishes: Wishes
) -> None:
    name = await life.conversation()
    await answered(life, name, "the dog barks at the fox", ask="a")
    await life.chats.residence.warm(name)
    reply = await life.send(name, "and then?", ask="b")
    run = await begun(life, 1)
    await life.chats.residence.warm(name)
    assert wishes.warmed[1].tokens == wishes.warmed[0].tokens
    run.give(life.ids("the fox"), finish=FinishReason.LENGTH)
    await until(lambda: reply.end is not None)


async def test_an_unknown_conversation_is_not_found(life: Process, wishes: Wishes) -> None:
    residence = life.chats.residence
    for call in (residence.lease("x", 1.0), residence.evict("x"), residence.warm("x")):
        with pytest.raises(NotFound):
            await call
    assert wishes.leased == wishes.evicted == wishes.warmed == []
