"""Changes: tells an owner's tabs which conversations have changed.

It may not know conversations, sockets or replies. Theory of operation: what changes is collected,
of each conversation the latest revision, and handed to all of the owner's mailboxes at once; the
next time is after an interval that grows with what this cost, so that an owner's telling never
takes more than `TELLINGS_PER_SECOND` however many tabs and conversations there are. News of more
than `NEWS_MAX` conversations is told as one: anything may have changed, list anew. A mailbox that
is not read merges in the same way. Nothing waits on a slow reader.

    publish ─▶ at once, if nothing was told lately ─▶ mailboxes, a few at a turn of the loop
            └▶ else collected until the interval is over ─▶ told
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from contextlib import contextmanager

from chatserve.chat.audience import Clock, Timer
from chatserve.chat.conversations.reply_events import ConversationChanged

NEWS_MAX = 32  # conversations that are told one by one
TELLINGS_PER_SECOND = 1_000.0  # of one owner: a conversation to a subscriber
TELLINGS_A_TURN = 32  # subscribers, of the event loop
INTERVAL_SECONDS = 0.025  # at the least


class _News:
    """Conversation to revision, the latest change last; or that anything may have changed."""

    def __init__(self) -> None:
        self._revisions: dict[str, int | None] = {}
        self._anything = False

    def __len__(self) -> int:
        return 1 if self._anything else len(self._revisions)

    def add(self, change: ConversationChanged) -> None:
        if change.conversation is None:
            self._anything = True
        elif not self._anything:
            self._revisions.pop(change.conversation, None)
            self._revisions[change.conversation] = change.revision
            self._anything = len(self._revisions) > NEWS_MAX
        if self._anything:
            self._revisions.clear()

    def all(self) -> tuple[ConversationChanged, ...]:
        if self._anything:
            return (ConversationChanged(None, None),)
        return tuple(ConversationChanged(*each) for each in self._revisions.items())

    def take(self) -> ConversationChanged:
        if self._anything:
            self._anything = False
            return ConversationChanged(None, None)
        conversation = next(iter(self._revisions))
        return ConversationChanged(conversation, self._revisions.pop(conversation))


class _Mailbox:
    """One subscriber's news."""

    def __init__(self) -> None:
        self._news = _News()
        self._arrived = asyncio.Event()
        self._closed = False

    def put(self, changes: Sequence[ConversationChanged]) -> None:
        if not self._closed:
            for change in changes:
                self._news.add(change)
            self._arrived.set()

    def close(self) -> None:
        self._closed = True
        self._arrived.set()

    def __aiter__(self) -> "_Mailbox":
        return self

    async def __anext__(self) -> ConversationChanged:
        while not self._closed:
            if self._news:
                return self._news.take()
            self._arrived.clear()
            await self._arrived.wait()
        raise StopAsyncIteration


class _Owner:
    """One owner's subscribers, and what they have not been told."""

    def __init__(self) -> None:
        self.mailboxes: set[_Mailbox] = set()
        self.news = _News()
        self.timer: Timer | None = None  # set: something was told lately


class Changes:
    """All owners' subscriptions. On the event loop."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._owners: dict[str, _Owner] = {}
        self._listeners: dict[str, list[Callable[[str], None]]] = {}

    @contextmanager
    def subscribe(self, owner: str) -> Generator[AsyncIterator[ConversationChanged]]:
        """The owner's changes for as long as the block lasts."""
        mailbox = _Mailbox()
        told = self._owners.setdefault(owner, _Owner())
        told.mailboxes.add(mailbox)
        try:
            yield mailbox
        finally:
            mailbox.close()
            told.mailboxes.discard(mailbox)
            if not told.mailboxes:
                del self._owners[owner]
                if told.timer is not None:
                    told.timer.cancel()

    @contextmanager
    def listen(self, owner: str, heard: Callable[[str], None]) -> Generator[None]:
        """Call back with each conversation of the owner as it changes. heard: never waits."""
        self._listeners.setdefault(owner, []).append(heard)
        try:
            yield
        finally:
            listeners = self._listeners[owner]
            listeners.remove(heard)
            if not listeners:
                del self._listeners[owner]

    def publish(self, owner: str, conversation: str, revision: int | None) -> None:
        """A conversation has a new revision; None = it was deleted. Never waits."""
        for heard in self._listeners.get(owner, ()):
            heard(conversation)
        told = self._owners.get(owner)
        if told is not None:
            told.news.add(ConversationChanged(conversation, revision))
            if told.timer is None:
                self._tell(told)

    @property
    def subscribers(self) -> int:
        """Subscriptions at this moment."""
        return sum(len(told.mailboxes) for told in self._owners.values())

    def _tell(self, told: _Owner) -> None:
        told.timer = None
        if not told.news:
            return
        changes, told.news = told.news.all(), _News()
        tellings = len(changes) * len(told.mailboxes)
        interval = max(INTERVAL_SECONDS, tellings / TELLINGS_PER_SECOND)
        told.timer = self._clock.call_later(interval, lambda: self._tell(told))
        _hand_out(changes, tuple(told.mailboxes))


def _hand_out(changes: Sequence[ConversationChanged], mailboxes: Sequence[_Mailbox]) -> None:
    for mailbox in mailboxes[:TELLINGS_A_TURN]:
        mailbox.put(changes)
    if len(mailboxes) > TELLINGS_A_TURN:
        rest = mailboxes[TELLINGS_A_TURN:]
        asyncio.get_running_loop().call_soon(_hand_out, changes, rest)
