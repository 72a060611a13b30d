"""What a user waits for who comes back to a long chat: at once, after eviction, after a restart.

    recompute   a new conversation whose first message is as long as the others' history
    at once     the next turn of a chat whose pages are on the device
    evicted     its pages have left the device (flushed) and are on disk, in the page cache
    restarted   the server was killed with -9 and started again on the same folder: its memory is
                new, the page cache is as it was
    once more   the next turn after that: a hit in the memory of the same process, at the same time
    cold disk   as evicted, and the kernel has given up what it had of the file (posix_fadvise)

The time to the first token, in medians over several users, all by the socket, in one run on one
machine: first the demonstration model, then a random one of about 0.45 billion parameters with a
vocabulary of 32,768 in bfloat16.  After a start each server answers one short and one long message
before anything is measured, so that what torch does once is not counted.
"""

import asyncio
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.drafts import Page, make_large_model, message, page, words_for
from benchmarks.report import run
from benchmarks.server_process import ServerProcess, server_process, wait_until_ready

HISTORY_TOKENS = 1_600
REPLY_TOKENS = 8
SECOND_VISIT = 100_000  # the first number of what is sent after the restart
USERS = 7
LARGE_USERS = 5
VOCABULARY = 32_768
LARGE_OPTIONS = ("--dtype", "bfloat16", "--kv-memory", "2GiB", "--context-length", "3072")
STATES = ("recompute", "at once", "evicted", "restarted", "once more", "cold disk")
# What a state is compared with: a hit of the same process, since one may run faster than another.
HITS = {"restarted": "once more", "once more": "once more", "cold disk": "once more"}


@dataclass(slots=True)
class Times:
    """Seconds to the first token, and tokens computed, by state."""

    seconds: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    computed: dict[str, list[int]] = field(default_factory=dict[str, list[int]])

    async def turn(self, user: Page, state: str, conversation: str, text: str) -> None:
        """One turn of somebody, booked."""
        sent = await user.send(conversation, text, REPLY_TOKENS)
        self.seconds.setdefault(state, []).append(sent.first_token)
        self.computed.setdefault(state, []).append(sent.computed)


async def measure_model(model: Sequence[str], users: int, folder: Path) -> Times:
    """All states of one model."""
    times = Times()
    options = [*model, "--drafts", "off"]
    chats: list[str] = []
    with server_process(options, data=folder) as server:
        await asyncio.to_thread(wait_until_ready, server)
        async with page(server) as user:
            words = await words_for(user, HISTORY_TOKENS)
            await warm_up(user, words)
            for number in range(users):
                chats.append(await user.new_conversation())
                await times.turn(user, "recompute", chats[-1], message(number, words))
                await times.turn(user, "at once", chats[-1], "Go on.")
            for chat in chats:
                await leave_the_device(server, folder)
                await times.turn(user, "evicted", chat, "And then?")
            await leave_the_device(server, folder)
        os.kill(server.pid, 9)
    await asyncio.to_thread(os.sync)
    with server_process(options, data=folder) as server:
        await asyncio.to_thread(wait_until_ready, server)
        async with page(server) as user:
            # Turns of one conversation have different ids, those of before the restart too.
            user._numbers = itertools.count(SECOND_VISIT)  # pyright: ignore[reportPrivateUsage]
            await warm_up(user, words)
            for chat in chats:
                await times.turn(user, "restarted", chat, "Are you there?")
                await times.turn(user, "once more", chat, "Do you hear me?")
            for chat in chats:
                await leave_the_device(server, folder, cold=True)
                await times.turn(user, "cold disk", chat, "And now?")
    return times


async def warm_up(user: Page, words: int) -> None:
    """What a process does once: the sizes of steps that are measured."""
    for number, length in enumerate((12, words)):
        chat = await user.new_conversation()
        await user.send(chat, message(10_000 + number, length), REPLY_TOKENS)
        await user.send(chat, "Go on.", REPLY_TOKENS)


async def leave_the_device(server: ServerProcess, folder: Path, *, cold: bool = False) -> None:
    """Wait until all pages have copies, then flush; cold: out of the page cache as well."""
    async with httpx.AsyncClient(base_url=server.url, timeout=60.0) as client:
        while True:
            cache = (await client.get("/admin/cache")).json()["cache"]
            waiting = cache["transit"]["unkept"] + cache["transit"]["keeping"]
            if not waiting + cache["pages"]["leaving"] + cache["pages"]["sealed"]:
                break
            await asyncio.sleep(0.02)
        # What the kernel has yet to write of the file it writes now, not beside what is measured.
        await asyncio.to_thread(os.sync)
        (await client.post("/admin/cache/flush", json={})).raise_for_status()
    if cold:
        await asyncio.to_thread(drop_from_page_cache, folder)


def drop_from_page_cache(folder: Path) -> None:
    """Have the kernel write and forget what it holds of the page store's files."""
    for path in (folder / "pages").iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def report(name: str, times: Times) -> dict[str, float]:
    """Print a table; its figures."""
    figures: dict[str, float] = {}
    whole = statistics.median(times.seconds["recompute"])
    hits = {state: statistics.median(times.seconds[state]) for state in ("at once", "once more")}
    print(f"{name}: first token, median of {len(times.seconds['recompute'])}")
    for state in STATES:
        seconds = statistics.median(times.seconds[state])
        computed = statistics.median(times.computed[state])
        hit = hits[HITS.get(state, "at once")]
        print(
            f"  {state:10} {1000 * seconds:8.0f} ms, {computed:5.0f} tokens computed, "
            f"{whole / seconds:6.1f} x less than recompute, {seconds / hit:5.2f} x the hit",
            flush=True,
        )
        key = f"{name}_{state}".replace(" ", "_")
        figures |= {f"{key}_seconds": seconds, f"{key}_computed": computed}
        figures |= {f"{key}_less": whole / seconds, f"{key}_of_hit": seconds / hit}
    return figures


async def measure() -> dict[str, float]:
    """Both models."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="chatserve-bench-") as data:
        figures |= report("demonstration", await measure_model((), USERS, Path(data)))
    with (
        tempfile.TemporaryDirectory(prefix="chatserve-bench-model-") as model,
        tempfile.TemporaryDirectory(prefix="chatserve-bench-") as data,
    ):
        await asyncio.to_thread(make_large_model, Path(model), VOCABULARY)
        times = await measure_model((model, *LARGE_OPTIONS), LARGE_USERS, Path(data))
        figures |= report("large", times)
    return figures


def main() -> int:
    """The exit status."""
    return run("benchmarks.returning", __doc__, measure)


if __name__ == "__main__":
    sys.exit(main())
