"""Mixed load with clients that leave at random points, and what a server holds afterwards."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass

import httpx

from chatserve.model.attention import padded_rows
from tests.wiring.server import MODEL, Server

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
STEP_ROWS_MAX = 2_048  # a CPU's largest step
SAMPLES_MAX = 96  # a storm's 48 clients, with two samples each
PAGE_TOKENS = 16


@dataclass(frozen=True)
class Holdings:
    """What must be the same before and after."""

    descriptors: float
    threads: float
    tasks: float
    named_pages_without_owner: bool


def holdings(server: Server) -> Holdings:
    """Wait until nothing runs and connections are closed, then look.

    Closed connections are noticed by the server a moment later, so this waits for the figures to
    stand still, and gives up after a while: the caller compares.
    """
    last = None
    for _ in range(200):
        state = server.wait_for("idle")
        pages = state["cache"]["pages"]
        now = Holdings(
            descriptors=server.metric("process_open_fds"),
            threads=server.metric("process_threads"),
            tasks=server.metric("chatserve_event_loop_tasks"),
            named_pages_without_owner=pages["free"] + pages["cached"] == pages["total"],  # type: ignore[index]
        )
        if now == last:
            return now
        last = now
        time.sleep(0.1)
    assert last is not None
    return last


async def mixed_load(
    server: Server, *, requests: int, seed: int, at_once: int = 48
) -> Counter[str]:
    """So many requests, a tenth of which leave at a random point. Counts how they ended.

    One seed is one storm: the same requests in the same order, their samples' seeds included.
    """
    dice = random.Random(seed)
    ends: Counter[str] = Counter()
    places = asyncio.Semaphore(at_once)
    stems = ["The harbour lamp. " * 12, "A list of small birds. " * 20, ""]

    def body(number: int) -> tuple[str, dict[str, object]]:
        text = dice.choice(stems) + f"Number {number % 97}."
        common: dict[str, object] = {
            "model": MODEL,
            "max_tokens": dice.choice([1, 4, 16, 30]),
            "temperature": dice.choice([0, 1]),
            "n": dice.choice([1, 1, 1, 2]),
            "stream": dice.random() < 0.6,
            "seed": dice.randrange(1 << 16),
        }
        if dice.random() < 0.2:
            common["stop"] = [dice.choice(["e", "the", ". "])]
        if dice.random() < 0.25:
            return PLAIN, common | {"prompt": text}
        return CHAT, common | {"messages": [{"role": "user", "content": text}]}

    async def one(
        client: httpx.AsyncClient,
        path: str,
        fields: dict[str, object],
        leave_after: float | None,
    ) -> None:
        try:
            async with asyncio.timeout(leave_after):
                async with client.stream("POST", path, json=fields) as answer:
                    async for _ in answer.aiter_raw():
                        pass
                    ends[str(answer.status_code)] += 1
        except TimeoutError:
            ends["left"] += 1
        except httpx.TransportError as error:
            ends[type(error).__name__] += 1

    async with httpx.AsyncClient(
        base_url=server.url, timeout=120, limits=httpx.Limits(max_connections=None)
    ) as client:

        async def placed(path: str, fields: dict[str, object], leave_after: float | None) -> None:
            try:
                await one(client, path, fields, leave_after)
            finally:
                places.release()

        async with asyncio.TaskGroup() as group:
            for number in range(requests):
                await places.acquire()
                leave = dice.random() ** 2 * 0.4 if dice.random() < 0.1 else None
                group.create_task(placed(*body(number), leave))
    return ends


async def every_row_count(server: Server) -> None:
    """Steps of every size that there is a kernel for, as far as one prompt fits the pool.

    oneDNN makes a kernel for a number of rows when it first meets it, and keeps it; the rows are
    padded to a few sizes (`padded_rows`). Prompts of random ids: none is found in the cache.
    """
    pages: dict[str, int] = server.cache()["cache"]["pages"]  # type: ignore[assignment]
    sizes = sorted({padded_rows(rows) for rows in range(1, STEP_ROWS_MAX + 1)})
    dice = random.Random(1)
    common = {"model": MODEL, "ignore_eos": True, "max_tokens": 2}
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        for size in sizes:
            prompt = [dice.randrange(300, 2_000) for _ in range(size)]
            for samples in {1, min(size, SAMPLES_MAX)}:
                # Two pages for each sample's own tokens, beside those of the prompt.
                if size // PAGE_TOKENS + 2 * samples + 2 > pages["total"]:
                    continue
                answer = await client.post(PLAIN, json=common | {"prompt": prompt, "n": samples})
                assert answer.status_code == 200, answer.text
