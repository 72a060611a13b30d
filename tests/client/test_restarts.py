"""The client and the terminal across restarts of a real server: kill -9, and a drain."""

import asyncio
import signal
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from chatserve.client import ChatClient, ClientLimits, Reply, Tree
from tests.terminal.pseudo_terminal import terminal
from tests.wiring.server import ENDLESS, Revived, reviving

TURN = "Tell me about pages."
SAMPLING = ENDLESS | {"max_tokens": 600, "temperature": 0.0}
LIMITS = ClientLimits(reconnect_seconds_first=0.05, reconnect_seconds_max=0.5)
RESTART_SECONDS_MAX = 180.0
# What is computed anew is rounded otherwise: in bfloat16 a near tie could go the other way.
OPTIONS = ["--dtype", "float32"]


@pytest.fixture
async def revived(tmp_path: Path) -> AsyncGenerator[Revived]:
    with reviving(tmp_path, OPTIONS) as made:
        await made.ready()
        yield made


async def spoken(reply: Reply, characters: int) -> None:
    async for _ in reply:
        if len(reply.text) >= characters:
            return


def check_kept(tree: Tree, reply: Reply) -> None:
    """What the client has is what the server keeps, once."""
    asked, answered = tree.turns
    assert (asked.id, asked.text) == (reply.ask, TURN)
    assert (answered.id, answered.text, answered.final) == (reply.id, reply.text, reply.final)
    assert tree.replies == ()


async def test_replies_outlive_a_killed_server(revived: Revived) -> None:
    url = revived.server.url
    async with asyncio.timeout(RESTART_SECONDS_MAX), ChatClient(url, limits=LIMITS) as client:
        undisturbed = client.send(await client.create(), TURN, **SAMPLING)
        await undisturbed.wait()
        conversations = [await client.create() for _ in range(3)]
        replies = [client.send(each, TURN, **SAMPLING) for each in conversations]
        await spoken(replies[0], 20)
        late = await client.create()
        revived.kill()
        # A turn that goes out to nobody: it is asked for again, by the same id.
        replies.append(client.send(late, TURN, **SAMPLING))
        conversations.append(late)
        revived.spawn()
        given = [text async for text in replies[0]]
        assert given
        for conversation, reply in zip(conversations, replies, strict=True):
            final = await reply.wait()
            assert reply.text == undisturbed.text
            assert final.usage.completion_tokens == SAMPLING["max_tokens"]
            check_kept(await client.open(conversation), reply)
        assert any(reply.cursor and reply.cursor.epoch == 2 for reply in replies)
    assert "Traceback" not in revived.logs()


async def test_a_drained_server_is_come_back_to(revived: Revived) -> None:
    url = revived.server.url
    async with asyncio.timeout(RESTART_SECONDS_MAX), ChatClient(url, limits=LIMITS) as client:
        conversation = await client.create()
        reply = client.send(conversation, TURN, **SAMPLING)
        await spoken(reply, 20)
        revived.server.process.send_signal(signal.SIGTERM)
        await reply.wait()  # a drain lets it end
        check_kept(await came_back(revived, client, conversation.id), reply)
        again = client.send(conversation, "And more?", **SAMPLING)
        final = await again.wait()
        assert final.usage.completion_tokens == SAMPLING["max_tokens"]


async def came_back(revived: Revived, client: ChatClient, conversation: str) -> Tree:
    assert await revived.terminated(60) == 0
    revived.spawn()
    await revived.ready()
    return await client.open(conversation)


async def test_the_terminal_survives_a_kill_in_mid_reply(revived: Revived, tmp_path: Path) -> None:
    async with ChatClient(revived.server.url) as client:
        conversation = await client.create(title="Pages", **SAMPLING)
    options = ("--conversation", conversation.id)
    async with terminal(revived.server.url, tmp_path, *options) as shown:
        await shown.shows("Pages")
        await shown.asks()
        shown.type(f"{TURN}\r")
        async with ChatClient(revived.server.url) as client:
            while not (replies := (await client.open(conversation)).replies):
                pass
            await spoken(client.attach(conversation, replies[0].id), 10)
        revived.kill()
        await shown.shows("Trying again")
        revived.spawn()
        await revived.ready()
        place = await shown.shows("computed · ")
        await shown.shows(f"{SAMPLING['max_tokens']} tokens", after=place)
        await shown.asks()
        shown.type("\x04")
        assert await shown.ends() == 0
        async with ChatClient(revived.server.url) as client:
            _, answered = (await client.open(conversation)).turns
        assert "".join(answered.text.split())[-12:] in shown.text
