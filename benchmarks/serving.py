"""The whole server with the demonstration model: start-up, streams, and what the cache saves.

    start       process start to the first streamed token, median of a few starts
    streams     output tokens a second with 1, 16 and 64 streams at once, and their ratio
    second turn time to the first token of a turn on a long history, cache on against off

The server is a process of its own; this one only reads, and keeps what it reads until a reply is
over. All figures of a run belong together:
absolute ones drift with the machine.
"""

import asyncio
import statistics
import sys
import time

from benchmarks.openai_load import Answer, Door
from benchmarks.report import run
from benchmarks.server_process import ServerProcess, server_process, wait_until_ready

MODEL = "chatserve-demonstration"
STREAMS = (1, 16, 64)
REPLY_TOKENS = 128
HISTORY_MESSAGES = 41
STARTS = 3
TURNS = 7


def door(server: ServerProcess) -> Door:
    """Where the demonstration model is served."""
    return Door(server.url, MODEL)


async def start_seconds() -> float:
    """Process start to the first streamed token."""
    with server_process() as server:
        await asyncio.to_thread(wait_until_ready, server)
        answered_from = time.monotonic()
        answer = await door(server).ask([{"role": "user", "content": "Hello!"}], 4)
        return answered_from - server.started + answer.first_token


async def streams_per_second(server: ServerProcess, streams: int) -> float:
    """Output tokens a second over `streams` replies at once, prompts all different."""
    asks = [[{"role": "user", "content": f"Count to {n} please"}] for n in range(streams)]
    began = time.monotonic()
    answers = await asyncio.gather(*(door(server).ask(each, REPLY_TOKENS) for each in asks))
    return sum(answer.tokens for answer in answers) / (time.monotonic() - began)


async def turn_seconds(server: ServerProcess) -> tuple[float, Answer]:
    """Median time to the first token of a new last message on one long history."""
    words = "Please remember this for later: the lamp in room {} is green and the door is shut."
    history = [
        {"role": ("user", "assistant")[n % 2], "content": words.format(n)}
        for n in range(HISTORY_MESSAGES - 1)
    ]
    await door(server).ask([*history, {"role": "user", "content": "Hello"}], 4)
    answers = [
        await door(server).ask([*history, {"role": "user", "content": f"Turn {n}?"}], 4)
        for n in range(TURNS)
    ]
    return statistics.median(answer.first_token for answer in answers), answers[-1]


async def measure() -> dict[str, float]:
    """All figures of one run."""
    figures = {"start_seconds": statistics.median([await start_seconds() for _ in range(STARTS)])}
    print(f"process start to first streamed token   {figures['start_seconds']:6.2f} s", flush=True)
    with server_process() as server:
        await asyncio.to_thread(wait_until_ready, server)
        await streams_per_second(server, 4)  # the first steps warm torch up
        for streams in STREAMS:
            rate = await streams_per_second(server, streams)
            figures[f"tokens_per_second_{streams}"] = rate
            ratio = rate / figures["tokens_per_second_1"]
            print(f"{streams:3d} streams  {rate:8.0f} tokens/s   {ratio:5.1f} x one", flush=True)
        cached, answer = await turn_seconds(server)
    with server_process(["--prefix-cache", "off"]) as server:
        await asyncio.to_thread(wait_until_ready, server)
        recomputed, _ = await turn_seconds(server)
    assert answer.prompt_tokens is not None
    assert answer.cached_tokens is not None
    figures |= {
        "turn_prompt_tokens": answer.prompt_tokens,
        "turn_cached_tokens": answer.cached_tokens,
        "turn_first_token_seconds_cached": cached,
        "turn_first_token_seconds_recomputed": recomputed,
    }
    print(
        f"next turn on {answer.prompt_tokens} tokens: first token {1000 * cached:.0f} ms "
        f"({answer.cached_tokens} cached) against {1000 * recomputed:.0f} ms without the cache: "
        f"{recomputed / cached:.1f} x"
    )
    return figures


def main() -> int:
    """Print a table; with --json also write it."""
    return run("benchmarks.serving", __doc__, measure)


if __name__ == "__main__":
    sys.exit(main())
