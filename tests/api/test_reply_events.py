"""A chat's reply by SSE: its frames, coming back to it at any place, and leaving it."""

import asyncio
import random
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import orjson
import pytest

from chatserve.api.chat_events import pieces, shape
from chatserve.chat.conversations.reply_events import ReplyDelta, ReplyProgress, ReplySnapshot
from chatserve.chat.store.conversation import ReplyCursor
from chatserve.errors import Unavailable
from tests.api.fake_conversations import DONE, FakeChatReply
from tests.api.harness import Site, close, quick, read_to_end, site, soon, until

TURN = {"id": "t1", "content": "x"}
NASTY = 'a\r\n\r\nevent: done\ndata: {}\n\n\u2028\u2029\x85\x00"\\ \U0001f600é\ud7ff'


@pytest.fixture
async def served() -> AsyncGenerator[Site]:
    async with site() as running:
        yield running


async def turns_path(client: httpx.AsyncClient) -> str:
    made = await client.post("/api/conversations", json={})
    return f"/api/conversations/{made.json()['id']}/turns"


@dataclass(frozen=True)
class Event:
    name: str
    id: str | None
    data: dict[str, Any]


def events_in(stream: bytes) -> Iterator[Event]:
    """By the standard's rules as far as we use them; an unfinished event is not one."""
    *blocks, _ = stream.split(b"\n\n")
    for block in blocks:
        fields: dict[str, str] = {}
        for line in block.decode().split("\n"):
            name, _, value = line.partition(": ")
            assert name not in fields
            fields[name] = value
        if fields.get("event"):
            yield Event(fields["event"], fields.get("id"), orjson.loads(fields["data"]))


class Reader:
    """What a client makes of the events it got, over all its connections."""

    def __init__(self) -> None:
        self.text = ""
        self.last_id: str | None = None
        self.final: Event | None = None

    def take(self, stream: bytes) -> None:
        for event in events_in(stream):
            match event.name:
                case "delta":
                    self.text += event.data["text"]
                    assert event.data["seq"] == len(self.text)
                case "snapshot":
                    self.text = event.data["text"]
                    assert event.data["seq"] == len(self.text)
                case "done" | "failed":
                    self.final = event
            assert (event.id is None) == (event.name in ("accepted", "progress"))
            self.last_id = event.id or self.last_id


async def ended(running: Site, text: str) -> FakeChatReply:
    """A reply that has said this and ended."""
    running.conversations.on_send = lambda reply: (reply.say(text), reply.finish())
    async with running.client() as client:
        await client.post(await turns_path(client), json=TURN)
    (reply,) = running.conversations.replies.values()
    return reply


async def test_a_turns_stream_has_its_events_in_order(served: Site) -> None:
    def script(reply: FakeChatReply) -> None:
        reply.progress = [ReplyProgress(queued=2, prompt_tokens=9, computed=4)]

    served.conversations.on_send = script
    async with served.client() as client:
        async with client.stream("POST", await turns_path(client), json=TURN) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.headers["x-accel-buffering"] == "no"
            assert answer.headers["cache-control"] == "no-store"
            lines = answer.aiter_lines()
            while "progress" not in await anext(lines):
                pass
            (reply,) = served.conversations.replies.values()
            reply.say("one")
            while '"one"' not in await anext(lines):
                pass
            reply.say(" two")
            reply.finish()
            rest = [line async for line in lines]
        again = await client.post(f"/api/conversations/{reply.conversation}/turns", json=TURN)
    assert rest[-2].startswith("data: ")
    assert [(event.name, event.id) for event in events_in(again.content)] == [
        ("accepted", None),
        ("delta", "1-7"),
        ("done", "1-8"),
    ]
    accepted, delta, done = events_in(again.content)
    assert accepted.data == {"conversation": "c1", "turn": "t1", "reply": reply.id}
    assert delta.data == {"seq": 7, "text": "one two"}
    assert done.data == DONE


@pytest.mark.parametrize("cut", [None, 3])
async def test_tokens_are_told_where_they_are_counted(cut: int | None) -> None:
    delta = ReplyDelta(cursor=ReplyCursor(1, 7), text="one two", tokens=2)
    told = [shape(each)[2] for each in pieces(delta, cut or 100)]
    assert [each["tokens"] for each in told] == [2] * (3 if cut else 1)
    uncounted = shape(ReplyDelta(cursor=ReplyCursor(1, 7), text="one two"))[2]
    assert uncounted == {"seq": 7, "text": "one two"}


async def test_a_failed_reply_ends_with_its_reason(served: Site) -> None:
    data = {"code": "numerical_fault", "message": "NaN", "retry_after": None}
    served.conversations.on_send = lambda reply: (reply.say("a"), reply.finish("failed", data))
    async with served.client() as client:
        answer = await client.post(await turns_path(client), json=TURN)
    assert answer.status_code == 200
    *_, last = events_in(answer.content)
    assert (last.name, last.id, last.data) == ("failed", "1-2", data)


async def test_text_cannot_break_out_of_its_line(served: Site) -> None:
    await ended(served, NASTY)
    async with served.client() as client:
        answer = await client.post("/api/conversations/c1/turns", json=TURN)
    assert len(answer.text.splitlines()) == len(answer.content.split(b"\n")) - 1
    reader = Reader()
    reader.take(answer.content)
    assert reader.text == NASTY
    assert reader.final is not None


@pytest.mark.parametrize("kind", [ReplyDelta, ReplySnapshot])
def test_a_long_text_is_several_events_that_mean_the_same(
    kind: type[ReplyDelta] | type[ReplySnapshot],
) -> None:
    text = "".join(map(str, range(1_000)))
    event = kind(cursor=ReplyCursor(3, 5_000 if kind is ReplyDelta else len(text)), text=text)
    cut = list(pieces(event, 100))
    assert type(cut[0]) is kind
    assert {type(each) for each in cut[1:]} == {ReplyDelta}
    assert "".join(each.text for each in cut if not isinstance(each, ReplyProgress)) == text
    place = event.cursor.seq - len(text)
    for each in cut:
        assert isinstance(each, ReplyDelta | ReplySnapshot)
        assert len(each.text) <= 100
        place += len(each.text)
        assert each.cursor == ReplyCursor(3, place)
    assert list(pieces(event, len(text))) == [event]


async def test_a_long_reply_comes_in_small_frames_one_can_come_back_to(served: Site) -> None:
    reply = await ended(served, "é" * 100_000)
    reader = Reader()
    async with served.client() as client:
        answer = await client.get(f"/api/replies/{reply.id}/events?after=1-1")
        reader.text = "é"
        reader.take(answer.content)
        assert max(map(len, answer.content.split(b"\n\n"))) < 64 * 1024
        middle = next(event.id for event in events_in(answer.content) if event.id)
        answer = await client.get(f"/api/replies/{reply.id}/events?after={middle}")
    assert reader.text == reply.text
    again = Reader()
    again.text = "é" * int(middle.partition("-")[2])
    again.take(answer.content)
    assert again.text == reply.text


async def test_204_is_for_the_final_events_cursor_alone(served: Site) -> None:
    reply = await ended(served, "abc")
    path = f"/api/replies/{reply.id}/events"
    async with served.client() as client:
        got = {
            after: await client.get(path, headers={"Last-Event-ID": after})
            for after in ("1-0", "1-2", "1-3", "1-4", "1-5", "2-4")
        }
        assert [answer.status_code for answer in got.values()] == [200, 200, 200, 204, 200, 200]
        assert got["1-4"].content == b""
        names = {
            after: [event.name for event in events_in(answer.content)]
            for after, answer in got.items()
        }
        assert names["1-0"] == names["1-2"] == ["accepted", "delta", "done"]
        assert names["1-3"] == ["accepted", "done"]
        assert names["2-4"] == ["accepted", "snapshot", "done"]
    assert reply.viewed == 6, "the turn's own and five of these"


async def test_while_a_reply_runs_no_cursor_is_its_end(served: Site) -> None:
    served.conversations.on_send = lambda reply: reply.say("abc")
    async with served.client() as client:
        path = await turns_path(client)
        async with client.stream("POST", path, json=TURN):
            (reply,) = served.conversations.replies.values()
        events = f"/api/replies/{reply.id}/events?after=1-4"
        async with client.stream("GET", events) as answer:
            assert answer.status_code == 200
            reply.finish()
            await answer.aread()
        assert (await client.get(events)).status_code == 204


@pytest.mark.parametrize(
    "text",
    ["", "1", "1-", "-1", "0-1", "1-01", "1--1", "1-1-1", "a-1", "1-1 ", "1-" + "9" * 11, "١-1"],
)
async def test_a_malformed_cursor_is_refused(served: Site, text: str) -> None:
    reply = await ended(served, "abc")
    async with served.client() as client:
        path = f"/api/replies/{reply.id}/events"
        answer = await client.get(path, params={"after": text})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "after"
        if text.strip() == text and text.isascii():
            header = {"Last-Event-ID": text}
            assert (await client.get(path, headers=header)).status_code == 400


async def test_the_header_is_newer_than_the_query(served: Site) -> None:
    reply = await ended(served, "abc")
    async with served.client() as client:
        answer = await client.get(
            f"/api/replies/{reply.id}/events?after=1-0", headers={"Last-Event-ID": "1-4"}
        )
        assert answer.status_code == 204


async def test_text_that_a_crash_lost_is_replaced(served: Site) -> None:
    served.conversations.on_send = lambda reply: reply.say("abcdef")
    reader = Reader()
    async with served.client() as client:
        async with client.stream("POST", await turns_path(client), json=TURN) as answer:
            raw = answer.aiter_raw()
            stream = b""
            while b"abcdef" not in stream:
                stream += await anext(raw)
        reader.take(stream + b"\n\n")
        assert reader.text == "abcdef"
        (reply,) = served.conversations.replies.values()
        reply.crash(kept=3)
        reply.say("DEFG")
        reply.finish()
        events = f"/api/replies/{reply.id}/events"
        answer = await client.get(events, headers={"Last-Event-ID": str(reader.last_id)})
    reader.take(answer.content)
    assert reader.text == "abcDEFG"
    assert reader.last_id == "2-8"


async def test_a_reply_cut_anywhere_and_resumed_is_whole(served: Site) -> None:
    """At random bytes of the stream, while the reply goes on; 150 times."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    reader, cuts = Reader(), 0
    async with served.client() as client:
        path = (await turns_path(client)).removesuffix("/turns")
    body = orjson.dumps(TURN)
    request = (
        b"POST %s/turns HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (path.encode(), len(body), body)
    )
    said = ""
    while reader.final is None:
        source, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(request)
        await until(lambda: bool(served.conversations.replies))
        (reply,) = served.conversations.replies.values()
        received, wanted = b"", dice.randrange(1, 1_500)
        while cuts < 150 and len(received) < wanted:
            # Nothing of this has been read yet, so there is something to read.
            said += (word := dice.choice(["a", "é\n\n", NASTY, "data: x\n\n", "\u2028 "]))
            reply.say(word)
            received += await source.read(dice.randrange(1, wanted - len(received) + 1))
        if cuts == 150:
            reply.finish()
            received = await source.readuntil(b"\r\n0\r\n\r\n")
        await close(writer)
        reader.take(unchunked(received))
        cuts += 1
        last = b"" if reader.last_id is None else b"Last-Event-ID: %s\r\n" % reader.last_id.encode()
        request = b"GET /api/replies/%s/events HTTP/1.1\r\nHost: localhost\r\n%s\r\n" % (
            reply.id.encode(),
            last,
        )
    assert cuts > 100
    assert reader.text == said == reply.text
    assert reader.final.data == DONE
    await soon(reply.left)


def unchunked(stream: bytes) -> bytes:
    """The body so far of an answer that may have been cut anywhere."""
    _, _, rest = stream.partition(b"\r\n\r\n")
    body = b""
    while b"\r\n" in rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return body


# -- leaving


async def test_a_client_that_leaves_leaves_the_viewing_and_the_reply_goes_on(served: Site) -> None:
    served.conversations.on_send = lambda reply: reply.say("a")
    async with served.client() as client:
        path = await turns_path(client)
        async with client.stream("POST", path, json=TURN) as answer:
            await anext(answer.aiter_raw())
            (reply,) = served.conversations.replies.values()
            assert reply.viewers == 1
        await soon(reply.left)
        assert reply.end is None
        async with client.stream("GET", f"/api/replies/{reply.id}/events") as answer:
            await anext(answer.aiter_raw())
            assert reply.viewers == 1
        await soon(reply.left)
    await until(lambda: not served.server_state.tasks)


async def test_leaving_while_the_turn_is_being_accepted_is_passed_on(served: Site) -> None:
    served.conversations.hold = asyncio.Event()
    async with served.client() as client:
        path = await turns_path(client)
    body = orjson.dumps(TURN)
    _, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (path.encode(), len(body), body)
    )
    await soon(served.conversations.arrived)
    await close(writer)
    await soon(served.conversations.send_cancelled)
    await until(lambda: not served.server_state.tasks)
    assert not served.conversations.replies


async def test_a_client_that_never_reads_is_aborted_and_delays_nobody() -> None:
    async with site(quick(write_seconds=0.3)) as running:
        async with running.client() as client:
            path = await turns_path(client)
            async with client.stream("POST", path, json=TURN):
                (reply,) = running.conversations.replies.values()
        await soon(reply.left)
        _, stalled = await asyncio.open_connection("127.0.0.1", running.port, limit=1)
        stalled.transport.pause_reading()
        line = b"GET /api/replies/%s/events HTTP/1.1\r\nHost: localhost\r\n\r\n" % reply.id.encode()
        stalled.write(line)
        await until(lambda: reply.viewers == 1)
        (connection,) = running.server_state.connections
        while not connection.flow.write_paused:
            reply.say("x" * 8_000)
            await asyncio.sleep(0)
        assert connection.transport.get_write_buffer_size() <= 64 * 1024
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port, limit=2**24)
        writer.write(line)
        reply.say("for those who read")
        await reader.readuntil(b"for those who read")
        await until(lambda: reply.viewers == 1)
        reply.finish()
        assert b"event: done" in await reader.readuntil(b"done")
        await close(writer)
        stalled.transport.abort()
        await until(lambda: not running.server_state.tasks)


async def test_a_silent_stream_is_kept_alive_by_comments() -> None:
    async with site(quick(ping_seconds=0.02)) as running, running.client() as client:
        path = await turns_path(client)
        async with client.stream("POST", path, json=TURN) as answer:
            lines = answer.aiter_lines()
            while await anext(lines) != ": still here":
                pass
            (reply,) = running.conversations.replies.values()
            reply.finish()
            assert "event: done" in [line async for line in lines]


# -- what breaks


async def test_a_server_that_goes_away_ends_the_stream_without_a_final_event(served: Site) -> None:
    def script(reply: FakeChatReply) -> None:
        reply.say("abc")
        asyncio.get_running_loop().call_soon(reply.go_away)

    served.conversations.on_send = script
    async with served.client() as client:
        answer = await client.post(await turns_path(client), json=TURN)
    assert answer.status_code == 200
    assert next(events_in(answer.content)).name == "accepted"
    assert b"event: done" not in answer.content
    assert b"event: failed" not in answer.content


async def test_a_viewing_that_breaks_cuts_the_stream(served: Site) -> None:
    served.conversations.on_send = lambda reply: reply.say("abc")
    body = orjson.dumps(TURN)
    async with served.client() as client:
        path = await turns_path(client)
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (path.encode(), len(body), body)
    )
    await reader.readuntil(b'"abc"}\n\n')
    (reply,) = served.conversations.replies.values()
    reply.break_off(Unavailable("The store is away."))
    rest = await read_to_end(reader)
    assert b"0\r\n\r\n" not in rest, "the answer does not look complete"
    await close(writer)
    await soon(reply.left)


async def test_a_reply_is_stopped(served: Site) -> None:
    served.conversations.on_send = lambda reply: reply.say("abc")
    async with served.client() as client:
        async with client.stream("POST", await turns_path(client), json=TURN) as answer:
            pieces = answer.aiter_raw()
            await anext(pieces)
            (reply,) = served.conversations.replies
            assert (await client.delete(f"/api/replies/{reply}")).status_code == 204
            text = b"".join([piece async for piece in pieces])
        assert b"event: done" in text
        assert (await client.delete(f"/api/replies/{reply}")).status_code == 204
        assert (await client.delete("/api/replies/other")).status_code == 404
