"""Two chatserves that are given one Redis: one has the conversations, whatever becomes of it."""

import asyncio
import signal
from collections.abc import Generator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from chatserve.chat.store.redis_lease import LEASE_SECONDS
from chatserve.chat.store.redis_values import LEASE_KEY
from tests.wiring.chat_client import ReplyView, resume_by_sse, send_by_sse
from tests.wiring.given_redis import DATABASE, PASSWORD, USER, GivenRedis
from tests.wiring.server import ENDLESS, Revived, reviving

OPTIONS = ["--dtype", "float32", "--kv-memory", "64MiB", "--threads", "1"]
OPTIONS += ["--shutdown-timeout", "0.5"]
WAIT_SECONDS_MAX = 120.0
LOOK_SECONDS = 0.05
TURN = {
    "content": "Tell me of the sea.",
    "temperature": 0,
    "repetition_penalty": 1.2,
    "max_tokens": 400,
} | ENDLESS


@dataclass
class Site:
    """One Redis, and chatserves with data folders of their own."""

    redis: GivenRedis
    folder: Path
    stack: ExitStack

    def server(self, name: str) -> Revived:
        """A chatserve that is being started."""
        url = f"unix://{USER}:{PASSWORD}@{self.redis.path}?db={DATABASE}"
        folder = self.folder / name
        folder.mkdir()
        return self.stack.enter_context(reviving(folder, [*OPTIONS, "--redis-url", url]))

    def holder(self) -> int | None:
        """The process that the lease names."""
        found = self.redis.command("GET", LEASE_KEY)
        return None if found is None else int(str(found, "ascii").split(" ")[2])  # type: ignore[call-overload]


@pytest.fixture
def site(tmp_path: Path) -> Generator[Site]:
    redis = GivenRedis(tmp_path / "redis")
    redis.start()
    try:
        with ExitStack() as stack:
            yield Site(redis, tmp_path, stack)
    finally:
        redis.kill()


async def new_view(server: Revived, ask: str) -> ReplyView:
    async with httpx.AsyncClient(base_url=server.server.url, timeout=60) as client:
        made = await client.post("/api/conversations", json={})
        made.raise_for_status()
        return ReplyView(conversation=made.json()["id"], ask=ask)


@asynccontextmanager
async def speaking(server: Revived, view: ReplyView):
    """A reply under way, being read; yields its reader once it speaks."""
    heard = asyncio.Event()
    view.watcher = lambda name: heard.set() if name == "delta" else None
    reading = asyncio.create_task(send_by_sse(server.port, view, TURN))
    try:
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            hearing = asyncio.create_task(heard.wait())
            await asyncio.wait({hearing, reading}, return_when=asyncio.FIRST_COMPLETED)
            assert heard.is_set(), reading
            yield reading
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def to_the_end(server: Revived, view: ReplyView) -> None:
    """Come back to a reply that is under way at this server."""
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        await resume_by_sse(server.port, view)
    assert view.ended


async def until_ready_is(server: Revived, status: int) -> None:
    async with (
        asyncio.timeout(WAIT_SECONDS_MAX),
        httpx.AsyncClient(base_url=server.server.url, timeout=60) as client,
    ):
        while True:
            if (await client.get("/ready")).status_code == status:
                return
            await asyncio.sleep(LOOK_SECONDS)


async def kept_once(server: Revived, view: ReplyView) -> None:
    async with httpx.AsyncClient(base_url=server.server.url, timeout=60) as client:
        whole = (await client.get(f"/api/conversations/{view.conversation}")).json()
    assert [turn["content"] for turn in whole["turns"]] == [TURN["content"], view.text]
    assert whole["turns"][1]["final"] == view.final
    assert whole["replies"] == []


async def test_a_second_server_is_refused_and_takes_over_from_a_killed_one(site: Site) -> None:
    first = site.server("first")
    await first.ready()
    undisturbed, view = await new_view(first, "undisturbed"), await new_view(first, "killed")
    await send_by_sse(first.port, undisturbed, TURN)

    second = site.server("second")
    assert await second.terminated(WAIT_SECONDS_MAX) == 2, "as for a data folder that is taken"
    said = [line for line in second.logs().splitlines() if line.startswith("chatserve: ")]
    (line,) = said
    assert f"process {first.server.process.pid} on " in line
    assert "since 2" in line
    assert PASSWORD not in second.logs()
    assert site.holder() == first.server.process.pid

    async with speaking(first, view):
        first.kill()
    assert view.final is None
    before = view.text
    second.spawn()
    seconds = await second.ready()
    left = int(str(site.redis.command("PTTL", LEASE_KEY)))
    assert 0 < left <= 1_000 * LEASE_SECONDS
    assert site.holder() == second.server.process.pid
    print(f"the second was ready after {seconds:.1f} s, with a killed one's lease in its way")
    assert "waiting up to" in second.server.log.read_text()
    await to_the_end(second, view)
    assert view.text.startswith(before) or view.snapshots
    assert view.text == undisturbed.text
    assert view.epochs == {1, 2}
    await kept_once(second, view)

    # One that ends in order keeps nobody waiting.
    second.server.process.send_signal(signal.SIGTERM)
    assert await second.terminated(WAIT_SECONDS_MAX) == 0
    assert site.holder() is None
    first.spawn()
    await first.ready()
    assert "waiting up to" not in first.server.log.read_text()
    assert "Traceback" not in first.logs() + second.logs()


async def test_one_that_hung_gives_way_and_comes_back_when_the_other_ends(site: Site) -> None:
    first = site.server("first")
    await first.ready()
    view = await new_view(first, "hung")
    async with speaking(first, view) as reading:
        first.server.process.send_signal(signal.SIGSTOP)
        site.redis.command("DEL", LEASE_KEY)  # as if it had hung until it expired
        second = site.server("second")
        await second.ready()
        again = ReplyView(conversation=view.conversation, ask=view.ask)
        await send_by_sse(second.port, again, TURN)
        first.server.process.send_signal(signal.SIGCONT)
        await reading
    assert view.final is None, "its viewer is not told of an end that the other does not know"
    assert view.put_off
    assert site.holder() == second.server.process.pid
    await until_ready_is(first, 503)
    assert "another chatserve, process " in first.server.log.read_text()
    async with httpx.AsyncClient(base_url=first.server.url, timeout=60) as client:
        path = f"/api/conversations/{view.conversation}/turns"
        refused = await client.post(path, json=TURN | {"id": "next"})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
    await to_the_end(first, view)  # it ended at the other, and both show it
    assert (view.text, view.final) == (again.text, again.final)
    await kept_once(second, view)

    other = await new_view(second, "left-over")
    async with speaking(second, other):
        second.kill()
    site.redis.command("DEL", LEASE_KEY)
    await until_ready_is(first, 200)
    assert site.holder() == first.server.process.pid
    await to_the_end(first, other)
    assert other.text == view.text
    await kept_once(first, other)
    assert "Traceback" not in first.logs() + second.logs()
