"""Both session stores, by the same tests: turns, logs and endings."""

from dataclasses import replace

import pytest

from chatserve.chat.store.conversation import (
    ReplyState,
    Role,
    Turn,
)
from chatserve.chat.store.session_store import SessionStore, Superseded, Unlogged
from chatserve.errors import Conflict, NotFound
from tests.chat.store.turns import OTHER, OWNER, conversation, ending, entry, exchange, new_turn

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


async def test_a_known_ask_is_found_by_its_owner_and_its_body_alone(store: SessionStore) -> None:
    await store.create(conversation())
    digest = new_turn("a").digest
    assert await store.find(OWNER, "c", ask="a", digest=digest) is None
    accepted = await store.accept(new_turn("a"))
    assert await store.find(OWNER, "c", ask="a", digest=digest) == accepted.record
    assert await store.find(OWNER, "c", ask="b", digest=digest) is None
    with pytest.raises(Conflict):
        await store.find(OWNER, "c", ask="a", digest=b"another")
    for owner, identity in ((OTHER, "c"), (OWNER, "d")):
        with pytest.raises(NotFound):
            await store.find(owner, identity, ask="a", digest=digest)
    await store.end(ending(accepted, "the answer"))
    found = await store.find(OWNER, "c", ask="a", digest=digest)
    assert found is not None
    assert (found.state, found.text) == (ReplyState.DONE, "the answer")


async def test_a_reply_that_was_in_doubt_is_not_accepted_later(store: SessionStore) -> None:
    await store.create(conversation())
    before = await store.get(OWNER, "c")
    for _ in range(2):
        assert await store.settle(OWNER, "c.late") is False
    with pytest.raises(Conflict):
        await store.accept(new_turn("a", reply="c.late"))
    assert await store.tree(OWNER, "c") == (before, (), ())
    assert await store.running() == ()
    # The same ask is accepted with another reply, and the late call then finds that one.
    accepted = await store.accept(new_turn("a"))
    assert not accepted.known
    assert (await store.accept(new_turn("a", reply="c.late"))).record == accepted.record
    assert await store.settle(OWNER, "c.late") is False
    assert await store.running() == ("c.a",)


async def test_a_reply_in_doubt_that_was_accepted_stays_accepted(store: SessionStore) -> None:
    await store.create(conversation())
    accepted = await store.accept(new_turn("a"))
    for owner, reply in ((OTHER, "c.a"), (OWNER, "d.a")):
        with pytest.raises(NotFound):
            await store.settle(owner, reply)
    assert await store.settle(OWNER, "c.a") is True
    assert await store.accept(new_turn("a")) == accepted
    await store.end(ending(accepted))
    assert await store.settle(OWNER, "c.a") is True
    assert (await store.reply(OWNER, "c.a")).state is ReplyState.DONE


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
    assert await store.append(entries[:2]) == Unlogged()
    assert await store.append(entries) == Unlogged()
    assert await store.append(entries[:1]) == Unlogged()
    assert await store.log("c.a") == tuple(entries)


async def test_appending_to_what_is_gone_says_so(store: SessionStore) -> None:
    await store.create(conversation("c"))
    await store.create(conversation("d"))
    await store.create(conversation("e"))
    for name in "cde":
        await store.accept(new_turn("a", of=name))
    entries = [entry(f"{name}.a", 1, "x") for name in "cde"]
    assert await store.append(entries) == Unlogged()
    await store.delete(OWNER, "d")
    ended = await store.accept(new_turn("a", of="e"))
    await store.end(ending(ended))
    later = [entry(f"{name}.a", 2, "y") for name in "cde"]
    assert await store.append(later) == Unlogged(
        gone=frozenset({"d.a"}), superseded=frozenset({"e.a"})
    )
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
    assert await store.append([late]) == Unlogged(superseded=frozenset({"c.a"}))
    _, _, record = await store.resume("c.a")
    assert (record.epoch, record.logged) == (3, (3, 3))
    assert await store.append([entry("c.a", 5, "de", epoch=3)]) == Unlogged()
    _, _, record = await store.resume("c.a")
    assert (record.epoch, record.logged) == (4, (3, 3, 5))
    assert "".join(each.text for each in await store.log("c.a")) == "abcde"
    assert await store.reply(OWNER, "c.a") == record
    assert record.epoch == 4
    for epoch in (1, 3):
        with pytest.raises(Superseded):
            await store.end(replace(ending(accepted), epoch=epoch))
    assert await store.reply(OWNER, "c.a") == record
    await store.end(replace(ending(accepted), epoch=4))
    with pytest.raises(Superseded):
        await store.end(replace(ending(accepted, "of the former process"), epoch=3))
    for epoch in (3, 4):
        late = entry("c.a", 9, "x", epoch=epoch)
        assert await store.append([late]) == Unlogged(superseded=frozenset({"c.a"}))
    assert (await store.reply(OWNER, "c.a")).text == "answer"
    assert (await store.reply(OWNER, "c.a")).logged == (3, 3, 5)
    with pytest.raises(Conflict):
        await store.resume("c.a")
    with pytest.raises(NotFound):
        await store.resume("c.nowhere")


@pytest.mark.parametrize("system", ["Be brief.", None])
async def test_a_reply_is_taken_up_with_the_settings_it_was_accepted_with(
    store: SessionStore, system: str | None
) -> None:
    settings: dict[str, object] = {"stop": ["é"], "temperature": 0.5}
    await store.create(replace(conversation(), system=system, settings=settings))
    await exchange(store, "a")
    accepted = await store.accept(new_turn("b"))
    assert accepted.path[0].token_ids is not None
    changes: dict[str, object] = {"settings": {"max_tokens": 1}, "title": "New"}
    await store.update(OWNER, "c", changes, now=11.0)
    resumed, path, _ = await store.resume("c.b")
    assert (resumed.settings, resumed.system, resumed.title) == (settings, system, "New")
    assert path == accepted.path
    await store.update(OWNER, "c", {"system": "Be long."}, now=12.0)
    # Another answer to the first message gives it ids of the new system prompt.
    await exchange(store, "a2", at_leaf=False, parent="a", content=None)
    assert (await store.tree(OWNER, "c"))[1][0].token_ids is not None
    resumed, path, record = await store.resume("c.b")
    assert (resumed.settings, resumed.system, record.epoch) == (settings, system, 3)
    assert [turn.token_ids is None for turn in path] == [True, False, True]
    await store.end(replace(ending(accepted), epoch=3))
    kept = await store.get(OWNER, "c")
    assert (kept.settings, kept.system) == ({"max_tokens": 1}, "Be long.")


async def test_a_reply_without_text_resumes_from_nothing(store: SessionStore) -> None:
    await store.create(conversation())
    await store.accept(new_turn("a"))
    _, _, record = await store.resume("c.a")
    assert (record.epoch, record.logged) == (2, (0,))
    assert await store.log("c.a") == ()
