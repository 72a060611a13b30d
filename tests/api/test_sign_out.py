"""Signing out ends what goes on under that sign-in, and nothing else."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from chatserve.api.keys import key_ring
from chatserve.api.session import COOKIE_NAME, Sessions
from chatserve.api.signed_in import SIGNED_OUT, SignedIn
from tests.api.fake_conversations import FakeChatReply
from tests.api.harness import CHAT, PATIENCE_SECONDS, Site, site, soon, until
from tests.api.socket_peer import Tab, conversation, reply_in, tab

KEY = "bob-key-0123456789"


@pytest.fixture
async def keyed(tmp_path: Any) -> AsyncGenerator[Site]:
    path = tmp_path / "keys.toml"
    path.write_text(f'[[keys]]\nname = "bob"\nkey = "{KEY}"\n')
    async with site(keys=key_ring(key_file=path)) as running:
        yield running


async def signed_in(keyed: Site) -> dict[str, str]:
    """The head of whoever has just signed in."""
    async with keyed.client() as client:
        answer = await client.post("/api/session", json={"key": KEY})
        return {"Cookie": f"{COOKIE_NAME}={answer.cookies[COOKIE_NAME]}"}


async def sign_out(keyed: Site, head: dict[str, str]) -> None:
    async with keyed.client(headers=head) as client:
        assert (await client.delete("/api/session")).status_code == 204


async def begun(keyed: Site, page: Tab) -> FakeChatReply:
    """A reply that goes on, of which something was heard."""
    name = await conversation(keyed, "bob")
    await page.send_turn(name)
    reply = await reply_in(keyed, name)
    reply.say("abc")
    assert (await page.hear())["text"] == "abc"
    return reply


async def test_a_socket_ends_with_its_sign_in_and_its_replies_go_on(keyed: Site) -> None:
    head = await signed_in(keyed)
    async with tab(keyed, additional_headers=head) as page:
        reply = await begun(keyed, page)
        await sign_out(keyed, head)
        assert await page.closed_by_server() == (SIGNED_OUT, "Signed out.")
    await soon(reply.left)
    await until(lambda: keyed.conversations.listeners == 0)
    assert reply.final is None
    with pytest.raises(Exception, match="401"):
        async with tab(keyed, additional_headers=head):
            pass


async def test_other_sign_ins_and_the_key_itself_go_on(keyed: Site) -> None:
    ended = await signed_in(keyed)
    heads = [await signed_in(keyed), {"Authorization": f"Bearer {KEY}"}]
    # Whoever shows a key is admitted by that, whatever cookie comes with it.
    heads.append(ended | heads[-1])
    for head in heads:
        async with tab(keyed, additional_headers=head) as page:
            reply = await begun(keyed, page)
            await sign_out(keyed, ended)
            reply.say("d")
            assert (await page.hear())["text"] == "d"


async def events_until_the_end(answer: httpx.Response) -> bytes:
    async with asyncio.timeout(PATIENCE_SECONDS):
        return b"".join([piece async for piece in answer.aiter_raw()])


@pytest.mark.parametrize("coming_back", [False, True])
async def test_a_chats_events_end_with_the_sign_in(
    keyed: Site, coming_back: bool, caplog: pytest.LogCaptureFixture
) -> None:
    head = await signed_in(keyed)
    async with keyed.client(headers=head) as client:
        name = await conversation(keyed, "bob")
        path = f"/api/conversations/{name}/turns"
        turn = {"id": "t1", "content": "x"}
        async with client.stream("POST", path, json=turn) as first:
            reply = await reply_in(keyed, name)
            reply.say("abc")
            await soon(reply.seen)
            if coming_back:
                events = f"/api/replies/{reply.id}/events"
                async with client.stream("GET", events) as second:
                    await sign_out(keyed, head)
                    await events_until_the_end(second)
            else:
                await sign_out(keyed, head)
            # A whole answer by the rules of HTTP, with no final event.
            said = await events_until_the_end(first)
            assert b"event: accepted" in said
            assert b"event: done" not in said
        await soon(reply.left)
        assert (await client.get(f"/api/replies/{reply.id}/events")).status_code == 401
    assert reply.final is None
    assert not [line for line in caplog.records if line.levelname in ("WARNING", "ERROR")]


async def test_a_completions_stream_ends_with_the_sign_in(keyed: Site) -> None:
    keyed.service.script = lambda ask: []
    head = await signed_in(keyed)
    async with (
        keyed.client(headers=head) as client,
        client.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as answer,
    ):
        reply = await keyed.service.replies.get()
        await soon(reply.entered)
        await sign_out(keyed, head)
        await events_until_the_end(answer)
        await soon(reply.left)


async def test_an_answer_in_one_piece_is_still_given(keyed: Site) -> None:
    keyed.service.hold = asyncio.Event()
    head = await signed_in(keyed)
    async with keyed.client(headers=head) as client, asyncio.TaskGroup() as group:
        asked = group.create_task(client.post("/v1/chat/completions", json=CHAT))
        await soon(keyed.service.asked)
        await sign_out(keyed, head)
        keyed.service.hold.set()
        assert (await asked).status_code == 200


async def test_a_stream_that_begins_after_the_sign_out_ends_at_once(keyed: Site) -> None:
    keyed.conversations.hold = asyncio.Event()
    head = await signed_in(keyed)
    async with keyed.client(headers=head) as client, asyncio.TaskGroup() as group:
        name = await conversation(keyed, "bob")
        path = f"/api/conversations/{name}/turns"
        asked = group.create_task(client.post(path, json={"id": "t1", "content": "x"}))
        await soon(keyed.conversations.arrived)
        await sign_out(keyed, head)
        keyed.conversations.hold.set()
        answer = await asked
        assert answer.status_code == 200
        assert b"done" not in answer.content
        reply = await reply_in(keyed, name)
        await soon(reply.left)


EVENTS = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "http",
            [
                EVENTS,
                {"type": "http.response.body", "body": b"x", "more_body": True},
                {"type": "http.response.body", "body": b"", "more_body": False},
            ],
        ),
        # The last piece need not say that it is the last.
        ("http", [EVENTS, {"type": "http.response.body", "body": b"x"}]),
        (
            "websocket",
            [{"type": "websocket.accept"}, {"type": "websocket.close", "code": 1000}],
        ),
    ],
)
async def test_what_was_over_before_the_sign_out_gets_no_second_end(
    kind: str, said: list[Message]
) -> None:
    ring = key_ring(api_key=KEY)
    holder = ring.find(KEY)
    assert holder is not None
    sessions = Sessions(bytes(32), ring, seconds=60, ended_max=1)
    cookie = sessions.issue(holder)
    sent: list[Message] = []
    over, signed_out, tidied = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in said:
            await send(message)
        over.set()
        await signed_out.wait()
        tidied.set()

    async def receive() -> Message:
        raise AssertionError("nobody asks for more")

    async def send(message: Message) -> None:
        sent.append(message)

    async with asyncio.TaskGroup() as group:
        group.create_task(SignedIn(send, sessions, cookie).run(app, {"type": kind}, receive))
        await soon(over)
        sessions.end(cookie)
        assert sessions.find(cookie) is None
        signed_out.set()
        await soon(tidied)
    assert sent == said
