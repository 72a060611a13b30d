"""Replies over the socket: what the reader gets, connections that are cut, refusals."""

import asyncio
import random
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from chatserve.chat.conversations.reply_events import ReplyProgress as ServerProgress
from chatserve.client import (
    BrokenProtocol,
    ChatClient,
    ChatError,
    ClientClosed,
    ClientLimits,
    Receipt,
    Refused,
    Reply,
    ReplyFailed,
    ReplyProgress,
    ReplyWaiting,
    TextDelta,
    TextReplaced,
    TextSnapshot,
    Unreachable,
)
from chatserve.errors import Busy, Unavailable
from tests.api.fake_conversations import FakeChatReply
from tests.api.harness import PATIENCE_SECONDS, Site, free_socket, site, soon, until
from tests.client.cutting_proxy import cutting_proxy

QUICK = ClientLimits(
    reconnect_seconds_first=0.001,
    reconnect_seconds_max=0.01,
    outage_seconds_max=PATIENCE_SECONDS,
    retry_after_seconds_max=0.01,
    unsent_seconds_max=0.05,
    draft_seconds_min=0.001,
)


@pytest.fixture
async def served() -> AsyncGenerator[Site]:
    async with site() as running:
        yield running


@pytest.fixture
async def client(served: Site) -> AsyncGenerator[ChatClient]:
    async with asyncio.timeout(PATIENCE_SECONDS), ChatClient(served.url, limits=QUICK) as made:
        yield made


def newest(served: Site) -> FakeChatReply:
    return list(served.conversations.replies.values())[-1]


async def test_a_reply_is_its_texts_and_its_end(served: Site, client: ChatClient) -> None:
    served.conversations.on_send = lambda reply: reply.say("one")
    conversation = await client.create(title="x")
    reply = client.send(conversation, "hello", temperature=0.5)
    assert (reply.id, reply.final) == (None, None)
    texts = aiter(reply)
    assert await anext(texts) == "one"
    newest(served).say(" two")
    assert await anext(texts) == " two"
    newest(served).finish()
    with pytest.raises(StopAsyncIteration):
        await anext(texts)
    (turn,) = served.conversations.sent
    assert (turn.content, turn.sampling, turn.at_leaf) == ("hello", {"temperature": 0.5}, True)
    assert (reply.text, reply.id, reply.turn) == ("one two", newest(served).id, turn.ask)
    assert reply.final is not None
    assert reply.final.receipt == Receipt(device=4, computed=1)
    assert reply.final.usage.prompt_tokens == 5
    assert reply.final.timings.to_first_token == 0.25
    assert await reply.wait() == reply.final


async def test_a_reply_needs_no_reader(served: Site, client: ChatClient) -> None:
    served.conversations.on_send = lambda reply: (reply.say("all"), reply.finish())
    reply = client.send(await client.create(), "hello")
    final = await reply.wait()
    assert (reply.text, final.finish_reason) == ("all", "stop")
    assert [text async for text in reply] == ["all"]


async def test_many_replies_share_one_socket(served: Site, client: ChatClient) -> None:
    conversations = [await client.create(title=str(n)) for n in range(8)]
    replies = [client.send(each, "hello") for each in conversations]
    for reply in replies:
        await reply.accepted()
    for fake in served.conversations.replies.values():
        fake.say(f"for {fake.conversation}")
        fake.finish()
    for conversation, reply in zip(conversations, replies, strict=True):
        await reply.wait()
        assert reply.text == f"for {conversation.id}"
    assert client._exchange.connections_total == 1  # pyright: ignore[reportPrivateUsage]


async def test_stop_ends_a_reply_wherever_it_is(served: Site, client: ChatClient) -> None:
    conversation = await client.create()
    served.conversations.hold = asyncio.Event()
    early = client.send(conversation, "hello")
    await soon(served.conversations.arrived)
    early.stop()  # before the server has said that it has it
    served.conversations.hold.set()
    assert (await early.wait()).finish_reason == "stop_requested"
    late = client.regenerate(conversation, early.turn or "")
    await late.accepted()
    newest(served).say("a")
    assert await anext(aiter(late)) == "a"
    late.stop()
    assert (await late.wait()).finish_reason == "stop_requested"


async def test_events_tell_of_progress_waits_and_replacements(served: Site) -> None:
    def script(reply: FakeChatReply) -> None:
        reply.progress = [ServerProgress(queued=2, prompt_tokens=9, computed=4)]

    served.conversations.on_send = script
    async with (
        asyncio.timeout(PATIENCE_SECONDS),
        cutting_proxy(served.port) as proxy,
        ChatClient(proxy.url, limits=QUICK) as client,
    ):
        reply = client.send(await client.create(), "hello")
        events = reply.events()
        assert await anext(events) == ReplyProgress(queued=2, prompt_tokens=9, computed=4)
        newest(served).say("kept lost")
        assert await anext(events) == TextDelta(text="kept lost")
        proxy.cut_all()
        waiting = await anext(events)
        assert isinstance(waiting, ReplyWaiting)
        assert waiting.reason
        newest(served).crash(kept=4)
        while isinstance(event := await anext(events), ReplyWaiting):
            pass
        assert event == TextSnapshot(text="kept")
        newest(served).say(" new")
        newest(served).finish()
        assert [event async for event in events] == [TextDelta(text=" new")]
        assert reply.text == "kept new"


@pytest.mark.parametrize(
    ("said_anew", "given"), [(" lost more", [" more"]), (" other", None), ("", None)]
)
async def test_texts_go_on_after_a_crash_or_say_that_they_cannot(
    served: Site, said_anew: str, given: list[str] | None
) -> None:
    async with (
        asyncio.timeout(PATIENCE_SECONDS),
        cutting_proxy(served.port) as proxy,
        ChatClient(proxy.url, limits=QUICK) as client,
    ):
        reply = client.send(await client.create(), "hello")
        await reply.accepted()
        newest(served).say("kept lost")
        assert await anext(aiter(reply)) == "kept lost"
        proxy.refusing = True
        proxy.cut_all()
        newest(served).crash(kept=4)
        newest(served).say(said_anew)
        newest(served).finish()
        proxy.refusing = False
        if given is not None:
            assert [text async for text in reply] == given
        else:
            with pytest.raises(TextReplaced):
                await anext(aiter(reply))
            assert "".join([text async for text in reply]) == "kept" + said_anew
        assert reply.text == "kept" + said_anew


async def test_random_cuts_leave_no_gap_and_no_doubled_text(served: Site) -> None:
    """The connection is cut at random bytes, the handshake's among them."""
    seed = random.randrange(2**32)
    print("seed", seed)
    dice = random.Random(seed)
    text = "".join(dice.choices('abc \n"\\é\u2028\U0001f600', k=40_000))
    async with (
        asyncio.timeout(60),
        # A handshake's answer has some 400 bytes, an event of 200 characters about 1,000.
        cutting_proxy(served.port, lambda: dice.randrange(2_000)) as proxy,
        ChatClient(served.url, limits=QUICK) as direct,
        ChatClient(proxy.url, limits=QUICK) as client,
    ):
        conversation = await direct.create()
        reply = client.send(conversation, "hello")

        async def speak() -> None:
            """A little at a time, each once the client has come back and has the last."""
            await until(lambda: bool(served.conversations.replies))
            fake, place = newest(served), 0
            while place < len(text):
                step = dice.randrange(1, 200)
                fake.say(text[place : place + step])
                place += step
                await until(lambda: len(reply.text) == len(fake.text))
            fake.finish()

        async with asyncio.TaskGroup() as group:
            group.create_task(speak())
            given = [piece async for piece in reply]
        assert "".join(given) == text == reply.text
        assert reply.final is not None
        assert reply.final.usage.completion_tokens == 2
        print(proxy.cuts, "cuts,", proxy.connections, "connections")
        assert proxy.cuts >= 100
        assert len(served.conversations.replies) == 1, "a retry must not be a second turn"


async def test_a_turn_whose_answer_was_lost_is_asked_for_again(served: Site) -> None:
    """The server keeps the turn, and the connection goes before it says so."""
    async with (
        asyncio.timeout(PATIENCE_SECONDS),
        cutting_proxy(served.port) as proxy,
        ChatClient(served.url, limits=QUICK) as direct,
        ChatClient(proxy.url, limits=QUICK) as client,
    ):
        conversation = await direct.create()
        served.conversations.hold = asyncio.Event()
        reply = client.send(conversation, "hello")
        await soon(served.conversations.arrived)
        proxy.refusing = True
        proxy.cut_all()
        await soon(served.conversations.send_cancelled)
        served.conversations.hold = None
        # What the server may have kept: the same ask, known by now.
        same = direct.send(conversation, "hello", ask=reply.ask)
        await same.accepted()
        proxy.refusing = False
        newest(served).say("x")
        newest(served).finish()
        await reply.wait()
        assert (reply.id, reply.text) == (same.id, "x")
        assert len(served.conversations.replies) == 1


async def test_a_turn_that_was_certainly_not_kept_is_refused_at_once(
    served: Site, client: ChatClient
) -> None:
    conversation = await client.create()
    served.conversations.refusal = Busy("Full.", retry_after=3.0)
    with pytest.raises(Refused) as caught:
        await client.send(conversation, "hello").accepted()
    error = caught.value
    assert (error.status, error.code, error.retry_after) == (429, "busy", 3.0)


async def test_a_turn_that_may_have_been_kept_is_asked_for_until_the_store_answers(
    served: Site, client: ChatClient
) -> None:
    conversation = await client.create()
    served.conversations.refusal = Unavailable("The store is away.", retry_after=0.001)
    reply = client.send(conversation, "hello")
    events = reply.events()
    assert await anext(events) == ReplyWaiting(reason="The store is away.")
    served.conversations.refusal = None
    await reply.accepted()
    newest(served).finish()
    await reply.wait()
    assert len({turn.ask for turn in served.conversations.sent}) == 1
    assert len(served.conversations.replies) == 1


async def test_patience_with_a_store_that_stays_away_ends(served: Site) -> None:
    limits = ClientLimits(outage_seconds_max=0.05, retry_after_seconds_max=0.001)
    async with asyncio.timeout(PATIENCE_SECONDS), ChatClient(served.url, limits=limits) as client:
        conversation = await client.create()
        served.conversations.refusal = Unavailable("The store is away.", retry_after=0.001)
        with pytest.raises(Refused) as caught:
            await client.send(conversation, "hello").wait()
    assert caught.value.status == 503


async def test_what_the_asker_can_mend_is_told_with_its_field(client: ChatClient) -> None:
    conversation = await client.create()
    with pytest.raises(Refused) as caught:
        await client.send(conversation, "hello", temperature=-1).accepted()
    assert (caught.value.status, caught.value.param) == (400, "temperature")
    with pytest.raises(Refused) as caught:
        await client.send("nobody", "hello").accepted()
    assert caught.value.status == 404
    with pytest.raises(Refused) as caught:
        await client.send(conversation, "x" * 2_000_000).accepted()
    assert (caught.value.status, caught.value.code) == (413, "request_too_large")
    with pytest.raises(ValueError, match="surrogates"):
        client.send(conversation, "\ud800")
    with pytest.raises(ValueError, match="JSON"):
        client.send(conversation, "hello", temperature=float("nan"))


async def test_a_reply_that_fails_keeps_its_text(served: Site, client: ChatClient) -> None:
    data: dict[str, Any] = {"code": "numerical_fault", "message": "NaN", "retry_after": None}
    served.conversations.on_send = lambda reply: (reply.say("a"), reply.finish("failed", data))
    reply = client.send(await client.create(), "hello")
    given: list[str] = []
    with pytest.raises(ReplyFailed) as caught:
        given += [text async for text in reply]
    assert (reply.text, reply.final) == ("a", None)
    assert (caught.value.code, caught.value.status) == ("numerical_fault", 500)


async def test_nobody_there_is_told_soon() -> None:
    with free_socket() as unused:
        port = unused.getsockname()[1]
        async with ChatClient(f"http://127.0.0.1:{port}", limits=QUICK) as client:
            with pytest.raises(Unreachable):
                await client.send("c1", "hello").wait()
            with pytest.raises(Unreachable):
                await client.create()


async def test_a_reply_under_way_outlives_a_draining_viewing(
    served: Site, client: ChatClient
) -> None:
    reply = client.send(await client.create(), "hello")
    await reply.accepted()
    fake = newest(served)
    fake.say("a")
    assert await anext(aiter(reply)) == "a"
    fake.go_away()  # the viewing ends without the final event, the socket stays
    await until(lambda: fake.viewers == 0)
    fake.going_away = False
    fake.say("b")
    fake.finish()
    await reply.wait()
    assert reply.text == "ab"


async def test_the_clients_end_ends_its_replies_and_lets_an_error_through(served: Site) -> None:
    class OwnError(Exception):
        pass

    client = ChatClient(served.url)
    replies: list[Reply] = []

    async def fail_inside() -> None:
        async with client:
            replies.append(client.send(await client.create(), "hello"))
            await replies[0].accepted()
            raise OwnError

    with pytest.raises(OwnError):
        await fail_inside()
    (reply,) = replies
    with pytest.raises(ClientClosed):
        await reply.wait()
    with pytest.raises(ClientClosed):
        client.send("c1", "hello")
    await soon(newest(served).left)
    await until(lambda: not served.conversations.listeners)


async def test_a_closed_reply_leaves_the_others_alone(served: Site, client: ChatClient) -> None:
    first = client.send(await client.create(), "hello")
    await first.accepted()
    first.close()
    with pytest.raises(ChatError):
        await first.wait()
    newest(served).say("not for anybody")
    second = client.send(await client.create(), "hello")
    await second.accepted()
    newest(served).finish()
    await second.wait()
    assert first.text == ""


async def test_a_closed_reply_has_no_viewer_left_and_goes_on(
    served: Site, client: ChatClient
) -> None:
    conversation = await client.create()
    for _ in range(3 * QUICK.replies_max):  # its place at the server is free for the next one
        with client.send(conversation, "hello") as reply:
            await reply.accepted()
    for fake in served.conversations.replies.values():
        await soon(fake.left)
        assert fake.final is None


async def test_more_replies_than_a_socket_shows_are_refused_here(
    served: Site, client: ChatClient
) -> None:
    conversation = await client.create()
    for _ in range(QUICK.replies_max):
        await client.send(conversation, "hello").accepted()
    with pytest.raises(Refused) as caught:
        client.send(conversation, "hello")
    assert caught.value.status == 429


async def test_a_reply_is_attached_to_by_its_id(served: Site, client: ChatClient) -> None:
    conversation = await client.create()
    asked = client.send(conversation, "hello")
    await asked.accepted()
    newest(served).say("seen")
    assert client.attach(conversation, asked.id or "") is asked
    async with ChatClient(served.url, limits=QUICK) as other:
        (running,) = (await other.open(conversation)).replies
        attached = other.attach(conversation, running.id)
        newest(served).finish()
        await attached.wait()
        assert attached.text == "seen"
        kept = other.attach(conversation, running.id)  # it has ended
        await kept.wait()
        assert kept.text == "seen"
        with pytest.raises(Refused) as caught:
            await other.attach(conversation, "c1.nobody").wait()
    assert caught.value.status == 404


async def test_somebody_elses_protocol_is_noticed() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, ChatClient(f"http://127.0.0.1:{port}", limits=QUICK) as client:
        with pytest.raises(Refused) as caught:
            await client.send("c1", "hello").wait()
        assert caught.value.status == 200
        with pytest.raises(BrokenProtocol):
            await client.create()
