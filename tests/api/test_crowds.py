"""Many clients at once: what they cost, and that nothing of them is left."""

import asyncio
import gc
import os
import socket
import time
from collections.abc import Callable

import orjson
import psutil
import pytest

from chatserve.api.server import descriptor_limit
from chatserve.chat.values import Delta
from tests.api.harness import CHAT, PATIENCE_SECONDS, Site, done, quick, site

BODY = orjson.dumps(CHAT | {"stream": True})
STREAM = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
)
SLOW = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"


async def crowd(running: Site, count: int, request: bytes) -> list[socket.socket]:
    """Clients that cost this process a descriptor each and nothing else."""
    loop = asyncio.get_running_loop()
    clients: list[socket.socket] = []
    for _ in range(count):
        client = socket.socket()
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", running.port))
        await loop.sock_sendall(client, request)
        clients.append(client)
    return clients


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 - the server has no event for 'all are gone'
            await asyncio.sleep(0)


def room_for(count: int) -> None:
    if descriptor_limit() < 2 * count + 256:
        pytest.skip("this machine allows too few descriptors")


async def drop_all(count: int, rounds: int) -> None:
    """Each round leaves descriptors, tasks and replies as they were. Prints the slowest round."""
    slowest = 0.0
    room_for(count)
    async with site(quick(connections_max=2 * count)) as running:
        running.service.script = lambda ask: [Delta(sample=0, seq=1, text="a")]
        baseline = psutil.Process().num_fds(), len(asyncio.all_tasks())
        for _ in range(rounds):
            clients = await crowd(running, count, STREAM)
            await until(lambda: len(running.service.left_open) == count)
            for client in clients:
                client.close()
            began = time.monotonic()
            await until(lambda: not running.server_state.tasks)
            await until(lambda: not running.server_state.connections)
            slowest = max(slowest, time.monotonic() - began)
            assert not running.service.left_open
            # The fake's own books: what piles up there makes each look of the collector longer.
            running.service.all_replies.clear()
            running.service.asks.clear()
            while not running.service.replies.empty():
                running.service.replies.get_nowait()
            # Whatever sse-starlette keeps is one task for the whole loop.
            assert len(asyncio.all_tasks()) <= baseline[1] + 1
            # Fewer: something of an earlier test was collected meanwhile.
            assert psutil.Process().num_fds() <= baseline[0]
    print(f"{count} dropped at once, {rounds} times: all gone after {slowest:.2f} s at the most")


async def test_a_crowd_that_drops_at_once_leaves_nothing() -> None:
    await drop_all(100, 2)


@pytest.mark.soak
async def test_a_crowd_that_drops_at_once_leaves_nothing_for_long() -> None:
    await drop_all(1_000, int(os.environ.get("CHATSERVE_SOAK_ROUNDS", "10")))


@pytest.mark.soak
async def test_a_thousand_streams_are_served_and_cost_little() -> None:
    count = 1_000
    room_for(count)
    async with site(quick(connections_max=2 * count)) as running:
        running.service.script = lambda ask: [Delta(sample=0, seq=1, text="a")]
        for client in await crowd(running, 50, STREAM):  # imports and pools are not a stream's
            client.close()
        await until(lambda: not running.server_state.connections)
        running.service.all_replies.clear()
        gc.collect()
        before = psutil.Process().memory_info().rss
        clients = await crowd(running, count, STREAM)
        await until(lambda: len(running.service.left_open) == count)
        each = (psutil.Process().memory_info().rss - before) / count
        print(f"{each / 1024:.1f} KiB a stream")
        assert each <= 100 * 1024
        for reply in running.service.left_open:
            reply.say(done(reply.ask))
        loop = asyncio.get_running_loop()
        for client in clients:
            received = b""
            while not received.endswith(b"0\r\n\r\n"):
                async with asyncio.timeout(PATIENCE_SECONDS):
                    received += await loop.sock_recv(client, 65_536)
            assert b"[DONE]" in received
            client.close()


async def latencies(running: Site, count: int) -> list[float]:
    async with running.client() as client:
        found: list[float] = []
        for _ in range(count):
            began = time.perf_counter()
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
            found.append(time.perf_counter() - began)
    return sorted(found)


@pytest.mark.soak
async def test_slow_and_stalled_clients_do_not_slow_the_others() -> None:
    room_for(1_500)
    async with site(quick(connections_max=3_000, write_seconds=60.0)) as running:
        echo = running.service.script
        alone = await latencies(running, 400)
        slow = await crowd(running, 1_000, SLOW)
        running.service.script = lambda ask: [Delta(sample=0, seq=1, text="x" * 2_000_000)]
        stalled = await crowd(running, 500, STREAM)
        await until(lambda: len(running.service.left_open) == 500)
        for each in running.server_state.connections:
            assert each.transport.get_write_buffer_size() < 2_100_000
        running.service.script = echo
        crowded = await latencies(running, 400)
        print(f"median {alone[200] * 1e3:.2f} ms alone, {crowded[200] * 1e3:.2f} ms in a crowd;")
        print(f"p99 {alone[396] * 1e3:.2f} ms alone, {crowded[396] * 1e3:.2f} ms in a crowd")
        # The target is 5 %; a shared machine's noise is larger than that.
        assert crowded[200] <= 1.25 * alone[200]
        for client in (*slow, *stalled):
            client.close()
