"""What raw sockets may do to the server: slow, large, malformed and smuggled requests."""

import asyncio
import re
import socket

import orjson
import pytest

from chatserve.api.head import Head, HeadReader, Refusal
from chatserve.api.limits import Limits
from chatserve.errors import Busy
from tests.api.harness import CHAT, LIMITS, PATIENCE_SECONDS, close, quick, read_to_end, site

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
CLOSE = b"Connection: close\r\n\r\n"


def status_of(answer: bytes) -> int:
    matched = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    assert matched is not None, answer[:100]
    return int(matched[1])


def statuses(answer: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


def post(content: bytes, more: bytes = b"", path: bytes = b"/v1/chat/completions") -> bytes:
    return (
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%s"
        b"Content-Length: %d\r\n\r\n%s" % (path, more, len(content), content)
    )


async def test_a_request_in_single_bytes_is_answered() -> None:
    request = post(orjson.dumps(CHAT), b"Connection: close\r\n")
    async with site() as running:
        answer = await running.talk(*(request[i : i + 1] for i in range(len(request))))
    assert status_of(answer) == 200
    assert b"one two three" in answer


async def test_a_connection_is_kept_for_the_next_request() -> None:
    async with site() as running, running.client() as client:
        for _ in range(3):
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
            assert (await client.get("/health")).status_code == 200
        assert len(running.server_state.connections) == 1


async def test_answers_do_not_name_the_server() -> None:
    async with site() as running, running.client() as client:
        assert "server" not in (await client.get("/health")).headers


async def test_a_full_queue_refuses_before_the_body_came() -> None:
    content = orjson.dumps(CHAT)
    async with site() as running:
        running.service.full = Busy("Too many requests are waiting.", retry_after=7.0)
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(post(content)[: -len(content)])
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_SECONDS)
        assert status_of(head) == 429
        assert b"retry-after: 7\r\n" in head.lower()
        # The body still comes, and the connection serves on once there is room.
        running.service.full = None
        length = int(re.findall(rb"content-length: (\d+)", head.lower())[0])
        assert orjson.loads(await reader.readexactly(length))["error"]["code"] == "busy"
        writer.write(content + post(content, b"Connection: close\r\n"))
        answer = await asyncio.wait_for(read_to_end(reader), PATIENCE_SECONDS)
        assert status_of(answer) == 200
        assert not running.service.left_open
        await close(writer)


# -- slow


async def test_a_peer_that_sends_nothing_is_closed() -> None:
    async with site(quick(idle_seconds=0.05)) as running:
        assert await running.talk() == b""


async def test_a_connection_that_is_idle_after_a_request_is_closed() -> None:
    async with site(quick(idle_seconds=0.05)) as running:
        assert statuses(await running.talk(GET + b"\r\n")) == [200]


@pytest.mark.parametrize("part", [b"G", GET, GET + b"A: b\r\n\r"])
async def test_half_a_head_is_closed_with_408(part: bytes) -> None:
    async with site(quick(head_seconds=0.05)) as running:
        assert status_of(await running.talk(part)) == 408


@pytest.mark.parametrize("before", [b"", b"chunked"])
async def test_half_a_body_is_closed_with_408(before: bytes) -> None:
    request = post(b"x" * 100)[:-50]
    if before:
        request = request.replace(b"Content-Length: 100", b"Transfer-Encoding: chunked")
        request = request[: request.index(b"\r\n\r\n") + 4] + b"a\r\nxx"
    async with site(quick(body_seconds=0.05)) as running:
        assert status_of(await running.talk(request)) == 408
        assert not running.service.asks


async def test_the_deadline_of_a_head_counts_from_its_first_byte_and_not_from_the_last() -> None:
    async with site(quick(head_seconds=0.3)) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        ended = asyncio.create_task(read_to_end(reader))
        began = asyncio.get_running_loop().time()
        for byte in GET * 200:
            if ended.done():
                break
            writer.write(bytes([byte]))
            await asyncio.sleep(0.02)  # the drip itself, not luck
        assert status_of(await ended) == 408
        assert asyncio.get_running_loop().time() - began < 5.0
        await close(writer)


async def test_an_unread_body_after_an_early_refusal_has_a_deadline_too() -> None:
    async with site(quick(body_seconds=0.1)) as running:
        request = post(b"{}", path=b"/nowhere").replace(b"Length: 2", b"Length: 200")
        answer = await running.talk(request)
    assert statuses(answer) in ([404], [404, 408])


async def test_a_long_answer_has_no_deadline() -> None:
    tight = quick(head_seconds=0.05, body_seconds=0.05, idle_seconds=0.05)
    async with site(tight) as running:
        running.service.hold = asyncio.Event()
        talk = asyncio.create_task(running.talk(post(orjson.dumps(CHAT))))
        await running.service.asked.wait()
        await asyncio.sleep(0.2)  # four deadlines of any other phase
        assert not talk.done()
        running.service.hold.set()
        assert statuses(await talk) == [200]


async def test_many_slow_peers_do_not_keep_a_good_one_out() -> None:
    async with site(quick(connections_max=400)) as running, running.client() as client:
        slow = [await asyncio.open_connection("127.0.0.1", running.port) for _ in range(300)]
        for _, writer in slow:
            writer.write(GET)
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        for _, writer in slow:
            await close(writer)


async def test_one_connection_too_many_is_told_to_come_back() -> None:
    async with site(quick(connections_max=2)) as running:
        held = [await asyncio.open_connection("127.0.0.1", running.port) for _ in range(2)]
        answer = await running.talk()
        assert status_of(answer) == 503
        assert b"retry-after: 1\r\n" in answer
        for _, writer in held:
            await close(writer)


# -- large


async def test_a_head_over_its_limit_is_431() -> None:
    async with site() as running:
        big = GET + b"A: " + b"x" * LIMITS.head_bytes_max + b"\r\n\r\n"
        assert status_of(await running.talk(big)) == 431
        endless = GET + b"A: " + b"x" * 1_000_000
        assert status_of(await running.talk(endless)) == 431


async def test_a_head_at_its_limits_is_read() -> None:
    fields = b"".join(b"F%d: x\r\n" % index for index in range(LIMITS.head_fields_max - 2))
    async with site() as running:
        assert status_of(await running.talk(GET + fields + CLOSE)) == 200
        assert status_of(await running.talk(GET + fields + b"More: x\r\n" + CLOSE)) == 431
        target = b"/" + b"x" * (LIMITS.target_bytes_max - 1)
        rest = b" HTTP/1.1\r\nHost: localhost\r\n" + CLOSE
        assert status_of(await running.talk(b"GET " + target + rest)) == 404
        assert status_of(await running.talk(b"GET " + target + b"x" + rest)) == 414
        assert status_of(await running.talk(b"GET /" + b"x" * 100_000)) == 414


async def test_a_declared_body_over_the_limit_is_413() -> None:
    async with site() as running, running.client() as client:
        answer = await client.post(
            "/v1/chat/completions",
            content=b" " * (LIMITS.body_bytes_max + 1),
            headers={"Content-Type": "application/json"},
        )
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"


async def test_a_chunked_body_over_the_limit_is_413_and_not_kept() -> None:
    held: list[int] = []

    async with site() as running:

        async def pieces():
            for _ in range(3 * 16):
                for connection in running.server_state.connections:
                    held.append(len(connection.cycle.body) if connection.cycle else 0)
                yield b" " * 65_536

        async with running.client() as client:
            answer = await client.post(
                "/v1/chat/completions",
                content=pieces(),
                headers={"Content-Type": "application/json"},
            )
        assert answer.status_code == 413
        assert max(held) <= LIMITS.body_bytes_max


@pytest.mark.parametrize("piece", [65_536, LIMITS.body_bytes_max])
async def test_a_chunked_body_may_have_as_many_bytes_as_a_declared_one_and_not_one_more(
    piece: int,
) -> None:
    whole = orjson.dumps(CHAT).ljust(LIMITS.body_bytes_max)

    async def pieces(body: bytes):
        for start in range(0, len(body), piece):
            yield body[start : start + piece]

    async with site() as running, running.client() as client:
        for body, status in ((whole, 200), (whole + b" ", 413)):
            answer = await client.post(
                "/v1/chat/completions",
                content=pieces(body),
                headers={"Content-Type": "application/json"},
            )
            assert answer.status_code == status


async def test_a_chunked_body_is_read_and_ends_its_connection() -> None:
    body = orjson.dumps(CHAT)
    chunks = b"".join(b"1;ext=x\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    async with site() as running:
        answer = await running.talk(request + chunks + GET + b"\r\n")
    assert statuses(answer) == [200]


async def test_all_bodies_together_have_a_limit() -> None:
    async with site(quick(bodies_max=1)) as running, running.client() as client:
        running.service.hold = asyncio.Event()
        large = CHAT | {"user": "x" * 700_000}
        first = asyncio.create_task(client.post("/v1/chat/completions", json=large))
        await running.service.asked.wait()
        second = await client.post("/v1/chat/completions", json=large)
        assert second.status_code == 429
        running.service.hold.set()
        assert (await first).status_code == 200
        assert (await client.post("/v1/chat/completions", json=large)).status_code == 200


# -- malformed and smuggled

HOST = b"Host: localhost\r\n"
SMUGGLED = {
    "both framings": b"POST / HTTP/1.1\r\n%sContent-Length: 4\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\n%sContent-Length: 4\r\nContent-Length: 5\r\n\r\n",
    "equal lengths": b"POST / HTTP/1.1\r\n%sContent-Length: 4\r\nContent-Length: 4\r\n\r\n",
    "a list of lengths": b"POST / HTTP/1.1\r\n%sContent-Length: 4, 4\r\n\r\n",
    "a signed length": b"POST / HTTP/1.1\r\n%sContent-Length: +4\r\n\r\n",
    "a negative length": b"POST / HTTP/1.1\r\n%sContent-Length: -1\r\n\r\n",
    "a huge length": b"POST / HTTP/1.1\r\n%sContent-Length: 99999999999999999999\r\n\r\n",
    "two codings": b"POST / HTTP/1.1\r\n%sTransfer-Encoding: chunked\r\n"
    b"Transfer-Encoding: identity\r\n\r\n",
    "a list of codings": b"POST / HTTP/1.1\r\n%sTransfer-Encoding: gzip, chunked\r\n\r\n",
    "an odd coding": b"POST / HTTP/1.1\r\n%sTransfer-Encoding: xchunked\r\n\r\n",
    "a coding in 1.0": b"POST / HTTP/1.0\r\n%sTransfer-Encoding: chunked\r\n\r\n",
    "a folded field": b"GET / HTTP/1.1\r\n%sA: b\r\n c\r\n\r\n",
    "a folded first field": b"GET / HTTP/1.1\r\n Host: localhost\r\n\r\n",
    "a space before the colon": b"GET / HTTP/1.1\r\n%sTransfer-Encoding : chunked\r\n\r\n",
    "no colon": b"GET / HTTP/1.1\r\n%sTransfer-Encoding\r\n\r\n",
    "an empty name": b"GET / HTTP/1.1\r\n%s: x\r\n\r\n",
    "bare LF after the request line": b"GET / HTTP/1.1\n%s\r\n",
    "bare LF after a field": b"GET / HTTP/1.1\r\nHost: localhost\n\r\n",
    "bare LF at the end": b"GET / HTTP/1.1\r\n%s\n",
    "a bare CR": b"GET / HTTP/1.1\r\n%sA: b\rTransfer-Encoding: chunked\r\n\r\n",
    "a NUL": b"GET / HTTP/1.1\r\n%sA: b\x00c\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\n%sHost: evil\r\n\r\n",
    "an absolute target": b"GET http://evil/ HTTP/1.1\r\n%s\r\n",
    "an asterisk": b"OPTIONS * HTTP/1.1\r\n%s\r\n",
    "an authority": b"CONNECT evil:80 HTTP/1.1\r\n%s\r\n",
    "a space in the target": b"GET / x HTTP/1.1\r\n%s\r\n",
    "two spaces": b"GET  / HTTP/1.1\r\n%s\r\n",
    "another version": b"GET / HTTP/2.0\r\n%s\r\n",
    "an old version": b"GET / HTTP/0.9\r\n%s\r\n",
    "no version": b"GET /\r\n\r\n",
    "a lower-case method": b"get / HTTP/1.1\r\n%s\r\n",
    "an empty line first": b"\r\nGET / HTTP/1.1\r\n%s\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}
BODIES = {
    "a bad size": b"xyz\r\n",
    "a signed size": b"+4\r\nabcd\r\n0\r\n\r\n",
    "a hex prefix": b"0x4\r\nabcd\r\n0\r\n\r\n",
    "a space before the size": b" 4\r\nabcd\r\n0\r\n\r\n",
    "an endless size": b"f" * 30 + b"\r\n",
    "bare LF after the size": b"4\nabcd\r\n0\r\n\r\n" + b"x" * 20_000,
    "a chunk longer than its size": b"4\r\nabcdefgh\r\n0\r\n\r\n",
    "no end of the last chunk": b"4\r\nabcd0\r\n\r\n",
    "an endless extension": b"4;" + b"x" * 20_000,
    "endless trailers": b"0\r\n" + b"A: b\r\n" * 4_000,
    "a folded trailer": b"0\r\n A: b\r\n\r\n",
}


@pytest.mark.parametrize("name", SMUGGLED)
async def test_a_head_that_two_parsers_could_read_differently_is_refused(name: str) -> None:
    request = SMUGGLED[name]
    request = request.replace(b"%s", HOST)
    async with site() as running:
        answer = await running.talk(request + b"0\r\n\r\n" + GET + b"\r\n")
    assert statuses(answer) in ([400], [501]), answer[:200]
    assert orjson.loads(answer[answer.index(b"\r\n\r\n") :])["error"]["message"]


@pytest.mark.parametrize("name", BODIES)
async def test_a_malformed_chunked_body_is_refused(name: str) -> None:
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    async with site() as running:
        answer = await running.talk(head + BODIES[name])
        assert statuses(answer) == [400], answer[:200]
        assert not running.service.asks


async def test_a_pipelined_request_is_never_served() -> None:
    async with site() as running:
        answer = await running.talk(post(orjson.dumps(CHAT)) + GET + b"\r\n")
        assert statuses(answer) == [200]
        answer = await running.talk(GET + b"\r\n" + GET + b"\r\n")
        assert statuses(answer) == [200]


async def test_what_follows_an_unread_body_is_read_as_strictly() -> None:
    async with site() as running:
        refused = post(b"x" * 10, path=b"/nowhere")
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(refused[:-5])
        await reader.readuntil(b"\r\n\r\n")
        writer.write(refused[-5:] + SMUGGLED["bare LF at the end"].replace(b"%s", HOST))
        assert statuses(await read_to_end(reader)) == [400]
        await close(writer)


async def test_an_upgrade_to_what_we_do_not_speak_is_ignored() -> None:
    upgrade = b"Connection: upgrade\r\nUpgrade: h2c\r\n\r\n"
    async with site() as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(GET + upgrade)
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert b" 200 " in await reader.readline()
        await close(writer)


async def test_expect_continue_is_answered() -> None:
    request = post(orjson.dumps(CHAT), b"Expect: 100-continue\r\nConnection: close\r\n")
    end = request.index(b"\r\n\r\n") + 4
    async with site() as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(request[:end])
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert b"100" in await reader.readuntil(b"\r\n\r\n")
        writer.write(request[end:])
        assert status_of(await read_to_end(reader)) == 200
        await close(writer)


# -- the reader by itself


@pytest.mark.parametrize("name", SMUGGLED)
def test_the_outcome_of_a_head_does_not_depend_on_how_it_is_cut(name: str) -> None:
    data = SMUGGLED[name].replace(b"%s", HOST) + b"\r\n\r\n"
    whole = HeadReader(LIMITS).feed(data)
    assert isinstance(whole, Refusal)
    assert fed_in_bytes(LIMITS, data) == whole


def test_a_strict_head_gives_its_framing_and_the_rest() -> None:
    head = b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 12\r\n\r\n"
    assert HeadReader(LIMITS).feed(head + b"rest\n") == Head(head, 12, b"rest\n")
    assert fed_in_bytes(LIMITS, head) == Head(head, 12, b"")
    chunked = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n"
    assert HeadReader(LIMITS).feed(chunked) == Head(chunked, None, b"")


def fed_in_bytes(limits: Limits, data: bytes) -> Head | Refusal | None:
    reader = HeadReader(limits)
    for index in range(len(data)):
        outcome = reader.feed(data[index : index + 1])
        if outcome is not None:
            return outcome
    return None


async def test_small_answers_are_not_held_back() -> None:
    async with site() as running, running.client() as client:
        await client.get("/health")
        (connection,) = running.server_state.connections
        sock = connection.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
