"""What goes over the wire, frame by frame, with a server that says what a test tells it to."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from chatserve.client import (
    BrokenProtocol,
    ChatClient,
    ClientLimits,
    Refused,
    Reply,
    ReplyWaiting,
    Unreachable,
)
from tests.api.harness import PATIENCE_SECONDS, until

QUICK = ClientLimits(
    reconnect_seconds_first=0.001,
    reconnect_seconds_max=0.01,
    outage_seconds_max=0.2,
    unsent_seconds_max=0.05,
    draft_seconds_min=0.2,
    reply_characters_max=100,
)
Frame = dict[str, Any]


class Script:
    """The server's side. `heard`: all frames of all connections; `sockets`: those connections."""

    def __init__(self) -> None:
        self.heard: list[Frame] = []
        self.sockets: list[ServerConnection] = []
        self.on_frame: Callable[[Frame], list[Mapping[str, object] | str] | None] = lambda _: []
        self.port = 0

    async def serve(self, socket: ServerConnection) -> None:
        self.sockets.append(socket)
        with contextlib.suppress(ConnectionClosed):
            async for message in socket:
                frame: Frame = json.loads(message)
                self.heard.append(frame)
                answers = self.on_frame(frame)
                if answers is None:
                    socket.transport.abort()
                for answer in answers or []:
                    await socket.send(answer if isinstance(answer, str) else json.dumps(answer))


@pytest.fixture
async def script() -> AsyncGenerator[Script]:
    script = Script()
    protocols = [Subprotocol("chatserve.v1")]
    async with serve(
        script.serve, "127.0.0.1", 0, subprotocols=protocols, max_size=1_000
    ) as server:
        script.port = next(iter(server.sockets)).getsockname()[1]
        yield script


@pytest.fixture
async def client(script: Script) -> AsyncGenerator[ChatClient]:
    url = f"http://127.0.0.1:{script.port}"
    async with asyncio.timeout(PATIENCE_SECONDS), ChatClient(url, limits=QUICK) as made:
        yield made


def accepted(frame: Frame) -> Frame:
    return {
        "event": "accepted",
        "request": frame["request"],
        "conversation": "c",
        "turn": "t",
        "reply": "c.r",
    }


def delta(seq: int, text: str, epoch: int = 1, kind: str = "delta") -> Frame:
    return {"event": kind, "id": f"{epoch}-{seq}", "reply": "c.r", "seq": seq, "text": text}


async def test_a_send_says_what_was_given_and_a_name_of_its_own(
    script: Script, client: ChatClient
) -> None:
    script.on_frame = lambda frame: [accepted(frame)]
    for reply in (
        client.send("c", "hello"),
        client.send("c", "hello", parent=None, temperature=0.5),
        client.regenerate("c", "t"),
    ):
        await reply.accepted()
        reply.close()
    sends = [frame for frame in script.heard if frame["type"] == "send"]
    bare = [{**frame, "id": "", "request": ""} for frame in sends]
    same = {"type": "send", "conversation": "c", "id": "", "request": ""}
    assert bare == [
        {**same, "content": "hello"},
        {**same, "content": "hello", "parent": None, "temperature": 0.5},
        {**same, "parent": "t"},
    ]
    assert len({frame["id"] for frame in sends}) == 3
    assert len({frame["request"] for frame in sends}) == 3


async def test_after_a_loss_the_same_send_and_then_the_cursor(
    script: Script, client: ChatClient
) -> None:
    steps = iter(["lose", "accept", "lose", "end"])

    def answer(frame: Frame) -> list[Mapping[str, object] | str] | None:
        match next(steps):
            case "accept":
                return [accepted(frame), delta(3, "one"), delta(5, " t", epoch=2), "close"]
            case "end":
                done = {"event": "done", "id": "2-6", "reply": "c.r", "finish_reason": "stop"}
                return [accepted(frame), done]
            case _:
                return None

    script.on_frame = answer
    reply = client.send("c", "hello")
    await reply.accepted()
    with pytest.raises(BrokenProtocol):  # "close" is no JSON
        await reply.wait()
    assert reply.text == "one t"

    script.on_frame = lambda frame: None if len(script.heard) < 5 else [accepted(frame)]
    attached = client.attach("c", "c.r")
    await attached.accepted()
    sends = [frame for frame in script.heard if frame["type"] == "send"]
    assert len(sends) == 2
    assert sends[0]["id"] == sends[1]["id"]
    assert [frame["type"] for frame in script.heard[2:]] == ["attach"] * 3


async def test_after_a_503_a_turn_may_have_been_kept_whatever_is_said_then(
    script: Script,
) -> None:
    """Neither the patience with what never went out nor a full queue ends it any more."""
    limits = ClientLimits(
        reconnect_seconds_first=0.001,
        reconnect_seconds_max=0.01,
        retry_after_seconds_max=0.001,
        unsent_seconds_max=0.0,
        outage_seconds_max=PATIENCE_SECONDS,
    )
    refusals = ["unavailable", "busy", "busy"]

    def answer(frame: Frame) -> list[Mapping[str, object] | str]:
        if len(script.heard) > len(refusals):
            return [accepted(frame)]
        code = refusals[len(script.heard) - 1]
        refusal = {"event": "failed", "request": frame["request"], "code": code, "message": "?"}
        return [refusal]

    script.on_frame = answer
    url = f"http://127.0.0.1:{script.port}"
    async with asyncio.timeout(PATIENCE_SECONDS), ChatClient(url, limits=limits) as client:
        reply = await client.send("c", "hello").accepted()
    assert reply.turn == "t"
    sends = script.heard[:4]
    assert [frame["type"] for frame in sends] == ["send"] * 4
    assert len({frame["id"] for frame in sends}) == 1


async def test_the_cursor_is_the_last_events(script: Script, client: ChatClient) -> None:
    def answer(frame: Frame) -> list[Mapping[str, object] | str] | None:
        match len(script.heard):
            case 1:
                return [accepted(frame), delta(3, "one"), delta(0, "", kind="snapshot", epoch=2)]
            case 2:
                done = {"event": "done", "id": "2-4", "reply": "c.r", "finish_reason": "stop"}
                return [accepted(frame), delta(3, "two", epoch=2), done]
            case _:
                raise AssertionError(frame)

    script.on_frame = answer
    reply = client.send("c", "hello")
    await until(lambda: reply.cursor is not None and reply.cursor.epoch == 2)
    script.sockets[0].transport.abort()
    await reply.wait()
    assert reply.text == "two"
    assert (script.heard[1]["type"], script.heard[1]["after"]) == ("attach", "2-0")


@pytest.mark.parametrize(
    "frames",
    [
        [delta(4, "one")],
        [delta(3, "one"), delta(3, "one")],
        [delta(3, "one"), delta(7, "two")],
        [delta(5, "one", kind="snapshot")],
        [{"event": "done", "id": "1-5", "reply": "c.r"}],
        [{"event": "delta", "id": "x", "reply": "c.r", "text": "a"}],
        [{"event": "delta", "id": "1-1", "reply": "c.r", "text": 3}],
        [{"event": "progress", "reply": "c.r", "queued": "many"}],
        [delta(101, "x" * 101)],
        [[]],
        ["not JSON"],
    ],
)
async def test_text_with_a_gap_or_frames_without_sense_end_the_reply(
    script: Script, client: ChatClient, frames: list[Any]
) -> None:
    script.on_frame = lambda frame: [
        accepted(frame),
        *(each if isinstance(each, str) else json.dumps(each) for each in frames),
    ]
    reply = client.send("c", "hello")
    with pytest.raises(BrokenProtocol):
        await reply.wait()
    assert reply.text in ("", "one"), "what does not follow is not shown"


async def test_frames_of_nobody_are_left_alone(script: Script, client: ChatClient) -> None:
    script.on_frame = lambda frame: [
        {"event": "changed", "conversation": "c", "revision": 3},
        {"event": "failed", "request": None, "code": "invalid_request", "message": "?"},
        {**delta(9, "not ours"), "reply": "c.other"},
        {"event": "of a newer server", "reply": "c.r"},
        accepted(frame),
        {"event": "also newer", "reply": "c.r"},
        {"event": "done", "id": "1-1", "reply": "c.r", "finish_reason": "stop"},
    ]
    await client.send("c", "hello").wait()


async def test_a_closed_reply_is_looked_at_no_more(script: Script, client: ChatClient) -> None:
    script.on_frame = lambda frame: [accepted(frame)]
    with client.send("c", "hello") as reply:
        await reply.accepted()
    reply.close()
    await until(lambda: len(script.heard) == 2)
    assert script.heard[1].pop("request")
    assert script.heard[1] == {"type": "detach", "reply": "c.r"}
    # Nothing is said twice, nor of a reply that nobody showed any more.
    done = {"event": "done", "id": "1-1", "reply": "c.r", "finish_reason": "stop"}
    script.on_frame = lambda frame: [accepted(frame), done]
    with client.attach("c", "c.r") as ended:
        await ended.wait()
    script.on_frame = lambda frame: [
        {"event": "failed", "request": frame["request"], "code": "not_found", "message": "?"}
    ]
    with client.attach("c", "c.r") as refused, pytest.raises(Refused):
        await refused.wait()
    client.focus("c")
    await until(lambda: script.heard[-1]["type"] == "focus")
    assert [frame["type"] for frame in script.heard] == [
        "send", "detach", "attach", "attach", "focus",
    ]  # fmt: skip


@pytest.mark.parametrize("answered", [True, False])
async def test_a_reply_closed_before_it_has_an_id_is_left_when_it_has(
    script: Script, client: ChatClient, answered: bool
) -> None:
    reply = client.send("c", "hello")
    await until(lambda: len(script.heard) == 1)
    reply.close()
    failed = {"event": "failed", "code": "busy", "message": "?"}
    request = script.heard[0]["request"]
    answer = accepted(script.heard[0]) if answered else {**failed, "request": request}
    await script.sockets[0].send(json.dumps(answer))
    if answered:
        await until(lambda: len(script.heard) == 2)
        assert (script.heard[1]["type"], script.heard[1]["reply"]) == ("detach", "c.r")
    client.focus("c")
    await until(lambda: script.heard[-1]["type"] == "focus")
    assert len(script.heard) == 2 + answered
    assert not reply.turn


async def test_a_text_that_makes_no_sense_is_left(script: Script, client: ChatClient) -> None:
    script.on_frame = lambda frame: [accepted(frame), delta(9, "gap")]
    with pytest.raises(BrokenProtocol):
        await client.send("c", "hello").wait()
    await until(lambda: script.heard[-1]["type"] == "detach")


async def test_of_two_looks_at_one_reply_the_newer_is_not_left(
    script: Script, client: ChatClient
) -> None:
    script.on_frame = lambda frame: [accepted(frame)]
    older, newer = client.send("c", "hello"), client.send("c", "hello")
    await newer.accepted()
    with pytest.raises(Refused):
        await older.wait()
    older.close()
    client.focus("c")
    await until(lambda: script.heard[-1]["type"] == "focus")
    assert [frame["type"] for frame in script.heard] == ["send", "send", "focus"]


async def test_drafts_merge_and_a_sent_turn_ends_them(script: Script, client: ChatClient) -> None:
    client.focus("c")
    client.draft("c", None, "h")
    await until(lambda: len(script.heard) == 2)
    for end in range(2, 6):
        client.draft("c", "t", "hello"[:end])
    await until(lambda: len(script.heard) == 3)
    client.draft("c", "t", "hello!")
    script.on_frame = lambda frame: [accepted(frame)]
    await client.send("c", "hello!").accepted()
    client.draft("d", None, "x" * (QUICK.draft_characters_max + 1))
    client.focus("d")
    await until(lambda: len(script.heard) == 5)
    for frame in script.heard:
        assert frame.pop("request")
    focus, first, merged, sent, other = script.heard
    assert focus == {"type": "focus", "conversation": "c"}
    assert first == {"type": "draft", "conversation": "c", "parent": None, "text": "h"}
    assert merged == {"type": "draft", "conversation": "c", "parent": "t", "text": "hello"}
    assert sent["type"] == "send"
    assert other == {"type": "focus", "conversation": "d"}


async def test_a_message_over_the_servers_limit_is_refused_alone(
    script: Script, client: ChatClient
) -> None:
    script.on_frame = lambda frame: [accepted(frame)]
    small = client.send("c", "hello")
    await small.accepted()
    large = client.send("d", "x" * 2_000)
    with pytest.raises(Refused) as caught:
        await large.wait()
    assert caught.value.status == 413
    await until(lambda: script.heard[-1]["type"] == "attach")
    assert not small.over


async def test_a_server_that_hangs_up_at_once_is_given_up(
    script: Script, client: ChatClient
) -> None:
    script.on_frame = lambda frame: None
    reply = client.send("c", "hello")
    events = [event async for event in _until_failed(reply)]
    assert any(isinstance(event, ReplyWaiting) and event.reason for event in events)
    with pytest.raises(Unreachable):
        await reply.wait()
    assert len({frame["id"] for frame in script.heard}) == 1


async def _until_failed(reply: Reply) -> AsyncGenerator[object]:
    with contextlib.suppress(Unreachable):
        async for event in reply.events():
            yield event


async def test_a_cancelled_wait_leaves_the_reply_as_it_is(
    script: Script, client: ChatClient
) -> None:
    reply = client.send("c", "hello")
    waits = [asyncio.ensure_future(each) for each in (reply.accepted(), reply.wait(), anext(reply))]
    await until(lambda: len(script.heard) == 1)
    for wait in waits:
        wait.cancel()
    await asyncio.wait(waits)
    frame = script.heard[0]
    for said in (
        accepted(frame),
        delta(3, "one"),
        {"event": "done", "id": "1-4", "reply": "c.r", "finish_reason": "stop"},
    ):
        await script.sockets[0].send(json.dumps(said))
    assert (await reply.wait()).finish_reason == "stop"
    assert [text async for text in reply] == ["one"]


async def test_a_server_without_the_subprotocol_is_none_of_ours() -> None:
    async def quiet(socket: ServerConnection) -> None:
        await socket.wait_closed()

    async with serve(quiet, "127.0.0.1", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        async with ChatClient(f"http://127.0.0.1:{port}", limits=QUICK) as client:
            with pytest.raises(BrokenProtocol):
                await client.send("c", "hello").wait()
