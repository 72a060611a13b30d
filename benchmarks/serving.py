"""The whole server with the demonstration model: start-up, streams, and what the cache saves.

    start       process start to the first streamed token, median of a few starts
    streams     output tokens a second with 1, 16 and 64 streams at once, and their ratio
    second turn time to the first token of a turn on a long history, cache on against off

The server is a process of its own; this one only reads. All figures of a run belong together:
absolute ones drift with the machine.
"""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from benchmarks.report import run
from benchmarks.server_process import ServerProcess, server_process, wait_until_ready

MODEL = "chatserve-demonstration"
STREAMS = (1, 16, 64)
REPLY_TOKENS = 128
HISTORY_MESSAGES = 41
STARTS = 3
TURNS = 7


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed reply as its reader saw it. Times in seconds from the request."""

    first_token: float
    total: float
    completion_tokens: int
    cached_tokens: int
    prompt_tokens: int
    text: str


async def ask(client: httpx.AsyncClient, messages: Sequence[dict[str, str]], tokens: int) -> Answer:
    """Stream one reply of exactly `tokens` tokens."""
    body = {
        "model": MODEL,
        "messages": list(messages),
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began = time.monotonic()
    first = 0.0
    text = ""
    usage: dict[str, object] = {}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            for choice in event["choices"]:
                piece = choice["delta"].get("content")
                if piece:
                    first = first or time.monotonic() - began
                    text += piece
            usage = event.get("usage") or usage
    return Answer(
        first_token=first,
        total=time.monotonic() - began,
        completion_tokens=int(str(usage["completion_tokens"])),
        cached_tokens=int(str(_details(usage)["cached_tokens"])),
        prompt_tokens=int(str(usage["prompt_tokens"])),
        text=text,
    )


def _details(usage: dict[str, object]) -> dict[str, object]:
    details = usage["prompt_tokens_details"]
    assert isinstance(details, dict)
    return details


def _client(server: ServerProcess) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=server.url, timeout=600.0, limits=limits)


async def start_seconds() -> float:
    """Process start to the first streamed token."""
    with server_process() as server:
        await asyncio.to_thread(wait_until_ready, server)
        async with _client(server) as client:
            answered_from = time.monotonic()
            answer = await ask(client, [{"role": "user", "content": "Hello!"}], 4)
            return answered_from - server.started + answer.first_token


async def streams_per_second(server: ServerProcess, streams: int) -> float:
    """Output tokens a second over `streams` replies at once, prompts all different."""
    async with _client(server) as client:
        began = time.monotonic()
        answers = await asyncio.gather(
            *(
                ask(client, [{"role": "user", "content": f"Count to {n} please"}], REPLY_TOKENS)
                for n in range(streams)
            )
        )
        return sum(answer.completion_tokens for answer in answers) / (time.monotonic() - began)


async def turn_seconds(server: ServerProcess) -> tuple[float, Answer]:
    """Median time to the first token of a new last message on one long history."""
    words = "Please remember this for later: the lamp in room {} is green and the door is shut."
    history = [
        {"role": ("user", "assistant")[n % 2], "content": words.format(n)}
        for n in range(HISTORY_MESSAGES - 1)
    ]
    async with _client(server) as client:
        await ask(client, [*history, {"role": "user", "content": "Hello"}], 4)
        answers = [
            await ask(client, [*history, {"role": "user", "content": f"Turn {n}?"}], 4)
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
