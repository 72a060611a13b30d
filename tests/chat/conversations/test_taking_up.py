"""Replies that are taken up: after a crash, by another model, with a store that is away."""

import asyncio
import json

import pytest

from chatserve.chat.conversations.reply_events import ReplySnapshot
from chatserve.chat.store.conversation import LogEntry, ReplyCursor, ReplyState
from chatserve.chat.store.memory_store import MemoryStore
from chatserve.chat.store.session_store import Unlogged
from chatserve.engine.values import Emission, FinishReason
from chatserve.errors import Busy
from tests.chat.conversations.chats import OWNER, Client, begun, process, tick, until


async def test_the_last_words_of_a_sample_are_left_to_the_replys_end():
    """What is taken up before the end is kept goes on, and says them again."""
    store = MemoryStore()
    async with process(store) as life:
        conversation = await life.conversation()
        reply = await life.send(conversation, sampling={"stop": ["xyz"]})
        await until(lambda: life.engine.runs)
        run = life.engine.runs[0]
        run.give(life.ids("the dog"))
        await until(lambda: reply.length)
        await tick(life)
        reply.take(Emission(sample=0, tokens=tuple(life.ids(" barks xyz"))))
        assert (reply.length, reply.sample.end is not None) == (len("the dog barks "), True)
        assert reply.take_entry() is None
        life.die()
    assert "".join(entry.text for entry in await store.log(reply.id)) == "the dog"
    async with process(store) as life:
        await life.chats.resume_all()
        await until(lambda: life.engine.runs)
        life.engine.runs[0].give(life.ids(" barks xyz"))
        client = Client()
        await client.read(await life.chats.reply(OWNER, reply.id))
        assert (client.text, client.final.data["finish_reason"]) == ("the dog barks ", "stop")


async def test_a_log_that_leads_to_an_end_is_not_gone_on_from():
    """Its ids hold a whole stop string, so that nobody can have logged it under this request."""
    store = MemoryStore()
    async with process(store) as life:
        conversation = await life.conversation()
        reply = await life.send(conversation, sampling={"stop": ["xyz"]})
        await until(lambda: life.engine.runs)
        cursor = ReplyCursor(1, len("the dog "))
        ids = tuple(life.ids("the dog xyz"))
        logged = LogEntry(reply=reply.id, cursor=cursor, text="the dog ", token_ids=ids)
        assert await store.append([logged]) == Unlogged()
        life.die()
    async with process(store) as life:
        await life.chats.resume_all()
        await life.chats.wait_quiet()
        record = await store.reply(OWNER, reply.id)
        assert (record.state, record.text) == (ReplyState.INTERRUPTED, "the dog ")
        assert life.engine.runs == []


async def test_a_crash_before_anything_was_logged_begins_the_reply_anew():
    store = MemoryStore()
    async with process(store) as life:
        conversation = await life.conversation(system="s")
        reply = await life.send(conversation)
        await until(lambda: life.engine.runs)
        first = life.engine.runs[0].request
        life.die()
    async with process(store) as life:
        await life.chats.resume_all()
        await until(lambda: life.engine.runs)
        run = life.engine.runs[0]
        assert run.request == first
        run.give(life.ids("dog"), finish=FinishReason.LENGTH)
        client = Client()
        await client.read(await life.chats.reply(OWNER, reply.id))
        assert client.text == "dog"


async def test_many_replies_taken_up_at_once_wait_for_the_engines_queue():
    store = MemoryStore()
    async with process(store) as life:
        replies = []
        for _ in range(20):
            conversation = await life.conversation()
            replies.append(await life.send(conversation))
        await until(lambda: len(life.engine.runs) == 20)
        life.die()
    async with process(store) as life:
        life.engine.refusal = Busy("full")
        await life.chats.resume_all()
        await until(lambda: len([each for each in life.time.due if each.seconds <= 1]) == 20)
        assert life.chats.statistics().waiting == 20
        life.engine.refusal = None
        await tick(life)
        await until(lambda: len(life.engine.runs) == 20)
        for run in life.engine.runs:
            run.give(life.ids("dog"), finish=FinishReason.LENGTH)
        await life.chats.wait_quiet()
    assert await store.running() == ()


async def test_a_reply_of_another_model_is_interrupted_and_keeps_its_text(monkeypatch):
    store = MemoryStore()
    async with process(store) as life:
        conversation = await life.conversation()
        reply = await life.send(conversation)
        await until(lambda: life.engine.runs)
        life.engine.runs[0].give(life.ids("the dog"))
        await until(lambda: reply.length)
        await tick(life)
        life.die()
    async with process(store) as life:
        life.chats._history.encoding = "another"
        await life.chats.resume_all()
        await life.chats.wait_quiet()
        kept = await life.chats.reply(OWNER, reply.id)
        client = Client()
        await client.read(kept)
        assert client.text == "the dog"
        assert (client.final.kind, client.final.data["code"]) == ("failed", "interrupted")
        assert (await store.reply(OWNER, reply.id)).state is ReplyState.INTERRUPTED
        assert life.engine.runs == []


async def test_a_reply_goes_on_as_it_was_accepted_whatever_its_conversation_has_become():
    store = MemoryStore()
    async with process(store) as life:
        conversation = await life.conversation(
            system="Be brief.", settings={"stop": ["xyz"], "max_tokens": 99, "temperature": 0.5}
        )
        reply = await life.send(conversation)
        await until(lambda: life.engine.runs)
        life.engine.runs[0].give(life.ids("the dog"))
        await until(lambda: reply.length)
        await tick(life)
        first = life.engine.runs[0].request
        changes = {"settings": {"stop": ["he"], "max_tokens": 4}, "system": "Be long."}
        await life.chats.update(OWNER, conversation, changes)
        life.die()
    async with process(store) as life:
        await life.chats.resume_all()
        await until(lambda: life.engine.runs)
        run = life.engine.runs[0]
        assert run.request.tokens == (*first.tokens, *life.ids("the dog"))
        assert run.request.sampling == first.sampling
        assert run.request.max_tokens == 99 - len(life.ids("the dog"))
        run.give(life.ids(" and then xyz"))
        client = Client()
        await client.read(await life.chats.reply(OWNER, reply.id))
        assert (client.text, client.final.kind) == ("the dog and then ", "done")
        await life.chats.wait_quiet()
        later = await life.send(conversation, ask="t2")
        await until(lambda: len(life.engine.runs) > 1)
        assert life.engine.runs[1].request.max_tokens == 4
        prompt = life.chats._text.tokenizer.decode(life.engine.runs[1].request.tokens)
        assert "Be long." in prompt
        assert "Be brief." not in prompt
        await life.chats.stop(OWNER, later.id)


async def test_a_reply_with_all_its_tokens_logged_ends_without_the_engine():
    store = MemoryStore()
    async with process(store) as life:
        conversation = await life.conversation()
        tokens = life.ids("the dog")
        reply = await life.send(conversation, sampling={"max_tokens": len(tokens)})
        await until(lambda: life.engine.runs)
        life.engine.runs[0].give(tokens)
        await until(lambda: reply.length)
        await tick(life)
        life.die()
    async with process(store) as life:
        await life.chats.resume_all()
        await life.chats.wait_quiet()
        assert life.engine.runs == []
    _, (_, answer), _ = await store.tree(OWNER, conversation)
    assert json.loads(answer.final)["finish_reason"] == "length"


async def test_a_store_that_is_away_at_the_start_is_waited_for():
    store = MemoryStore()
    async with process(store) as life:
        reply = await life.send(await life.conversation())
        await until(lambda: life.engine.runs)
        life.die()
    async with process(store) as life:
        life.store.plot = lambda name, number: (
            {"running": "before", "resume": "after", "log": "before"}.get(name)
            if number == 0
            else None
        )
        resuming = asyncio.create_task(life.chats.resume_all())
        for name in ("running", "resume", "log"):
            await until(lambda name=name: name in life.store.calls)
            await tick(life)
        await resuming
        live = await life.chats.reply(OWNER, reply.id)
        assert live.epoch == 4, "a doubtful resume may count twice, and none goes back"
        await until(lambda: life.engine.runs)
        life.engine.runs[0].give(life.ids("dog"), finish=FinishReason.LENGTH)
        await life.chats.wait_quiet()


async def test_who_asks_for_a_left_over_reply_before_it_is_taken_up_gets_the_live_one():
    store = MemoryStore()
    async with process(store) as life:
        conversation = await life.conversation()
        reply = await life.send(conversation)
        await until(lambda: life.engine.runs)
        life.die()
    async with process(store) as life:
        found = await asyncio.gather(
            life.chats.reply(OWNER, reply.id),
            life.chats.reply(OWNER, reply.id),
            life.send(conversation),
            life.chats.resume_all(),
        )
        assert found[0] is found[1] is found[2]
        assert life.store.calls.count("resume") == 1
        await life.chats.stop(OWNER, reply.id)
        await life.chats.wait_quiet()
    assert await store.running() == ()


# Two processes that both believe to be alone --------------------------------------------------


@pytest.mark.parametrize("noticed_by", ["append", "end"])
async def test_who_was_superseded_breaks_off_and_the_other_ends_it(noticed_by: str):
    store = MemoryStore()
    async with process(store) as former, process(store) as later:
        conversation = await former.conversation()
        reply = await former.send(conversation)
        run = await begun(former)
        client = Client()
        reading = asyncio.create_task(client.read(reply))
        run.give(former.ids("the dog"))
        await until(lambda: client.text)
        await tick(former)
        await later.chats.resume_all()
        again = await later.chats.reply(OWNER, reply.id)
        if noticed_by == "append":
            run.give(former.ids(" sleeps"))
            await until(lambda: client.text == "the dog sleeps")
            await tick(former)
            await reading
            assert run.aborted
            assert "end" not in former.store.calls
        else:
            run.give(former.ids(" sleeps"), finish=FinishReason.LENGTH)
            await reading
            assert "end" in former.store.calls
        assert (client.text, client.final) == ("the dog sleeps", None)
        await until(lambda: not former.chats.statistics().running)
        assert await store.running() == (reply.id,)
        (await begun(later)).give(later.ids(" barks"), finish=FinishReason.LENGTH)
        await client.read(again)
        assert (client.text, client.final.kind) == ("the dog barks", "done")
        assert any(isinstance(event, ReplySnapshot) for event in client.events)
        _, (_, answer), _ = await store.tree(OWNER, conversation)
        assert answer.text == "the dog barks"


async def test_who_comes_to_a_viewing_that_broke_off_gets_its_text_and_no_end():
    store = MemoryStore()
    async with process(store) as life:
        reply = await life.send(await life.conversation())
        (await begun(life)).give(life.ids("the dog"))
        await until(lambda: reply.length)
        await life.chats.close()
        client = Client()
        await client.read(reply)
        assert (client.text, client.final) == ("the dog", None)
        assert reply.end is None
