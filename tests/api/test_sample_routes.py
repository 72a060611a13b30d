"""The stream of samples for an admin: one sampler for all who look, on a clock of the test's."""

import asyncio
import random
from bisect import bisect_left
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from chatserve.api.keys import key_ring
from chatserve.api.sample_routes import SamplesEndpoint
from chatserve.api.sampler import RING_ROWS, Sampler
from chatserve.api.samples import COLUMNS, percentile, read, row
from chatserve.cache.host_pages import HostStatistics
from chatserve.engine.statistics import STEP_SECONDS_BOUNDS, Histogram, TierStatistics
from prefix_store import PageShape
from prefix_store.values import Evictions, Misses, SlabStatistics
from prefix_store.values import StoreStatistics as DiskStatistics
from tests.api.harness import (
    CACHE_STATISTICS,
    ENGINE_STATISTICS,
    PATIENCE_SECONDS,
    STATISTICS,
    FakeHealth,
    Site,
    site,
    until,
)
from tests.api.test_view_routes import KEYS

PATH = "/admin/cache/events"
PAGE_BYTES = 24_576
ENGINE = replace(
    ENGINE_STATISTICS,
    page_bytes=PAGE_BYTES,
    tiers=TierStatistics(host=HostStatistics(total=9, free=4, cached=5, saved_total=20)),
)
SLAB = SlabStatistics(
    shape=PageShape(fingerprint=bytes(32), page_bytes=PAGE_BYTES, page_tokens=16),
    pages=7,
    bytes=200_000,
    slot_bytes=25_000,
    orphans=0,
    hits=3,
    misses=Misses(),
    writes=9,
    touched=0,
    refused=0,
    evictions=Evictions(space=2),
    io_errors=0,
    tombstones=0,
    read_seconds=0.1,
    read_bytes=75_000,
    write_seconds=0.2,
    write_bytes=225_000,
    degraded=None,
)
DISK = DiskStatistics(
    folder=Path("pages"),
    capacity_bytes=10**9,
    bytes=200_000,
    unopened=0,
    reclaimed=0,
    slabs=(SLAB,),
)
FULL = STATISTICS | {"engine": ENGINE, "disk": DISK}


@dataclass
class Time:
    """Stands still until a test moves it."""

    now: float = 1000.0
    sleepers: list[tuple[float, "asyncio.Future[None]"]] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        future = asyncio.get_running_loop().create_future()
        self.sleepers.append((self.now + seconds, future))
        await future

    def move(self, seconds: float) -> None:
        self.now += seconds
        due = [future for at, future in self.sleepers if at <= self.now]
        self.sleepers = [item for item in self.sleepers if item[0] > self.now]
        for future in due:
            if not future.done():
                future.set_result(None)

    @property
    def asleep(self) -> int:
        return sum(not future.done() for _, future in self.sleepers)


class Counted:
    """Statistics that a test changes, and how often somebody asked."""

    def __init__(self) -> None:
        self.now: dict[str, object] = dict(FULL)
        self.asked = 0

    def __call__(self) -> dict[str, object]:
        self.asked += 1
        return self.now


class Stage:
    """A sampler whose time and statistics are the test's."""

    def __init__(self) -> None:
        self.time, self.statistics = Time(), Counted()
        self.sampler = Sampler(
            self.statistics,
            lambda: 5,
            clock=self.time,
            wall=lambda: 1e9 + self.time.now,
            sleep=self.time.sleep,
        )

    async def second(self, viewers: int = 1) -> None:
        """All who look wait for the next sample; it is due now."""
        await until(lambda: self.time.asleep == viewers)
        self.time.move(1.0)


Event = tuple[str, dict[str, Any]]


async def events(answer: httpx.Response) -> AsyncIterator[Event]:
    name = ""
    async for line in answer.aiter_lines():
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, orjson.loads(line[6:])


@asynccontextmanager
async def looking(running: Site) -> AsyncIterator[AsyncIterator[Event]]:
    async with running.client() as client, client.stream("GET", PATH) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield events(answer)


async def test_history_comes_first_and_then_a_sample_a_second() -> None:
    stage = Stage()
    async with (
        asyncio.timeout(PATIENCE_SECONDS),
        site(sampler=stage.sampler) as running,
        looking(running) as seen,
    ):
        assert await anext(seen) == ("history", {"columns": list(COLUMNS), "rows": []})
        name, first = await anext(seen)
        assert (name, first["at"], first["seconds"]) == ("sample", 1e9 + 1000.0, None)
        assert first["streams_open"] == 5
        assert (first["device_pages"], first["device_cached_pages"]) == (100, 30)
        assert (first["host_cached_pages"], first["disk_pages"]) == (5, 7)
        assert (first["store_kind"], first["store_available"]) == ("valkey", True)
        assert first["steps_a_second"] is None
        assert first["step_99th_percentile_seconds"] is None
        await stage.second()
        name, second = await anext(seen)
        assert (name, second["seconds"], second["steps_a_second"]) == ("sample", 1.0, 0.0)


async def test_what_is_counted_is_told_as_growth_a_second() -> None:
    stage = Stage()
    async with (
        asyncio.timeout(PATIENCE_SECONDS),
        site(sampler=stage.sampler) as running,
        looking(running) as seen,
    ):
        await anext(seen)
        await anext(seen)
        stage.statistics.now |= {
            "cache": replace(CACHE_STATISTICS, hit_tokens=164, evicted_by_age_total=4),
            "engine": replace(
                ENGINE,
                steps_total=17,
                step_seconds=Histogram((0.1, 1.0), (5, 12, 0), 4.0),
                tiers=TierStatistics(host=HostStatistics(saved_total=30)),
            ),
            "disk": replace(DISK, slabs=(replace(SLAB, hits=1, read_bytes=25_000),)),
        }
        await stage.second()
        _, told = await anext(seen)
    assert told["hit_tokens_a_second"] == 100.0
    assert told["query_tokens_a_second"] == 0.0
    assert told["device_evicted_by_age_a_second"] == 4.0
    assert told["steps_a_second"] == 10.0
    assert told["step_mean_seconds"] == 0.25
    assert 0.1 < told["step_99th_percentile_seconds"] <= 1.0
    assert told["host_saved_pages_a_second"] == 10.0
    assert told["host_saved_bytes_a_second"] == 10 * PAGE_BYTES
    assert told["disk_read_pages_a_second"] == 1.0, "counted anew since"


async def test_all_viewers_share_one_sample_and_nobody_looks_no_more() -> None:
    stage = Stage()
    async with asyncio.timeout(PATIENCE_SECONDS), site(sampler=stage.sampler) as running:
        async with looking(running) as one:
            await anext(one)
            _, first = await anext(one)
            async with looking(running) as two:
                name, history = await anext(two)
                assert name == "history"
                assert dict(zip(history["columns"], history["rows"][0], strict=True)) == first
                await stage.second(viewers=2)
                assert await anext(one) == await anext(two)
                assert stage.statistics.asked == 2
        await until(lambda: not running.server_state.tasks)
        assert stage.time.asleep == 0
        stage.time.move(600.0)
        assert stage.statistics.asked == 2
        async with looking(running) as late:
            _, history = await anext(late)
            assert history["rows"] == [], "they are too old"
            _, sample = await anext(late)
            assert sample["seconds"] is None, "nobody looked before"


async def test_a_viewer_that_was_slow_gets_what_it_has_not_seen_at_once() -> None:
    stage = Stage()
    async with site(sampler=stage.sampler) as running:
        assert running.port
        frames = SamplesEndpoint(_Desk(FakeHealth()), stage.sampler)._frames()  # pyright: ignore
        assert (await anext(frames)).startswith(b"event: history\n")
        assert (await anext(frames)).startswith(b"event: sample\n")
        for _ in range(3):
            stage.time.move(1.0)
            await stage.sampler.wait(stage.sampler.taken)
        name, data = (await anext(frames)).split(b"\n", 1)
        rows = orjson.loads(data.removeprefix(b"data: "))["rows"]
        assert name == b"event: history"
        assert [each[0] for each in rows] == [1e9 + 1001.0 + place for place in range(3)]
        await frames.aclose()


@dataclass
class _Desk:
    health: FakeHealth


async def test_the_stream_ends_when_the_server_drains() -> None:
    stage = Stage()
    async with asyncio.timeout(PATIENCE_SECONDS), site(sampler=stage.sampler) as running:
        async with looking(running) as seen:
            await anext(seen)
            await anext(seen)
            running.health.draining = True
            await stage.second()
            assert [name async for name, _ in seen] == ["sample"]
        await until(lambda: not running.server_state.tasks)


async def test_while_the_model_loads_there_are_samples_that_say_so() -> None:
    stage = Stage()
    stage.statistics.now = dict.fromkeys(FULL)
    async with (
        asyncio.timeout(PATIENCE_SECONDS),
        site(sampler=stage.sampler) as running,
        looking(running) as seen,
    ):
        await anext(seen)
        _, sample = await anext(seen)
    told = {name for name, value in sample.items() if value is not None}
    assert told == {"at", "streams_open"}


async def test_only_an_admin_may_look(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(KEYS)
    stage = Stage()
    keys = key_ring(key_file=file)
    async with site(sampler=stage.sampler, keys=keys) as running, running.client() as client:
        for key, status in (("key-of-bob", 403), ("nobody", 401)):
            answer = await client.get(PATH, headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == status
    assert stage.statistics.asked == 0


async def test_events_are_small_and_the_ring_has_an_end() -> None:
    stage = Stage()
    stage.statistics.now["engine"] = replace(ENGINE, broken="x" * 5_000)
    for number in range(RING_ROWS + 50):
        big = 10**9 + 7_777_777 * number
        changed = replace(CACHE_STATISTICS, hit_tokens=big, query_tokens=2 * big, sealed_total=big)
        stage.statistics.now["cache"] = changed
        await stage.sampler.wait(stage.sampler.taken)
        stage.time.move(1.0)
    assert len(stage.sampler.since(0)) == 300
    frames = SamplesEndpoint(_Desk(FakeHealth()), stage.sampler)._frames()  # pyright: ignore
    sizes: list[int] = []
    while (frame := await anext(frames)).startswith(b"event: history"):
        sizes.append(len(frame))
    print(f"history {sizes}, sample {len(frame)} bytes")
    assert len(sizes) == 4
    assert max(sizes) < 64 * 1024
    assert len(frame) < 4_096
    await frames.aclose()


@pytest.mark.parametrize("seed", range(20))
def test_a_percentile_lies_in_the_bucket_of_the_true_one(seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    bounds = STEP_SECONDS_BOUNDS

    def histogram(observed: list[float]) -> Histogram:
        counts = [0] * (len(bounds) + 1)
        for each in observed:
            counts[bisect_left(bounds, each)] += 1
        return Histogram(bounds, tuple(counts), sum(observed))

    old = [rng.expovariate(20) for _ in range(rng.randrange(200))]
    new = [rng.lognormvariate(-3, 1.5) for _ in range(rng.randrange(1, 400))]
    share = rng.choice((0.5, 0.9, 0.99))
    found = percentile(histogram(old + new), histogram(old), share)
    true = sorted(new)[max(0, -int(-share * len(new) // 1) - 1)]
    assert found is not None
    place = bisect_left(bounds, true)
    low = bounds[place - 1] if place else 0.0
    assert low <= found <= bounds[min(place, len(bounds) - 1)], (true, found)


@pytest.mark.parametrize(("seconds", "told"), [(1.0, 1.0), (2.5, 2.5), (10.0, None), (90.0, None)])
async def test_after_a_pause_there_is_no_growth(seconds: float, told: float | None) -> None:
    stage = Stage()
    place = COLUMNS.index("seconds")
    for expected in (None, told):
        await stage.sampler.wait(stage.sampler.taken)
        (taken,) = stage.sampler.since(stage.sampler.taken - 1)
        assert taken[place] == expected
        stage.time.move(seconds)


def test_no_step_has_no_percentile_and_a_row_has_every_column() -> None:
    one = Histogram((1.0,), (3, 0), 1.0)
    assert percentile(one, one, 0.99) is None
    assert percentile(one, None, 0.99) is None
    reading = read(FULL, 5.0)
    assert len(row(reading, reading, reading, at=0.0, streams=0)) == len(COLUMNS)
    assert len(set(COLUMNS)) == len(COLUMNS)
