"""Thousands of conversations at once: how late they are, what they cost, and who disturbs whom.

The model is simulated (`simulated_server.py`); the clients are this process, the server is another
one.  Half of the conversations are turns by POST whose events come as SSE, half are sockets.

    rates      all streams at 4 tokens/s each, then at higher rates, each on a server of its own:
               the event loop's lag, errors, memory a stream. The highest rate that holds the
               limits is named
    stalled    the same at 4 tokens/s, half the streams, for a while; then beside viewers of a
               long reply who never read, as many again: the others' times between two events, and
               when descriptors and tasks of those who never read are gone

Every reply is checked: it ends with `done` and all its tokens, and its text is the one that the
server keeps.
"""

import argparse
import asyncio
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import orjson

from benchmarks.server_process import ServerProcess, server_process, wait_until_ready
from benchmarks.stream_clients import (
    SocketStream,
    SseStream,
    Stream,
    get_head,
    handshake,
    post_head,
)
from chatserve.chat.store.conversation import Conversation, ReplyState, Role, Turn
from chatserve.chat.store.redis_link import RedisLink
from chatserve.chat.store.redis_store import RedisStore
from chatserve.chat.store.session_store import Ending, NewTurn

SSE, SOCKETS = 1_000, 1_000
RATES = (4.0, 5.0, 6.0, 8.0)  # tokens a second of each stream
RAMP_SECONDS, WINDOW_SECONDS = 15.0, 20.0
LAG_SECONDS_MAX = 0.050  # at p99
MEMORY_KIB_MAX = 100.0  # of a stream
STALLED = 500
STALLED_CHARACTERS = 400_000  # more than a kernel keeps for a connection
GONE_SECONDS_MAX = 60.0
CHECKED = 40  # replies whose kept text is asked for
OPTIONS = ["--max-sequences", "4096", "--max-queued", "4096"]


@dataclass(frozen=True, slots=True)
class Scrape:
    """What /metrics says at a moment."""

    lag: tuple[tuple[float, float], ...]  # upper bound in seconds, observations up to it
    resident: float
    descriptors: float
    tasks: float
    cpu_seconds: float


async def scrape(client: httpx.AsyncClient, server: ServerProcess) -> Scrape:
    """Now."""
    text = (await client.get("/metrics")).text
    lag = re.findall(r'chatserve_event_loop_lag_seconds_bucket\{le="([^"]+)"\} (\S+)', text)

    def value(name: str) -> float:
        found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
        assert found, name
        return float(found[1])

    return Scrape(
        tuple((float(bound), float(count)) for bound, count in lag),
        value("process_resident_memory_bytes"),
        value("process_open_fds"),
        value("chatserve_event_loop_tasks"),
        cpu_seconds(server.pid),
    )


def cpu_seconds(pid: int) -> float:
    """What a process has used so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def lag_between(before: Scrape, after: Scrape, share: float) -> float:
    """A quantile of the lag, interpolated in its bucket as Prometheus does. Seconds."""
    counts = [late - early for (_, early), (_, late) in zip(before.lag, after.lag, strict=True)]
    wanted = share * counts[-1]
    low_bound, low_count = 0.0, 0.0
    for (bound, _), count in zip(after.lag, counts, strict=True):
        if count >= wanted:
            if bound == float("inf"):
                return bound
            inside = (wanted - low_count) / max(1.0, count - low_count)
            return low_bound + (bound - low_bound) * inside
        low_bound, low_count = bound, count
    raise AssertionError("the last bucket holds all")


def quantile(values: Sequence[float], share: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def gaps(streams: Sequence[Stream], since: float, until: float) -> list[float]:
    """Seconds between two arrivals on a stream, over all streams, within a window."""
    found: list[float] = []
    for stream in streams:
        times = [each for each in stream.arrivals if since <= each <= until]
        found += [late - early for early, late in itertools.pairwise(times)]
    return found


@dataclass(frozen=True, slots=True)
class Load:
    """Streams that run, each with its conversation."""

    streams: tuple[Stream, ...]
    conversations: tuple[str, ...]
    tokens: int


async def begin(
    server: ServerProcess, client: httpx.AsyncClient, *, sse: int, sockets: int, tokens: int
) -> Load:
    """So many replies, begun one after the other over the ramp."""
    loop = asyncio.get_running_loop()
    places = asyncio.Semaphore(32)

    async def conversation() -> str:
        async with places:
            answer = await client.post("/api/conversations", json={})
            answer.raise_for_status()
            return str(answer.json()["id"])

    names = await asyncio.gather(*(conversation() for _ in range(sse + sockets)))
    place = urlsplit(server.url)
    assert place.hostname is not None
    assert place.port is not None
    host, port = place.hostname, place.port

    async def one(number: int) -> Stream:
        turn: dict[str, object] = {
            "id": "1",
            "content": f"Tell me something about number {number}.",
            "max_tokens": tokens,
            "ignore_eos": True,
            "seed": number,
            "temperature": 1.0,
        }
        if number % 2 == 0 and number // 2 < sse:
            transport, stream = await loop.create_connection(SseStream, host, port)
            path = f"/api/conversations/{names[number]}/turns"
            transport.write(post_head(server.url, path, orjson.dumps(turn)))
            return stream
        transport, socket = await loop.create_connection(SocketStream, host, port)
        transport.write(handshake(server.url))
        assert await socket.opened, "the handshake was refused"
        frame: dict[str, object] = {
            "type": "send",
            "request": "1",
            "conversation": names[number],
        }
        socket.send(turn | frame)
        return socket

    began = loop.time()
    tasks: list[asyncio.Task[Stream]] = []
    for number in range(sse + sockets):
        await asyncio.sleep(max(0.0, began + RAMP_SECONDS * number / (sse + sockets) - loop.time()))
        tasks.append(asyncio.create_task(one(number)))
    return Load(tuple(await asyncio.gather(*tasks)), tuple(names), tokens)


async def check(load: Load, client: httpx.AsyncClient) -> list[str]:
    """What is wrong with the ended replies."""
    errors: list[str] = []
    for number, stream in enumerate(load.streams):
        final = stream.final()
        if final is None or final[0] != "done":
            errors.append(f"stream {number}: ended with {final}")
            continue
        usage: Any = final[1]["usage"]
        if usage["completion_tokens"] != load.tokens:
            errors.append(f"stream {number}: {usage}")
    step = max(1, len(load.streams) // CHECKED)
    for number in range(0, len(load.streams), step):
        kept = (await client.get(f"/api/conversations/{load.conversations[number]}")).json()
        if kept["turns"][-1]["content"] != load.streams[number].text():
            errors.append(f"stream {number}: another text than the kept one")
    return errors


async def end(load: Load, seconds: float) -> None:
    """Wait for all finals."""
    await asyncio.wait([stream.ended for stream in load.streams], timeout=seconds)
    for stream in load.streams:
        stream.close()


async def at_rate(rate: float, sse: int, sockets: int) -> dict[str, object]:
    """One server, all streams at one rate."""
    tokens = int(rate * (RAMP_SECONDS + WINDOW_SECONDS + 10.0))
    count = sse + sockets
    with simulated(rate) as server:
        await asyncio.to_thread(wait_until_ready, server)
        async with quiet_client(server) as client:
            warm = await begin(server, client, sse=50, sockets=50, tokens=4)
            await end(warm, 60.0)
            before = await scrape(client, server)
            load = await begin(server, client, sse=sse, sockets=sockets, tokens=tokens)
            early, since = await scrape(client, server), time.monotonic()
            await asyncio.sleep(WINDOW_SECONDS)
            late, until = await scrape(client, server), time.monotonic()
            await end(load, tokens / rate * 4 + 60.0)
            errors = await check(load, client)
    found = gaps(load.streams, since, until)
    lag = lag_between(early, late, 0.99)
    memory = (late.resident - before.resident) / count / 1024
    gap = quantile(found, 0.5)
    figures: dict[str, object] = {
        "rate": rate,
        "streams": count,
        "errors": len(errors),
        "first_errors": errors[:3],
        "lag_p50": lag_between(early, late, 0.5),
        "lag_p99": lag,
        "kib_per_stream": memory,
        "gap_p50": gap,
        "gap_p99": quantile(found, 0.99),
        "cores": (late.cpu_seconds - early.cpu_seconds) / (until - since),
    }
    good = lag <= LAG_SECONDS_MAX and memory <= MEMORY_KIB_MAX and gap <= 1.1 / rate
    figures["holds"] = good and not errors
    show(figures)
    return figures


def quiet_client(server: ServerProcess) -> httpx.AsyncClient:
    """One that keeps no idle connections, which would be counted."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=server.url, timeout=60.0, limits=limits)


def simulated(rate: float) -> Any:
    """A server whose steps take as long as one token of each reply.

    Its prompts are short and many: a target above that time lets a step begin many of them.
    """
    timing = ["--step-seconds", str(1 / rate), "--step-target", str(2 / rate)]
    return server_process([*OPTIONS, *timing], program=("benchmarks.simulated_server",))


def show(figures: dict[str, object]) -> None:
    """One line."""
    shown = {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in figures.items()
    }
    print(json.dumps(shown), flush=True)


# Viewers who never read ------------------------------------------------------------------------


async def long_reply(server: ServerProcess) -> str:
    """A kept reply that no kernel's buffers hold, put where the server finds it."""
    path = quote(str(server.data / "redis" / "server.sock"))
    async with RedisLink(f"unix://{path}") as link:
        store = RedisStore(link)
        await store.check()
        now, text = time.time(), "word " * (STALLED_CHARACTERS // 5)
        await store.create(
            Conversation(id="long", owner="local", title="", created=now, updated=now)
        )
        asked = NewTurn(
            conversation="long",
            owner="local",
            ask="1",
            digest=b"",
            content="Go on",
            at_leaf=True,
            parent=None,
            reply="long.1",
            request=b"{}",
            now=now,
        )
        record = (await store.accept(asked)).record
        turn = Turn(
            id=record.id,
            parent=record.turn,
            role=Role.ASSISTANT,
            text=text,
            created=now,
            final=b"{}",
        )
        ending = Ending(
            reply=record.id,
            epoch=record.epoch,
            state=ReplyState.DONE,
            final=b"{}",
            text=text,
            turn=turn,
            prompt_ids=None,
            encoding="",
            title=None,
            now=now,
        )
        await store.end(ending)
        return record.id


async def stall(server: ServerProcess, reply: str, number: int, stack: AsyncExitStack) -> None:
    """A viewer who asks for a long reply and never reads."""
    parts = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1_024)
    stack.callback(writer.close)
    if number % 2:
        writer.write(get_head(server.url, f"/api/replies/{reply}/events"))
    else:
        writer.write(handshake(server.url))
        await reader.readuntil(b"\r\n\r\n")
        frame = orjson.dumps({"type": "attach", "request": "1", "reply": reply})
        writer.write(bytes((0x81, 0x80 | len(frame))) + bytes(4) + frame)
    await writer.drain()
    # From here on nothing is read: the reader's limit is small, and then its transport pauses.


async def stalled(sse: int, sockets: int) -> dict[str, object]:
    """Others, without and with viewers who never read."""
    rate = RATES[0]
    tokens = int(rate * (RAMP_SECONDS + 3 * WINDOW_SECONDS + 20.0))
    with simulated(rate) as server:
        await asyncio.to_thread(wait_until_ready, server)
        async with (
            quiet_client(server) as client,
            AsyncExitStack() as stack,
        ):
            reply = await long_reply(server)
            load = await begin(server, client, sse=sse, sockets=sockets, tokens=tokens)
            before, first = await scrape(client, server), time.monotonic()
            await asyncio.sleep(WINDOW_SECONDS)
            second = time.monotonic()
            for number in range(STALLED):
                await stall(server, reply, number, stack)
            there, third = await scrape(client, server), time.monotonic()
            await asyncio.sleep(WINDOW_SECONDS)
            fourth = time.monotonic()
            gone: float | None = None
            while gone is None and time.monotonic() - third < GONE_SECONDS_MAX:
                await asyncio.sleep(1.0)
                now = await scrape(client, server)
                if now.descriptors <= before.descriptors and now.tasks <= before.tasks:
                    gone = time.monotonic() - third
            await end(load, 120.0)
            errors = await check(load, client)
    alone, beside = gaps(load.streams, first, second), gaps(load.streams, third, fourth)
    figures: dict[str, object] = {
        "streams": sse + sockets,
        "stalled": STALLED,
        "errors": len(errors),
        "first_errors": errors[:3],
        "gap_p99_alone": quantile(alone, 0.99),
        "gap_p99_beside": quantile(beside, 0.99),
        "ratio": quantile(beside, 0.99) / quantile(alone, 0.99),
        "descriptors_of_the_stalled": there.descriptors - before.descriptors,
        "kib_per_stalled": (there.resident - before.resident) / STALLED / 1024,
        "gone_after_seconds": gone,
    }
    show(figures)
    return figures


async def measure(sse: int, sockets: int) -> dict[str, object]:
    """Everything. Stops at the first rate that does not hold."""
    rates: list[dict[str, object]] = []
    for rate in RATES:
        rates.append(await at_rate(rate, sse, sockets))
        if not rates[-1]["holds"]:
            break
    held = [each["rate"] for each in rates if each["holds"]]
    print(f"highest rate that holds: {held[-1] if held else 'none'} tokens/s of each stream")
    return {"rates": rates, "stalled": await stalled(sse // 2, sockets // 2)}


def main() -> int:
    """Print a line of JSON for each part; with --json also write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sse", type=int, default=SSE)
    parser.add_argument("--sockets", type=int, default=SOCKETS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    given = parser.parse_args()
    figures = asyncio.run(measure(given.sse, given.sockets))
    if given.json is not None:
        command = "python -m benchmarks.conversation_load"
        given.json.write_text(json.dumps({"command": command, "figures": figures}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
