"""Deleting a conversation: the names of its pages outlive it until they are forgotten."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from chatserve.chat.store.redis_link import RedisLink
from chatserve.chat.store.redis_rewrite import RedisRewrite
from chatserve.chat.store.session_store import SessionStore
from chatserve.errors import NotFound, Unavailable
from tests.chat.store.redis_process import RedisProcess, redis_process, redis_store
from tests.chat.store.turns import OTHER, OWNER, conversation, ending, exchange, new_turn

TEXT = "an otter of Ullswater"


def names(*numbers: int) -> tuple[bytes, ...]:
    return tuple(number.to_bytes(32, "big") for number in numbers)


async def test_names_of_all_endings_are_given_until_the_deletion_is_over(
    store: SessionStore,
) -> None:
    await store.create(conversation())
    for ask, those in (("a", names(1, 2)), ("b", names(2, 3)), ("c", ())):
        accepted = await store.accept(new_turn(ask))
        kept = replace(ending(accepted), names=those)
        await store.end(kept)
        await store.end(replace(kept, names=names(9)))  # an ended reply stays as it ended
    await store.accept(new_turn("d"))
    assert await store.named(OWNER, "c") == {"c.a", "c.b", "c.c"}
    with pytest.raises(NotFound):
        await store.named(OTHER, "c")
    assert await store.deletions() == ()
    assert await store.forgotten_names("c") == frozenset()
    with pytest.raises(NotFound):
        await store.delete(OTHER, "c", names=names(7))
    assert await store.deletions() == ()
    assert await store.delete(OWNER, "c", names=names(3, 4)) == ("c.d",)
    assert await store.deletions() == ((OWNER, "c"),)
    assert await store.forgotten_names("c") == {*names(1, 2, 3, 4)}
    for call in (store.get(OWNER, "c"), store.named(OWNER, "c"), store.delete(OWNER, "c")):
        with pytest.raises(NotFound):
            await call
    for _ in range(2):
        await store.end_deletion("c")
        assert await store.deletions() == ()
        assert await store.forgotten_names("c") == frozenset()


async def test_an_admin_is_told_the_owner_and_all_names(store: SessionStore) -> None:
    await store.create(conversation())
    for ask, those in (("a", names(1, 2)), ("b", names(2, 3)), ("c", ())):
        accepted = await store.accept(new_turn(ask))
        await store.end(replace(ending(accepted), names=those))
    assert await store.owner("c") == OWNER
    assert await store.page_names("c") == {*names(1, 2, 3)}
    assert await store.page_names("other") == frozenset()
    await store.delete(OWNER, "c")
    assert await store.page_names("c") == frozenset()
    for name in ("c", "other"):
        with pytest.raises(NotFound):
            await store.owner(name)


async def test_a_conversation_that_comes_back_meanwhile_keeps_its_own_names(
    store: SessionStore,
) -> None:
    await store.create(conversation())
    await store.delete(OWNER, "c", names=names(1))
    await store.create(conversation())
    await exchange(store, "a")
    assert await store.forgotten_names("c") == {*names(1)}
    await store.delete(OWNER, "c", names=names(2))
    assert await store.forgotten_names("c") == {*names(1, 2)}


async def test_a_deletion_under_way_outlives_the_server(tmp_path: Path) -> None:
    async with redis_process(tmp_path / "redis") as process:
        async with redis_store(process.server.url) as store:
            await store.create(conversation())
            await store.delete(OWNER, "c", names=names(1, 2))
        await process.kill()
        await process.start()
        async with redis_store(process.server.url) as store:
            assert await store.deletions() == ((OWNER, "c"),)
            assert await store.forgotten_names("c") == {*names(1, 2)}


def holding(folder: Path, *wanted: bytes) -> list[str]:
    """Files of a folder that hold one of these."""
    return [
        path.name
        for path in folder.rglob("*")
        if path.is_file() and any(each in path.read_bytes() for each in wanted)
    ]


async def test_after_a_deletion_no_file_has_the_text_or_a_name(tmp_path: Path) -> None:
    folder = tmp_path / "redis"
    async with redis_process(folder) as process, redis_store(process.server.url) as store:
        for identity in ("c", "d"):
            await store.create(conversation(identity))
            accepted = await store.accept(new_turn("a", content=TEXT + identity, of=identity))
            await store.end(replace(ending(accepted, TEXT + identity), names=names(len(identity))))
        await store.delete(OWNER, "c", names=(b"n" * 32,))
        assert holding(folder, (TEXT + "c").encode()), "the test would find it"
        await store.end_deletion("c")
        assert holding(folder, (TEXT + "c").encode(), b"n" * 32) == []
        assert holding(folder, (TEXT + "d").encode()), "what is not deleted stays"
        assert (await store.tree(OWNER, "d"))[1][0].text == TEXT + "d"


async def rewrites(process: RedisProcess) -> int:
    info = await process.command("INFO", "persistence")
    assert isinstance(info, dict)
    return int(info["aof_rewrites"])


async def test_who_comes_together_shares_a_rewrite_that_begins_after_all(tmp_path: Path) -> None:
    async with redis_process(tmp_path / "redis") as process, RedisLink(process.server.url) as link:
        rewrite = RedisRewrite(link)
        before = await rewrites(process)
        await asyncio.gather(*(rewrite.done() for _ in range(20)))
        assert before < await rewrites(process) <= before + 2
        before = await rewrites(process)
        await rewrite.done()
        assert await rewrites(process) == before + 1


async def test_a_server_that_ends_meanwhile_has_not_done_it(tmp_path: Path) -> None:
    async with redis_process(tmp_path / "redis") as process, RedisLink(process.server.url) as link:
        looks = 0

        async def restart(_seconds: float) -> None:
            nonlocal looks
            looks += 1
            if looks == 1:
                await process.kill()
                await process.start()

        await process.command("CONFIG", "SET", "rdb-key-save-delay", 2_000_000)
        await process.command("SET", "key", "value")
        with pytest.raises(Unavailable):
            await RedisRewrite(link, sleep=restart).done()
        assert looks
        await RedisRewrite(link).done()
