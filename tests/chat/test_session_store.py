"""Both session stores, by the same tests: what one does, the other does."""

import asyncio
import random
from collections.abc import AsyncGenerator, Generator
from dataclasses import replace

import pytest

from chatserve.chat.conversation import (
    Conversation,
    LogEntry,
    ReplyCursor,
    ReplyState,
    Role,
    Turn,
)
from chatserve.chat.memory_store import MemoryStore
from chatserve.chat.session_store import Accepted, Ending, NewTurn, SessionStore
from chatserve.errors import Conflict, NotFound, RequestError
from tests.chat.redis_process import RedisProcess, redis_store

OWNER, OTHER = "owner", "other"


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Generator[RedisProcess]:
    process = RedisProcess(tmp_path_factory.mktemp("redis"))
    asyncio.run(process.start())
    yield process
    asyncio.run(process.stop())


@pytest.fixture(params=["memory", "redis"])
async def store(
    request: pytest.FixtureRequest, process: RedisProcess
) -> AsyncGenerator[SessionStore]:
    if request.param == "memory":
        yield MemoryStore()
        return
    await process.command("FLUSHALL")
    async with redis_store(process.server.url) as store:
        yield store


def conversation(identity: str = "c", *, owner: str = OWNER, updated: float = 1.0) -> Conversation:
    return Conversation(id=identity, owner=owner, title="", created=1.0, updated=updated)


def new_turn(
    ask: str,
    *,
    content: str | None = "hello",
    at_leaf: bool = True,
    parent: str | None = None,
    digest: bytes = b"\x00digest",
    reply: str | None = None,
    of: str = "c",
    now: float = 10.0,
) -> NewTurn:
    return NewTurn(
        conversation=of,
        owner=OWNER,
        ask=ask,
        digest=digest,
        content=content,
        at_leaf=at_leaf,
        parent=parent,
        reply=reply or f"{of}.{ask}",
        request=b'{"seed": 1}',
        now=now,
    )


def ending(
    accepted: Accepted,
    text: str | None = "answer",
    *,
    state: ReplyState = ReplyState.DONE,
    now: float = 20.0,
    title: str | None = "A title",
    prompt_ids: tuple[int, ...] | None = (1, 2, 3),
) -> Ending:
    record = accepted.record
    turn = Turn(
        id=record.id,
        parent=record.turn,
        role=Role.ASSISTANT,
        text=text or "",
        created=now,
        token_ids=(4, 1 << 31, 0),
        encoding="model",
        final=b'{"finish_reason": "stop"}',
    )
    return Ending(
        reply=record.id,
        state=state,
        final=b'{"finish_reason": "stop"}',
        text=text or "",
        turn=None if text is None else turn,
        prompt_ids=prompt_ids,
        encoding="model",
        title=title,
        now=now,
    )


def entry(reply: str, seq: int, text: str, *, epoch: int = 1) -> LogEntry:
    return LogEntry(reply=reply, cursor=ReplyCursor(epoch, seq), text=text, token_ids=(7,))


async def exchange(store: SessionStore, ask: str, text: str = "answer", **where: object) -> str:
    """A turn and its answer; the answer's id."""
    accepted = await store.accept(new_turn(ask, **where))  # type: ignore[arg-type]
    await store.end(ending(accepted, text))
    return accepted.record.id


# Accepting -------------------------------------------------------------------------------------


async def test_a_turn_and_its_reply_are_kept_at_once(store: SessionStore) -> None:
    await store.create(conversation())
    accepted = await store.accept(new_turn("a", content="h\0é\u2028\U0001f600"))
    assert not accepted.known
    (turn,) = accepted.path
    assert (turn.id, turn.parent, turn.role) == ("a", None, Role.USER)
    assert (turn.text, turn.token_ids, turn.created) == ("h\0é\u2028\U0001f600", None, 10.0)
    assert (accepted.conversation.leaf, accepted.conversation.revision) == ("a", 2)
    assert accepted.conversation.updated == 10.0
    record = accepted.record
    assert (record.id, record.turn, record.state) == ("c.a", "a", ReplyState.RUNNING)
    assert (record.epoch, record.logged, record.request) == (1, (), b'{"seed": 1}')
    assert await store.reply(OWNER, "c.a") == record
    assert await store.running() == ("c.a",)
    assert await store.tree(OWNER, "c") == (accepted.conversation, (turn,), (record,))


async def test_a_known_ask_is_its_reply_before_all_other_checks(store: SessionStore) -> None:
    await store.create(conversation())
    first = await store.accept(new_turn("a"))
    # Now the leaf is a message without an answer, which nothing may follow.
    again = await store.accept(new_turn("a", reply="c.drawn-anew"))
    assert again.known
    assert again.path == ()
    assert again.record == first.record
    await store.end(ending(first, "the answer"))
    again = await store.accept(new_turn("a", reply="c.drawn-once-more"))
    assert again.known
    assert (again.record.state, again.record.text) == (ReplyState.DONE, "the answer")
    assert again.record.final == b'{"finish_reason": "stop"}'
    assert again.conversation.revision == 3
    assert await store.running() == ()


async def test_the_same_call_again_is_the_same_acceptance(store: SessionStore) -> None:
    await store.create(conversation())
    await exchange(store, "a")
    first = await store.accept(new_turn("b"))
    assert await store.accept(new_turn("b")) == first
    assert len(first.path) == 3


async def test_a_known_ask_with_another_body_is_refused(store: SessionStore) -> None:
    await store.create(conversation())
    first = await store.accept(new_turn("a"))
    with pytest.raises(Conflict):
        await store.accept(new_turn("a", digest=b"another", reply="c.other"))
    assert await store.get(OWNER, "c") == first.conversation
    assert await store.running() == ("c.a",)


async def test_nothing_follows_a_turn_whose_reply_is_running(store: SessionStore) -> None:
    await store.create(conversation())
    await store.accept(new_turn("a"))
    for refused in (
        new_turn("b"),
        new_turn("b", content=None),
        new_turn("b", at_leaf=False, parent="c.a"),
        new_turn("b", at_leaf=False, parent="a", content=None),
    ):
        with pytest.raises(Conflict):
            await store.accept(refused)
    _, turns, records = await store.tree(OWNER, "c")
    assert [turn.id for turn in turns] == ["a"]
    assert [record.id for record in records] == ["c.a"]


async def test_parents_that_cannot_be_followed(store: SessionStore) -> None:
    await store.create(conversation())
    with pytest.raises(Conflict):
        await store.accept(new_turn("x", content=None))  # an empty conversation has no question
    first = await store.accept(new_turn("a"))
    await store.end(ending(first, None, state=ReplyState.FAILED))
    with pytest.raises(NotFound) as missing:
        await store.accept(new_turn("b", at_leaf=False, parent="nowhere"))
    assert missing.value.param == "parent"
    with pytest.raises(NotFound):
        await store.accept(new_turn("b", at_leaf=False, parent="c.a"))  # it left no turn
    with pytest.raises(Conflict):
        await store.accept(new_turn("b"))  # a message without an answer
    answer = await store.accept(new_turn("b", content=None))
    assert answer.record.turn == "a"
    await store.end(ending(answer))
    with pytest.raises(Conflict):
        await store.accept(new_turn("d", content=None))  # nothing to answer under an answer
    with pytest.raises(Conflict):
        await store.accept(new_turn("d", at_leaf=False, parent=None, content=None))
    with pytest.raises(NotFound):
        await store.accept(new_turn("d", of="nowhere"))


async def test_a_new_turn_may_not_take_an_id_of_the_tree(store: SessionStore) -> None:
    turns = (Turn(id="t", parent=None, role=Role.USER, text="x", created=1.0),)
    await store.create(conversation(), turns)
    answer = await exchange(store, "a", at_leaf=False, parent="t", content=None)
    for taken in ("t", answer):
        with pytest.raises(Conflict):
            await store.accept(new_turn(taken, reply="c.new"))
    assert len((await store.tree(OWNER, "c"))[1]) == 2


async def test_branches_and_regenerated_replies_share_what_is_above(store: SessionStore) -> None:
    await store.create(conversation())
    one = await exchange(store, "a")
    await exchange(store, "b")
    # Another answer to the first message, another second message, another first message.
    other = await exchange(store, "a2", "otherwise", at_leaf=False, parent="a", content=None)
    assert (await store.get(OWNER, "c")).leaf == other
    branch = await store.accept(new_turn("b2", at_leaf=False, parent=one))
    assert [turn.id for turn in branch.path] == ["a", one, "b2"]
    root = await store.accept(new_turn("r", at_leaf=False, parent=None))
    assert [turn.id for turn in root.path] == ["r"]
    # Two replies run at once, on branches of their own; the leaf stays with the latest asked.
    await store.end(ending(branch))
    assert (await store.get(OWNER, "c")).leaf == "r"
    await store.end(ending(root))
    ended, turns, records = await store.tree(OWNER, "c")
    assert ended.leaf == root.record.id
    assert records == ()
    parents = {turn.id: turn.parent for turn in turns}
    assert parents[other] == "a"
    assert parents["b2"] == one
    seen: set[str | None] = {None}
    for turn in turns:
        assert turn.parent in seen, "parents first"
        seen.add(turn.id)


async def test_a_path_has_the_texts_and_ids_it_was_computed_with(store: SessionStore) -> None:
    await store.create(conversation())
    await exchange(store, "a", "ans\0wer \U0001f600")
    accepted = await store.accept(new_turn("b"))
    question, answer, _ = accepted.path
    assert (question.token_ids, question.encoding) == ((1, 2, 3), "model")
    assert (answer.text, answer.token_ids) == ("ans\0wer \U0001f600", (4, 1 << 31, 0))
    assert answer.final == b'{"finish_reason": "stop"}'


# Logs and endings ------------------------------------------------------------------------------


async def test_appending_again_changes_nothing(store: SessionStore) -> None:
    await store.create(conversation())
    await store.accept(new_turn("a"))
    first = replace(entry("c.a", 3, "abc"), prompt_ids=(9, 8))
    entries = [first, entry("c.a", 5, "\0é"), entry("c.a", 6, "\U0001f600")]
    assert await store.append(entries[:2]) == frozenset()
    assert await store.append(entries) == frozenset()
    assert await store.append(entries[:1]) == frozenset()
    assert await store.log("c.a") == tuple(entries)


async def test_appending_to_what_is_gone_says_so(store: SessionStore) -> None:
    await store.create(conversation("c"))
    await store.create(conversation("d"))
    await store.create(conversation("e"))
    for name in "cde":
        await store.accept(new_turn("a", of=name))
    entries = [entry(f"{name}.a", 1, "x") for name in "cde"]
    assert await store.append(entries) == frozenset()
    await store.delete(OWNER, "d")
    ended = await store.accept(new_turn("a", of="e"))
    await store.end(ending(ended))
    later = [entry(f"{name}.a", 2, "y") for name in "cde"]
    assert await store.append(later) == {"d.a", "e.a"}
    assert await store.log("c.a") == (entries[0], later[0])
    assert await store.log("d.a") == await store.log("e.a") == ()


async def test_ending_again_changes_nothing(store: SessionStore) -> None:
    await store.create(conversation())
    accepted = await store.accept(new_turn("a"))
    await store.append([entry("c.a", 3, "abc")])
    ended = await store.end(ending(accepted))
    assert (ended.leaf, ended.title, ended.updated, ended.revision) == ("c.a", "A title", 20.0, 3)
    again = await store.end(ending(accepted, "another", now=30.0, title="Another"))
    assert again == ended
    assert (await store.reply(OWNER, "c.a")).text == "answer"
    assert await store.log("c.a") == ()
    assert await store.running() == ()


async def test_an_ending_without_a_turn_keeps_its_text_in_the_record(store: SessionStore) -> None:
    await store.create(conversation())
    accepted = await store.accept(new_turn("a"))
    failed = replace(ending(accepted, None, state=ReplyState.INTERRUPTED), text="half a sen")
    ended = await store.end(failed)
    assert ended.leaf == "a"
    record = await store.reply(OWNER, "c.a")
    assert (record.state, record.text) == (ReplyState.INTERRUPTED, "half a sen")
    assert record.final == failed.final
    _, turns, records = await store.tree(OWNER, "c")
    assert [turn.id for turn in turns] == ["a"]
    assert turns[0].token_ids == (1, 2, 3)
    assert records == (record,)


async def test_only_the_first_answer_names_a_conversation(store: SessionStore) -> None:
    await store.create(replace(conversation(), title="Mine"))
    await exchange(store, "a")
    assert (await store.get(OWNER, "c")).title == "Mine"


async def test_ending_what_is_gone_is_not_found(store: SessionStore) -> None:
    await store.create(conversation())
    accepted = await store.accept(new_turn("a"))
    await store.delete(OWNER, "c")
    with pytest.raises(NotFound):
        await store.end(ending(accepted))


async def test_each_resume_begins_an_epoch_that_knows_the_text_before(store: SessionStore) -> None:
    await store.create(conversation())
    accepted = await store.accept(new_turn("a"))
    await store.append([entry("c.a", 3, "abc")])
    resumed, path, record = await store.resume("c.a")
    assert resumed == accepted.conversation
    assert path == accepted.path
    assert (record.epoch, record.logged, record.state) == (2, (3,), ReplyState.RUNNING)
    late = entry("c.a", 9, "of the former process", epoch=1)
    assert await store.append([late]) == {"c.a"}
    _, _, record = await store.resume("c.a")
    assert (record.epoch, record.logged) == (3, (3, 3))
    assert await store.append([entry("c.a", 5, "de", epoch=3)]) == frozenset()
    _, _, record = await store.resume("c.a")
    assert (record.epoch, record.logged) == (4, (3, 3, 5))
    assert "".join(each.text for each in await store.log("c.a")) == "abcde"
    assert await store.reply(OWNER, "c.a") == record
    await store.end(ending(accepted))
    assert (await store.reply(OWNER, "c.a")).logged == (3, 3, 5)
    with pytest.raises(Conflict):
        await store.resume("c.a")
    with pytest.raises(NotFound):
        await store.resume("c.nowhere")


async def test_a_reply_without_text_resumes_from_nothing(store: SessionStore) -> None:
    await store.create(conversation())
    await store.accept(new_turn("a"))
    _, _, record = await store.resume("c.a")
    assert (record.epoch, record.logged) == (2, (0,))
    assert await store.log("c.a") == ()


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
        await store.delete(OWNER, "c")
        await store.list(OWNER)
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
    assert still == sorted(still, key=lambda name: (int(name[1:]) // 4, name), reverse=True)


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
