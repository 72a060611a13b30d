"""What a broken server of conversations does to calls: each fault on a real server."""

import asyncio
import contextlib
import gc
import itertools
import logging
import signal
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from chatserve.chat.store.redis_link import RedisLink, place_of
from chatserve.chat.store.redis_store import RedisStore
from chatserve.chat.store.session_store import Unlogged
from chatserve.errors import Conflict, NotFound, SettingsError, StartError, Unavailable
from tests.chat.store.redis_process import (
    RedisProcess,
    SlowWay,
    redis_process,
    redis_store,
    until_available,
)
from tests.chat.store.turns import (
    OWNER,
    conversation,
    ending,
    entry,
    exchange,
    new_turn,
)

ANSWER_SECONDS_MAX = 1.0  # asked for: an answer or a refusal
BACK_SECONDS_MAX = 2.0  # asked for: from a server's return to the first answer


@pytest.fixture
async def process(tmp_path: Path) -> AsyncGenerator[RedisProcess]:
    async with redis_process(tmp_path / "redis") as process:
        yield process


@pytest.fixture
async def store(process: RedisProcess) -> AsyncGenerator[RedisStore]:
    async with redis_store(process.server.url) as store:
        await store.create(conversation())
        await exchange(store, "a")
        yield store


async def refused(store: RedisStore, ask: str = "z") -> float:
    """A turn is refused with a time to come back; after how many seconds."""
    began = time.monotonic()
    with pytest.raises(Unavailable) as refusal:
        await store.accept(new_turn(ask))
    assert refusal.value.retry_after
    return time.monotonic() - began


class LoopLag:
    """The longest that the loop was held, in a block. The collector rests meanwhile: what it has to
    look through is what the tests before this one left, and the server's own looks are bounded
    (tests/wiring/test_collector.py)."""

    def __init__(self) -> None:
        self.seconds = 0.0  # of work
        self.looks = 0  # few where the loop itself waited for something

    async def __aenter__(self) -> "LoopLag":
        gc.collect()
        gc.disable()
        self._task = asyncio.create_task(self._look())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        gc.enable()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _look(self) -> None:
        while True:
            began = time.thread_time()  # of this thread: other processes' load is no lag of ours
            await asyncio.sleep(0.001)
            self.seconds = max(self.seconds, time.thread_time() - began)
            self.looks += 1


async def test_a_hung_server_refuses_in_time_and_comes_back(
    process: RedisProcess, store: RedisStore
) -> None:
    process.signal(signal.SIGSTOP)
    async with LoopLag() as lag:
        seconds = await asyncio.gather(*[refused(store, f"z{number}") for number in range(100)])
    assert max(seconds) < ANSWER_SECONDS_MAX + 0.5  # on a machine that is busy with other tests
    assert lag.seconds < 0.2
    assert lag.looks > 20, "others went on while it was waited for an answer"
    assert await refused(store) < 0.2, "known to be away: refused at once"
    assert not store.statistics().available
    assert store.statistics().failures >= 101
    process.signal(signal.SIGCONT)
    kept, seconds_away = await until_available(lambda: store.get(OWNER, "c"))
    assert kept.leaf
    assert seconds_away < BACK_SECONDS_MAX
    assert store.statistics().available


async def test_a_call_that_was_refused_can_be_sent_again(
    process: RedisProcess, store: RedisStore
) -> None:
    process.signal(signal.SIGSTOP)
    await refused(store, "b")  # the server has read it, and does it when it goes on
    process.signal(signal.SIGCONT)
    accepted, _ = await until_available(lambda: store.accept(new_turn("b")))
    assert not accepted.known
    assert [turn.id for turn in accepted.path] == ["a", "c.a", "b"]
    assert await store.running() == ("c.b",)


async def test_what_was_acknowledged_survives_a_kill(
    process: RedisProcess, store: RedisStore
) -> None:
    accepted = await store.accept(new_turn("b"))
    await store.append([entry("c.b", 3, "abc")])
    before = await store.tree(OWNER, "c")
    await process.kill()
    assert await refused(store) < ANSWER_SECONDS_MAX
    await process.start()
    tree, seconds = await until_available(lambda: store.tree(OWNER, "c"))
    assert seconds < BACK_SECONDS_MAX
    assert tree == before
    assert await store.running() == ("c.b",)
    assert await store.log("c.b") == (entry("c.b", 3, "abc"),)
    _, path, record = await store.resume("c.b")  # the scripts are loaded again
    assert path == accepted.path
    assert record.logged == (3,)


async def test_connections_that_were_reset_are_not_noticed(
    process: RedisProcess, tmp_path: Path
) -> None:
    way = SlowWay(tmp_path / "way", process.server.path)
    async with way, redis_store(f"unix://{way.path}") as store:
        await store.create(conversation())
        for number in range(5):
            way.reset()
            await exchange(store, f"a{number}")
        assert store.statistics().failures == 0


async def test_a_slow_way_is_slow_and_a_slower_one_refuses(
    process: RedisProcess, tmp_path: Path
) -> None:
    way = SlowWay(tmp_path / "way", process.server.path)
    async with way, redis_store(f"unix://{way.path}") as store:
        await store.create(conversation())
        way.seconds = 0.5
        async with LoopLag() as lag:
            accepted = await store.accept(new_turn("a"))
            await store.end(ending(accepted))
        assert lag.seconds < 0.05
        way.seconds = 1.5
        assert await refused(store, "b") < ANSWER_SECONDS_MAX + 0.5
        way.seconds = 0.0
        again, _ = await until_available(lambda: store.accept(new_turn("b")))
        assert [turn.id for turn in again.path] == ["a", "c.a", "b"]


async def test_of_many_callers_one_looks_for_the_server(
    process: RedisProcess, store: RedisStore
) -> None:
    await process.kill()
    await refused(store)
    link = RedisLink(process.server.url, clock=lambda: now, draw=lambda: 1.0)
    tries: list[float] = []
    answers = link._answers  # pyright: ignore[reportPrivateUsage]

    async def counted(commands: object) -> list[object]:
        tries.append(now)
        return await answers(commands)  # type: ignore[arg-type]

    link._answers = counted  # type: ignore[method-assign]
    async with link:
        now = 0.0
        for tick in range(400):
            now = tick / 100
            calls = [link.run([("PING",)]) for _ in range(5)]
            assert all(
                isinstance(outcome, Unavailable)
                for outcome in await asyncio.gather(*calls, return_exceptions=True)
            )
    # The first five found it away; then after 0.1, 0.2, 0.4 and 0.8 s, then each 0.8 s.
    assert len(tries) - 5 <= 9
    pauses = [later - sooner for sooner, later in itertools.pairwise(tries)]
    assert max(pauses) <= 0.85


async def test_flushed_data_is_not_found_and_new_data_is_kept(
    process: RedisProcess, store: RedisStore
) -> None:
    await store.accept(new_turn("b"))
    await process.command("FLUSHALL")
    for call in (store.get(OWNER, "c"), store.accept(new_turn("d")), store.reply(OWNER, "c.b")):
        with pytest.raises(NotFound):
            await call
    assert await store.append([entry("c.b", 1, "x")]) == Unlogged(gone=frozenset({"c.b"}))
    assert (await store.list(OWNER)).conversations == ()
    assert await store.running() == ()
    await store.create(conversation("d"))
    assert await exchange(store, "a", of="d") == "d.a"
    assert [each.id for each in (await store.list(OWNER)).conversations] == ["d"]


async def test_flushed_scripts_are_loaded_again(process: RedisProcess, store: RedisStore) -> None:
    for ask in ("b", "d"):
        await process.command("SCRIPT", "FLUSH")
        await exchange(store, ask)
    assert len((await store.tree(OWNER, "c"))[1]) == 6
    assert store.statistics().failures == 0


@pytest.mark.parametrize(
    ("fault", "cure"),
    [
        ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0"),
        ("CONFIG SET min-replicas-to-write 1", "CONFIG SET min-replicas-to-write 0"),
        ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE"),
    ],
    ids=["out of memory", "too few replicas", "read-only"],
)  # fmt: skip
async def test_a_server_that_takes_no_writes_refuses_turns_and_is_read(
    process: RedisProcess, store: RedisStore, fault: str, cure: str
) -> None:
    before = await store.tree(OWNER, "c")
    await process.command(*fault.split())
    assert await refused(store, "b") < ANSWER_SECONDS_MAX
    assert await store.tree(OWNER, "c") == before, "nothing of a refused turn is there"
    assert store.statistics().available
    await process.command(*cure.split())
    accepted = await store.accept(new_turn("b"))
    assert not accepted.known


async def test_a_key_of_a_wrong_type_refuses_its_conversation_only(
    process: RedisProcess, store: RedisStore
) -> None:
    await store.create(conversation("d"))
    whole = await store.tree(OWNER, "c")
    for part in ("meta", "parents", "turns", "ids", "asks", "replies", "running", "ended"):
        key = f"cs:{{c}}:{part}"
        await process.command("DEL", "kept")
        await process.command("COPY", key, "kept")
        await process.command("SET", key, "wrong")
        await refused(store, f"z{part}")
        await process.command("DEL", key)
        await process.command("COPY", "kept", key)
        assert await store.tree(OWNER, "c") == whole, f"a refused turn left something: {part}"
    assert await exchange(store, "a", of="d") == "d.a"
    await process.command("SET", "cs:{c}:log:c.z", "wrong")
    await refused(store)
    await process.command("HSET", "cs:{c}:turns", "a", "damaged")
    await refused(store)
    for call in (store.tree(OWNER, "c"), store.resume("c.z")):
        with pytest.raises((Unavailable, NotFound)):
            await call
    await process.command("SET", "cs:running", "wrong")
    with pytest.raises(Unavailable):
        await store.running()
    await process.command("SET", f"cs:owner:{OWNER}", "wrong")
    with pytest.raises(Unavailable):
        await store.list(OWNER)
    await store.delete(OWNER, "c")  # what is damaged can be deleted


async def test_a_conversation_partly_gone_is_no_traceback(
    process: RedisProcess, store: RedisStore
) -> None:
    await store.accept(new_turn("b"))
    for part in ("turns", "parents", "replies", "meta"):
        await process.command("DEL", f"cs:{{c}}:{part}")
        for call in (
            store.tree(OWNER, "c"),
            store.reply(OWNER, "c.a"),
            store.resume("c.b"),
            store.list(OWNER, search="x"),
            store.accept(new_turn(f"after {part}")),
        ):
            with contextlib.suppress(Unavailable, NotFound, Conflict):
                await call


async def test_indexes_are_mended_where_a_crash_left_them(
    process: RedisProcess, store: RedisStore
) -> None:
    await process.command("SADD", "cs:running", "c.nowhere", "gone.reply", "c.a")
    index = f"cs:owner:{OWNER}"
    await process.command("ZADD", index, "5", "gone")
    await process.command("ZADD", index, "0.5", "c")  # lags behind its conversation
    await store.create(conversation("d", updated=3.0))
    assert await store.running() == ()
    assert await process.command("SMEMBERS", "cs:running") == set()
    listed = [each.id for each in (await store.list(OWNER)).conversations]
    assert sorted(listed) == ["c", "d"]
    assert [each.id for each in (await store.list(OWNER)).conversations] == ["c", "d"]
    assert await process.command("ZRANGE", index, "0", "-1") == [b"d", b"c"]


async def test_a_cancelled_call_leaves_its_connection_to_nobody(store: RedisStore) -> None:
    for _ in range(200):
        call = asyncio.create_task(store.tree(OWNER, "c"))
        for _ in range(3):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert (await store.get(OWNER, "c")).id == "c", "an answer of its own"
    assert store.statistics().available


async def test_a_long_conversation_does_not_hold_the_loop(store: RedisStore) -> None:
    for number in range(30):
        await exchange(store, f"b{number}", "word " * 20_000)
    async with LoopLag() as lag:
        tree = await store.tree(OWNER, "c")
        accepted = await store.accept(new_turn("z"))
        assert (await store.list(OWNER, search="absent")).conversations == ()
    assert len(tree[1]) == 62
    assert len(accepted.path) == 63
    assert lag.seconds < 0.05


# Given servers ---------------------------------------------------------------------------------


async def test_our_own_server_is_durable_and_raises_no_warning(
    process: RedisProcess, store: RedisStore
) -> None:
    facts = await store.check()
    assert facts.warnings == ()
    assert facts.durable
    assert store.statistics().durable
    assert store.statistics().kind == facts.kind
    await process.command("CONFIG", "SET", "appendonly", "no")
    await process.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    facts = await store.check()
    assert not facts.durable
    assert ["noeviction" in facts.warnings[0], "appendonly" in facts.warnings[1]] == [True, True]


async def test_passwords_are_used_and_never_told(
    process: RedisProcess, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await process.command("CONFIG", "SET", "requirepass", "pass-word")
    path = process.server.path
    async with redis_store(f"unix://:pass-word@{path}") as store:
        await store.check()
        await store.create(conversation())
    async with redis_store(f"unix://:wrong-word@{path}") as store:
        with pytest.raises(StartError) as refusal:
            await store.check()
        with pytest.raises(Unavailable):
            await store.create(conversation())
    async with RedisLink(f"unix://:pass-word@{path}") as link:
        await link.run([("CONFIG", "SET", "requirepass", "")])  # the fixture has none
    async with redis_store(f"unix://:needless@{path}") as store:
        with pytest.raises(StartError):
            await store.check()
    told = caplog.text + str(refusal.value)
    assert "wrong-word" not in told
    assert "pass-word" not in told


@pytest.mark.parametrize(
    "url",
    [
        "http://host", "redis", "", "redis://host:port", "redis://:hid-den@host:99999",
        "redis://:hid-den@host/0?socket_timeout=long", "rediss://:hid-den@[::1",
    ],
)  # fmt: skip
def test_a_url_that_is_none_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        RedisLink(url)
    assert "hid-den" not in str(refusal.value)
    assert refusal.value.__cause__ is None


def test_a_place_has_no_secrets() -> None:
    assert place_of("rediss://user:hid-den@example.test:7000/0") == "example.test:7000"
    assert place_of("redis://user:hid-den@/") == "localhost:6379"
    assert place_of("unix://:hid-den@/run/redis.sock?db=1") == "/run/redis.sock"


async def test_old_servers_and_clusters_are_refused(process: RedisProcess) -> None:
    async with RedisLink(process.server.url) as link:
        (answer,) = await link.run([("INFO",)])
        assert isinstance(answer, bytes)
        for change in (b"redis_version:6.0.16", b"redis_version:", b"redis_mode:cluster"):

            async def told(_: object, change: bytes = change) -> list[object]:
                return [answer + change]

            link._answers = told  # type: ignore[method-assign]
            with pytest.raises(StartError):
                await link.facts()
