"""What the routes of conversations need of the chat floor, as protocols."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from chatserve.chat.conversations.draft_ask import DraftAsk
from chatserve.chat.conversations.reply_events import ChatEvent, ConversationChanged
from chatserve.chat.store.conversation import Conversation, ReplyCursor, ReplyRecord, Turn
from chatserve.chat.store.session_store import Page


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnAsk:
    """A turn as its client sent it. ask: the client's id. content None: answer `parent` once more.

    at_leaf: no parent was named. sampling: the sampling fields that were given, as OpenAI spells
    them, validated; they go before the conversation's settings. digest: of the body's meaning.
    """

    owner: str
    conversation: str
    ask: str
    digest: bytes
    content: str | None
    at_leaf: bool
    parent: str | None
    sampling: Mapping[str, object]


class ChatReply(Protocol):
    """A chat's reply, under way or ended long ago."""

    @property
    def conversation(self) -> str: ...
    @property
    def turn(self) -> str: ...
    @property
    def id(self) -> str: ...
    @property
    def end(self) -> ReplyCursor | None:
        """The final event's cursor, None while running: who is there has seen it all."""
        ...

    def view(
        self, after: ReplyCursor | None = None
    ) -> AbstractContextManager[AsyncIterator[ChatEvent]]:
        """Look at it for as long as the block lasts, from a cursor on; leaving the last viewing of
        a running reply starts its grace period. Begins with ReplyAccepted."""
        ...


class Typist(Protocol):
    """One socket's user, whose text is computed ahead of its turn."""

    def take(self, ask: DraftAsk) -> None:
        """Only what was taken last counts. Never waits."""
        ...

    async def run(self, failed: Callable[[Exception, str], None]) -> None:
        """Act on what is taken, until cancelled. failed: is told of what cannot be (another's
        conversation is NotFound), with the request of its ask."""
        ...

    def close(self) -> None:
        """After `run` was cancelled: nothing of it is left. Synchronous, idempotent."""
        ...


class Conversations(Protocol):
    """Floor 4's door for chats. Another owner's things are NotFound."""

    async def create(
        self, owner: str, *, title: str | None, system: str | None, settings: Mapping[str, object]
    ) -> Conversation: ...
    async def get(
        self, owner: str, conversation: str
    ) -> tuple[Conversation, Sequence[Turn], Sequence[ReplyRecord]]:
        """With all turns (parents first) and the replies that are running or have no turn."""
        ...

    async def list(
        self, owner: str, *, after: str | None, limit: int, search: str | None
    ) -> Page: ...
    async def update(
        self, owner: str, conversation: str, changes: Mapping[str, object]
    ) -> Conversation: ...
    async def delete(self, owner: str, conversation: str) -> None:
        """Its running replies are stopped first."""
        ...

    async def add(
        self,
        owner: str,
        conversation: Conversation,
        turns: Sequence[Turn],
        *,
        ask: str | None = None,
    ) -> Conversation:
        """Import: a fresh id for the conversation, its turns as given (parents first). ask: the
        client's id of this import; the same again gives the same conversation."""
        ...

    async def send(self, turn: TurnAsk) -> ChatReply:
        """Accept a turn, or find the reply of a known ask. When this returns, it is kept."""
        ...

    async def reply(self, owner: str, reply: str) -> ChatReply:
        """Raises NotFound."""
        ...

    async def stop(self, owner: str, reply: str) -> None:
        """End a reply with what it has; an ended one stays as it is. Raises NotFound."""
        ...

    def typist(self, owner: str) -> Typist | None:
        """None where drafts are off."""
        ...

    def changes(self, owner: str) -> AbstractContextManager[AsyncIterator[ConversationChanged]]:
        """The owner's conversations as they change, merged: the latest revision of each."""
        ...
