"""Viewers that read late, little, or never: what they cost, and that they are really gone."""

import asyncio
import contextlib
import gc
import os
import socket
from collections.abc import AsyncGenerator
from typing import Any

import orjson
import psutil
import pytest

from chatserve.api.outbox import Outbox
from chatserve.api.socket_connection import SocketConnection
from tests.api.fake_conversations import FakeChatReply
from tests.api.harness import PATIENCE_SECONDS, Site, quick, site, soon, until
from tests.api.socket_peer import (
    PING,
    RECEIVE_BUFFER_BYTES,
    TEXT,
    Peer,
    conversation,
    frame,
    peer,
    reply_in,
    tab,
    text,
)

# Never reached by a test that passes: who is aborted here is aborted for another reason.
PATIENT = quick(write_seconds=10 * PATIENCE_SECONDS, socket_ping_seconds=3_600.0)
# A stalled viewer is looked at after half of this, and gone then.
SHORT = quick(write_seconds=0.4, socket_ping_seconds=3_600.0)
KIB = 1024


def descriptors() -> int:
    return psutil.Process(os.getpid()).num_fds()


def turn(name: str, ask: str = "t") -> bytes:
    return text({"type": "send", "request": "r", "conversation": name, "id": ask, "content": "x"})


def connection_to(running: Site, client: Peer) -> SocketConnection:
    """The server's side of it."""
    return next(
        each
        for each in running.server_state.connections
        if isinstance(each, SocketConnection) and each.client == client.address
    )


async def fill(connection: SocketConnection, reply: FakeChatReply) -> None:
    """Let the reply talk until what it says waits in the server's process."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while connection.writable.is_set():
            reply.say("x" * 8_000)
            await asyncio.sleep(0)


# -- gone


@contextlib.asynccontextmanager
async def stalled_sse(running: Site, reply: FakeChatReply) -> AsyncGenerator[None]:
    """A viewer by SSE, of small buffers, that reads nothing."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_connect(sock, ("127.0.0.1", running.port))
        line = b"GET /api/replies/%s/events HTTP/1.1\r\nHost: localhost\r\n\r\n"
        await loop.sock_sendall(sock, line % reply.id.encode())
        yield
    finally:
        sock.close()


async def test_viewers_that_never_read_are_gone_and_the_others_go_on() -> None:
    """Task, descriptor and viewing, of twenty by each way, while two of each way read on."""
    count, limits = 20, SHORT
    async with site(limits) as running, contextlib.AsyncExitStack() as stack:
        name = await conversation(running)
        page = await stack.enter_async_context(tab(running))
        await page.send_turn(name)
        reply = await reply_in(running, name)
        client = await stack.enter_async_context(running.client())
        answer = await stack.enter_async_context(
            client.stream("GET", f"/api/replies/{reply.id}/events")
        )
        lines = answer.aiter_lines()
        await until(lambda: reply.viewers == 2)
        tasks, open_before = len(asyncio.all_tasks()), descriptors()
        async with contextlib.AsyncExitStack() as stalled:
            for _ in range(count):
                one = await stalled.enter_async_context(peer(running, stalled=True))
                await one.send(text({"type": "attach", "request": "r", "reply": reply.id}))
                await stalled.enter_async_context(stalled_sse(running, reply))
            await until(lambda: reply.viewers == 2 * count + 2)
            said = 0
            while reply.viewers > 2:  # until the last of them is gone, by the server's doing
                reply.say("x" * 4_000)
                said += 4_000
                while (await page.hear())["seq"] < said:
                    pass
                while f'"seq":{said},' not in await anext(lines):
                    pass
            await until(lambda: len(running.server_state.connections) == 2)
            await until(lambda: len(running.server_state.tasks) == 2)
            # The clients' own ends are still open: one descriptor each, and no server's.
            assert descriptors() <= open_before + 2 * count
        await until(lambda: len(asyncio.all_tasks()) == tasks)
        await until(lambda: descriptors() == open_before)
        reply.finish()
        await page.hear_until("done")
        assert [line async for line in lines][-2].startswith("data: ")
    await soon(reply.left)


@pytest.mark.parametrize("way", ["says nothing", "sends pings", "half-closes", "closes"])
async def test_a_stalled_socket_is_aborted_whatever_else_it_does(way: str) -> None:
    async with site(SHORT) as running:
        name = await conversation(running)
        async with peer(running, stalled=True) as client:
            await client.send(turn(name))
            reply = await reply_in(running, name, "t")
            connection = connection_to(running, client)
            await fill(connection, reply)
            match way:
                case "sends pings":
                    await client.send(frame(PING, b"x"))
                case "half-closes":
                    client.writer.write_eof()
                case "closes":
                    await client.send(frame(8, b"\x03\xe8"))
                case _:
                    pass
            await soon(reply.left)
            await until(lambda: not running.server_state.tasks)
            await until(lambda: not running.server_state.connections)
            assert reply.end is None
            assert running.conversations.listeners == 0


async def test_who_takes_a_little_is_no_dead_peer() -> None:
    """A line of 16 KiB and more in half of the limit is slow, and stays."""
    async with site(SHORT) as running:
        name = await conversation(running)
        async with peer(running, stalled=True) as client:
            await client.send(turn(name))
            reply = await reply_in(running, name, "t")
            await fill(connection_to(running, client), reply)
            reply.finish()
            client.go_on_reading()
            seq = 0
            while b'"event":"done"' not in (heard := await client.read_frame()).payload:
                seq = heard.fields.get("seq", seq)
            assert seq == len(reply.text)


async def test_pongs_that_nobody_reads_end_the_connection() -> None:
    async with site(PATIENT) as running, peer(running, stalled=True) as client:
        connection, most = connection_to(running, client), 0
        flood = b"".join(frame(PING, b"x" * 125) for _ in range(20))
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not client.writer.transport.is_closing():
                    await client.send(flood)
                    most = max(most, connection.transport.get_write_buffer_size())
        # The pongs of what one read of the loop gives are written together.
        assert most <= PATIENT.socket_waiting_bytes_max + 256 * KIB
        await until(lambda: not running.server_state.connections)
        await until(lambda: not running.server_state.tasks)


async def test_answers_that_nobody_reads_end_the_connection() -> None:
    async with site(SHORT) as running, peer(running, stalled=True) as client:
        ask = text({"type": "ping", "request": "r" * 60})
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not client.writer.transport.is_closing():
                    await client.send(ask * 20)
        await until(lambda: not running.server_state.connections)
        await until(lambda: not running.server_state.tasks)


# -- late


async def test_a_slow_reader_gets_the_whole_text_in_few_frames_of_bounded_size() -> None:
    async with site(PATIENT) as running:
        name = await conversation(running)
        async with peer(running, stalled=True) as client:
            await client.send(turn(name))
            reply = await reply_in(running, name, "t")
            connection = connection_to(running, client)
            await fill(connection, reply)
            deltas = 0
            for number in range(5_000):
                reply.say(f"{number} é\U0001f600\x01 " * 10)
                deltas += 1
                if number % 100 == 0:
                    await asyncio.sleep(0)
                    waiting = connection.transport.get_write_buffer_size()
                    assert waiting <= PATIENT.socket_waiting_bytes_max
            reply.finish()
            client.go_on_reading()
            said, frames = "", 0
            while (heard := (await client.read_frame())).fields["event"] != "done":
                assert len(heard.payload) < 64 * KIB
                if heard.fields["event"] == "delta":
                    said += heard.fields["text"]
                    frames += 1
                    assert heard.fields["seq"] == len(said)
            assert said == reply.text
            assert frames < deltas / 20
        await soon(reply.left)


async def test_a_slow_socket_holds_a_frame_for_each_viewing_and_no_more() -> None:
    """Bytes in the process while 30 replies talk to a socket that reads none of it."""
    older = outboxes()  # of sockets that have gone, and that some traceback still holds
    async with site(PATIENT) as running:
        names = [await conversation(running) for _ in range(30)]
        async with peer(running, stalled=True) as client:
            for name in names:
                await client.send(turn(name))
            replies = [await reply_in(running, name, "t") for name in names]
            connection = connection_to(running, client)
            await fill(connection, replies[0])
            (held,) = (each for each in outboxes() if each not in older)
            for _ in range(200):
                for reply in replies:
                    reply.say("é" * 1_000)
                await asyncio.sleep(0)
            # The replies' own texts are 30 × 200,000 code points; here wait a frame of each.
            frames = [frame.encode() for frame, _ in held._frames]
            deltas = [each for each in frames if b'"delta"' in each]
            assert len(deltas) <= len(replies)
            assert max(map(len, frames)) < 64 * KIB
            for reply in replies:
                reply.finish()
            client.go_on_reading()
            texts, ended = dict.fromkeys(names, ""), 0
            while ended < len(names):
                heard = (await client.read_frame()).fields
                if heard["event"] == "delta":
                    texts[heard["conversation"]] += heard["text"]
                ended += heard["event"] == "done"
            assert [texts[name] for name in names] == [reply.text for reply in replies]


def outboxes() -> list[Outbox]:
    return [each for each in gc.get_objects() if type(each) is Outbox]


# -- a reader that always reads


async def test_a_stop_arrives_while_nothing_can_be_written() -> None:
    async with site(PATIENT) as running:
        name = await conversation(running)
        async with peer(running, stalled=True) as client:
            await client.send(turn(name))
            reply = await reply_in(running, name, "t")
            await fill(connection_to(running, client), reply)
            await client.send(text({"type": "stop", "request": "s", "reply": reply.id}))
            await until(lambda: reply.final is not None)
            client.go_on_reading()
            while (heard := (await client.read_frame()).fields)["event"] != "done":
                pass
            assert heard["finish_reason"] == "stop_requested"
            assert heard["id"] == str(reply.end)


async def test_a_close_and_a_reset_arrive_while_nothing_can_be_written() -> None:
    async with site(PATIENT) as running:
        for way in ("close", "reset"):
            name = await conversation(running)
            async with peer(running, stalled=True) as client:
                await client.send(turn(name))
                reply = await reply_in(running, name, "t")
                await fill(connection_to(running, client), reply)
                if way == "close":
                    await client.send(frame(8, b"\x03\xe8"))
                    await soon(reply.left)
            await soon(reply.left)
            await until(lambda: not running.server_state.tasks)
            await until(lambda: not running.server_state.connections)


async def test_a_client_that_sends_much_while_it_is_sent_much_loses_nothing() -> None:
    """Frames of both directions cross; the client reads as it goes, and all is answered."""
    async with site(PATIENT) as running:
        name = await conversation(running)
        async with peer(running) as client:
            await client.send(turn(name))
            reply = await reply_in(running, name, "t")
            padding = b" " * 20_000
            pongs, said, asked = 0, "", 300

            async def talk() -> None:
                for number in range(asked):
                    reply.say(f"{number} " + "y" * 5_000)
                    await client.send(
                        frame(
                            TEXT,
                            orjson.dumps({"type": "ping", "request": str(number)}) + padding,
                        )
                    )
                reply.finish()

            async with asyncio.TaskGroup() as group:
                group.create_task(talk())
                ended = False
                while not ended or pongs < asked:
                    heard = (await client.read_frame()).fields
                    match heard["event"]:
                        case "pong":
                            assert heard["request"] == str(pongs)
                            pongs += 1
                        case "delta":
                            said += heard["text"]
                        case "done":
                            ended = True
                        case other:
                            assert other in ("accepted", "changed")
            assert said == reply.text


# -- the outbox


async def test_a_limit_on_answers_sends_away_who_reads_none_of_them() -> None:
    outbox = Outbox(2)
    written: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        written.append(message)

    for said in "abc":
        outbox.post(said)
    assert outbox.finished
    outbox.post("d")
    await outbox.write(send)
    assert [message.get("text") for message in written] == ["a", "b", None]
    assert written[-1]["code"] == 1008


async def test_a_frame_whose_source_has_gone_is_not_written() -> None:
    outbox = Outbox(2)
    written: list[str | None] = []

    async def send(message: Any) -> None:
        written.append(message.get("text"))

    source = asyncio.create_task(outbox.put("withdrawn"))
    await asyncio.sleep(0)
    outbox.post("kept")
    source.cancel()
    await asyncio.gather(source, return_exceptions=True)
    outbox.finish(1000, "")
    await outbox.write(send)
    assert written == ["kept", None]
