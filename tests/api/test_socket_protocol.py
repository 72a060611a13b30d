"""`/api/socket`: frames as RFC 6455 has them, and every way to get them wrong."""

import asyncio
import os
from collections.abc import AsyncGenerator

import pytest

from chatserve.api.limits import Limits
from chatserve.api.socket_connection import SocketConnection
from tests.api.harness import PATIENCE_SECONDS, Site, quick, site, soon, until
from tests.api.socket_peer import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    Frame,
    conversation,
    frame,
    peer,
    reply_in,
    text,
)

ASK = b'{"type":"ping","request":"r"}'
ANSWER = {"event": "pong", "request": "r"}
LIMIT = quick().body_bytes_max


@pytest.fixture
async def served() -> AsyncGenerator[Site]:
    async with site() as running:
        yield running


def connection_of(running: Site) -> SocketConnection:
    """The server's side of the only connection."""
    (connection,) = running.server_state.connections
    assert isinstance(connection, SocketConnection)
    return connection


async def gone(running: Site) -> None:
    """Nothing of any connection is left in the server."""
    await until(lambda: not running.server_state.tasks)
    await until(lambda: not running.server_state.connections)
    assert running.conversations.listeners == running.conversations.viewers == 0


# -- what is allowed


@pytest.mark.parametrize("cuts", [1, 2, 7, len(ASK)])
async def test_a_message_in_fragments_is_one_message(served: Site, cuts: int) -> None:
    size = -(-len(ASK) // cuts)
    parts = [ASK[place : place + size] for place in range(0, len(ASK), size)]
    frames = [
        frame(CONTINUATION if place else TEXT, part, fin=place == len(parts) - 1)
        for place, part in enumerate(parts)
    ]
    async with peer(served) as client:
        await client.send(*frames)
        assert (await client.read_frame()).fields == ANSWER
        await client.send(b"".join(frames))
        assert (await client.read_frame()).fields == ANSWER
        await client.send(frame(TEXT, fin=False), frame(CONTINUATION, ASK, fin=False))
        await client.send(frame(CONTINUATION, fin=False), frame(CONTINUATION))
        assert (await client.read_frame()).fields == ANSWER


async def test_frames_in_single_bytes_are_frames(served: Site) -> None:
    async with peer(served) as client:
        for byte in frame(TEXT, ASK):
            await client.send(bytes([byte]))
        assert (await client.read_frame()).fields == ANSWER
        for byte in frame(PING, b"x" * 125):
            await client.send(bytes([byte]))
        assert await client.read_frame() == Frame(PONG, b"x" * 125)


async def test_control_frames_may_stand_between_fragments(served: Site) -> None:
    async with peer(served) as client:
        await client.send(
            frame(TEXT, ASK[:9], fin=False),
            frame(PING, b"1"),
            frame(CONTINUATION, ASK[9:12], fin=False),
            frame(PONG, b"nobody asked"),
            frame(PING, b""),
            frame(CONTINUATION, ASK[12:]),
        )
        assert await client.read_frame() == Frame(PONG, b"1")
        assert await client.read_frame() == Frame(PONG, b"")
        assert (await client.read_frame()).fields == ANSWER


async def test_a_code_point_may_be_cut_by_frames(served: Site) -> None:
    ask = '{"type":"ping","request":"é\U0001f600"}'.encode()
    async with peer(served) as client:
        for place in range(1, len(ask)):
            await client.send(frame(TEXT, ask[:place], fin=False), frame(CONTINUATION, ask[place:]))
            assert (await client.read_frame()).fields["request"] == "é\U0001f600"


@pytest.mark.parametrize("code", [b"", 1000, 1001, 1003, 1007, 1011, 3000, 4999])
async def test_a_closing_word_is_returned(served: Site, code: int | bytes) -> None:
    word = code if isinstance(code, bytes) else code.to_bytes(2, "big") + "é".encode()
    async with peer(served) as client:
        await client.send(frame(CLOSE, word), text({"type": "ping", "request": "late"}))
        assert await client.read_all() == [Frame(CLOSE, word)], "what comes after it is dropped"
        await gone(served)


async def test_pings_that_are_read_are_no_flood(served: Site) -> None:
    async with peer(served) as client:
        for _ in range(100):
            await client.send(b"".join(frame(PING, bytes([number]) * 125) for number in range(100)))
            for number in range(100):
                assert await client.read_frame() == Frame(PONG, bytes([number]) * 125)


# -- what is not

_LONG = b"\x81\xff" + (1 << 63).to_bytes(8, "big") + b"mask"
FAULTS: dict[str, tuple[bytes, int]] = {
    "no mask": (frame(TEXT, ASK, masked=False), 1002),
    "no mask on a ping": (frame(PING, masked=False), 1002),
    **{f"reserved bits {bits}": (frame(TEXT, ASK, reserved=bits), 1002) for bits in (1, 2, 4, 7)},
    "reserved bits of a ping": (frame(PING, reserved=4), 1002),
    **{f"opcode {opcode}": (frame(opcode), 1002) for opcode in (3, 4, 5, 6, 7, 11, 12, 15)},
    "a large ping": (frame(PING, b"x" * 126), 1002),
    "a large pong": (frame(PONG, b"x" * 126), 1002),
    "a large close": (frame(CLOSE, b"\x03\xe8" + b"x" * 124), 1002),
    "half a ping": (frame(PING, fin=False), 1002),
    "half a close": (frame(CLOSE, fin=False), 1002),
    "the end of nothing": (frame(CONTINUATION, ASK), 1002),
    "the middle of nothing": (frame(CONTINUATION, ASK, fin=False), 1002),
    "a message in a message": (frame(TEXT, ASK[:3], fin=False) + frame(TEXT, ASK), 1002),
    "a close in a message": (frame(TEXT, ASK[:3], fin=False) + frame(CLOSE), 1002),
    "one byte of a code": (frame(CLOSE, b"\x03"), 1002),
    **{
        f"code {code}": (frame(CLOSE, code.to_bytes(2, "big")), 1002)
        for code in (0, 999, 1004, 1005, 1006, 1015, 2000, 2999, 5000, 65535)
    },
    "a reason that is no UTF-8": (frame(CLOSE, b"\x03\xe8\xff\xfe"), 1007),
    "binary": (frame(BINARY, ASK), 1003),
    "binary in fragments": (frame(BINARY, ASK, fin=False) + frame(CONTINUATION, fin=False), 1003),
    **{
        f"text that is no UTF-8: {bad.hex()}": (frame(TEXT, b'{"type":"' + bad + b'"}'), 1007)
        for bad in (b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82")
    },
    "a code point without its end": (frame(TEXT, b"\xe2", fin=False) + frame(CONTINUATION), 1007),
    "a message over the limit": (frame(TEXT, b" " * (LIMIT + 1)), 1009),
    "the head of one": (frame(TEXT, b" " * (LIMIT + 1))[:14], 1009),
    "a length of 63 bits": (_LONG, 1009),
    "fragments over the limit": (
        frame(TEXT, b" " * LIMIT, fin=False) + frame(CONTINUATION, b"x"),
        1009,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_ends_the_connection_with_its_code(served: Site, name: str) -> None:
    """Whatever comes behind it."""
    sent, code = FAULTS[name]
    later = frame(PING, b"later")
    for pieces in ([sent + later], [sent[:1], sent[1:], later]):
        async with peer(served) as client, peer(served) as other:
            await client.send(frame(TEXT, ASK))
            assert (await client.read_frame()).fields == ANSWER
            sending = asyncio.create_task(client.send(*pieces))
            # The library reads on to the end of what came with it, and may answer a ping there.
            heard = [each for each in await client.read_all() if each.opcode != PONG]
            assert [each.code for each in heard] == [code]
            await asyncio.gather(sending, return_exceptions=True)
            await other.pong()
        await gone(served)


async def test_what_came_before_a_fault_was_said(served: Site) -> None:
    """However it was cut into pieces on its way: the stop counts."""
    name = await conversation(served)
    async with peer(served) as client:
        turn = {"type": "send", "request": "r", "conversation": name, "id": "t", "content": "x"}
        await client.send(text(turn))
        reply = await reply_in(served, name, "t")
        await until(lambda: reply.viewers == 1)
        stop = {"type": "stop", "request": "r", "reply": reply.id}
        await client.send(frame(PING) + text(stop) + frame(3))
        assert await client.close_code() == 1002
    await gone(served)
    assert reply.final is not None


async def test_noise_ends_the_connection_and_no_other(served: Site) -> None:
    """Random bytes, 200 times; the seed is the bytes themselves."""
    async with peer(served) as other:
        for _ in range(200):
            noise = os.urandom(64)
            async with peer(served) as client:
                await client.send(noise)
                client.writer.write_eof()
                frames = await client.read_all()
            assert all(each.opcode in (CLOSE, PONG) for each in frames), noise.hex()
        await other.pong()
    await gone(served)


# -- limits of messages


async def test_a_message_of_exactly_the_limit_is_taken(served: Site) -> None:
    async with peer(served) as client:
        padded = ASK + b" " * (LIMIT - len(ASK))
        await client.send(frame(TEXT, padded))
        assert (await client.read_frame()).fields == ANSWER
        half = LIMIT // 2
        await client.send(frame(TEXT, padded[:half], fin=False), frame(CONTINUATION, padded[half:]))
        assert (await client.read_frame()).fields == ANSWER


async def test_messages_under_way_share_one_budget() -> None:
    async with site(quick(bodies_max=1)) as running:
        part = frame(TEXT, b" " * (LIMIT * 6 // 10), fin=False)
        async with peer(running) as one:
            await one.send(part)
            budget = connection_of(running)._budget
            await until(lambda: budget.bytes_held >= LIMIT * 6 // 10)
            async with peer(running) as two:
                await two.send(part)
                assert await two.close_code() == 1013
            await until(lambda: len(running.server_state.connections) == 1)
            await one.send(frame(CONTINUATION, ASK))
            assert (await one.read_frame()).fields == ANSWER
            assert budget.bytes_held == 0, "a whole message is the app's"
            await one.send(part)
            await until(lambda: budget.bytes_held > 0)
        await gone(running)
        assert budget.bytes_held == 0
        async with peer(running) as three:
            await three.send(part, frame(CONTINUATION, ASK))
            assert (await three.read_frame()).fields == ANSWER


@pytest.mark.parametrize(
    "part",
    [frame(TEXT, ASK)[:1], frame(TEXT, ASK)[:-1], frame(TEXT, ASK[:5], fin=False)],
    ids=["a byte", "all but a byte", "a fragment"],
)
async def test_a_message_that_does_not_end_is_cut_off(part: bytes) -> None:
    async with site(quick(body_seconds=0.05)) as running:
        async with peer(running) as client:
            await client.send(part)
            assert await client.close_code() == 1008
        await gone(running)


async def test_a_messages_time_begins_with_its_own_first_byte(served: Site) -> None:
    """Who sends one after the other, cut anywhere, is never too slow."""
    half = len(frame(TEXT, ASK)) // 2
    async with peer(served) as client:
        connection = connection_of(served)
        seen: list[asyncio.TimerHandle] = []
        for opcode in (TEXT, PING, TEXT, TEXT, PING):
            whole = frame(opcode, ASK)
            if not seen:
                await client.send(whole[:half])
            else:
                await client.send(whole[:half])
                await client.read_frame()
            await until(lambda: connection._message_deadline not in (None, *seen[-1:]))
            assert connection._message_deadline is not None
            seen.append(connection._message_deadline)
            # The next one's first half comes with this one's second half.
            client.writer.write(whole[half:])
        assert all(timer.cancelled() for timer in seen[:-1])


async def test_fragments_and_pings_do_not_renew_a_messages_time(served: Site) -> None:
    async with peer(served) as client:
        connection = connection_of(served)
        await client.send(frame(TEXT, ASK[:3], fin=False))
        await until(lambda: connection._message_deadline is not None)
        first = connection._message_deadline
        for place in range(3, 9):
            await client.send(frame(CONTINUATION, ASK[place : place + 1], fin=False))
            await client.pong()
            assert connection._message_deadline is first
        await client.send(frame(CONTINUATION, ASK[9:]))
        assert (await client.read_frame()).fields == ANSWER
        assert connection._message_deadline is None


# -- heartbeat


def beating(pong_seconds: float) -> Limits:
    return quick(socket_ping_seconds=0.02, socket_pong_seconds=pong_seconds)


@pytest.mark.parametrize("answer", [None, b"", b"0000"])
async def test_a_peer_that_does_not_answer_our_pings_is_aborted(answer: bytes | None) -> None:
    async with site(beating(0.1)) as running:
        name = await conversation(running)
        async with peer(running) as client:
            await client.send(
                text(
                    {
                        "type": "send",
                        "request": "r",
                        "conversation": name,
                        "id": "t",
                        "content": "x",
                    }
                )
            )
            reply = await reply_in(running, name, "t")
            while (await client.read_frame()).opcode != PING:
                pass
            if answer is not None:
                await client.send(frame(PONG, answer))
            assert all(each.opcode != CLOSE for each in await client.read_all())
            await soon(reply.left)
        await gone(running)


async def test_a_peer_that_answers_stays_whatever_else_it_is_sent() -> None:
    async with site(beating(PATIENCE_SECONDS)) as running:
        name = await conversation(running)
        async with peer(running) as client:
            await client.send(
                text(
                    {
                        "type": "send",
                        "request": "r",
                        "conversation": name,
                        "id": "t",
                        "content": "x",
                    }
                )
            )
            reply = await reply_in(running, name, "t")
            pings = 0
            while pings < 5:
                reply.say("x" * 10_000)
                heard = await client.read_frame()
                if heard.opcode == PING:
                    pings += 1
                    await client.send(frame(PONG, b"stale"), frame(PONG, heard.payload))
            reply.finish()
            while (
                heard := await client.read_frame()
            ).opcode != TEXT or b"done" not in heard.payload:
                pass


# -- ends


async def test_a_half_closed_connection_is_closed_and_leaves_nothing(served: Site) -> None:
    async with peer(served) as client:
        await client.send(frame(TEXT, ASK))
        client.writer.write_eof()
        assert [each.opcode for each in await client.read_all()] in ([], [TEXT])
        await gone(served)


async def test_a_reset_leaves_nothing(served: Site) -> None:
    for sent in (b"", frame(TEXT, ASK), frame(TEXT, ASK)[:5], frame(TEXT, ASK, fin=False)):
        async with peer(served) as client:
            await client.send(sent)
        await gone(served)
