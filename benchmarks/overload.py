"""Ten times too many requests: what the served ones still get, and how fast the others are refused.

    peak       as many clients as the server computes and queues, each asking again at once
    crowd      ten times as many clients, all at once; one that is refused waits as long as
               Retry-After says
    storm      ten times as many requests a second as the peak answered, at random times (Poisson),
               whatever the answers are
    elsewhere  the peak's clients, beside a storm that another process refuses: clients and server
               share the cores, so this much of the storm's cost is its senders'

They take turns on one server, so that a machine that slows down slows all. Printed: output tokens
a second of each in the median and the ratios, the time to a refusal (as the clients see it), and
how late the event loop was (from /metrics) over the whole run.
"""

import asyncio
import itertools
import random
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field

import httpx

from benchmarks.light_client import LightClient
from benchmarks.report import run
from benchmarks.server_process import server_process, wait_until_ready
from benchmarks.serving import MODEL

RUNNING, QUEUED = 8, 8
CLIENTS = RUNNING + QUEUED
FACTOR = 10
SECONDS = 10.0
ROUNDS = 5
SEED = 25
REPLY_TOKENS = 64
OPTIONS = ["--max-sequences", str(RUNNING), "--max-queued", str(QUEUED)]
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "last": 1.0}


@dataclass
class Tally:
    """What the clients of one kind of phase saw, over all rounds."""

    tokens_per_second: list[float] = field(default_factory=list[float])
    answers_per_second: list[float] = field(default_factory=list[float])
    refusal_seconds: list[float] = field(default_factory=list[float])
    tokens: int = 0
    answers: int = 0

    def refusals(self) -> dict[str, float]:
        """Quantiles of the time to a refusal, in seconds, and how many came within 50 ms."""
        times = sorted(self.refusal_seconds)
        late = {name: times[int(share * (len(times) - 1))] for name, share in QUANTILES.items()}
        return late | {
            "count": len(times),
            "share_within_50_ms": sum(each <= 0.05 for each in times) / len(times),
        }

    @contextmanager
    def phase(self) -> Generator[None]:
        """One phase: its rates are those between entering and leaving."""
        began, tokens, answers = time.monotonic(), self.tokens, self.answers
        yield
        seconds = time.monotonic() - began
        self.tokens_per_second.append((self.tokens - tokens) / seconds)
        self.answers_per_second.append((self.answers - answers) / seconds)


_numbers = itertools.count()


async def ask(client: LightClient, tally: Tally) -> float:
    """One request; the seconds after which to come back, 0 where it was answered.

    Each asks something else: whoever asked the same again would have its whole prompt from the
    cache, and that would be the peak's clients alone.
    """
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"Tell me about number {next(_numbers)}"}],
        "max_tokens": REPLY_TOKENS,
        "ignore_eos": True,
    }
    began = time.monotonic()
    status, headers, answer = await client.post("/v1/chat/completions", body)
    if status == 200:
        tally.answers += 1
        tally.tokens += int(answer["usage"]["completion_tokens"])
        return 0.0
    if status in (429, 503):
        tally.refusal_seconds.append(time.monotonic() - began)
        return float(headers["retry-after"])
    raise RuntimeError(f"{status}: {answer}")


async def client_loop(url: str, until: float, tally: Tally) -> None:
    """Ask, and ask again, until the phase is over."""
    async with LightClient(url) as client:
        while time.monotonic() < until:
            wait = await ask(client, tally)
            if wait:
                await asyncio.sleep(max(0.0, min(wait, until - time.monotonic())))


async def crowd(url: str, clients: int, tally: Tally) -> None:
    """A phase of so many clients."""
    with tally.phase():
        until = time.monotonic() + SECONDS
        await asyncio.gather(*(client_loop(url, until, tally) for _ in range(clients)))


async def storm(url: str, per_second: float, tally: Tally, source: random.Random) -> None:
    """A phase of requests at random times."""
    with tally.phase():
        await send_storm(url, per_second, tally, source)


async def send_storm(url: str, per_second: float, tally: Tally, source: random.Random) -> None:
    """Connections are used again."""
    idle: list[LightClient] = []

    async def one(stack: AsyncExitStack) -> None:
        client = idle.pop() if idle else await stack.enter_async_context(LightClient(url))
        await ask(client, tally)
        idle.append(client)

    async with AsyncExitStack() as stack:
        due = time.monotonic()
        until = due + SECONDS
        async with asyncio.TaskGroup() as tasks:
            while True:
                due += source.expovariate(per_second)
                if due > until:
                    break
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                tasks.create_task(one(stack))


@contextmanager
def refuser() -> Generator[str]:
    """A process that refuses everything; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.refuser", str(port)])
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def lag_quantile(metrics: str, quantile: float) -> str:
    """The bucket of the event loop's lag in which a quantile lies."""
    found = re.findall(r'chatserve_event_loop_lag_seconds_bucket\{le="([^"]+)"\} (\S+)', metrics)
    total = float(found[-1][1])
    return next(bound for bound, count in found if float(count) >= quantile * total)


async def measure() -> dict[str, object]:
    """All phases on one server."""
    source = random.Random(SEED)
    peak, crowded, stormy, elsewhere = Tally(), Tally(), Tally(), Tally()
    with server_process(OPTIONS) as server, refuser() as other:
        await asyncio.to_thread(wait_until_ready, server)
        await crowd(server.url, 2, Tally())
        for _ in range(ROUNDS):
            await crowd(server.url, CLIENTS, peak)
            await crowd(server.url, FACTOR * CLIENTS, crowded)
            rate = FACTOR * peak.answers_per_second[-1]
            await storm(server.url, rate, stormy, source)
            await asyncio.gather(
                crowd(server.url, CLIENTS, elsewhere), send_storm(other, rate, Tally(), source)
            )
        async with httpx.AsyncClient(base_url=server.url) as client:
            metrics = (await client.get("/metrics")).text
    figures: dict[str, object] = {"peak_tokens_per_second": peak.tokens_per_second}
    best = statistics.median(peak.tokens_per_second)
    print(f"peak    {CLIENTS} clients: {best:.0f} tokens/s in the median of {ROUNDS} rounds")
    beside = statistics.median(elsewhere.tokens_per_second)
    storms = statistics.median(stormy.tokens_per_second)
    figures["elsewhere"] = {
        "tokens_per_second": elsewhere.tokens_per_second,
        "ratio_of_medians": beside / best,
        "storm_against_it": storms / beside,
    }
    print(
        f"elsewhere {beside:.0f} tokens/s, {beside / best:.2f} x; storm {storms / beside:.2f} of it"
    )
    for name, tally in (("crowd", crowded), ("storm", stormy)):
        rate, late = statistics.median(tally.tokens_per_second), tally.refusals()
        figures[name] = {
            "tokens_per_second": tally.tokens_per_second,
            "ratio_of_medians": rate / best,
            "refusals": late,
        }
        print(
            f"{name}   {rate:.0f} tokens/s, {rate / best:.2f} x; {late['count']} refusals, "
            + ", ".join(f"{each} {1000 * late[each]:.1f} ms" for each in QUANTILES)
            + f", {100 * late['share_within_50_ms']:.1f} % within 50 ms"
        )
    figures["loop_lag_seconds_p999_at_most"] = lag_quantile(metrics, 0.999)
    print(f"event loop late by at most {figures['loop_lag_seconds_p999_at_most']} s at p99.9")
    return figures


def main() -> int:
    """Print a table; with --json also write it."""
    return run("benchmarks.overload", __doc__, measure)


if __name__ == "__main__":
    sys.exit(main())
