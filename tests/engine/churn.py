"""Many requests through one engine, some of whose askers leave, and what is left behind."""

import asyncio
import gc
import os
import random
import threading
from dataclasses import dataclass

from chatserve.engine.stream import Stream
from chatserve.engine.values import Request
from tests.engine.build import House, Setup, ask, build, quiet, random_tokens, running
from tests.engine.oracle import Heard, assert_prefix, assert_right

SETUP = Setup(pages=40, page_size=8, sequences_max=24, queued_max=10_000, context_length=200)
AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a process holds besides memory."""

    descriptors: int
    threads: int
    tasks: int

    @classmethod
    def now(cls) -> "Footprint":
        """Count everything."""
        gc.collect()
        return cls(
            len(os.listdir("/proc/self/fd")), threading.active_count(), len(asyncio.all_tasks())
        )


def random_request(source: random.Random, stem: tuple[int, ...], index: int) -> Request:
    """Some share a stem, some fork, some stop early."""
    return ask(
        (*stem[: source.randrange(1, len(stem))], *random_tokens(source, source.randrange(6))),
        source.randrange(1, 24),
        name=f"{index}",
        tenant=source.choice("abc"),
        samples=source.choice([1, 1, 1, 2]),
        temperature=source.choice([0.0, 1.0]),
        seed=index,
        priority=source.choice([0, 0, 1]),
    )


async def one(house: House, request: Request, leave_after: int | None) -> None:
    """Ask, listen, and leave after so many batches if told to; what was heard must be right."""
    heard = [Heard() for _ in range(request.samples)]
    with house.engine.open(house.prepare(request)) as stream:
        await _read(stream, heard, leave_after)
    if leave_after is None:
        assert_right(request, heard, house.setup.vocabulary)
    for sample, item in enumerate(heard):
        assert_prefix(request, item, sample, house.setup.vocabulary)


async def _read(stream: Stream, heard: list[Heard], leave_after: int | None) -> None:
    batches = 0
    if leave_after == 0:
        return
    async for batch in stream:
        for emission in batch:
            heard[emission.sample].hear(emission)
        batches += 1
        if leave_after is not None and batches >= leave_after:
            return


async def churn(count: int, *, leaving: float, seed: int, check_every: int = 1) -> House:
    """`count` requests, at most AT_ONCE at a time; everything is back at the baseline after."""
    source = random.Random(seed)
    house = build(SETUP)
    steps = 0

    def now_and_then() -> None:
        nonlocal steps
        steps += 1
        if steps % check_every == 0:
            house.check()

    house.engine.on_step = now_and_then
    stem = random_tokens(source, 90)
    before = Footprint.now()
    gate = asyncio.Semaphore(AT_ONCE)

    async def gated(index: int) -> None:
        async with gate:
            leave = source.randrange(8) if source.random() < leaving else None
            await one(house, random_request(source, stem, index), leave)

    async with running(house):
        for start in range(0, count, 500):
            await asyncio.gather(*map(gated, range(start, min(count, start + 500))))
            house.auditor.forget_groups()
        await quiet(house)
        assert not house.engine._streams
        assert not house.engine._groups
        assert len(asyncio.all_tasks()) == before.tasks + 1, "a task was left"
    house.assert_baseline()
    await asyncio.get_running_loop().shutdown_default_executor()
    assert Footprint.now() == before
    return house
