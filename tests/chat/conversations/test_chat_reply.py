"""Replies over the real engine and a simulated model: whoever comes back, from wherever and after
whatever crash, has the text that is kept; and that is the text of a reply that was never cut."""

import asyncio
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from chatserve.chat.conversations.chat_reply import KeptReply
from chatserve.chat.conversations.reply_events import (
    ReplyAccepted,
    ReplyDelta,
    ReplyFinal,
    ReplySnapshot,
)
from chatserve.chat.conversations.reply_log import LogLimits
from chatserve.chat.store.conversation import (
    ReplyCursor,
    ReplyRecord,
    ReplyState,
)
from chatserve.chat.store.memory_store import MemoryStore
from chatserve.engine.values import FinishReason
from tests.chat.conversations.chats import OWNER, Client, Process, process, tick, until
from tests.chat.vocabularies import pretrained
from tests.engine.build import House, Setup, build, running

FAST_LOG = LogLimits(tick_seconds=0.002)


def new_house(context: int = 400) -> House:
    """An engine whose vocabulary is the tokenizer's: its words are any bytes at all."""
    vocabulary = len(pretrained("byte_level"))
    house = build(
        Setup(pages=200, page_size=4, vocabulary=vocabulary, context_length=context, queued_max=2)
    )
    house.runner._step_seconds = 0.0003
    return house


@dataclass(frozen=True)
class Whole:
    """A reply as it was kept."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    ids: tuple[int, ...] | None


async def whole_of(store: MemoryStore, conversation: str, reply: str) -> Whole:
    _, turns, records = await store.tree(OWNER, conversation)
    assert records == ()
    answer = next(each for each in turns if each.id == reply)
    final = json.loads(answer.final)
    return Whole(
        answer.text,
        final["finish_reason"],
        final["usage"]["prompt_tokens"],
        final["usage"]["completion_tokens"],
        answer.token_ids,
    )


def draw_sampling(source: random.Random) -> Mapping[str, object]:
    """Sampling fields under which replies end in every way, some after a few characters."""
    fields: dict[str, object] = {
        "temperature": source.choice([0.0, 1.0]),
        "seed": source.randrange(1 << 40),
        "max_tokens": source.choice([1, 7, 60, 120, 300]),
        "ignore_eos": source.random() < 0.5,
    }
    if source.random() < 0.6:
        letters = "aeint ,\ufffd"
        fields["stop"] = [
            "".join(source.choices(letters, k=source.choice([1, 2, 3]))) for _ in range(2)
        ]
    if source.random() < 0.4:
        fields["min_tokens"] = source.choice([1, 20])
        fields["max_tokens"] = max(int(fields["max_tokens"]), 20)
    return fields


async def uninterrupted(content: str, sampling: Mapping[str, object]) -> Whole:
    store, house = MemoryStore(), new_house()
    async with running(house), process(store, engine=house.engine, real_time=True) as life:
        conversation = await life.conversation(system="s")
        reply = await life.send(conversation, content, sampling=sampling)
        await Client().read(reply)
        return await whole_of(store, conversation, reply.id)


@pytest.mark.parametrize("seed", range(24))
async def test_any_cuts_and_crashes_assemble_the_text_of_an_uninterrupted_reply(seed: int):
    source = random.Random(seed)
    content = "".join(source.choices("the quick dog\n", k=source.randrange(1, 60)))
    sampling = draw_sampling(source)
    expected = await uninterrupted(content, sampling)
    store = MemoryStore()
    clients = [Client() for _ in range(3)]
    names: tuple[str, str] | None = None
    for crash in range(source.randrange(1, 6), -1, -1):
        house = new_house()
        async with (
            running(house),
            process(store, engine=house.engine, real_time=True, log=FAST_LOG) as life,
        ):
            if names is None:
                conversation = await life.conversation(system="s")
                reply = await life.send(conversation, content, sampling=sampling)
                names = conversation, reply.id
            else:
                await life.chats.resume_all()
            work = asyncio.gather(*(wander(life, names[1], each, source) for each in clients))
            if crash:
                mark = source.randrange(len(expected.text) + 2)
                await until(lambda mark=mark, work=work: seen(clients) >= mark or work.done())
                life.die()
            await work
    assert await whole_of(store, *names) == expected
    for client in clients:
        assert client.text == expected.text
        assert client.final.data["usage"]["completion_tokens"] == expected.completion_tokens
    assert await store.running() == ()


def seen(clients: list[Client]) -> int:
    return max(len(client.text) for client in clients)


async def wander(life: Process, name: str, client: Client, source: random.Random) -> None:
    """Look at a reply for a few events at a time, now and then from an earlier place, to its end.
    Where it breaks off that is the server's end: the client waits for the next."""
    while client.final is None:
        reply = await life.chats.reply(OWNER, name)
        await client.read(reply, most=source.randrange(1, 6))
        if client.final is None and reply.broken_off:
            return
        if client.final is None and source.random() < 0.2:
            client.step_back(source)


async def test_a_reply_goes_on_where_its_log_ends_and_its_prompt_is_not_logged_twice():
    store = MemoryStore()
    async with process(store) as life:
        conversation = await life.conversation()
        reply = await life.send(conversation, sampling={"max_tokens": 9, "stop": ["xyz"]})
        await until(lambda: life.engine.runs)
        (run,) = life.engine.runs
        said = life.ids("the dog x")
        run.give(said)
        await until(lambda: reply.length)
        await tick(life)
        life.die()
    (entry,) = await store.log(reply.id)
    assert (entry.text, entry.token_ids) == ("the dog ", tuple(said))
    assert entry.prompt_ids is not None
    async with process(store) as life:
        await life.chats.resume_all()
        again = await life.chats.reply(OWNER, reply.id)
        assert again.epoch == 2
        await until(lambda: life.engine.runs)
        (next_run,) = life.engine.runs
        assert next_run.request.tokens == (*run.request.tokens, *said)
        assert next_run.request.answered == len(said)
        assert next_run.request.max_tokens == 9 - len(said)
        assert next_run.request.sampling == run.request.sampling
        next_run.give(life.ids("y"))
        await tick(life)
        next_run.give(life.ids("zz"))
        client = Client()
        await client.read(again)
        assert client.text == "the dog "
        assert client.final.data["usage"]["prompt_tokens"] == len(run.request.tokens)
        assert client.final.data["usage"]["completion_tokens"] == len(life.ids("the dog "))
        assert next_run.finished == {0: 0}


@pytest.mark.parametrize(
    ("cursor", "begins"),
    [
        (None, "the dog"),
        (ReplyCursor(1, 0), "the dog"),
        (ReplyCursor(1, 3), " dog"),
        (ReplyCursor(1, 7), ""),
        (ReplyCursor(1, 8), ReplySnapshot),
        (ReplyCursor(2, 3), " dog"),
        (ReplyCursor(2, 16), ReplySnapshot),
        (ReplyCursor(3, 1), ReplySnapshot),
        (ReplyCursor(0, 1), ReplySnapshot),
    ],
)
async def test_a_cursor_gets_what_is_missing_or_a_snapshot(cursor, begins):
    """Epoch 1 logged 'the dog', showed more, and died; epoch 2 is there."""
    store = MemoryStore()
    async with process(store) as life:
        conversation = await life.conversation()
        reply = await life.send(conversation)
        await until(lambda: life.engine.runs)
        life.engine.runs[0].give(life.ids("the dog"))
        await until(lambda: reply.length)
        await tick(life)
        life.engine.runs[0].give(life.ids(" barks"))
        await until(lambda: reply.length > 7)
        life.die()
    async with process(store) as life:
        await life.chats.resume_all()
        live = await life.chats.reply(OWNER, reply.id)
        assert live.logged == (7,)
        await until(lambda: life.engine.runs)
        life.engine.runs[0].give(life.ids(" sleeps"), finish=FinishReason.LENGTH)
        await until(lambda: live.end is not None)
        for found in (live, await life.chats.reply(OWNER, reply.id)):
            with found.view(cursor) as viewing:
                events = [event async for event in viewing]
            assert isinstance(events[0], ReplyAccepted)
            assert isinstance(events[-1], ReplyFinal)
            assert len(events) == 3
            if begins is ReplySnapshot:
                assert isinstance(events[1], ReplySnapshot)
                assert events[1].text == "the dog sleeps"
            else:
                assert events[1].text == begins + " sleeps"
            assert events[1].cursor == ReplyCursor(2, 14)
            assert events[2].cursor == found.end == ReplyCursor(2, 15)
            with found.view(found.end) as viewing:
                assert [type(event) async for event in viewing] == [ReplyAccepted, ReplyFinal]


async def test_a_cursor_beyond_the_text_of_a_running_reply_gets_a_snapshot():
    async with process(MemoryStore()) as life:
        reply = await life.send(await life.conversation())
        await until(lambda: life.engine.runs)
        life.engine.runs[0].give(life.ids("the dog"))
        await until(lambda: reply.length)
        # 8 were the final event's place, were this the whole text.
        with reply.view(ReplyCursor(1, 7)) as known, reply.view(ReplyCursor(1, 8)) as unknown:
            for viewing in (known, unknown):
                assert isinstance(await anext(viewing), ReplyAccepted)
            first, more = life.ids("the dog"), life.ids(" barks")
            assert await anext(unknown) == ReplySnapshot(
                cursor=ReplyCursor(1, 7), text="the dog", tokens=len(first)
            )
            life.engine.runs[0].give(more)
            for viewing in (known, unknown):
                assert await anext(viewing) == ReplyDelta(
                    cursor=ReplyCursor(1, 13), text=" barks", tokens=len(first) + len(more)
                )


def test_a_kept_reply_is_served_from_its_record_alone():
    record = ReplyRecord(
        id="c.r",
        turn="t",
        state=ReplyState.FAILED,
        created=1.0,
        request=b"",
        epoch=3,
        logged=(2, 5),
        final=b'{"code":"x"}',
        text="hello",
    )
    kept = KeptReply(record)
    assert (kept.conversation, kept.end) == ("c", ReplyCursor(3, 6))
    assert kept.final.kind == "failed"
