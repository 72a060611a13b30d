"""After mixed load with clients that leave, the server holds what it held before."""

import random
from pathlib import Path

import pytest

from tests.wiring.load import holdings, mixed_load
from tests.wiring.server import running

OPTIONS = ["--kv-memory", "16MiB", "--max-queued", "10000", "--log-level", "warning"]


async def _load_and_compare(folder: Path, requests: int) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    with running(folder, OPTIONS) as server:
        await mixed_load(server, requests=60, seed=seed)  # threads and pools come into being
        before = holdings(server)
        memory = server.metric("process_resident_memory_bytes")
        ends = await mixed_load(server, requests=requests, seed=seed + 1)
        after = holdings(server)
        grown = server.metric("process_resident_memory_bytes") - memory
        print(f"ends {dict(ends)}, resident memory grew by {grown / 2**20:.1f} MiB")
        assert after == before
        assert after.named_pages_without_owner
        assert set(ends) <= {"200", "left"}
        assert ends["left"] >= requests // 40, "too few left for this to mean anything"
        assert server.cache()["engine"]["failed_steps_total"] == 0
        assert "Traceback" not in server.log.read_text()


async def test_a_mixed_load_leaves_nothing_behind(tmp_path: Path) -> None:
    await _load_and_compare(tmp_path, 400)


@pytest.mark.soak
@pytest.mark.parametrize("requests", [10_000])
async def test_a_long_mixed_load_leaves_nothing_behind(tmp_path: Path, requests: int) -> None:
    await _load_and_compare(tmp_path, requests)
