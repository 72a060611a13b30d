"""Ten times too many clients: what the served ones still get, and how fast the others are refused.

    peak       as many clients as the server computes and queues, each asking again at once
    overload   ten times as many; one that is refused waits as long as Retry-After says

The two take turns on one server, so that a machine that slows down slows both. Printed: output
tokens a second of both in the median and the ratio, the time to a refusal (as the clients see it),
and how late the event loop was (from /metrics) over the whole run.
"""

import asyncio
import re
import statistics
import sys
import time
from dataclasses import dataclass, field

import httpx

from benchmarks.light_client import LightClient
from benchmarks.report import run
from benchmarks.server_process import ServerProcess, server_process, wait_until_ready
from benchmarks.serving import MODEL

RUNNING, QUEUED = 8, 8
CLIENTS = RUNNING + QUEUED
FACTOR = 10
SECONDS = 10.0
ROUNDS = 5
REPLY_TOKENS = 64
OPTIONS = ["--max-sequences", str(RUNNING), "--max-queued", str(QUEUED)]
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "last": 1.0}


@dataclass
class Tally:
    """What the clients of one phase saw."""

    tokens: int = 0
    answers: int = 0
    refusal_seconds: list[float] = field(default_factory=list[float])


async def client_loop(url: str, number: int, until: float, tally: Tally) -> None:
    """Ask, and ask again, until the phase is over."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"Tell me about number {number}"}],
        "max_tokens": REPLY_TOKENS,
        "ignore_eos": True,
    }
    async with LightClient(url) as client:
        while time.monotonic() < until:
            began = time.monotonic()
            status, headers, answer = await client.post("/v1/chat/completions", body)
            if status == 200:
                tally.answers += 1
                tally.tokens += int(answer["usage"]["completion_tokens"])
            elif status in (429, 503):
                tally.refusal_seconds.append(time.monotonic() - began)
                wait = float(headers["retry-after"])
                await asyncio.sleep(max(0.0, min(wait, until - time.monotonic())))
            else:
                raise RuntimeError(f"{status}: {answer}")


async def phase(server: ServerProcess, clients: int, tally: Tally) -> float:
    """Output tokens a second over one phase."""
    before = tally.tokens
    began = time.monotonic()
    until = began + SECONDS
    await asyncio.gather(*(client_loop(server.url, n, until, tally) for n in range(clients)))
    return (tally.tokens - before) / (time.monotonic() - began)


def lag_quantile(metrics: str, quantile: float) -> str:
    """The bucket of the event loop's lag in which a quantile lies."""
    found = re.findall(r'chatserve_event_loop_lag_seconds_bucket\{le="([^"]+)"\} (\S+)', metrics)
    total = float(found[-1][1])
    return next(bound for bound, count in found if float(count) >= quantile * total)


async def measure() -> dict[str, object]:
    """Both phases on one server."""
    peaks: list[float] = []
    loads: list[float] = []
    calm, crowded = Tally(), Tally()
    with server_process(OPTIONS) as server:
        await asyncio.to_thread(wait_until_ready, server)
        await phase(server, 2, Tally())
        for _ in range(ROUNDS):
            peaks.append(await phase(server, CLIENTS, calm))
            loads.append(await phase(server, FACTOR * CLIENTS, crowded))
        async with httpx.AsyncClient(base_url=server.url) as client:
            metrics = (await client.get("/metrics")).text
    peak, loaded = statistics.median(peaks), statistics.median(loads)
    refusals = sorted(crowded.refusal_seconds)
    late = {name: refusals[int(share * (len(refusals) - 1))] for name, share in QUANTILES.items()}
    figures: dict[str, object] = {
        "peak_tokens_per_second": peaks,
        "overload_tokens_per_second": loads,
        "ratio_of_medians": loaded / peak,
        "refusals": len(refusals),
        "refusal_seconds": late,
        "refused_within_50_ms": sum(each <= 0.05 for each in refusals) / len(refusals),
        "loop_lag_seconds_p999_at_most": lag_quantile(metrics, 0.999),
    }
    print(
        f"{CLIENTS} clients {peak:.0f} tokens/s; {FACTOR * CLIENTS} clients {loaded:.0f} tokens/s: "
        f"{loaded / peak:.2f} x ({ROUNDS} rounds)\n"
        f"{len(refusals)} refusals, "
        + ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in late.items())
        + f"\nevent loop late by at most {figures['loop_lag_seconds_p999_at_most']} s at p99.9"
    )
    return figures


def main() -> int:
    """Print a table; with --json also write it."""
    return run("benchmarks.overload", __doc__, measure)


if __name__ == "__main__":
    sys.exit(main())
