"""One server at a time: who has the lease, who waits for it, and who finds that it is gone."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from chatserve.chat.store.redis_lease import (
    LEASE_SECONDS,
    LOOK_SECONDS,
    RENEW_SECONDS,
    RedisLease,
    described,
    held,
)
from chatserve.chat.store.redis_link import RedisLink
from chatserve.chat.store.redis_store import RedisStore
from chatserve.chat.store.redis_values import LEASE_KEY
from chatserve.chat.store.session_store import Elsewhere, Superseded, Unlogged
from chatserve.errors import StartError
from tests.chat.store.redis_process import RedisProcess
from tests.chat.store.turns import conversation, ending, entry, new_turn

WAIT_SECONDS_MAX = 20.0


@dataclass
class Steps:
    """A clock that goes on when somebody sleeps by it. on_sleep: is told before each time."""

    now: float = 0.0
    on_sleep: Callable[[float], object] = lambda _: None
    slept: list[float] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        found = self.on_sleep(seconds)
        if asyncio.iscoroutine(found):
            await found
        self.now += seconds


@dataclass
class Ticks:
    """Sleeps that end when the test says so."""

    waiting: "asyncio.Queue[asyncio.Future[None]]" = field(default_factory=asyncio.Queue)

    async def sleep(self, seconds: float) -> None:
        assert seconds == RENEW_SECONDS
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self.waiting.put(over)
        await over

    async def renew(self) -> None:
        """One renewal, from its beginning to its end."""
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            (await self.waiting.get()).set_result(None)
            following = await self.waiting.get()
        self.waiting.put_nowait(following)


@pytest.fixture
async def link(process: RedisProcess) -> AsyncGenerator[RedisLink]:
    await process.command("FLUSHALL")
    async with RedisLink(process.server.url) as link:
        yield link


async def value(process: RedisProcess) -> bytes | None:
    found = await process.command("GET", LEASE_KEY)
    assert found is None or isinstance(found, bytes)
    return found


@asynccontextmanager
async def other(link: RedisLink) -> AsyncGenerator[RedisLease]:
    """Another process's, taken and not renewed."""
    lease = RedisLease(link)
    await lease.take()
    yield lease
    await lease.release()


async def test_it_is_taken_expires_and_is_given_back(
    process: RedisProcess, link: RedisLink
) -> None:
    lease = RedisLease(link)
    async with held(lease):
        found = await value(process)
        assert found is not None
        assert found.startswith(lease.id.encode() + b" ")
        left = await process.command("PTTL", LEASE_KEY)
        assert 0 < int(str(left)) <= 1_000 * LEASE_SECONDS
    assert await value(process) is None


async def test_an_error_of_the_block_gives_it_back(process: RedisProcess, link: RedisLink) -> None:
    with pytest.raises(ExceptionGroup) as raised:
        async with held(RedisLease(link)):
            raise ZeroDivisionError
    assert raised.group_contains(ZeroDivisionError, depth=1)
    assert await value(process) is None


async def test_whoever_lives_is_named_and_left_alone(
    process: RedisProcess, link: RedisLink, caplog: pytest.LogCaptureFixture
) -> None:
    async with other(link) as first:
        steps = Steps()

        async def renew_once(seconds: float) -> None:
            if steps.now > 1.0:
                await first.take()

        steps.on_sleep = renew_once
        second = RedisLease(link, clock=steps.clock, sleep=steps.sleep)
        with pytest.raises(StartError) as refusal:
            await second.take()
        assert steps.now < LEASE_SECONDS, "refused as soon as it is seen to live"
        found = await value(process)
        assert found is not None
        assert found.startswith(first.id.encode())
        told = described(found)
        assert told in refusal.value.message
        assert "\n" not in refusal.value.message
        (line,) = caplog.messages
        assert told in line


async def test_whoever_died_is_waited_for(process: RedisProcess, link: RedisLink) -> None:
    async with other(link):
        steps = Steps()

        async def expire(seconds: float) -> None:
            if steps.now == 4 * LOOK_SECONDS:
                await process.command("PEXPIRE", LEASE_KEY, 0)

        steps.on_sleep = expire
        second = RedisLease(link, clock=steps.clock, sleep=steps.sleep)
        await second.take()
        assert steps.now == 5 * LOOK_SECONDS
        found = await value(process)
        assert found is not None
        assert found.startswith(second.id.encode())


async def test_a_dead_ones_lease_that_does_not_expire_is_taken_over(
    process: RedisProcess, link: RedisLink
) -> None:
    """As where the server's clock was set back."""
    async with other(link):
        await process.command("PEXPIRE", LEASE_KEY, 3_600_000)
        steps = Steps()
        second = RedisLease(link, clock=steps.clock, sleep=steps.sleep)
        await second.take()
        assert LEASE_SECONDS <= steps.now <= LEASE_SECONDS + 2 * LOOK_SECONDS
        left = await process.command("PTTL", LEASE_KEY)
        assert 0 < int(str(left)) <= 1_000 * LEASE_SECONDS


async def test_nobody_is_held_for_dead_while_redis_does_not_answer(
    process: RedisProcess, link: RedisLink
) -> None:
    async with other(link):
        await process.command("PEXPIRE", LEASE_KEY, 3_600_000)
        steps, answers_at = Steps(), 0.75 * LEASE_SECONDS

        async def refuse_for_a_while(seconds: float) -> None:
            if steps.now == 0.0:
                await process.command("ACL", "SETUSER", "default", "-evalsha")
            elif steps.now == answers_at:
                await process.command("ACL", "SETUSER", "default", "+evalsha")

        steps.on_sleep = refuse_for_a_while
        second = RedisLease(link, clock=steps.clock, sleep=steps.sleep)
        try:
            await second.take()
        finally:
            await process.command("ACL", "SETUSER", "default", "+evalsha")
        assert steps.now >= answers_at + LEASE_SECONDS


async def test_a_redis_that_falls_silent_while_a_lease_is_waited_for_is_no_living_server(
    process: RedisProcess, link: RedisLink
) -> None:
    async with other(link):
        steps = Steps()

        async def fall_silent(seconds: float) -> None:
            if steps.now == 0.0:
                await process.command("ACL", "SETUSER", "default", "-evalsha")

        steps.on_sleep = fall_silent
        second = RedisLease(link, clock=steps.clock, sleep=steps.sleep)
        try:
            with pytest.raises(StartError) as refusal:
                await second.take()
        finally:
            await process.command("ACL", "SETUSER", "default", "+evalsha")
        assert "does not answer any more" in str(refusal.value)


async def test_one_that_is_missing_is_taken_again(
    process: RedisProcess, link: RedisLink, caplog: pytest.LogCaptureFixture
) -> None:
    ticks = Ticks()
    lease = RedisLease(link, sleep=ticks.sleep)
    async with held(lease):
        await ticks.renew()
        assert not caplog.messages
        await process.command("FLUSHALL")
        await ticks.renew()
        found = await value(process)
        assert found is not None
        assert found.startswith(lease.id.encode())
        assert not lease.lost
        (line,) = caplog.messages
        assert "taken again" in line


async def test_one_that_is_lost_is_told_and_is_ours_again_when_the_other_lets_go(
    process: RedisProcess, link: RedisLink, caplog: pytest.LogCaptureFixture
) -> None:
    ticks = Ticks()
    lease = RedisLease(link, sleep=ticks.sleep)
    store = RedisStore(link, lease)
    async with held(lease):
        back = asyncio.create_task(store.handed_back())
        await process.command("DEL", LEASE_KEY)  # we hung for too long
        async with other(link) as second:
            for _ in range(2):
                await ticks.renew()
                assert lease.lost
                assert not store.statistics().ours
            found = await value(process)
            assert found is not None
            assert found.startswith(second.id.encode()), "it is left alone"
            (error,) = [each for each in caplog.records if each.levelno == logging.ERROR]
            assert described(found) in error.message
            assert not back.done()
        await ticks.renew()
        assert store.statistics().ours
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            await back


async def test_who_releases_late_takes_nothing_from_the_next(
    process: RedisProcess, link: RedisLink
) -> None:
    first = RedisLease(link)
    await first.take()
    await process.command("DEL", LEASE_KEY)
    async with other(link) as second:
        await first.release()
        found = await value(process)
        assert found is not None
        assert found.startswith(second.id.encode())


async def test_a_store_that_does_not_answer_is_no_other_server(tmp_path: Path) -> None:
    async with RedisLink(f"unix://{tmp_path}/nobody.sock") as link:
        await RedisLease(link).take()


async def test_the_one_without_it_begins_nothing_and_what_it_has_is_closed_to_it(
    process: RedisProcess, link: RedisLink
) -> None:
    first, second = RedisLease(link), RedisLease(link)
    await first.take()
    ours, theirs = RedisStore(link, first), RedisStore(link, second)
    await ours.create(conversation("c"))
    await ours.create(conversation("d"))
    accepted, other_accepted = (
        await ours.accept(new_turn("a")),
        await ours.accept(new_turn("b", of="d")),
    )
    assert await ours.append([entry("c.a", 3, "abc")]) == Unlogged()
    await process.command("DEL", LEASE_KEY)
    await second.take()
    for begun in (ours.resume("c.a"), ours.accept(new_turn("z", of="d", at_leaf=False))):
        with pytest.raises(Elsewhere) as refusal:
            await begun
        assert refusal.value.retry_after
    assert (await ours.accept(new_turn("a"))).record.id == "c.a", "what is known is found"
    assert (await ours.reply("owner", "c.a")).epoch == 1
    _, _, record = await theirs.resume("c.a")
    assert record.epoch == 2
    # What the other has not taken up is still ours to end.
    late = [entry("c.a", 5, "de"), entry("d.b", 2, "xy")]
    assert await ours.append(late) == Unlogged(superseded=frozenset({"c.a"}))
    with pytest.raises(Superseded):
        await ours.end(ending(accepted))
    await ours.end(ending(other_accepted))
    assert await theirs.running() == ("c.a",)
    assert "".join(each.text for each in await theirs.log("c.a")) == "abc"


async def test_without_a_lease_of_its_own_a_store_gives_way_to_one(
    process: RedisProcess, link: RedisLink
) -> None:
    """Our own server in the data folder, found by somebody else's --redis-url."""
    alone = RedisStore(link)
    await alone.create(conversation())
    async with other(link):
        with pytest.raises(Elsewhere):
            await alone.accept(new_turn("a"))
    await alone.accept(new_turn("a"))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (b"id 3 17 0 host", "process 17 on host, since 1970-01-01 00:00:00 UTC"),
        (b"id 3 17 0 ho\x1b[2J\nst", "process 17 on ho[2Jst, since 1970-01-01 00:00:00 UTC"),
        (b"\xff", "an unknown process"),
        (b"id 3 17 soon host", "an unknown process"),
    ],
)
def test_a_foreign_value_is_shown_as_plain_text(value: bytes, told: str) -> None:
    assert described(value) == told
