"""Word of changes: all of it, never much of it, and merged where it would be much."""

import asyncio
from collections.abc import AsyncIterator

from chatserve.chat.audience import Clock
from chatserve.chat.conversations.changes import (
    NEWS_MAX,
    TELLINGS_A_TURN,
    TELLINGS_PER_SECOND,
    Changes,
)
from chatserve.chat.conversations.reply_events import ConversationChanged
from tests.chat.engine import ManualTime

ANYTHING = ConversationChanged(None, None)


def made() -> tuple[Changes, ManualTime]:
    time = ManualTime()
    return Changes(Clock(time.now, time.call_later)), time


def ring(time: ManualTime) -> float:
    """The one timer; its seconds."""
    (timer,) = time.due
    timer.cancelled = True
    timer.call()
    return timer.seconds


async def waiting(mailbox: AsyncIterator[ConversationChanged]) -> list[ConversationChanged]:
    """What is there now."""
    found: list[ConversationChanged] = []
    for _ in range(10):
        await asyncio.sleep(0)
    while True:
        task = asyncio.ensure_future(anext(mailbox))
        await asyncio.sleep(0)
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return found
        found.append(task.result())


async def test_the_first_change_is_told_at_once_and_the_next_ones_together() -> None:
    changes, time = made()
    with changes.subscribe("ann") as mailbox, changes.subscribe("bob") as others:
        changes.publish("ann", "a", 1)
        assert await waiting(mailbox) == [ConversationChanged("a", 1)]
        changes.publish("ann", "a", 2)
        changes.publish("ann", "b", 1)
        changes.publish("ann", "a", None)
        assert await waiting(mailbox) == []
        ring(time)
        assert await waiting(mailbox) == [
            ConversationChanged("b", 1),
            ConversationChanged("a", None),
        ]
        ring(time)  # nothing happened since: the next change is told at once again
        assert not time.due
        changes.publish("ann", "c", 1)
        assert await waiting(mailbox) == [ConversationChanged("c", 1)]
        assert await waiting(others) == []
    assert not time.due
    assert changes.subscribers == 0


async def test_news_of_many_conversations_is_one() -> None:
    changes, time = made()
    with changes.subscribe("ann") as mailbox:
        changes.publish("ann", "first", 1)
        for number in range(NEWS_MAX):
            changes.publish("ann", str(number), 1)
        ring(time)
        for number in range(NEWS_MAX + 1):
            changes.publish("ann", str(number), 2)
        # Not read until now: the first word and those after it were too many as well.
        assert await waiting(mailbox) == [ANYTHING]
        ring(time)
        assert await waiting(mailbox) == [ANYTHING]
        ring(time)
        changes.publish("ann", "last", 1)
        assert await waiting(mailbox) == [ConversationChanged("last", 1)]


async def test_as_many_as_may_be_are_told_one_by_one() -> None:
    changes, time = made()
    with changes.subscribe("ann") as mailbox:
        changes.publish("ann", "first", 1)
        assert await waiting(mailbox) == [ConversationChanged("first", 1)]
        for number in range(NEWS_MAX):
            changes.publish("ann", str(number), 1)
        ring(time)
        assert len(await waiting(mailbox)) == NEWS_MAX


async def test_telling_many_tabs_takes_turns_and_makes_the_next_telling_wait() -> None:
    changes, time = made()
    count = 10 * TELLINGS_A_TURN
    mailboxes = [changes.subscribe("ann") for _ in range(count)]
    entered = [mailbox.__enter__() for mailbox in mailboxes]
    tasks = [asyncio.ensure_future(anext(mailbox)) for mailbox in entered]
    await asyncio.sleep(0)
    changes.publish("ann", "a", 1)
    told: list[int] = []
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        told.append(sum(task.done() for task in tasks))
    assert max(b - a for a, b in zip([0, *told], told, strict=False)) <= TELLINGS_A_TURN
    assert {task.result() for task in tasks} == {ConversationChanged("a", 1)}
    assert ring(time) == count / TELLINGS_PER_SECOND
    for mailbox in mailboxes:
        mailbox.__exit__(None, None, None)
    assert changes.subscribers == 0


async def test_who_leaves_in_the_middle_of_a_telling_is_not_told() -> None:
    changes, _ = made()
    entered = [changes.subscribe("ann") for _ in range(2 * TELLINGS_A_TURN)]
    mailboxes = [each.__enter__() for each in entered]
    changes.publish("ann", "a", 1)
    for each in entered:
        each.__exit__(None, None, None)
    for mailbox in mailboxes:
        assert [change async for change in mailbox] == []
