"""A client that leaves ends its reply, wherever the request is at that moment."""

import asyncio

import orjson
import pytest

from chatserve.chat.values import Delta, SampleEnd
from tests.api.harness import (
    CHAT,
    PATIENCE_SECONDS,
    FakeReply,
    Site,
    close,
    done,
    quick,
    site,
    soon,
)


def post(body: dict[str, object], path: str = "/v1/chat/completions") -> bytes:
    content = orjson.dumps(body)
    return (
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (path.encode(), len(content), content)
    )


async def quiet(running: Site) -> None:
    """Every task of the server has ended."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while running.server_state.tasks:
            await asyncio.wait(set(running.server_state.tasks))


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_while_the_ask_is_being_opened_leaves_nothing_open(*, stream: bool) -> None:
    async with site() as running:
        running.service.hold = asyncio.Event()
        _, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(post(CHAT | {"stream": stream}))
        await soon(running.service.asked)
        await close(writer)
        await soon(running.service.open_cancelled)
        await quiet(running)
        assert not running.service.all_replies


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_before_the_first_token_leaves_the_reply(*, stream: bool) -> None:
    async with site() as running:
        running.service.script = lambda ask: []
        _, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(post(CHAT | {"stream": stream}))
        reply = await running.service.replies.get()
        await soon(reply.entered)
        await close(writer)
        await soon(reply.left)
        await quiet(running)


async def test_leaving_in_mid_stream_leaves_every_reply_of_the_request() -> None:
    async with site() as running:
        running.service.script = lambda ask: [Delta(sample=0, seq=1, text="a")]
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        body = {"model": CHAT["model"], "prompt": ["a", "b", "c"], "stream": True}
        writer.write(post(body, "/v1/completions"))
        for _ in range(3):
            await reader.readuntil(b'"text":"a"')
        await close(writer)
        replies = [await running.service.replies.get() for _ in range(3)]
        for reply in replies:
            await soon(reply.left)
        await quiet(running)


async def test_a_reset_connection_counts_as_leaving() -> None:
    async with site() as running:
        running.service.script = lambda ask: []
        _, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(post(CHAT))
        reply = await running.service.replies.get()
        await soon(reply.entered)
        writer.transport.abort()
        await soon(reply.left)
        await quiet(running)


async def test_leaving_after_pipelined_bytes_is_noticed() -> None:
    async with site() as running:
        running.service.script = lambda ask: []
        _, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(post(CHAT) + post(CHAT))
        reply = await running.service.replies.get()
        await soon(reply.entered)
        writer.write(b"x" * 100_000)
        await writer.drain()
        await close(writer)
        await soon(reply.left)
        await quiet(running)
        assert len(running.service.asks) == 1


async def stalled(running: Site) -> tuple[asyncio.StreamWriter, FakeReply]:
    """A client that asked for a stream and reads nothing, until the server's writes block."""
    _, writer = await asyncio.open_connection("127.0.0.1", running.port, limit=1)
    writer.transport.pause_reading()
    writer.write(post(CHAT | {"stream": True}))
    reply = await running.service.replies.get()
    await soon(reply.entered)
    return writer, reply


async def test_a_client_that_never_reads_is_aborted_and_holds_little() -> None:
    async with site(quick(write_seconds=0.3)) as running:
        running.service.script = lambda ask: []
        writer, reply = await stalled(running)
        (connection,) = running.server_state.connections
        sent = 0
        while not reply.left.is_set():
            reply.say(Delta(sample=0, seq=sent, text="x" * 8_000))
            sent += 8_000
            buffered = connection.transport.get_write_buffer_size()
            assert buffered <= 64 * 1024
            # Once the writer is blocked the mailbox only grows in this fake: stop there.
            if connection.flow.write_paused and buffered:
                break
            await asyncio.sleep(0)
        await soon(reply.left)
        await quiet(running)
        assert not running.server_state.connections
        writer.transport.abort()


async def test_leaving_while_blocked_in_send_leaves_the_reply() -> None:
    async with site() as running:
        running.service.script = lambda ask: []
        writer, reply = await stalled(running)
        (connection,) = running.server_state.connections
        while not connection.flow.write_paused:
            reply.say(Delta(sample=0, seq=0, text="x" * 8_000))
            await asyncio.sleep(0)
        writer.transport.abort()
        await soon(reply.left)
        await quiet(running)


async def test_a_slow_reader_of_a_large_answer_gets_all_of_it() -> None:
    async with site(quick(write_seconds=0.4)) as running:
        text = "x" * 3_000_000
        running.service.script = lambda ask: [
            Delta(sample=0, seq=len(text), text=text),
            SampleEnd(sample=0, finish_reason="stop"),
            done(ask),
        ]
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port, limit=16_384)
        began = asyncio.get_running_loop().time()
        writer.write(post(CHAT))
        received = 0
        while received < len(text):
            piece = await reader.read(65_536)
            assert piece
            received += len(piece)
            await asyncio.sleep(0.01)  # the slowness itself
        assert asyncio.get_running_loop().time() - began > 0.4
        await close(writer)
        await quiet(running)
