"""After mixed load with clients that leave, the server holds what it held before."""

import asyncio
import random
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.wiring.load import PLAIN, holdings, mixed_load
from tests.wiring.server import MODEL, running

OPTIONS = ["--max-queued", "10000", "--log-level", "warning"]
LARGE, TINY = "16MiB", "1MiB"  # 409 pages; and 25, which two or three requests fill
# What a run of 10,000 may grow by in its second half: what 100,000 grew by at that pace is in
# docs/log.md (44 MiB), and a busy machine's allocator is not exact.
GROWTH_MIB_MAX = 32.0


async def _load_and_compare(folder: Path, requests: int, memory: str) -> float:
    """Returns how many MiB the server grew by in the second half."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    with running(folder, [*OPTIONS, "--kv-memory", memory]) as server:
        await mixed_load(server, requests=60, seed=seed)  # threads and pools come into being
        before = holdings(server)
        resident = [server.metric("process_resident_memory_bytes") / 2**20]
        ends: Counter[str] = Counter()
        for half in (1, 2):
            ends += await mixed_load(server, requests=requests // 2, seed=seed + half)
            after = holdings(server)
            resident.append(server.metric("process_resident_memory_bytes") / 2**20)
        shown = ", ".join(f"{each:.1f}" for each in resident)
        print(f"ends {dict(ends)}, resident memory {shown} MiB")
        assert after == before
        assert after.named_pages_without_owner
        assert set(ends) <= {"200", "left"}
        assert ends["left"] >= requests // 40, "too few left for this to mean anything"
        engine = server.cache()["engine"]
        assert engine["failed_steps_total"] == 0
        assert engine["recoveries_total"] == 0, "a fault of ours"
        assert engine["finished_total"]["error"] == 0  # type: ignore[index]
        assert "Traceback" not in server.log.read_text()
    return resident[2] - resident[1]


@pytest.mark.parametrize("memory", [LARGE, TINY])
async def test_a_mixed_load_leaves_nothing_behind(tmp_path: Path, memory: str) -> None:
    await _load_and_compare(tmp_path, 400, memory)


async def test_who_is_queued_behind_one_who_leaves_is_served(tmp_path: Path) -> None:
    """Alone in a pool that does not hold both, so that nobody runs while the other's pages go."""
    options = [*OPTIONS, "--kv-memory", TINY]
    common = {"model": MODEL, "ignore_eos": True, "temperature": 0}
    with running(tmp_path, options) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            for number in range(6):
                long = common | {"prompt": [20 + number] * 300, "max_tokens": 90, "stream": True}
                behind = common | {"prompt": [50 + number] * 200, "max_tokens": 4}
                async with client.stream("POST", PLAIN, json=long) as leaving:
                    await anext(leaving.aiter_lines())
                    waiting = asyncio.create_task(client.post(PLAIN, json=behind))
                    while not (waiting.done() or server.cache()["engine"]["waiting"]):  # noqa: ASYNC110
                        await asyncio.sleep(0)
                assert (await waiting).status_code == 200
        state = server.wait_for("idle")["engine"]
        assert state["recoveries_total"] == 0
        assert state["finished_total"]["abort"] >= 3, "too few left in mid-reply"  # type: ignore[index]


@pytest.mark.soak
@pytest.mark.parametrize("memory", [LARGE, TINY])
async def test_a_long_mixed_load_leaves_nothing_behind(tmp_path: Path, memory: str) -> None:
    assert await _load_and_compare(tmp_path, 10_000, memory) <= GROWTH_MIB_MAX
