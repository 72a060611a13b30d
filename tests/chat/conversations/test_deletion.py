"""Deleting: every name that was ever computed for a conversation is forgotten, whatever fails."""

import asyncio
from dataclasses import replace

import pytest

from chatserve.chat.conversations.named_pages import NamedPages
from chatserve.chat.conversations.outcome import left_out_of
from chatserve.chat.store.conversation import Role, Turn
from chatserve.chat.store.memory_store import MemoryStore
from chatserve.engine.values import FinishReason
from chatserve.errors import NotFound, Unavailable
from tests.chat.conversations.chats import (
    OWNER,
    Process,
    answered,
    begun,
    process,
    tick,
    turn,
    until,
)


def computed(life: Process) -> set[bytes]:
    """Names of all prompts that the engine was given."""
    engine = life.engine
    return {
        name for run in engine.runs for name in engine.page_names(run.request, run.request.tokens)
    }


def names_of(life: Process, number: int, answer: str) -> set[bytes]:
    """Names of a run's prompt with its answer."""
    request = life.engine.runs[number].request
    return {*life.engine.page_names(request, (*request.tokens, *life.ids(answer)))}


async def test_prompts_answers_and_branches_are_forgotten(
    life: Process, store: MemoryStore
) -> None:
    other = await life.conversation()
    await answered(life, other, content="something else entirely")
    others = names_of(life, 0, "the dog")
    conversation = await life.conversation(system="You are kind.")
    await answered(life, conversation, "the dog barks at the fox", ask="a")
    await answered(life, conversation, "the fox", ask="b", content="and then?")
    await answered(life, conversation, "the quick dog", ask="c", content="hello", parent=None)
    await answered(life, conversation, "the lazy fox", ask="d", content=None, parent="c")
    wanted: set[bytes] = set()
    for number, answer in enumerate(
        ("the dog barks at the fox", "the fox", "the quick dog", "the lazy fox"), 1
    ):
        wanted |= names_of(life, number, answer)
    await life.chats.delete(OWNER, conversation)
    assert life.engine.forgotten == wanted
    assert not others & life.engine.forgotten
    assert await store.deletions() == ()
    assert life.chats.statistics().deletions == 0
    with pytest.raises(NotFound):
        await life.chats.delete(OWNER, conversation)


async def test_a_turn_tells_the_store_only_what_is_new(life: Process, store: MemoryStore) -> None:
    conversation = await life.conversation()
    for number in range(4):
        await answered(life, conversation, "the dog barks", ask=f"t{number}", content="go on")
    rows = [*store._kept[conversation].names.values()]
    told = [name for row in rows for name in row]
    assert len(rows) == 4
    assert len(told) == len(set(told)), "told twice"
    assert set(told) >= computed(life)


async def test_what_a_cut_reply_had_generated_is_forgotten_too(life: Process) -> None:
    conversation = await life.conversation()
    reply = await life.send(conversation)
    run = await begun(life)
    run.give(life.ids("the dog barks at the"))
    await until(lambda: reply.length)
    before = (*run.request.tokens, *life.ids("the dog barks at the"))
    last = life.ids(8 * " fox")[: 8 - len(before) % 4]  # they complete two pages

    def delete_comes(name: str, _number: int) -> None:
        if name == "delete":
            run.give(last)  # of these nobody had a name before, and nobody will read them

    life.store.plot = delete_comes
    await life.chats.delete(OWNER, conversation)
    assert run.aborted
    names = life.engine.page_names(run.request, (*before, *last))
    assert life.engine.forgotten == {*names}
    assert len(names) == len(before) // 4 + 2


async def test_a_reply_left_by_a_killed_process_is_made_again(store: MemoryStore) -> None:
    async with process(store) as life:
        conversation = await life.conversation(system="You are kind.")
        await answered(life, conversation, "the dog", ask="a")
        reply = await life.send(conversation, ask="b", content="and the fox?")
        run = await begun(life, 1)
        run.give(life.ids("the fox barks"))
        await until(lambda: reply.length)
        await tick(life)
        assert await store.log(reply.id)
        wanted = names_of(life, 1, "the fox barks")
        life.die()
    # What the endings told is lost too: as in a conversation of before there was such a thing.
    store._kept[conversation].names.clear()
    async with process(store) as life:
        await life.chats.delete(OWNER, conversation)
        assert life.engine.forgotten >= wanted


async def test_with_a_cut_that_is_not_told_every_cut_is_tried(life: Process, store) -> None:
    """Old records without a receipt."""
    conversation = await life.conversation()
    for number in range(12):
        await answered(life, conversation, ask=f"t{number}", content="the quick brown fox " * 6)
    wanted = computed(life)
    left_out = [
        left_out_of(each.final) for each in store._kept[conversation].turns.values() if each.final
    ]
    assert max(each or 0 for each in left_out) > 0, "the context was cut"
    kept = store._kept[conversation]
    kept.names.clear()
    for identity, each in kept.turns.items():
        kept.turns[identity] = replace(each, final=None)
    await life.chats.delete(OWNER, conversation)
    assert life.engine.forgotten >= wanted


async def test_a_disk_that_refuses_is_told_and_tried_again(life: Process, store) -> None:
    conversation = await life.conversation()
    await answered(life, conversation)
    life.engine.disk_refuses = True
    with pytest.raises(Unavailable) as refused:
        await life.chats.delete(OWNER, conversation)
    assert refused.value.retry_after
    with pytest.raises(NotFound):
        await life.chats.get(OWNER, conversation)
    assert await store.deletions() == ((OWNER, conversation),)
    with pytest.raises(Unavailable):  # asked again, tried again
        await life.chats.delete(OWNER, conversation)
    with pytest.raises(NotFound):
        await life.chats.delete("bob", conversation)
    assert life.chats.statistics().deletions == 1
    life.engine.disk_refuses = False
    await until(lambda: life.time.due)
    await tick(life)
    await until(lambda: not life.chats.statistics().deletions)
    assert life.engine.forgotten == names_of(life, 0, "the dog")
    assert await store.deletions() == ()


async def test_what_was_begun_is_finished_by_the_next_process(store: MemoryStore) -> None:
    async with process(store) as life:
        conversation = await life.conversation()
        await answered(life, conversation)
        wanted = names_of(life, 0, "the dog")
        life.engine.disk_refuses = True
        with pytest.raises(Unavailable):
            await life.chats.delete(OWNER, conversation)
        life.die()
    async with process(store) as life:
        await life.chats.resume_all()
        await until(lambda: not life.chats.statistics().deletions)
        assert life.engine.forgotten == wanted
        assert await store.deletions() == ()


async def test_a_caller_that_leaves_changes_nothing_and_two_share_one(life: Process, store) -> None:
    conversation = await life.conversation()
    await answered(life, conversation)
    life.store.held["end_deletion"] = asyncio.Event()
    leaving = asyncio.create_task(life.chats.delete(OWNER, conversation))
    staying = asyncio.create_task(life.chats.delete(OWNER, conversation))
    await until(lambda: "end_deletion" in life.store.calls)
    leaving.cancel()
    await until(leaving.done)
    assert not staying.done()
    life.store.held.pop("end_deletion").set()
    await staying
    assert life.store.calls.count("delete") == 1
    assert await store.deletions() == ()


async def test_a_turn_that_comes_at_the_last_moment_is_lost(life: Process, store) -> None:
    conversation = await life.conversation()
    await answered(life, conversation, ask="a")
    life.store.held["resume"] = asyncio.Event()
    life.store.plot = lambda name, number: "after" if name == "accept" and number == 1 else None
    with pytest.raises(Unavailable):  # it is kept, and its answer is lost
        await life.send(conversation, ask="b", content="late")
    await life.chats.delete(OWNER, conversation)
    life.store.held.pop("resume").set()
    for _ in range(50):
        await asyncio.sleep(0)
    assert life.chats.statistics().running == 0
    assert len(life.engine.runs) == 1, "nothing was computed for it any more"


def test_a_row_is_told_from_where_its_path_has_it() -> None:
    pages = NamedPages(marks_max=2)
    rows = [bytes([number]) * 32 for number in range(6)]
    path = [Turn(id=each, parent=None, role=Role.ASSISTANT, text="", created=0.0) for each in "ab"]
    assert pages.new(path, rows[:2]) == tuple(rows[:2])
    pages.kept("a", rows[:2])
    assert pages.new(path, rows[:4]) == tuple(rows[2:4])
    assert pages.new(path[1:], rows[:4]) == tuple(rows[:4]), "another branch"
    assert pages.new(path, [rows[5], rows[1]]) == ()  # chained: the same name, the same before it
    assert pages.new(path, [rows[0], rows[5], rows[1]]) == (rows[0], rows[5], rows[1])
    assert pages.new(path, rows[:1]) == tuple(rows[:1]), "a shorter row"
    pages.kept("b", ())
    pages.kept("c", rows)
    pages.kept("d", rows)
    assert pages.new(path, rows[:4]) == tuple(rows[:4]), "forgotten here, told again"


def test_the_cut_that_a_receipt_tells() -> None:
    assert left_out_of(b'{"receipt": {"left_out": 4}}') == 4
    for final in (None, b"", b"{", b"{}", b"[]", b'{"receipt": {"left_out": "x"}}', b'"x"'):
        assert left_out_of(final) is None


async def test_turns_of_others_are_not_found(life: Process) -> None:
    conversation = await life.conversation()
    await answered(life, conversation)
    with pytest.raises(NotFound):
        await life.chats.delete("bob", conversation)
    assert not life.engine.forgotten
    reply = await life.chats.send(turn(conversation, ask="b", content="still here"))
    (await begun(life, 1)).give(life.ids("dog"), finish=FinishReason.LENGTH)
    await until(lambda: reply.end is not None)
