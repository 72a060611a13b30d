"""Both session stores, by the same tests: owners, changes, deletion, lists, races."""

import asyncio
import random
from dataclasses import replace

import pytest

from chatserve.chat.store.conversation import (
    Role,
    Turn,
)
from chatserve.chat.store.session_store import Accepted, SessionStore
from chatserve.errors import Conflict, NotFound, RequestError
from tests.chat.store.redis_process import RedisProcess, redis_store
from tests.chat.store.turns import OTHER, OWNER, conversation, ending, entry, exchange, new_turn

# Owners, changes, deletion ---------------------------------------------------------------------


async def test_another_owner_finds_nothing(store: SessionStore) -> None:
    await store.create(conversation())
    kept = await store.accept(new_turn("a"))
    calls = (
        store.get(OTHER, "c"),
        store.tree(OTHER, "c"),
        store.update(OTHER, "c", {"title": "mine"}, now=5.0),
        store.delete(OTHER, "c"),
        store.reply(OTHER, "c.a"),
        store.accept(replace(new_turn("b"), owner=OTHER)),
        store.accept(replace(new_turn("a"), owner=OTHER)),
    )
    for call in calls:
        with pytest.raises(NotFound):
            await call
    assert (await store.list(OTHER)).conversations == ()
    assert await store.get(OWNER, "c") == kept.conversation


async def test_changes_are_kept_and_counted(store: SessionStore) -> None:
    await store.create(conversation())
    await exchange(store, "a")
    settings = {"temperature": 0.5, "stop": ["\0é"], "seed": None}
    changed = await store.update(
        OWNER, "c", {"title": "T\0", "settings": settings, "leaf": "a"}, now=30.0
    )
    assert (changed.title, changed.settings, changed.leaf) == ("T\0", settings, "a")
    assert (changed.revision, changed.updated) == (4, 30.0)
    earlier = await store.update(OWNER, "c", {"title": ""}, now=5.0)
    assert (earlier.title, earlier.updated, earlier.revision) == ("", 30.0, 5)
    assert await store.get(OWNER, "c") == earlier
    for leaf in ("nowhere", None):
        with pytest.raises(NotFound) as missing:
            await store.update(OWNER, "c", {"title": "x", "leaf": leaf}, now=40.0)
        assert missing.value.param == "leaf"
    assert await store.get(OWNER, "c") == earlier
    with pytest.raises(NotFound):
        await store.update(OWNER, "nowhere", {"title": "x"}, now=40.0)


async def test_a_new_system_prompt_forgets_the_ids_of_first_messages(store: SessionStore) -> None:
    await store.create(conversation())
    await exchange(store, "a")
    await exchange(store, "b")
    await exchange(store, "r", at_leaf=False, parent=None)
    await store.update(OWNER, "c", {"system": None}, now=30.0)
    ids = {turn.id: turn.token_ids for turn in (await store.tree(OWNER, "c"))[1]}
    assert None not in ids.values(), "it is the same prompt as before"
    changed = await store.update(OWNER, "c", {"system": ""}, now=30.0)
    assert changed.system == ""
    ids = {turn.id: turn.token_ids for turn in (await store.tree(OWNER, "c"))[1]}
    assert ids["a"] is ids["r"] is None
    assert ids["b"] == (1, 2, 3)
    assert (await store.update(OWNER, "c", {"system": None}, now=30.0)).system is None


async def test_ids_made_with_a_former_system_prompt_are_not_kept(store: SessionStore) -> None:
    await store.create(conversation())
    accepted = await store.accept(new_turn("a"))
    await store.update(OWNER, "c", {"system": "Be brief."}, now=15.0)
    await store.end(ending(accepted))
    question, answer = (await store.tree(OWNER, "c"))[1]
    assert question.token_ids is None
    assert answer.token_ids == (4, 1 << 31, 0)


async def test_deleting_forgets_everything_and_names_what_ran(store: SessionStore) -> None:
    await store.create(conversation())
    await exchange(store, "a")
    await store.accept(new_turn("b"))
    await store.append([entry("c.b", 1, "x")])
    assert await store.delete(OWNER, "c") == ("c.b",)
    for call in (store.get(OWNER, "c"), store.reply(OWNER, "c.a"), store.delete(OWNER, "c")):
        with pytest.raises(NotFound):
            await call
    assert await store.running() == ()
    assert await store.log("c.b") == ()
    assert (await store.list(OWNER)).conversations == ()


async def test_nothing_is_left_of_what_was_deleted(process: RedisProcess) -> None:
    await process.command("FLUSHALL")
    async with redis_store(process.server.url) as store:
        await store.create(conversation())
        await exchange(store, "a")
        await store.accept(new_turn("b"))
        assert await store.settle(OWNER, "c.late") is False
        await store.delete(OWNER, "c")
        await store.list(OWNER)
        assert await process.command("KEYS", "*") == [b"cs:deletions"]
        await store.end_deletion("c")
    assert await process.command("KEYS", "*") == []


async def test_an_imported_tree_is_as_it_was(store: SessionStore) -> None:
    draw = random.Random(5)
    turns: list[Turn] = []
    for number in range(2_500):
        above = turns[draw.randrange(max(0, number - 3), number)] if number else None
        asked = above is None or above.role is Role.ASSISTANT
        turn = Turn(
            id=f"t{number}",
            parent=None if above is None else above.id,
            role=Role.USER if asked else Role.ASSISTANT,
            text=f"text {number}",
            created=float(draw.randrange(100)),
            token_ids=None if number % 3 else tuple(range(number % 50)),
            encoding="" if number % 3 else "model",
            final=None if asked else b"{}",
        )
        turns.append(turn)
    imported = replace(conversation(), leaf="t2499", title="T", system="S", settings={"n": 1})
    await store.create(imported, turns)
    await store.create(replace(imported, title="again"), turns)
    kept, there, records = await store.tree(OWNER, "c")
    assert (kept, list(there), records) == (imported, turns, ())


# Lists -----------------------------------------------------------------------------------------


async def ids(store: SessionStore, **how: object) -> tuple[list[str], str | None]:
    page = await store.list(OWNER, **how)  # type: ignore[arg-type]
    return [each.id for each in page.conversations], page.next


async def test_the_latest_update_comes_first(store: SessionStore) -> None:
    for number in range(5):
        await store.create(conversation(f"c{number}", updated=float(number)))
    await store.create(conversation("theirs", owner=OTHER))
    assert await ids(store) == (["c4", "c3", "c2", "c1", "c0"], None)
    await store.accept(new_turn("a", of="c1", now=50.0))
    assert await ids(store) == (["c1", "c4", "c3", "c2", "c0"], None)
    await store.update(OWNER, "c0", {"title": "x"}, now=60.0)
    assert await ids(store, limit=2) == (["c0", "c1"], (await store.list(OWNER, limit=2)).next)
    # What is refused changes nothing.
    with pytest.raises(Conflict):
        await store.accept(new_turn("b", of="c1", now=99.0))
    assert (await ids(store))[0] == ["c0", "c1", "c4", "c3", "c2"]


async def test_parts_of_a_list_stay_right_while_conversations_change(store: SessionStore) -> None:
    for number in range(30):
        await store.create(conversation(f"c{number:02}", updated=float(number // 4)))
    draw, seen, after = random.Random(3), [], None
    moved: set[str] = set()
    while True:
        found, after = await ids(store, limit=4, after=after)
        assert len(found) <= 4
        seen += found
        if after is None:
            break
        mover = f"c{draw.randrange(30):02}"
        moved.add(mover)
        await store.update(OWNER, mover, {"title": "x"}, now=100.0 + len(seen))
        gone = f"c{draw.randrange(30):02}"
        if gone not in moved and gone not in seen:
            await store.delete(OWNER, gone)
            moved.add(gone)
    assert len(seen) == len(set(seen)), "none twice"
    assert {f"c{number:02}" for number in range(30)} - set(seen) <= moved, "none left out"
    still = [name for name in seen if name not in moved]

    def place(name: str) -> tuple[int, str]:
        return int(name[1:]) // 4, name

    assert still == sorted(still, key=place, reverse=True)


async def test_many_conversations_of_one_moment_are_all_listed(store: SessionStore) -> None:
    names = {f"c{number}" for number in range(25)}
    for name in names:
        await store.create(conversation(name))
    seen: list[str] = []
    after = None
    while True:
        found, after = await ids(store, limit=3, after=after)
        seen += found
        if after is None:
            break
    assert sorted(seen) == sorted(names)


async def test_a_search_looks_in_titles_and_texts_whatever_the_case(store: SessionStore) -> None:
    for number, title in enumerate(("Straße", "other", "third")):
        await store.create(replace(conversation(f"c{number}", updated=float(number)), title=title))
    await exchange(store, "a", "An ANSWER\0with Ärger", of="c1")
    assert (await ids(store, search="STRASSE"))[0] == ["c0"]
    assert (await ids(store, search="answer\0WITH äR"))[0] == ["c1"]
    assert (await ids(store, search="HELLO"))[0] == ["c1"]
    assert (await ids(store, search="o"))[0] == ["c1"]
    assert await ids(store, search="nowhere") == ([], None)
    assert len((await ids(store, search=""))[0]) == 3
    # What is no text is not found: token ids, roles, field names, final events.
    for absent in ("model", "finish_reason", "assistant", "owner"):
        assert (await ids(store, search=absent))[0] == []


async def test_a_cursor_of_nobody_is_the_askers_fault(store: SessionStore) -> None:
    for cursor in ("", "x", "%%", "MS4w", "bmFuIGE=", "é", "A" * 1_000):
        with pytest.raises(RequestError):
            await store.list(OWNER, after=cursor)


# Races -----------------------------------------------------------------------------------------


async def test_a_hundred_accepts_of_one_ask_are_one_reply(store: SessionStore) -> None:
    await store.create(conversation())
    turns = [new_turn("a", reply=f"c.{number}") for number in range(100)]
    accepted = await asyncio.gather(*[store.accept(turn) for turn in turns])
    (new,) = [each for each in accepted if not each.known]
    assert {each.record.id for each in accepted} == {new.record.id}
    assert await store.running() == (new.record.id,)
    conversation_, tree, _ = await store.tree(OWNER, "c")
    assert (len(tree), conversation_.revision) == (1, 2)


async def test_a_hundred_asks_at_one_leaf_are_one_reply_and_conflicts(store: SessionStore) -> None:
    await store.create(conversation())
    await exchange(store, "first")
    outcomes = await asyncio.gather(
        *[store.accept(new_turn(f"a{number}")) for number in range(100)], return_exceptions=True
    )
    (new,) = [each for each in outcomes if isinstance(each, Accepted)]
    assert sum(isinstance(each, Conflict) for each in outcomes) == 99
    assert await store.running() == (new.record.id,)
    assert len((await store.tree(OWNER, "c"))[1]) == 3


async def test_statistics_count_calls(store: SessionStore) -> None:
    before = store.statistics()
    await store.create(conversation())
    await store.get(OWNER, "c")
    after = store.statistics()
    assert after.calls == before.calls + 2
    assert after.available
    assert after.failures == 0
