"""How long a start takes with a large page store beside an empty one, after kill -9.

    python -m benchmarks.store_start [--json FILE]

One data folder has an empty page store, the other one of 10 GB: pages of the demonstration model's
size with random contents, put there by the store itself, in chats of 96 pages.  Both servers are
then killed with -9 under load and started again in turn, several times.  From the start of the
process: until it says that it is ready, until its page store is open, and until a chat from before
the first kill has its first token, which must have come from the disk.  The page cache is as warm
as the machine's memory lets it be.  The aim: 5 seconds more than with an empty store, or less.
"""

import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.drafts import message
from benchmarks.report import run
from benchmarks.server_process import (
    ServerProcess,
    end_left_behind,
    server_process,
    wait_until_ready,
)
from benchmarks.serving import door
from prefix_store import MasterSecret, PageStore, PageWrite

STORE_BYTES = 10_000_000_000
CAPACITY = "12GB"
CHAT_PAGES, CALL_PAGES = 96, 48
STARTS = 5
LOAD_SECONDS = 1.0  # before each kill
QUESTION_WORDS = 400
TARGET = 5.0
KINDS = ("empty", "10 GB")


@dataclass(slots=True)
class Starts:
    """Seconds from the start of the process, start by start."""

    ready: list[float] = field(default_factory=list[float])
    opened: list[float] = field(default_factory=list[float])
    answered: list[float] = field(default_factory=list[float])


def fill(folder: Path) -> int:
    """Put pages into the store of a data folder until it has STORE_BYTES; how many."""
    store = PageStore.open(
        folder / "pages", MasterSecret.open(folder), capacity_bytes=2 * STORE_BYTES
    )
    [others] = store.others()
    shape = others.shape
    slab = store.slab(shape)
    dice, count = random.Random(1), 0
    while store.statistics().bytes < STORE_BYTES:
        names = [dice.randbytes(32) for _ in range(CHAT_PAGES)]
        for first in range(0, CHAT_PAGES, CALL_PAGES):
            slab.put(
                [
                    PageWrite(
                        name=names[place],
                        parent=names[place - 1] if place else None,
                        position=place,
                        tokens=dice.randbytes(shape.token_bytes),
                        page=dice.randbytes(shape.page_bytes),
                    )
                    for place in range(first, first + CALL_PAGES)
                ]
            )
        count += CHAT_PAGES
    store.close()
    return count


async def start(folder: Path, question: str, times: Starts | None) -> None:
    """One start on a folder, some load, and kill -9. times: None the first time, when the question
    is asked for the first time."""
    options = ("--drafts", "off", "--disk-capacity", CAPACITY)
    with server_process(options, data=folder) as server:
        await asyncio.to_thread(wait_until_ready, server)
        ready = time.monotonic() - server.started
        opened = await store_is_open(server)
        async with httpx.AsyncClient(base_url=server.url, timeout=60.0) as client:
            began = time.monotonic() - server.started
            answer = await door(server).ask([{"role": "user", "content": question}], 4)
            if times is not None:
                loaded = (await client.get("/admin/cache")).json()["disk"]["slabs"][0]["hits"]
                if not answer.cached_tokens or not loaded:
                    raise RuntimeError("the chat was not found on the disk")
                times.ready.append(ready)
                times.opened.append(opened)
                times.answered.append(began + answer.first_token)
            if times is None:
                await all_are_kept(client)
            until, number = time.monotonic() + LOAD_SECONDS, random.randrange(1 << 30)
            while time.monotonic() < until:
                number += 1
                words = message(number, QUESTION_WORDS)
                await door(server).ask([{"role": "user", "content": words}], 4)
        os.kill(server.pid, 9)


async def all_are_kept(client: httpx.AsyncClient) -> None:
    """Return when the disk has pages, and none waits for its copy."""
    while True:
        cache = (await client.get("/admin/cache")).json()
        waiting = cache["cache"]["transit"]["unkept"] + cache["cache"]["transit"]["keeping"]
        if not waiting and cache["disk"]["slabs"][0]["pages"]:
            return
        await asyncio.sleep(0.02)


async def store_is_open(server: ServerProcess) -> float:
    """Seconds from the process's start until its page store is open."""
    async with httpx.AsyncClient(base_url=server.url, timeout=60.0) as client:
        while True:
            disk = (await client.get("/admin/cache")).json()["disk"]
            if disk is not None and disk["slabs"]:
                return time.monotonic() - server.started
            await asyncio.sleep(0.01)


def warm(folder: Path) -> None:
    """Have the kernel read what a start reads."""
    for path in (folder / "pages").glob("*.table"):
        with suppress(OSError):
            path.read_bytes()


async def measure() -> dict[str, float]:
    """All starts."""
    question = message(7, QUESTION_WORDS)
    times = {kind: Starts() for kind in KINDS}
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="chatserve-bench-") as root:
        folders = {kind: Path(root) / kind.replace(" ", "-") for kind in KINDS}
        for folder in folders.values():
            folder.mkdir()
            await start(folder, question, None)
        began = time.monotonic()
        pages = await asyncio.to_thread(fill, folders["10 GB"])
        await asyncio.to_thread(os.sync)  # else the kernel writes 10 GB beside the starts
        print(f"{pages:,} pages put in {time.monotonic() - began:.0f} s", flush=True)
        for _ in range(STARTS):
            for kind in KINDS:
                warm(folders[kind])
                await start(folders[kind], question, times[kind])
        for folder in folders.values():
            end_left_behind(folder)
    for name in ("ready", "opened", "answered"):
        medians = {kind: statistics.median(getattr(times[kind], name)) for kind in KINDS}
        most = max(getattr(times["10 GB"], name))
        more = medians["10 GB"] - medians["empty"]
        print(
            f"{name:9} empty {medians['empty']:6.2f} s, 10 GB {medians['10 GB']:6.2f} s "
            f"(at most {most:.2f}): {more:+.2f} s",
            flush=True,
        )
        figures |= {f"{name}_empty_seconds": medians["empty"]}
        figures |= {f"{name}_10_GB_seconds": medians["10 GB"], f"{name}_more_seconds": more}
        figures |= {f"{name}_10_GB_most_seconds": most}
    print(f"aim: {TARGET:.0f} s more at the most", flush=True)
    return figures | {"pages": float(pages)}


def main() -> int:
    """The exit status."""
    return run("benchmarks.store_start", __doc__, measure)


if __name__ == "__main__":
    sys.exit(main())
