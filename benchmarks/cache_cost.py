"""What the cache costs when nobody ever comes back: one load, with none, in memory, on disk.

    python -m benchmarks.cache_cost [--model FOLDER] [--rounds 30] [--json FILE]
                                    [--device-memory 32MiB] [--disk 64MiB]

Three servers with one model, by default that of demonstration: one that keeps and shares no pages
(`--prefix-cache off`), one that does in the device's memory (`--disk-capacity 0`), one that copies
them to disk as well. All run all the time and are of one age. Rounds of a few seconds go to each in
turn, the order changing, so a machine that drifts is the same to all. In a round some users ask one
question after the other, each a prompt that was never sent before, so that every page is computed,
named, written, and never found. The device has room for a few rounds only, so that pages must leave
it, and be copied down, while there is load and not only between the rounds; before its next round
the server with the disk may finish what it copies from the last one, for that takes nothing from
anybody. The disk is full before anything is measured, as that of a server in use: each page takes
the slot of an older one. (A file that grows costs what the machine's memory costs that nobody has
touched: on a virtual machine ten times the copying.)

Memory is compared with none, and disk with memory, round by round: output and prompt tokens a
second, the median time to the first token, and the server's processor time for a token, with all
that is copied after the round. Each figure is the median over the rounds, with its standard error
(by resampling them). The aim: 1 % or less.

On a machine that is not ours alone these ratios are known to 2 % or so, as a model's own time for
the same tokens changes by 10 % from round to round. So what the cache makes the server do is told
on its own as well: what the event loop took for a token more (it plans the steps, names the pages
and keeps the books), and what the copying threads took (the server counts it), as shares of the
time that the steps took for a token, and of all processor time. The threads that compute do nothing
for the cache; that copying may slow them, by sharing caches and the interpreter with them, shows in
the ratios alone.
"""

import argparse
import asyncio
import itertools
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.drafts import message
from benchmarks.openai_load import Door
from benchmarks.report import run
from benchmarks.server_process import ServerProcess, server_process, wait_until_ready
from benchmarks.serving import MODEL

ROUND_SECONDS = 4.0
USERS = 4
PROMPT_WORDS = 300
REPLY_TOKENS = 32
RESAMPLES = 2_000
TARGET = 0.01
COPYING_METRIC = "chatserve_keep_processor_seconds_total"


@dataclass(frozen=True, slots=True)
class Round:
    """What users of one server saw in some seconds."""

    tokens_a_second: float
    first_token_seconds: float
    processor_seconds_a_token: float
    loop_seconds_a_token: float
    copying_seconds_a_token: float


@dataclass(frozen=True, slots=True)
class Used:
    """Processor seconds of a server so far. loop: of its main thread, which has the event loop.
    copying: of the threads that copy pages down, as the server counts it."""

    process: float
    loop: float
    copying: float


def processor_seconds(pid: int) -> float:
    """What a process has used so far, all threads, in user's and system's time."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main_thread_seconds(pid: int) -> float:
    """What the main thread of a process has used so far."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


class Side:
    """One of the servers, and a client of it."""

    def __init__(
        self,
        server: ServerProcess,
        client: httpx.AsyncClient,
        seeds: Iterator[int],
        *,
        model: str,
        copies: bool,
    ) -> None:
        self._server, self._door = server, Door(server.url, model)
        self._copies = copies
        self._client = client
        self._seeds = seeds

    async def round(self) -> Round:
        """Some seconds of load; what was asked in them is answered to its end."""
        before, began = await self.used(), time.monotonic()
        first: list[float] = []
        tokens = 0

        async def user() -> None:
            nonlocal tokens
            while time.monotonic() < began + ROUND_SECONDS:
                text = message(next(self._seeds), PROMPT_WORDS)
                words = [{"role": "user", "content": text}]
                answer = await self._door.ask(words, REPLY_TOKENS)
                assert answer.prompt_tokens is not None
                tokens += answer.prompt_tokens + answer.tokens
                first.append(answer.first_token)

        async with asyncio.TaskGroup() as group:
            for _ in range(USERS):
                group.create_task(user())
        seconds = time.monotonic() - began
        await self.settle()
        after = await self.used()
        return Round(
            tokens / seconds,
            statistics.median(first),
            (after.process - before.process) / tokens,
            (after.loop - before.loop) / tokens,
            (after.copying - before.copying) / tokens,
        )

    async def used(self) -> Used:
        """What the server has used so far."""
        metrics = (await self._client.get("/metrics")).raise_for_status().text
        (copying,) = re.findall(rf"^{COPYING_METRIC} (\S+)$", metrics, re.MULTILINE)
        pid = self._server.pid
        return Used(processor_seconds(pid), main_thread_seconds(pid), float(copying))

    async def cache(self) -> dict[str, dict[str, float]]:
        """What the server says of its pages."""
        return (await self._client.get("/admin/cache")).raise_for_status().json()["cache"]

    async def evicted(self) -> float:
        """How many pages have left the disk for others."""
        state = (await self._client.get("/admin/cache")).raise_for_status().json()
        return sum(slab["evictions"]["space"] for slab in state["disk"]["slabs"])

    async def settle(self) -> None:
        """Return when nothing is being copied. A server without a disk has nothing to copy."""
        while self._copies:
            transit = (await self.cache())["transit"]
            if not transit["unkept"] + transit["keeping"]:
                return
            await asyncio.sleep(0.05)


async def measure(given: argparse.Namespace) -> dict[str, float]:
    """All ratios and shares."""
    common = ("--drafts", "off", "--kv-memory", given.device_memory)
    model, name = ((str(given.model),), given.model.name) if given.model else ((), MODEL)
    with (
        server_process([*model, *common, "--prefix-cache", "off"]) as none,
        server_process([*model, *common, "--disk-capacity", "0"]) as memory,
        server_process([*model, *common, "--disk-capacity", given.disk]) as disk,
    ):
        servers = (none, memory, disk)
        for server in servers:
            await asyncio.to_thread(wait_until_ready, server)
        async with AsyncExitStack() as clients:
            seeds = itertools.count(1)
            sides: list[Side] = []
            for server in servers:
                client = httpx.AsyncClient(base_url=server.url, timeout=60.0)
                await clients.enter_async_context(client)
                sides.append(Side(server, client, seeds, model=name, copies=server is disk))
            return await measured(sides, given.rounds)


async def measured(sides: Sequence[Side], count: int) -> dict[str, float]:
    """So many rounds of all sides, the last the one with a disk."""
    disk = sides[-1]
    while not await disk.evicted():  # to warm up
        for side in sides:
            await side.round()
    before = (await disk.cache())["transit"]
    rounds: list[list[Round]] = []
    for number in range(count):
        start = number % len(sides)
        in_turn = {side: await side.round() for side in [*sides[start:], *sides[:start]]}
        rounds.append([in_turn[side] for side in sides])
    after = (await disk.cache())["transit"]
    figures: dict[str, float] = {"rounds": count}
    print(f"{count} rounds of {ROUND_SECONDS:.0f} s each, {USERS} users, no prompt twice")
    nones, memories, disks = zip(*rounds, strict=True)
    figures |= report("pages in memory", "memory", memories, nones)
    figures |= report("pages on disk as well", "disk", disks, memories)
    copied = {key: after[key] - before[key] for key in ("kept_total", "lost_total")}
    return figures | copied


def report(title: str, key: str, on: Sequence[Round], off: Sequence[Round]) -> dict[str, float]:
    """Print what one thing costs beside going without it; the figures."""
    pairs = list(zip(on, off, strict=True))
    print(f"  {title}:")
    kinds = {
        "tokens_a_second": [(one.tokens_a_second, other.tokens_a_second) for one, other in pairs],
        "first_token_seconds": [
            (one.first_token_seconds, other.first_token_seconds) for one, other in pairs
        ],
        "processor_seconds_a_token": [
            (one.processor_seconds_a_token, other.processor_seconds_a_token) for one, other in pairs
        ],
    }
    figures: dict[str, float] = {}
    for kind, values in kinds.items():
        ratios = [one / other for one, other in values]
        ratio, error = statistics.median(ratios), standard_error(ratios)
        with_it = statistics.median(one for one, _ in values)
        without = statistics.median(other for _, other in values)
        print(
            f"    {kind:26} with {with_it:10.4g}, without {without:10.4g}: "
            f"ratio {ratio:.4f} (standard error {error:.4f}; aim within {TARGET:.0%} of 1)"
        )
        figures |= {f"{key}_{kind}_with": with_it, f"{key}_{kind}_without": without}
        figures |= {f"{key}_{kind}_ratio": ratio, f"{key}_{kind}_ratio_error": error}
    return figures | report_work(key, pairs)


def report_work(key: str, pairs: Sequence[tuple[Round, Round]]) -> dict[str, float]:
    """Print what it makes the server do, for a token; the figures."""
    copying = [on.copying_seconds_a_token - off.copying_seconds_a_token for on, off in pairs]
    loop = [on.loop_seconds_a_token - off.loop_seconds_a_token for on, off in pairs]
    both = [sum(seconds) for seconds in zip(copying, loop, strict=True)]
    wholes = {
        "step": [1 / off.tokens_a_second for _, off in pairs],
        "processor": [off.processor_seconds_a_token for _, off in pairs],
    }
    figures: dict[str, float] = {}
    for name, seconds in (("event loop", loop), ("copying threads", copying), ("both", both)):
        told: list[str] = []
        for whole, of in wholes.items():
            shares = [one / other for one, other in zip(seconds, of, strict=True)]
            share, error = statistics.median(shares), standard_error(shares)
            kind = f"{key}_{name.replace(' ', '_')}_of_{whole}"
            figures |= {kind: share, f"{kind}_error": error}
            told.append(f"{share:7.3%} of {whole} time (standard error {error:.3%})")
        print(f"    {name:16} {', '.join(told)}")
    return figures


def standard_error(values: list[float]) -> float:
    """Of the median, by resampling with a fixed seed."""
    source = random.Random(1)
    medians = [statistics.median(source.choices(values, k=len(values))) for _ in range(RESAMPLES)]
    return statistics.stdev(medians)


def main() -> int:
    """Print a table; with --json also write it."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("--model", type=Path, metavar="FOLDER", help="instead of the demonstration model")
    add("--rounds", type=int, default=30, help="of each server; two at the least")
    add("--device-memory", default="32MiB", help="for pages: less than a few rounds need")
    add("--disk", default="64MiB", help="more than that, and full after a few rounds")
    given, others = parser.parse_known_args()
    if given.rounds < 2:
        parser.error("--rounds: two at the least")
    sys.argv[1:] = others
    return run("benchmarks.cache_cost", __doc__, lambda: measure(given))


if __name__ == "__main__":
    sys.exit(main())
