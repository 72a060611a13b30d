"""Ten times too many clients: what the served ones still get, and how fast the others are refused.

    peak       as many clients as the server computes and queues, each asking again at once
    overload   ten times as many; one that is refused waits as long as Retry-After says

Printed: output tokens a second of both and their ratio, the time to a refusal, and how late the
event loop was (from /metrics) over the whole run.
"""

import asyncio
import re
import statistics
import sys
import time
from dataclasses import dataclass, field

import httpx

from benchmarks.report import run
from benchmarks.server_process import ServerProcess, server_process, wait_until_ready
from benchmarks.serving import MODEL

RUNNING, QUEUED = 8, 8
CLIENTS = RUNNING + QUEUED
FACTOR = 10
SECONDS = 20.0
REPLY_TOKENS = 64
OPTIONS = ["--max-sequences", str(RUNNING), "--max-queued", str(QUEUED)]


@dataclass
class Tally:
    """What the clients of one phase saw."""

    tokens: int = 0
    answers: int = 0
    refusal_seconds: list[float] = field(default_factory=list[float])


async def client_loop(client: httpx.AsyncClient, number: int, until: float, tally: Tally) -> None:
    """Ask, and ask again, until the phase is over."""
    while time.monotonic() < until:
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"Tell me about number {number}"}],
            "max_tokens": REPLY_TOKENS,
            "ignore_eos": True,
        }
        began = time.monotonic()
        answer = await client.post("/v1/chat/completions", json=body)
        if answer.status_code == 200:
            tally.answers += 1
            tally.tokens += int(answer.json()["usage"]["completion_tokens"])
        elif answer.status_code in (429, 503):
            tally.refusal_seconds.append(time.monotonic() - began)
            wait = float(answer.headers["retry-after"])
            await asyncio.sleep(max(0.0, min(wait, until - time.monotonic())))
        else:
            answer.raise_for_status()


async def phase(server: ServerProcess, clients: int) -> tuple[float, Tally]:
    """Output tokens a second over one phase."""
    tally = Tally()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=600.0, limits=limits) as client:
        began = time.monotonic()
        until = began + SECONDS
        await asyncio.gather(*(client_loop(client, n, until, tally) for n in range(clients)))
        return tally.tokens / (time.monotonic() - began), tally


def lag_quantile(metrics: str, quantile: float) -> str:
    """The bucket of the event loop's lag in which a quantile lies."""
    found = re.findall(r'chatserve_event_loop_lag_seconds_bucket\{le="([^"]+)"\} (\S+)', metrics)
    total = float(found[-1][1])
    return next(bound for bound, count in found if float(count) >= quantile * total)


async def measure() -> dict[str, object]:
    """Both phases on one server."""
    with server_process(OPTIONS) as server:
        await asyncio.to_thread(wait_until_ready, server)
        await phase(server, 2)
        peak, _ = await phase(server, CLIENTS)
        loaded, tally = await phase(server, FACTOR * CLIENTS)
        async with httpx.AsyncClient(base_url=server.url) as client:
            metrics = (await client.get("/metrics")).text
    refusals = sorted(tally.refusal_seconds)
    figures: dict[str, object] = {
        "peak_tokens_per_second": peak,
        "overload_tokens_per_second": loaded,
        "ratio": loaded / peak,
        "refusals": len(refusals),
        "refusal_seconds_median": statistics.median(refusals),
        "refusal_seconds_p99": refusals[int(0.99 * (len(refusals) - 1))],
        "loop_lag_seconds_p999_at_most": lag_quantile(metrics, 0.999),
    }
    print(
        f"{CLIENTS} clients {peak:.0f} tokens/s; {FACTOR * CLIENTS} clients {loaded:.0f} tokens/s: "
        f"{loaded / peak:.2f} x\n"
        f"{len(refusals)} refusals, median {1000 * statistics.median(refusals):.1f} ms, "
        f"p99 {1000 * refusals[int(0.99 * (len(refusals) - 1))]:.1f} ms\n"
        f"event loop late by at most {figures['loop_lag_seconds_p999_at_most']} s at p99.9"
    )
    return figures


def main() -> int:
    """Print a table; with --json also write it."""
    return run("benchmarks.overload", __doc__, measure)


if __name__ == "__main__":
    sys.exit(main())
