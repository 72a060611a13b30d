"""What the API floor is given before the model is loaded: doors that open when it is.

The routes exist from the first moment, and answer 503 with a Retry-After until then.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from chatserve.api.chat_collaborators import ChatReply, Conversations, TurnAsk, Typist
from chatserve.chat.conversations.reply_events import ConversationChanged
from chatserve.chat.store.conversation import Conversation, ReplyRecord, Turn
from chatserve.chat.store.session_store import Page


class LateConversations:
    """Conversations, found at each call. behind: raises Unavailable while there are none."""

    def __init__(self, behind: Callable[[], Conversations]) -> None:
        self._behind = behind

    async def create(
        self, owner: str, *, title: str | None, system: str | None, settings: Mapping[str, object]
    ) -> Conversation:
        """See Conversations, as for all that follows."""
        return await self._behind().create(owner, title=title, system=system, settings=settings)

    async def get(
        self, owner: str, conversation: str
    ) -> tuple[Conversation, Sequence[Turn], Sequence[ReplyRecord]]:
        return await self._behind().get(owner, conversation)

    async def list(self, owner: str, *, after: str | None, limit: int, search: str | None) -> Page:
        return await self._behind().list(owner, after=after, limit=limit, search=search)

    async def update(
        self, owner: str, conversation: str, changes: Mapping[str, object]
    ) -> Conversation:
        return await self._behind().update(owner, conversation, changes)

    async def delete(self, owner: str, conversation: str) -> None:
        await self._behind().delete(owner, conversation)

    async def add(
        self,
        owner: str,
        conversation: Conversation,
        turns: Sequence[Turn],
        *,
        ask: str | None = None,
    ) -> Conversation:
        return await self._behind().add(owner, conversation, turns, ask=ask)

    async def send(self, turn: TurnAsk) -> ChatReply:
        return await self._behind().send(turn)

    async def reply(self, owner: str, reply: str) -> ChatReply:
        return await self._behind().reply(owner, reply)

    async def stop(self, owner: str, reply: str) -> None:
        await self._behind().stop(owner, reply)

    def typist(self, owner: str) -> Typist | None:
        return self._behind().typist(owner)

    def changes(self, owner: str) -> AbstractContextManager[AsyncIterator[ConversationChanged]]:
        return self._behind().changes(owner)
