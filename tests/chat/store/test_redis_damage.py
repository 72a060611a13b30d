"""What a damaged conversation does to others: nothing."""

from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from chatserve.chat.store.redis_store import RedisStore
from chatserve.chat.store.session_store import Unlogged, Unreadable
from chatserve.errors import Unavailable
from tests.chat.store.redis_process import RedisProcess, redis_store
from tests.chat.store.turns import OWNER, conversation, ending, entry, exchange, new_turn

PARTS = ("meta", "parents", "turns", "ids", "asks", "replies", "running", "ended")


@pytest.fixture
async def store(process: RedisProcess) -> AsyncGenerator[RedisStore]:
    """Conversations c and d, each with a reply that runs: c.b and d.b."""
    await process.command("FLUSHALL")
    async with redis_store(process.server.url) as store:
        for name in ("c", "d"):
            await store.create(conversation(name))
            await exchange(store, "a", of=name)
            await store.accept(new_turn("b", of=name))
        yield store


@pytest.mark.parametrize("part", PARTS)
async def test_all_calls_on_it_say_so_and_others_are_whole(
    process: RedisProcess, store: RedisStore, part: str
) -> None:
    await process.command("SET", f"cs:{{c}}:{part}", "wrong")
    with pytest.raises(Unreadable) as refusal:
        await store.accept(new_turn("z", at_leaf=False, parent=None))
    assert refusal.value.retry_after
    assert (refusal.value.status, refusal.value.code) == (503, "unavailable")
    assert "c.b" in await store.running() or part != "running"
    assert "d.b" in await store.running()
    listed = [each.id for each in (await store.list(OWNER)).conversations]
    assert "d" in listed
    found = [each.id for each in (await store.list(OWNER, search="a")).conversations]
    assert "d" in found
    assert await store.append([entry("c.b", 3, "abc"), entry("d.b", 3, "abc")]) == Unlogged()
    assert await store.log("d.b") == (entry("d.b", 3, "abc"),)
    assert store.statistics().available


async def test_a_damaged_log_stops_no_other_and_not_its_replys_end(
    process: RedisProcess, store: RedisStore
) -> None:
    accepted = await store.accept(new_turn("z", of="d", at_leaf=False, parent="d.a"))
    await process.command("SET", f"cs:{{d}}:log:{accepted.record.id}", "wrong")
    entries = [entry(accepted.record.id, 3, "abc"), entry("c.b", 3, "abc")]
    for _ in range(2):
        assert await store.append(entries) == Unlogged()
    assert await store.log("c.b") == (entry("c.b", 3, "abc"),)
    with pytest.raises(Unreadable):
        await store.resume(accepted.record.id)
    await store.end(ending(accepted))
    assert (await store.reply(OWNER, accepted.record.id)).final is not None


async def test_an_end_that_cannot_be_kept_changes_nothing(
    process: RedisProcess, store: RedisStore
) -> None:
    accepted = await store.accept(new_turn("b"))  # once more: its first answer was lost
    await process.command("COPY", "cs:{c}:turns", "kept")
    await process.command("SET", "cs:{c}:turns", "wrong")
    with pytest.raises(Unreadable):
        await store.end(ending(accepted))
    await process.command("DEL", "cs:{c}:turns")
    await process.command("COPY", "kept", "cs:{c}:turns")
    ended = await store.end(ending(accepted))
    assert ended.leaf == "c.b", "once it was mended"


async def test_an_index_of_a_wrong_type_is_no_conversations_fault(
    process: RedisProcess, store: RedisStore
) -> None:
    await process.command("SET", "cs:running", "wrong")
    with pytest.raises(Unavailable) as refusal:
        await store.accept(new_turn("z", of="c", at_leaf=False, parent=None))
    assert not isinstance(refusal.value, Unreadable), "it may have been accepted: look for it"


@pytest.mark.parametrize("search", [None, "word"])
async def test_scores_that_lag_leave_nobody_out_of_the_next_part(
    process: RedisProcess, store: RedisStore, search: str | None
) -> None:
    """As after a crash: what is looked at ahead of the next part is not moved before it."""
    await process.command("FLUSHALL")
    names = [f"n{number}" for number in range(7)]
    for number, name in enumerate(names):
        await store.create(replace(conversation(name, updated=100.0 + number), title="word"))
        await process.command("ZADD", f"cs:owner:{OWNER}", str(number), name)
    for wanted in (1, 2, 3):
        listed: list[str] = []
        after = None
        while True:
            page = await store.list(OWNER, after=after, limit=wanted, search=search)
            listed += [each.id for each in page.conversations]
            after = page.next
            if after is None:
                break
        assert sorted(listed) == names
        for number, name in enumerate(names):
            await process.command("ZADD", f"cs:owner:{OWNER}", str(number), name)
