"""What it costs to keep pages on disk when nobody ever comes back: the same load, disk on and off.

    python -m benchmarks.write_through [--json FILE]

Two servers with the demonstration model, one with the disk tier and one without (`--disk-capacity
0`), both running all the time and of one age. Rounds of a few seconds go to one and the other in
turn, which goes first changing from pair to pair, so a machine that drifts is the same to both. In
a round some users ask one question after the other, each a prompt that was never sent before, so
that every page is computed, written, and never found. The device has room for a few rounds only,
so that pages must be copied down while there is load, and not only between the rounds; before its
round the server with the disk may finish what it copies from the last one, for that takes nothing
from anybody. The disk is full before anything is measured, as that of a server in use: each page
takes the slot of an older one. (A file that grows costs what the machine's memory costs that nobody
has touched: on a virtual machine ten times the copying.)

Three things are compared, pair by pair: output and prompt tokens a second, the median time to the
first token, and the server's processor time for a token, with all that is copied after the round.
Each figure is the median over the pairs, with its standard error (by resampling the pairs). The
aim: 1 % or less.

On a machine that is not ours alone these ratios are known to 2 % or so, as a model's own time for
the same tokens changes by 10 % from round to round. So what the disk makes the server do is told on
its own as well, as a share of all processor time: what the copying threads took (the server counts
it), and what the event loop took for a token more than without a disk (it orders the copies and
keeps the books). The threads that compute do nothing for the disk; that copying may slow them, by
sharing caches and the interpreter with them, shows in the ratios alone.
"""

import asyncio
import itertools
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.drafts import message
from benchmarks.report import run
from benchmarks.server_process import ServerProcess, server_process, wait_until_ready
from benchmarks.serving import ask

PAIRS = 30
ROUND_SECONDS = 4.0
USERS = 4
PROMPT_WORDS = 300
REPLY_TOKENS = 32
OPTIONS = ("--drafts", "off", "--kv-memory", "32MiB")
DISK_OPTIONS = ("--disk-capacity", "64MiB")  # full after a few rounds
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
    """One of the two servers, and a client of it."""

    def __init__(
        self,
        server: ServerProcess,
        client: httpx.AsyncClient,
        seeds: Iterator[int],
        *,
        copies: bool,
    ) -> None:
        self._server = server
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
                answer = await ask(self._client, words, REPLY_TOKENS)
                tokens += answer.prompt_tokens + answer.completion_tokens
                first.append(answer.first_token)

        async with asyncio.TaskGroup() as group:
            for _ in range(USERS):
                group.create_task(user())
        rate = tokens / (time.monotonic() - began)
        await self.settle()
        after = await self.used()
        return Round(
            rate,
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


async def measure() -> dict[str, float]:
    """Both ratios."""
    pairs: list[tuple[Round, Round]] = []
    with (
        server_process([*OPTIONS, *DISK_OPTIONS]) as kept,
        server_process([*OPTIONS, "--disk-capacity", "0"]) as plain,
    ):
        for server in (kept, plain):
            await asyncio.to_thread(wait_until_ready, server)
        async with (
            httpx.AsyncClient(base_url=kept.url, timeout=60.0) as one,
            httpx.AsyncClient(base_url=plain.url, timeout=60.0) as other,
        ):
            seeds = itertools.count(1)
            on = Side(kept, one, seeds, copies=True)
            off = Side(plain, other, seeds, copies=False)
            while not await on.evicted():  # to warm up
                for side in (on, off):
                    await side.round()
            before = (await on.cache())["transit"]
            for number in range(PAIRS):
                order = (on, off) if number % 2 else (off, on)
                rounds: dict[Side, Round] = {}
                for side in order:
                    rounds[side] = await side.round()
                pairs.append((rounds[on], rounds[off]))
            after = (await on.cache())["transit"]
    copied = {key: after[key] - before[key] for key in ("kept_total", "lost_total")}
    return report(pairs) | copied


def report(pairs: list[tuple[Round, Round]]) -> dict[str, float]:
    """Print both ratios; the figures."""
    figures: dict[str, float] = {"pairs": len(pairs)}
    print(f"{len(pairs)} pairs of rounds of {ROUND_SECONDS:.0f} s, {USERS} users, no prompt twice")
    kinds = {
        "tokens_a_second": [(on.tokens_a_second, off.tokens_a_second) for on, off in pairs],
        "first_token_seconds": [
            (on.first_token_seconds, off.first_token_seconds) for on, off in pairs
        ],
        "processor_seconds_a_token": [
            (on.processor_seconds_a_token, off.processor_seconds_a_token) for on, off in pairs
        ],
    }
    for kind, values in kinds.items():
        ratios = [on / off for on, off in values]
        ratio, error = statistics.median(ratios), standard_error(ratios)
        with_disk = statistics.median(on for on, _ in values)
        without = statistics.median(off for _, off in values)
        print(
            f"  {kind:26} disk on {with_disk:10.4g}, off {without:10.4g}: "
            f"ratio {ratio:.4f} (standard error {error:.4f}; aim within {TARGET:.0%} of 1)"
        )
        figures |= {f"{kind}_on": with_disk, f"{kind}_off": without}
        figures |= {f"{kind}_ratio": ratio, f"{kind}_ratio_error": error}
    return figures | report_work(pairs)


def report_work(pairs: list[tuple[Round, Round]]) -> dict[str, float]:
    """Print what the disk makes the server do, as a share of its processor time; the figures."""
    copying = [on.copying_seconds_a_token / on.processor_seconds_a_token for on, _ in pairs]
    loop = [
        (on.loop_seconds_a_token - off.loop_seconds_a_token) / off.processor_seconds_a_token
        for on, off in pairs
    ]
    both = [sum(shares) for shares in zip(copying, loop, strict=True)]
    figures: dict[str, float] = {}
    kinds = {"copying_share": copying, "loop_share": loop, "work_share": both}
    for kind, shares in kinds.items():
        share, error = statistics.median(shares), standard_error(shares)
        figures |= {kind: share, f"{kind}_error": error}
    print("  processor time for the disk, of all that the server takes:")
    for kind, name in zip(kinds, ("copying threads", "event loop", "both"), strict=True):
        share, error = figures[kind], figures[f"{kind}_error"]
        aim = f"; aim at most {TARGET:.0%}" if kind == "work_share" else ""
        print(f"    {name:16} {share:8.3%} (standard error {error:.3%}{aim})")
    return figures


def standard_error(values: list[float]) -> float:
    """Of the median, by resampling with a fixed seed."""
    source = random.Random(1)
    medians = [statistics.median(source.choices(values, k=len(values))) for _ in range(RESAMPLES)]
    return statistics.stdev(medians)


def main() -> int:
    """Print a table; with --json also write it."""
    return run("benchmarks.write_through", __doc__, measure)


if __name__ == "__main__":
    sys.exit(main())
