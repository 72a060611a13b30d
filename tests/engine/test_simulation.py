"""Simulation: whatever the cache, pool, page size, budget and pipelining, every token stream is
the one that the model gives without any page.

The model's next token is a hash of everything before it, read through the page tables, so one
wrong, stale, missing or misplaced page changes all that follows. Seeds are printed on failure by
pytest's parameter ids and by `seed=` in the captured output.
"""

import asyncio
import random
from dataclasses import replace

import pytest

from chatserve.engine.values import Request
from tests.engine.build import VOCABULARY, Setup, ask, build, quiet, random_tokens, running
from tests.engine.oracle import Heard, assert_right, listen

Streams = dict[str, list[Heard]]


def mixed_requests(seed: int, count: int, *, longest: int) -> list[Request]:
    """Requests that share prefixes and branch, of two tenants, greedy and sampled."""
    source = random.Random(seed)
    trunk = random_tokens(source, longest // 2)
    branches = [trunk[: source.randrange(1, len(trunk))] for _ in range(3)]
    branches = [branch + random_tokens(source, longest // 8) for branch in branches]
    requests: list[Request] = []
    for index in range(count):
        stem = source.choice([trunk, *branches])
        stem = stem[: source.randrange(1, len(stem) + 1)]
        tail = random_tokens(source, source.choice([0, 0, 1, 3, longest // 8]))
        request = ask(
            stem + tail,
            source.randrange(1, longest),
            name=f"{index}",
            tenant=source.choice(["a", "a", "b"]),
            samples=source.choice([1, 1, 1, 2, 4]),
            temperature=source.choice([0.0, 1.0]),
            seed=source.randrange(1 << 40),
            stop_ids=frozenset(random_tokens(source, 3)) if source.random() < 0.5 else frozenset(),
            min_tokens=source.choice([0, 0, 5]),
            priority=source.choice([0, 0, 0, 1, -1]),
        )
        requests.append(request)
    return requests


async def simulate(setup: Setup, requests: list[Request], seed: int) -> tuple[Streams, int]:
    """All streams, and how often somebody was preempted. Requests arrive in waves."""
    house = build(setup)
    source = random.Random(seed)

    async def one(request: Request) -> list[Heard]:
        for _ in range(source.randrange(40)):
            await asyncio.sleep(0)  # lets the loop take a step or not: any order is right
        with house.engine.open(house.prepare(request)) as stream:
            return await listen(stream)

    async with running(house):
        heard = await asyncio.gather(*map(one, requests))
        await quiet(house)
    house.assert_baseline()
    for request, answers in zip(requests, heard, strict=True):
        assert_right(request, answers, VOCABULARY)
    streams = {
        request.request_id: answers for request, answers in zip(requests, heard, strict=True)
    }
    return streams, house.scheduler.counts.preemptions


BASE = Setup(pages=200, page_size=4)
SETUPS = {
    "plain": BASE,
    "cache off": replace(BASE, caching=False),
    "one step at a time": replace(BASE, steps_in_flight=1),
    "launched ahead": replace(BASE, launched=True),
    "launched ahead, one step at a time": replace(BASE, launched=True, steps_in_flight=1),
    "launched ahead, tiny pool": replace(BASE, launched=True, pages=34),
    "tiny pool": replace(BASE, pages=34),
    "tiny pool, one step at a time": replace(BASE, pages=34, steps_in_flight=1),
    "tiny pool, cache off": replace(BASE, pages=34, caching=False),
    "one preemption a step": replace(BASE, pages=34, preemptions_max=1),
    "pages of 1": replace(BASE, pages=136, page_size=1),
    "pages of 2": replace(BASE, pages=68, page_size=2),
    "pages of 8": replace(BASE, pages=20, page_size=8),
    "pages of 16": replace(BASE, pages=12, page_size=16),
    "pages of 64": replace(BASE, pages=7, page_size=64),
    "budget of 1": replace(BASE, budget_min=1, budget_max=1),
    "large budget": replace(BASE, budget_min=1000, budget_max=1000),
    "few sequences": replace(BASE, sequences_max=4),
    "many sequences, tiny pool": replace(BASE, pages=34, sequences_max=64),
}


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("seed", [1, 2])
async def test_token_streams_are_the_models_whatever_the_house(name: str, seed: int) -> None:
    print(f"seed={seed}")
    requests = mixed_requests(seed, 40, longest=60)
    streams, preemptions = await simulate(SETUPS[name], requests, seed)
    assert len(streams) == len(requests)
    if "tiny" in name or name == "one preemption a step":
        assert preemptions > 0, "a tiny pool that nobody felt proves nothing"


async def test_two_houses_give_bit_equal_streams() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed={seed}")
    requests = mixed_requests(seed, 30, longest=60)
    one, _ = await simulate(SETUPS["plain"], requests, seed)
    other, _ = await simulate(SETUPS["tiny pool, cache off"], requests, seed + 1)
    assert {key: [item.answer for item in value] for key, value in one.items()} == {
        key: [item.answer for item in value] for key, value in other.items()
    }
