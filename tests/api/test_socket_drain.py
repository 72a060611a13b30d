"""`/api/socket` when the server is asked to end: replies first, then 1001."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncGenerator

import pytest

from chatserve.api.server import Server, server_config
from chatserve.api.socket_connection import SocketConnection
from chatserve.errors import Unavailable
from tests.api.fake_conversations import FakeConversations
from tests.api.harness import (
    LIMITS,
    PATIENCE_SECONDS,
    FakeHealth,
    FakeService,
    Site,
    build,
    free_socket,
    quick,
    site,
    soon,
    until,
)
from tests.api.socket_peer import CLOSE, conversation, peer, reply_in, tab, text
from tests.api.test_socket_slow_peers import connection_to, fill, turn

REFUSED = Unavailable("The server is shutting down.", retry_after=2.0)


@pytest.fixture
async def served() -> AsyncGenerator[Site]:
    async with site() as running:
        yield running


def drain(running: Site) -> None:
    """What the server does at its first signal, and again at each tick."""
    running.health.draining = True
    running.conversations.refusal = REFUSED
    for _ in range(3):
        for connection in list(running.server_state.connections):
            if isinstance(connection, SocketConnection):
                connection.drain()


async def test_a_socket_without_replies_is_closed_at_once(served: Site) -> None:
    async with tab(served) as page:
        assert (await page.ask("ping"))["event"] == "pong"
        drain(served)
        code, reason = await page.closed_by_server()
    assert code == 1001
    assert "shutting down" in reason
    await until(lambda: not served.server_state.connections)
    await until(lambda: not served.server_state.tasks)


async def test_replies_under_way_are_seen_to_their_ends_and_nothing_new_begins(
    served: Site,
) -> None:
    names = [await conversation(served) for _ in range(3)]
    async with tab(served) as page:
        for name in names[:2]:
            await page.send_turn(name)
        first, second = [await reply_in(served, name) for name in names[:2]]
        drain(served)
        refused = await page.ask("send", conversation=names[2], id="t", content="x")
        assert (refused["event"], refused["code"]) == ("failed", "unavailable")
        assert refused["retry_after"] == 2.0
        assert (await page.ask("ping"))["event"] == "pong"
        first.say("abc")
        first.finish()
        assert (await page.hear_until("done"))[-1]["reply"] == first.id
        # Whoever lost the place finds it even now.
        await page.ask("attach", reply=first.id, after="1-1")
        assert [each["event"] for each in await page.hear_until("done")] == ["delta", "done"]
        await page.tell("stop", reply=second.id)
        last = await page.hear()
        assert (last["event"], last["finish_reason"]) == ("done", "stop_requested")
        assert (await page.closed_by_server())[0] == 1001
    assert len(served.conversations.replies) == 2


async def test_replies_that_end_with_the_server_leave_no_final_event(served: Site) -> None:
    """They are resumable: the client comes back with the last id that it saw."""
    name = await conversation(served)
    async with tab(served) as page:
        await page.send_turn(name)
        reply = await reply_in(served, name)
        reply.say("abc")
        await page.hear_until("delta")
        drain(served)
        reply.go_away()
        assert (await page.closed_by_server())[0] == 1001
    assert {each["event"] for each in page.unheard} <= {"changed"}
    await soon(reply.left)


async def test_a_turn_that_is_being_accepted_is_waited_for(served: Site) -> None:
    name = await conversation(served)
    served.conversations.hold = asyncio.Event()
    async with tab(served) as page:
        await page.tell("send", conversation=name, id="t1", content="x")
        await soon(served.conversations.arrived)
        served.health.draining = True
        for connection in served.server_state.connections:
            connection.drain()
        served.conversations.hold.set()
        assert (await page.hear())["event"] == "accepted"
        (await reply_in(served, name)).finish()
        assert (await page.hear())["event"] == "done"
        assert (await page.closed_by_server())[0] == 1001


async def test_a_stop_that_is_being_acted_on_is_waited_for(served: Site) -> None:
    served.conversations.stop_hold = asyncio.Event()
    async with tab(served) as page:
        request = await page.tell("stop", reply="c1.r1")
        await until(lambda: served.conversations.stopping == 1)
        drain(served)
        served.conversations.stop_hold.set()
        heard = await page.hear()
        assert (heard["request"], heard["code"]) == (request, "not_found")
        assert (await page.closed_by_server())[0] == 1001


async def test_frames_after_the_last_word_are_not_acted_on() -> None:
    async with site(quick(linger_seconds=PATIENCE_SECONDS)) as running:
        name = await conversation(running)
        async with peer(running) as client:
            await client.pong()
            drain(running)
            closing = await client.read_frame()
            assert (closing.opcode, closing.code) == (CLOSE, 1001)
            await client.send(turn(name), text({"type": "stop", "request": "r", "reply": "x"}))
            await until(lambda: not running.server_state.tasks)
        await until(lambda: not running.server_state.connections)
        assert not running.conversations.sent


async def test_who_does_not_answer_our_last_word_is_cut_off() -> None:
    async with site(quick(linger_seconds=0.05)) as running, peer(running) as client:
        drain(running)
        assert [each.code for each in await client.read_all()] == [1001]
        await until(lambda: not running.server_state.connections)


async def test_a_stalled_viewer_does_not_hold_up_the_end_for_longer_than_its_limit() -> None:
    limits = quick(write_seconds=0.4, socket_ping_seconds=3_600.0)
    async with site(limits) as running:
        name = await conversation(running)
        async with peer(running, stalled=True) as client:
            await client.send(turn(name))
            reply = await reply_in(running, name, "t")
            await fill(connection_to(running, client), reply)
            drain(running)
            reply.finish()
            await soon(reply.left)
            await until(lambda: not running.server_state.tasks)
            await until(lambda: not running.server_state.connections)


# -- the whole server


class Whole:
    """A server with its signals; its drain refuses new turns and ends viewings when it expires."""

    def __init__(self, shutdown_seconds: float) -> None:
        self.health, self.conversations = FakeHealth(), FakeConversations()
        app = build(FakeService(), self.health, conversations=self.conversations)
        self.server = Server(
            server_config(app, LIMITS), drain=self, shutdown_seconds=shutdown_seconds
        )
        self.sock = free_socket()
        self.expired = False

    @property
    def busy(self) -> bool:
        return False

    @property
    def socket_url(self) -> str:
        return f"ws://127.0.0.1:{self.sock.getsockname()[1]}/api/socket"

    def begin(self) -> None:
        self.health.draining = True
        self.conversations.refusal = REFUSED

    def expire(self) -> None:
        self.expired = True
        for reply in self.conversations.replies.values():
            reply.go_away()


@contextlib.asynccontextmanager
async def whole(shutdown_seconds: float) -> AsyncGenerator[Whole]:
    running = Whole(shutdown_seconds)
    running.sock.listen()
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(running.server.serve(sockets=[running.sock]))
        await until(lambda: running.server.started)
        yield running
        async with asyncio.timeout(PATIENCE_SECONDS):
            await serving


async def test_a_signal_closes_sockets_after_their_last_reply() -> None:
    async with whole(PATIENCE_SECONDS) as running:
        name = await conversation(running)
        async with tab(running) as page, tab(running) as idle:
            await page.send_turn(name)
            (reply,) = running.conversations.replies.values()
            running.server.handle_exit(signal.SIGTERM, None)
            assert (await idle.closed_by_server())[0] == 1001
            reply.say("abc")
            assert (await page.hear())["text"] == "abc"
            reply.finish()
            assert (await page.hear())["event"] == "done"
            assert (await page.closed_by_server())[0] == 1001


async def test_a_reply_that_is_too_long_ends_its_socket_with_1001_too() -> None:
    async with whole(0.1) as running:
        name = await conversation(running)
        async with tab(running) as page:
            await page.send_turn(name)
            (reply,) = running.conversations.replies.values()
            reply.say("abc")
            running.server.handle_exit(signal.SIGTERM, None)
            assert (await page.closed_by_server())[0] == 1001
        assert running.expired
        await soon(reply.left)


async def test_a_server_that_ends_without_a_drain_says_1001(served: Site) -> None:
    name = await conversation(served)
    async with tab(served) as page:
        await page.send_turn(name)
        reply = await reply_in(served, name)
        for connection in list(served.server_state.connections):
            connection.shutdown()
        assert (await page.closed_by_server())[0] == 1001
    await soon(reply.left)
    await until(lambda: not served.server_state.tasks)
