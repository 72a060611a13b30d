"""Replies end once, whatever happens: stops, faults, cancellation, a store that is away, drains."""

import asyncio
import json

import pytest

from chatserve.chat.store.conversation import ReplyState, Role
from chatserve.chat.store.memory_store import MemoryStore
from chatserve.chat.store.session_store import Accepted, Elsewhere, NewTurn
from chatserve.engine.values import FinishReason
from chatserve.errors import (
    Conflict,
    ContextLengthExceeded,
    NumericalFault,
    RequestError,
    Unavailable,
)
from tests.chat.conversations.chats import (
    OWNER,
    Client,
    Process,
    answered,
    begun,
    process,
    tick,
    turn,
    until,
)

# Ends ------------------------------------------------------------------------------------------


async def test_stop_keeps_what_was_said_and_gives_the_engine_its_pages_back(
    life: Process, store: MemoryStore
):
    conversation = await life.conversation()
    reply = await life.send(conversation)
    run = await begun(life)
    client = Client()
    reading = asyncio.create_task(client.read(reply))
    run.give(life.ids("the dog"))
    await until(lambda: client.text == "the dog")
    await life.chats.stop(OWNER, reply.id)
    await reading
    assert run.aborted
    assert client.final.kind == "done"
    assert client.final.data["finish_reason"] == "abort"
    _, (_, answer), _ = await store.tree(OWNER, conversation)
    assert answer.text == "the dog"
    await life.chats.stop(OWNER, reply.id)
    assert (await life.chats.reply(OWNER, reply.id)).end == client.cursor


async def test_a_reply_stopped_before_its_first_step_ends_in_an_empty_turn(
    life: Process, store: MemoryStore
):
    conversation = await life.conversation()
    life.store.held["accept"] = asyncio.Event()
    sending = asyncio.create_task(life.send(conversation))
    await until(lambda: "accept" in life.store.calls)
    life.store.held.pop("accept").set()
    reply = await sending
    await life.chats.stop(OWNER, reply.id)
    client = Client()
    await client.read(reply)
    assert (client.text, client.final.data["finish_reason"]) == ("", "abort")
    _, turns, records = await store.tree(OWNER, conversation)
    assert len(turns) == 2
    assert records == ()


async def test_the_last_viewer_gone_starts_a_grace_period_that_a_new_one_ends(life: Process):
    conversation = await life.conversation()
    reply = await life.send(conversation)
    run = await begun(life)
    assert [timer.seconds for timer in life.time.due if timer.seconds > 1] == [300.0]
    with reply.view():
        assert [timer.seconds for timer in life.time.due if timer.seconds > 1] == []
    assert [timer.seconds for timer in life.time.due if timer.seconds > 1] == [200.0]
    with reply.view():
        assert [timer.seconds for timer in life.time.due if timer.seconds > 1] == []
    run.give(life.ids("dog"))
    await until(lambda: reply.length)
    await tick(life, 200.0)
    await until(lambda: reply.end is not None)
    assert run.aborted
    assert reply.final.data["finish_reason"] == "abort"


async def test_a_prompt_that_does_not_fit_fails_its_reply_and_keeps_the_turn(
    life: Process, store: MemoryStore
):
    conversation = await life.conversation()
    reply = await life.send(conversation, "dog " * 500)
    client = Client()
    await client.read(reply)
    assert client.final.kind == "failed"
    assert client.final.data["code"] == ContextLengthExceeded.code
    _, (user,), (record,) = await store.tree(OWNER, conversation)
    assert user.role is Role.USER
    assert record.state is ReplyState.FAILED
    assert json.loads(record.final) == client.final.data


async def test_ids_outside_the_vocabulary_fail_the_reply(life: Process):
    conversation = await life.conversation()
    reply = await life.send(conversation, sampling={"stop_token_ids": [10**6]})
    client = Client()
    await client.read(reply)
    assert client.final.data["code"] == RequestError.code


async def test_an_error_of_the_engine_keeps_the_text_that_was_said(
    life: Process, store: MemoryStore
):
    conversation = await life.conversation()
    reply = await life.send(conversation)
    run = await begun(life)
    run.give(life.ids("the dog"))
    run.give(finish=FinishReason.ERROR, error=NumericalFault("NaN"))
    client = Client()
    await client.read(reply)
    assert (client.text, client.final.data["code"]) == ("the dog", NumericalFault.code)
    await until(lambda: not life.chats.statistics().running)
    late = Client()
    await late.read(await life.chats.reply(OWNER, reply.id))
    assert (late.text, late.final) == (client.text, client.final)
    with pytest.raises(Conflict):
        await life.send(conversation, "and now?", ask="t2")
    await answered(life, conversation, content=None, ask="t3")


async def test_a_mistake_of_ours_fails_one_reply_and_is_kept_as_failed(
    life: Process, store: MemoryStore, caplog
):
    conversation = await life.conversation()

    def broken() -> None:
        raise ZeroDivisionError

    life.engine.on_prepare = broken
    reply = await life.send(conversation)
    client = Client()
    await client.read(reply)
    assert client.final.data["code"] == "engine_error"
    assert "ZeroDivisionError" in caplog.text
    life.engine.on_prepare = lambda: None
    await answered(life, await life.conversation())


# A store that is away --------------------------------------------------------------------------


async def test_a_store_that_is_away_holds_up_the_end_and_not_the_text(
    life: Process, store: MemoryStore
):
    conversation = await life.conversation()
    reply = await life.send(conversation)
    run = await begun(life)
    life.store.away = {"append", "end"}
    client = Client()
    reading = asyncio.create_task(client.read(reply))
    run.give(life.ids("the dog"))
    await until(lambda: client.text == "the dog")
    await tick(life)
    run.give(life.ids(" barks"), finish=FinishReason.LENGTH)
    for tries in range(1, 4):
        await until(lambda tries=tries: life.store.calls.count("end") >= tries)
        assert client.final is None
        await until(lambda: any(timer.seconds <= 1.0 for timer in life.time.due))
        await tick(life)
    assert client.text == "the dog barks"
    life.store.away = set()
    await until(lambda: any(timer.seconds <= 1.0 for timer in life.time.due))
    await tick(life)
    await reading
    _, (_, answer), _ = await store.tree(OWNER, conversation)
    assert answer.text == client.text
    assert json.loads(answer.final) == client.final.data


@pytest.mark.parametrize("when", ["before", "after"])
async def test_an_end_in_doubt_is_asked_again_and_counts_once(
    life: Process, store: MemoryStore, when: str
):
    conversation = await life.conversation()
    life.store.plot = lambda name, number: when if (name, number) == ("end", 0) else None
    reply = await life.send(conversation)
    (await begun(life)).give(life.ids("dog"), finish=FinishReason.LENGTH)
    await until(lambda: "end" in life.store.calls)
    await until(lambda: any(timer.seconds <= 1.0 for timer in life.time.due))
    await tick(life)
    await until(lambda: reply.end is not None)
    _, turns, records = await store.tree(OWNER, conversation)
    assert ([each.text for each in turns], records) == (["hi", "dog"], ())


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_turn_in_doubt_is_answered_if_it_was_kept(
    life: Process, store: MemoryStore, when: str
):
    conversation = await life.conversation()
    life.store.plot = lambda name, number: when if (name, number) == ("accept", 0) else None
    with pytest.raises(Unavailable):
        await life.send(conversation)
    await until(lambda: not life.chats.statistics().doubts)
    _, turns, records = await store.tree(OWNER, conversation)
    assert len(turns) == len(records) == (1 if when == "after" else 0)
    assert len(life.engine.runs) <= 1
    assert life.chats.statistics().running == len(records)
    reply = await life.send(conversation)  # the client's retry
    (await begun(life)).give(life.ids("dog"), finish=FinishReason.LENGTH)
    await until(lambda: reply.end is not None)
    _, turns, records = await store.tree(OWNER, conversation)
    assert ([each.text for each in turns], records) == (["hi", "dog"], ())
    assert len(life.engine.runs) == 1


async def test_a_turn_that_arrives_after_its_doubt_was_settled_is_refused(
    life: Process, store: MemoryStore
):
    conversation = await life.conversation()
    on_the_way: list[NewTurn] = []

    async def hold_up(new: NewTurn) -> Accepted:
        on_the_way.append(new)
        raise Unavailable("The store did not answer.", retry_after=1.0)

    life.store.accept = hold_up
    with pytest.raises(Unavailable):
        await life.send(conversation)
    await until(lambda: not life.chats.statistics().doubts)
    del life.store.accept
    (late,) = on_the_way
    with pytest.raises(Conflict):
        await store.accept(late)
    assert await store.running() == ()
    reply = await answered(life, conversation)  # the client's retry
    assert reply.id != late.reply
    _, turns, records = await store.tree(OWNER, conversation)
    assert ([each.text for each in turns], records) == (["hi", "the dog"], ())


async def test_a_turn_that_another_server_should_get_is_in_no_doubt(life: Process):
    conversation = await life.conversation()

    async def refuse(_: NewTurn) -> Accepted:
        raise Elsewhere

    life.store.accept = refuse
    with pytest.raises(Elsewhere) as refused:
        await life.send(conversation)
    assert refused.value.retry_after
    assert life.chats.statistics().doubts == 0
    assert "settle" not in life.store.calls
    del life.store.accept
    await answered(life, conversation)


# Points of cancellation ------------------------------------------------------------------------


async def test_a_send_cancelled_on_its_way_to_the_store_leaves_a_turn_that_is_answered(
    life: Process, store: MemoryStore
):
    conversation = await life.conversation()
    life.store.held["accept"] = asyncio.Event()
    sending = asyncio.create_task(life.send(conversation))
    await until(lambda: "accept" in life.store.calls)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    life.store.held.pop("accept").set()
    run = await begun(life)
    run.give(life.ids("dog"), finish=FinishReason.LENGTH)
    await until(lambda: not life.chats.statistics().running)
    _, turns, _ = await store.tree(OWNER, conversation)
    assert [each.text for each in turns] == ["hi", "dog"]


async def test_a_send_cancelled_before_a_refusal_leaves_nothing(life: Process):
    conversation = await life.conversation()
    life.store.held["accept"] = asyncio.Event()
    sending = asyncio.create_task(life.send(conversation, parent="nowhere"))
    await until(lambda: "accept" in life.store.calls)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    life.store.held.pop("accept").set()
    await until(lambda: not life.chats.statistics().waiting)
    assert life.chats.statistics().running == 0


async def test_a_reply_stopped_while_its_end_is_kept_ends_as_it_was(
    life: Process, store: MemoryStore
):
    conversation = await life.conversation()
    life.store.held["end"] = asyncio.Event()
    reply = await life.send(conversation)
    (await begun(life)).give(life.ids("dog"), finish=FinishReason.LENGTH)
    await until(lambda: "end" in life.store.calls)
    await life.chats.stop(OWNER, reply.id)
    life.store.held.pop("end").set()
    await until(lambda: reply.end is not None)
    assert reply.final.data["finish_reason"] == "length"


async def test_a_cancelled_task_group_leaves_replies_running_in_the_store(store: MemoryStore):
    async with process(store) as life:
        conversation = await life.conversation()
        reply = await life.send(conversation)
        run = await begun(life)
        client = Client()
        reading = asyncio.create_task(client.read(reply))
        run.give(life.ids("dog"))
        await until(lambda: client.text)
        life.die()
        await reading
        assert client.final is None, "it goes on after the restart"
        assert run.aborted
    assert await store.running() == (reply.id,)


async def test_a_reply_cancelled_before_its_first_step_is_left_running(store: MemoryStore):
    async with process(store) as life:
        conversation = await life.conversation()
        life.store.held["accept"] = asyncio.Event()
        sending = asyncio.create_task(life.send(conversation))
        await until(lambda: "accept" in life.store.calls)
        life.store.held.pop("accept").set()
        reply = await sending
        life.die()
        client = Client()
        await client.read(reply)
        assert client.final is None
    assert await store.running() == (reply.id,)


# The end of a server ---------------------------------------------------------------------------


async def test_a_drain_refuses_new_turns_and_lets_the_running_finish(life: Process):
    conversation = await life.conversation()
    reply = await life.send(conversation)
    run = await begun(life)
    life.chats.begin_drain()
    with pytest.raises(Unavailable) as refused:
        await life.send(conversation, ask="t2")
    assert refused.value.retry_after
    assert await life.send(conversation) is reply
    run.give(life.ids("dog"), finish=FinishReason.LENGTH)
    await life.chats.wait_quiet()
    assert reply.final.kind == "done"
    assert (await life.send(conversation)).id == reply.id


async def test_what_runs_at_the_end_of_a_drain_stays_running_with_all_its_text_logged(
    life: Process, store: MemoryStore
):
    conversation = await life.conversation()
    reply = await life.send(conversation)
    run = await begun(life)
    client = Client()
    reading = asyncio.create_task(client.read(reply))
    run.give(life.ids("the dog"))
    await until(lambda: client.text)
    await life.chats.close()
    await reading
    assert (client.text, client.final) == ("the dog", None)
    assert run.aborted
    assert await store.running() == (reply.id,)
    assert "".join(entry.text for entry in await store.log(reply.id)) == "the dog"
    with pytest.raises(Unavailable):
        await life.chats.reply(OWNER, reply.id)


async def test_an_end_that_the_store_never_took_is_resumable_after_the_drain(
    life: Process, store: MemoryStore
):
    conversation = await life.conversation()
    life.store.away = {"end"}
    reply = await life.send(conversation)
    (await begun(life)).give(life.ids("dog"), finish=FinishReason.LENGTH)
    await until(lambda: "end" in life.store.calls)
    await life.chats.close()
    assert (reply.over, reply.final) == (True, None)
    assert await store.running() == (reply.id,)


async def test_a_turn_accepted_while_the_server_closes_is_left_running(
    life: Process, store: MemoryStore
):
    conversation = await life.conversation()
    life.store.held["accept"] = asyncio.Event()
    sending = asyncio.create_task(life.send(conversation))
    await until(lambda: "accept" in life.store.calls)
    closing = asyncio.create_task(life.chats.close())
    await asyncio.sleep(0)
    life.store.held.pop("accept").set()
    reply = await sending
    await closing
    await until(lambda: reply.over)
    assert reply.final is None
    assert await store.running() == (reply.id,)
    assert life.engine.runs == []


def test_the_asks_of_the_two_floors_fit():
    assert turn("c").at_leaf
