"""Changes: tells an owner's other tabs which conversations have changed.

It may not know conversations, sockets or replies. A subscription is a mailbox that merges: of each
conversation only the latest revision waits, and of more than `WAITING_MAX` conversations the ones
that changed first are let go (a tab so far behind lists anew). Nothing waits on a slow reader.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import contextmanager

from chatserve.chat.conversations.reply_events import ConversationChanged

WAITING_MAX = 1_000  # conversations with news in one mailbox: some 100 KiB


class _Mailbox:
    """One subscriber's news: conversation to revision, the latest change last."""

    def __init__(self) -> None:
        self._news: dict[str, int | None] = {}
        self._arrived = asyncio.Event()
        self._closed = False

    def put(self, change: ConversationChanged) -> None:
        self._news.pop(change.conversation, None)
        self._news[change.conversation] = change.revision
        if len(self._news) > WAITING_MAX:
            del self._news[next(iter(self._news))]
        self._arrived.set()

    def close(self) -> None:
        self._closed = True
        self._news.clear()
        self._arrived.set()

    def __aiter__(self) -> "_Mailbox":
        return self

    async def __anext__(self) -> ConversationChanged:
        while not self._news:
            if self._closed:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        conversation = next(iter(self._news))
        return ConversationChanged(conversation, self._news.pop(conversation))


class Changes:
    """All owners' subscriptions. On the event loop."""

    def __init__(self) -> None:
        self._mailboxes: dict[str, set[_Mailbox]] = {}
        self._listeners: dict[str, list[Callable[[str], None]]] = {}

    @contextmanager
    def subscribe(self, owner: str) -> Generator[AsyncIterator[ConversationChanged]]:
        """The owner's changes for as long as the block lasts."""
        mailbox = _Mailbox()
        self._mailboxes.setdefault(owner, set()).add(mailbox)
        try:
            yield mailbox
        finally:
            mailbox.close()
            mailboxes = self._mailboxes[owner]
            mailboxes.discard(mailbox)
            if not mailboxes:
                del self._mailboxes[owner]

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
        for mailbox in self._mailboxes.get(owner, ()):
            mailbox.put(ConversationChanged(conversation, revision))
        for heard in self._listeners.get(owner, ()):
            heard(conversation)

    @property
    def subscribers(self) -> int:
        """Subscriptions at this moment."""
        return sum(map(len, self._mailboxes.values()))
