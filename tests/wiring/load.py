"""Mixed load with clients that leave at random points, and what a server holds afterwards."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass

import httpx

from tests.wiring.server import MODEL, Server

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"


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
    """So many requests, a tenth of which leave at a random point. Counts how they ended."""
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
        }
        if dice.random() < 0.2:
            common["stop"] = [dice.choice(["e", "the", ". "])]
        if dice.random() < 0.25:
            return PLAIN, common | {"prompt": text}
        return CHAT, common | {"messages": [{"role": "user", "content": text}]}

    async def one(client: httpx.AsyncClient, number: int, leave_after: float | None) -> None:
        path, fields = body(number)
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

        async def placed(number: int, leave_after: float | None) -> None:
            try:
                await one(client, number, leave_after)
            finally:
                places.release()

        async with asyncio.TaskGroup() as group:
            for number in range(requests):
                await places.acquire()
                leave = dice.random() ** 2 * 0.4 if dice.random() < 0.1 else None
                group.create_task(placed(number, leave))
    return ends
