"""What a conversation has is held for a while for who types there."""

import asyncio
from dataclasses import replace

from chatserve.chat.conversations.draft_ask import DraftAsk
from chatserve.chat.conversations.drafts import HOLD_AGAIN_SECONDS
from chatserve.chat.store.conversation import Conversation
from chatserve.chat.store.memory_store import MemoryStore
from chatserve.errors import NotFound
from tests.chat.conversations.chats import until
from tests.chat.conversations.test_drafts import Holds, typing
from tests.chat.store.turns import ending, new_turn


async def kept(store: MemoryStore, *told: tuple[bytes, ...]) -> None:
    """A conversation 'c' whose replies told these names."""
    await store.create(Conversation(id="c", owner="ann", title="", created=1.0, updated=1.0))
    for number, names in enumerate(told):
        accepted = await store.accept(replace(new_turn(f"a{number}"), owner="ann"))
        await store.end(replace(ending(accepted), names=names))


async def test_while_the_engine_is_busy_too_a_typists_conversation_is_held() -> None:
    holds = Holds()
    async with typing(holds) as desk:
        await kept(desk.store.store, (b"1" * 32, b"2" * 32), (b"3" * 32,))
        desk.engine.idle.clear()
        desk.typist.take(DraftAsk(request="q", conversation="c"))
        await until(lambda: holds.held)
        assert holds.held == [{b"1" * 32, b"2" * 32, b"3" * 32}]
        assert not desk.engine.drafted
        desk.engine.idle.set()
        await desk.settle()


async def test_it_is_held_again_now_and_then_while_something_is_typed() -> None:
    holds = Holds()
    async with typing(holds) as desk:
        await kept(desk.store.store, (b"1" * 32,))
        for count in (1, 2):
            for text in ("the quick brown fox ", "the quick brown fox jumps over "):
                await desk.draft(text=text)
                assert len(holds.held) == count
            desk.time.seconds += HOLD_AGAIN_SECONDS
        assert desk.store.calls.count("page_names") == 1, "the store is asked once"


async def test_what_a_new_reply_told_is_held_too() -> None:
    holds = Holds()
    async with typing(holds) as desk:
        await kept(desk.store.store, (b"1" * 32,))
        await desk.draft(text="the quick brown fox ")
        accepted = await desk.store.store.accept(replace(new_turn("later"), owner="ann"))
        await desk.store.store.end(replace(ending(accepted), names=(b"2" * 32,)))
        desk.changes.publish("ann", "c", 5)
        await desk.draft(text="the quick brown fox jumps over ")
        assert holds.held == [{b"1" * 32}, {b"1" * 32, b"2" * 32}]


async def test_nothing_is_held_of_anothers_conversation_or_of_none() -> None:
    holds = Holds()
    async with typing(holds) as desk:
        await kept(desk.store.store, (b"1" * 32,))
        other = desk.drafts.typist("bob")
        told: list[Exception] = []
        task = asyncio.create_task(other.run(lambda error, request: told.append(error)))
        other.take(DraftAsk(request="q", conversation="c"))
        await until(lambda: told)
        task.cancel()
        await asyncio.wait({task})
        other.close()
        await desk.draft(conversation=None, text="the quick brown fox ")
        assert isinstance(told[0], NotFound)
        assert not holds.held
