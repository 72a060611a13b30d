"""Conversations: turns accepted once, owners, viewers, changes."""

import asyncio
import json
import re
import threading
from dataclasses import replace

import pytest

from chatserve.chat.conversations.reply_events import (
    ConversationChanged,
    ReplyAccepted,
    ReplyDelta,
    ReplyProgress,
)
from chatserve.chat.store.conversation import Conversation, ReplyState, Role, Turn, conversation_of
from chatserve.chat.store.memory_store import MemoryStore
from chatserve.engine.values import FinishReason
from chatserve.errors import (
    Busy,
    Conflict,
    NotFound,
    Unavailable,
)
from tests.chat.conftest import ask
from tests.chat.conversations.chats import (
    OWNER,
    Client,
    Process,
    answered,
    begun,
    tick,
    until,
)


async def test_a_turn_is_kept_before_its_reply_begins_and_its_reply_before_it_is_done(
    life: Process, store: MemoryStore
):
    conversation = await life.conversation()
    reply = await life.send(conversation, "Where is the dog?\nTell me.")
    _, (user,), (record,) = await store.tree(OWNER, conversation)
    assert (user.role, user.text) == (Role.USER, "Where is the dog?\nTell me.")
    assert (record.id, record.state, record.turn) == (reply.id, ReplyState.RUNNING, user.id)
    assert conversation_of(reply.id) == conversation
    client = Client()
    reading = asyncio.create_task(client.read(reply))
    run = await begun(life)
    run.give(life.ids("the dog"))
    run.give(life.ids(" barks"), finish=FinishReason.LENGTH)
    await reading
    assert client.text == "the dog barks"
    assert client.final.kind == "done"
    kept, turns, records = await store.tree(OWNER, conversation)
    assert records == ()
    assert kept.title == "Where is the dog?"
    user, answer = turns
    assert (answer.id, answer.parent, answer.text) == (reply.id, user.id, "the dog barks")
    assert json.loads(answer.final) == client.final.data
    assert kept.leaf == answer.id
    assert user.token_ids + answer.token_ids == (*run.request.tokens, *life.ids("the dog barks"))
    usage = client.final.data["usage"]
    assert usage["prompt_tokens"] == len(run.request.tokens)
    assert usage["completion_tokens"] == len(life.ids("the dog")) + len(life.ids(" barks"))


async def test_the_next_turns_prompt_begins_with_all_ids_so_far(life: Process):
    conversation = await life.conversation(system="Be brief.")
    await answered(life, conversation, "the dog")
    await answered(life, conversation, "the fox", content="and?", ask="t2")
    first, second = (run.request.tokens for run in life.engine.runs)
    assert second[: len(first)] == first
    assert second[len(first) :][: len(life.ids("the dog"))] == tuple(life.ids("the dog"))


async def test_settings_stand_behind_a_turns_own_fields(life: Process):
    settings = {"temperature": 0.5, "top_k": 3, "max_tokens": 9, "stop": ["END"]}
    conversation = await life.conversation(settings=settings)
    sampling = {"temperature": 0.0, "seed": 7, "logit_bias": {"3": 1.5}}
    reply = await life.send(conversation, sampling=sampling)
    run = await begun(life)
    found = run.request.sampling
    assert (found.temperature, found.top_k, found.seed) == (0.0, 3, 7)
    assert found.logit_bias == ((3, 1.5),)
    assert run.request.max_tokens == 9
    run.give(life.ids("dog END fox"))
    client = Client()
    await client.read(reply)
    assert (client.text, client.final.data["finish_reason"]) == ("dog ", "stop")
    assert run.finished == {0: len(life.ids("dog "))}


async def test_regenerating_draws_another_seed_and_keeps_both_answers(
    life: Process, store: MemoryStore
):
    conversation = await life.conversation()
    first = await answered(life, conversation, "one")
    second = await answered(life, conversation, "two", content=None, parent=first.turn, ask="t2")
    runs = life.engine.runs
    assert runs[0].request.tokens == runs[1].request.tokens
    assert runs[0].request.sampling.seed != runs[1].request.sampling.seed
    _, turns, _ = await store.tree(OWNER, conversation)
    assert {each.text for each in turns if each.parent == first.turn} == {"one", "two"}
    assert second.turn == first.turn


# The same ask again ----------------------------------------------------------------------------


async def test_a_known_ask_answers_with_its_reply_while_it_runs_and_after(
    life: Process, store: MemoryStore
):
    conversation = await life.conversation()
    reply = await life.send(conversation)
    assert await life.send(conversation) is reply
    with pytest.raises(Conflict):
        await life.send(conversation, "other words")
    (await begun(life)).give(life.ids("dog"), finish=FinishReason.LENGTH)
    await until(lambda: reply.end is not None and not life.chats.statistics().running)
    again = await life.send(conversation)
    assert again is not reply
    assert (again.id, again.end) == (reply.id, reply.end)
    client = Client()
    await client.read(again)
    assert client.text == "dog"
    _, turns, _ = await store.tree(OWNER, conversation)
    assert len(turns) == 2
    with pytest.raises(Conflict):
        await life.send(conversation, "other words")


async def test_the_same_ask_at_the_same_time_is_accepted_once(life: Process, store: MemoryStore):
    conversation = await life.conversation()
    replies = await asyncio.gather(*(life.send(conversation) for _ in range(5)))
    assert len(set(map(id, replies))) == 1
    assert life.store.calls.count("accept") == 1


async def test_a_full_queue_refuses_before_anything_is_written_but_not_a_known_ask(
    life: Process, store: MemoryStore
):
    conversation = await life.conversation()
    reply = await answered(life, conversation)
    await until(lambda: not life.chats.statistics().running)
    life.engine.places = 0
    with pytest.raises(Busy):
        await life.send(conversation, ask="t2")
    assert life.store.calls.count("accept") == 1
    assert (await life.send(conversation)).id == reply.id
    with pytest.raises(Conflict):
        await life.send(conversation, "other words")


async def test_turns_and_requests_are_one_crowd(life: Process):
    conversation = await life.conversation()
    life.engine.places = 1
    life.store.held["accept"] = asyncio.Event()
    turn_on_its_way = asyncio.create_task(life.send(conversation))
    await until(lambda: "accept" in life.store.calls)
    with pytest.raises(Busy):
        await life.requests.open(ask())
    life.store.held.pop("accept").set()
    reply = await turn_on_its_way
    (await begun(life)).give(life.ids("the dog"), finish=FinishReason.LENGTH)
    await until(lambda: reply.end is not None)

    life.engine.places = 2
    go_on = threading.Event()
    life.engine.on_prepare = go_on.wait
    request = asyncio.create_task(life.requests.open(ask()))
    await until(lambda: life.chats.statistics().waiting == 1)
    with pytest.raises(Busy):
        await life.send(conversation, ask="t2")
    go_on.set()
    stream = (await request, await begun(life, 1))[1]
    stream.give(life.ids("the dog"), finish=FinishReason.LENGTH)


async def test_an_accepted_turn_waits_for_its_place_in_the_engine(life: Process):
    conversation = await life.conversation()
    life.engine.refusal = Busy("full")
    reply = await life.send(conversation)
    for _ in range(3):
        await until(lambda: any(timer.seconds <= 1.0 for timer in life.time.due))
        await tick(life)
    assert reply.end is None
    life.engine.refusal = None
    await until(lambda: any(timer.seconds <= 1.0 for timer in life.time.due))
    with reply.view():
        await tick(life)
        (await begun(life)).give(life.ids("dog"), finish=FinishReason.LENGTH)
        await until(lambda: reply.end is not None)
    assert life.chats.statistics().waiting == 0


# Owners ----------------------------------------------------------------------------------------


async def test_what_is_anothers_is_not_there(life: Process):
    conversation = await life.conversation()
    reply = await life.send(conversation)
    await begun(life)
    calls = [
        lambda: life.chats.get("bob", conversation),
        lambda: life.chats.update("bob", conversation, {"title": "x"}),
        lambda: life.chats.delete("bob", conversation),
        lambda: life.send(conversation, owner="bob", ask="t2"),
        lambda: life.send(conversation, owner="bob"),
        lambda: life.chats.reply("bob", reply.id),
        lambda: life.chats.stop("bob", reply.id),
        lambda: life.chats.reply(OWNER, f"{conversation}.other"),
    ]
    for call in calls:
        with pytest.raises(NotFound):
            await call()
    assert reply.end is None
    life.engine.runs[0].give(life.ids("dog"), finish=FinishReason.LENGTH)
    await until(lambda: not life.chats.statistics().running)
    for call in calls:
        with pytest.raises(NotFound):
            await call()
    with life.chats.changes("bob") as changes:
        await life.chats.update(OWNER, conversation, {"title": "x"})
        waiting = asyncio.ensure_future(anext(changes))
        await asyncio.sleep(0)
        assert not waiting.done()
        waiting.cancel()


# Viewers ---------------------------------------------------------------------------------------


async def test_a_viewer_is_told_how_far_its_prompt_is_until_the_first_token(life: Process):
    conversation = await life.conversation()
    reply = await life.send(conversation)
    with reply.view() as viewing:
        assert isinstance(await anext(viewing), ReplyAccepted)
        run = await begun(life)
        total = len(run.request.tokens)
        assert await anext(viewing) == ReplyProgress(queued=0, prompt_tokens=total, computed=0)
        waiting = asyncio.ensure_future(anext(viewing))
        for _ in range(3):
            await tick(life, 0.2)
        assert not waiting.done(), "nothing has changed"
        run.computed = 3
        await tick(life, 0.2)
        assert (await waiting).computed == 3
        run.give(life.ids("dog"))
        assert isinstance(await anext(viewing), ReplyDelta)
        assert 0.2 not in [timer.seconds for timer in life.time.due]


async def test_nobody_looks_at_progress_for_nobody(life: Process):
    conversation = await life.conversation()
    reply = await life.send(conversation)
    await begun(life)
    await asyncio.sleep(0)
    assert 0.2 not in [timer.seconds for timer in life.time.due]
    with reply.view():
        assert 0.2 in [timer.seconds for timer in life.time.due]
    await tick(life, 0.2)
    assert 0.2 not in [timer.seconds for timer in life.time.due]


# Changes, titles, imports ----------------------------------------------------------------------


async def test_other_tabs_hear_the_latest_revision_of_what_changed(life: Process):
    with life.chats.changes(OWNER) as changes:
        conversation = await life.conversation()
        await answered(life, conversation)
        other = await life.conversation()
        kept, _, _ = await life.chats.get(OWNER, conversation)
        await tick(life)
        assert await anext(changes) == ConversationChanged(conversation, kept.revision)
        assert await anext(changes) == ConversationChanged(other, 1)
        await life.chats.delete(OWNER, other)
        await tick(life)
        assert await anext(changes) == ConversationChanged(other, None)
        assert life.chats.statistics().subscribers == 1
    assert life.chats.statistics().subscribers == 0
    assert [change async for change in changes] == []


async def test_an_import_gets_a_fresh_id_and_no_ids_of_tokens(life: Process):
    given = Conversation(id="mine", owner="bob", title="Old", created=1.0, updated=2.0, leaf="b")
    turns = (
        Turn(id="a", parent=None, role=Role.USER, text="hi", created=1.0, token_ids=(1, 2)),
        Turn(id="b", parent="a", role=Role.ASSISTANT, text="dog", created=1.0, token_ids=(3,)),
    )
    added = await life.chats.add(OWNER, given, turns)
    assert added.id != "mine"
    assert "." not in added.id
    assert len(added.id) >= 22
    kept, found, _ = await life.chats.get(OWNER, added.id)
    assert (kept.owner, kept.title, kept.leaf) == (OWNER, "Old", "b")
    assert [(each.text, each.token_ids) for each in found] == [("hi", None), ("dog", None)]
    await answered(life, added.id, content="and?", ask="t9")


async def test_an_import_that_is_asked_for_again_is_the_same_conversation(
    life: Process, store: MemoryStore
):
    given = Conversation(id="", owner=OWNER, title="Old", created=1.0, updated=2.0, leaf="a")
    turns = (Turn(id="a", parent=None, role=Role.USER, text="hi", created=1.0),)
    life.store.plot = lambda name, number: "after" if (name, number) == ("create", 0) else None
    with pytest.raises(Unavailable):
        await life.chats.add(OWNER, given, turns, ask="mine")
    (kept,) = (await store.list(OWNER)).conversations
    later = replace(turns[0], created=5.0), replace(given, created=5.0, updated=6.0)
    added = await life.chats.add(OWNER, later[1], later[:1], ask="mine")
    assert added == kept
    await answered(life, added.id, content=None, ask="t9", parent="a")
    again = await life.chats.add(OWNER, given, turns, ask="mine")
    assert again == await store.get(OWNER, added.id)
    assert again.revision > added.revision
    others = [
        await life.chats.add(OWNER, given, turns),
        await life.chats.add(OWNER, given, turns, ask="other"),
        await life.chats.add("bob", given, turns, ask="mine"),
        await life.chats.add(OWNER, given, (replace(turns[0], text="ho"),), ask="mine"),
        await life.chats.add(OWNER, given, (replace(turns[0], final=b"{}"),), ask="mine"),
        await life.chats.add(OWNER, replace(given, settings={"top_k": 1}), turns, ask="mine"),
        await life.chats.add(OWNER, replace(given, system="Be brief."), turns, ask="mine"),
        await life.chats.add(OWNER, replace(given, title="New"), turns, ask="mine"),
        await life.chats.add(OWNER, replace(given, leaf=None), turns, ask="mine"),
    ]
    ids = {each.id for each in others}
    assert len(ids) == len(others)
    assert added.id not in ids
    assert all(re.fullmatch("[0-9a-f]{36}", each) for each in ids | {added.id})


async def test_deleting_ends_the_running_replies(life: Process, store: MemoryStore):
    conversation, other = await life.conversation(), await life.conversation()
    reply, kept = await life.send(conversation), await life.send(other)
    run = await begun(life)
    client = Client()
    reading = asyncio.create_task(client.read(reply))
    run.give(life.ids("dog"))
    await until(lambda: client.text)
    await life.chats.delete(OWNER, conversation)
    await until(reading.done)
    assert run.aborted
    assert (client.final.kind, client.final.data["code"]) == ("failed", "not_found")
    assert "end" not in life.store.calls, "there is nowhere to keep it"
    with pytest.raises(NotFound):
        await life.chats.reply(OWNER, reply.id)
    (await begun(life, 1)).give(life.ids("fox"), finish=FinishReason.LENGTH)
    await until(lambda: kept.end is not None)
    assert kept.final.kind == "done"


async def test_a_conversation_that_could_not_be_deleted_keeps_its_replies(
    life: Process, store: MemoryStore
):
    conversation = await life.conversation()
    reply = await life.send(conversation)
    run = await begun(life)
    run.give(life.ids("the dog"))
    life.store.away = {"delete"}
    with pytest.raises(Unavailable):
        await life.chats.delete(OWNER, conversation)
    run.give(life.ids(" barks"), finish=FinishReason.LENGTH)
    await until(lambda: reply.end is not None)
    assert (reply.final.kind, reply.final.data["finish_reason"]) == ("done", "length")
    _, turns, _ = await store.tree(OWNER, conversation)
    assert [each.text for each in turns] == ["hi", "the dog barks"]


async def test_deleting_what_is_gone_ends_the_owners_running_replies(
    life: Process, store: MemoryStore
):
    """The answer to a first call was lost: the store had deleted it."""
    conversation = await life.conversation()
    reply = await life.send(conversation)
    run = await begun(life)
    await store.delete(OWNER, conversation)
    with pytest.raises(NotFound):
        await life.chats.delete("bob", conversation)
    run.give(life.ids("dog"))
    await until(lambda: reply.length)
    assert not reply.over
    await life.chats.delete(OWNER, conversation)  # goes on with what was begun
    with pytest.raises(NotFound):
        await life.chats.delete(OWNER, conversation)
    await until(lambda: reply.end is not None)
    assert run.aborted
    assert reply.final.data["message"] == "The conversation was deleted."


async def test_a_reply_whose_conversation_vanished_is_said_to_its_end_and_frees_the_engine(
    life: Process, store: MemoryStore
):
    conversation = await life.conversation()
    reply = await life.send(conversation)
    run = await begun(life)
    client = Client()
    reading = asyncio.create_task(client.read(reply))
    await store.delete(OWNER, conversation)
    run.give(life.ids("dog"))
    await until(lambda: client.text)
    await tick(life)
    assert "append" in life.store.calls
    run.give(life.ids(" barks"), finish=FinishReason.LENGTH)
    await reading
    assert client.text == "dog barks"
    assert client.final.kind == "failed"
    assert client.final.data["code"] == "not_found"
    assert client.final.data["retry_after"] is None
    assert client.final.data["finish_reason"] == "length"
    assert client.final.data["usage"]["completion_tokens"] == len(life.ids("dog barks"))
    await until(lambda: not life.chats.statistics().running)
