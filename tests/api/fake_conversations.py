"""Conversations in memory, with replies that say what a test tells them to.

A viewing is a place in the reply's text: it waits until there is more, and gives all of it at
once, as the real mailboxes merge.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import orjson

from chatserve.api.chat_collaborators import TurnAsk
from chatserve.chat.conversations.reply_events import (
    ChatEvent,
    ConversationChanged,
    ReplyAccepted,
    ReplyDelta,
    ReplyFinal,
    ReplyProgress,
    ReplySnapshot,
)
from chatserve.chat.store.conversation import (
    Conversation,
    ReplyCursor,
    ReplyRecord,
    ReplyState,
    Role,
    Turn,
)
from chatserve.chat.store.session_store import Page
from chatserve.errors import Conflict, NotFound

DONE: dict[str, object] = {
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
    "receipt": {"device": 4, "computed": 1},
    "timings": {"to_first_token": 0.25, "total": 1.0},
}


class FakeChatReply:
    """A reply. `viewers` are those who look now; `left` is set while nobody does."""

    def __init__(self, conversation: str, turn: str, reply: str) -> None:
        self.conversation, self.turn, self.id = conversation, turn, reply
        self.text = ""
        self.tokens: int | None = None
        self.epoch = 1
        self.logged: dict[int, int] = {}  # of epochs that are over: what was kept of the text
        self.progress: list[ReplyProgress] = []
        self.final: ReplyFinal | None = None
        self.going_away = False
        self.fault: Exception | None = None
        self.viewers = 0
        self.viewed = 0
        self.seen, self.left = asyncio.Event(), asyncio.Event()
        self.left.set()
        self._news = asyncio.Event()

    @property
    def end(self) -> ReplyCursor | None:
        return None if self.final is None else self.final.cursor

    def say(self, text: str, tokens: int | None = None) -> None:
        """tokens: of all that was said, as the server would count them."""
        self.text += text
        self.tokens = tokens
        self._tell()

    def finish(self, kind: str = "done", data: Mapping[str, object] = DONE) -> None:
        cursor = ReplyCursor(self.epoch, len(self.text) + 1)
        self.final = ReplyFinal(cursor=cursor, kind=kind, data=data)
        self._tell()

    def go_away(self) -> None:
        """End the viewings without a final event, as a server that ends does."""
        self.going_away = True
        self._tell()

    def break_off(self, fault: Exception) -> None:
        self.fault = fault
        self._tell()

    def crash(self, kept: int) -> None:
        """Be taken up again after a crash that lost the text from there on."""
        self.logged[self.epoch] = kept
        self.epoch += 1
        self.text = self.text[:kept]
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    @contextlib.contextmanager
    def view(self, after: ReplyCursor | None = None) -> Generator[AsyncIterator[ChatEvent]]:
        self.viewers += 1
        self.viewed += 1
        self.seen.set()
        self.left.clear()
        try:
            yield self._events(after)
        finally:
            self.viewers -= 1
            if not self.viewers:
                self.left.set()

    async def _events(self, after: ReplyCursor | None) -> AsyncIterator[ChatEvent]:
        yield ReplyAccepted(conversation=self.conversation, turn=self.turn, reply=self.id)
        if not self.text:
            for progress in self.progress:
                yield progress
        place = 0
        if after is not None:
            known = self.logged.get(after.epoch, len(self.text))
            if after.epoch > self.epoch or after.seq > known:
                place = len(self.text)
                yield ReplySnapshot(cursor=self._at(place), text=self.text, tokens=self.tokens)
            else:
                place = after.seq
        while True:
            if self.fault is not None:
                raise self.fault
            if self.going_away:
                return
            if place < len(self.text):
                text, place = self.text[place:], len(self.text)
                yield ReplyDelta(cursor=self._at(place), text=text, tokens=self.tokens)
            elif self.final is not None:
                yield self.final
                return
            else:
                await self._news.wait()

    def _at(self, place: int) -> ReplyCursor:
        return ReplyCursor(self.epoch, place)


class FakeConversations:
    """`on_send` is given each new reply; `refusal` is raised by every call that is not a read;
    `hold` makes sends wait, `stop_hold` stops."""

    def __init__(self) -> None:
        self.known: dict[str, Conversation] = {}
        self.turns: dict[str, dict[str, Turn]] = {}
        self.asks: dict[tuple[str, str], tuple[bytes, FakeChatReply]] = {}
        self.replies: dict[str, FakeChatReply] = {}
        self.make_reply: Callable[[str, str, str], Any] = FakeChatReply
        self.on_send: Callable[[FakeChatReply], None] = lambda reply: None
        self.refusal: Exception | None = None
        self.hold: asyncio.Event | None = None
        self.stop_hold: asyncio.Event | None = None
        self.stopping = 0  # stops that were asked for
        self.sent: list[TurnAsk] = []
        self.arrived = asyncio.Event()
        self.send_cancelled = asyncio.Event()
        self._numbers = itertools.count(1)
        self._times = itertools.count(1_700_000_000)
        self.import_asks: list[str | None] = []
        self._named: dict[tuple[str, str], str] = {}  # conversations by what their client says
        self._listeners: list[tuple[str, asyncio.Queue[ConversationChanged | Exception]]] = []

    async def create(
        self, owner: str, *, title: str | None, system: str | None, settings: Mapping[str, object]
    ) -> Conversation:
        empty = Conversation(id="", owner=owner, title=title or "", created=0.0, updated=0.0)
        return await self.add(owner, replace(empty, system=system, settings=settings), ())

    async def add(
        self,
        owner: str,
        conversation: Conversation,
        turns: Sequence[Turn],
        *,
        ask: str | None = None,
    ) -> Conversation:
        self._may()
        self.import_asks.append(ask)
        known = None if ask is None else self._named.get((owner, ask))
        if known is not None:
            return self.known[known]
        now = float(next(self._times))
        name = f"c{next(self._numbers)}"
        made = replace(conversation, id=name, owner=owner, created=now, updated=now)
        self.known[name] = made
        if ask is not None:
            self._named[owner, ask] = name
        self.turns[name] = {turn.id: turn for turn in turns}
        self._tell(made)
        return made

    async def get(
        self, owner: str, conversation: str
    ) -> tuple[Conversation, Sequence[Turn], Sequence[ReplyRecord]]:
        found = self._own(owner, conversation)
        running = [
            ReplyRecord(
                id=reply.id, turn=reply.turn, state=ReplyState.RUNNING, created=1.0, request=b"{}"
            )
            for reply in self.replies.values()
            if reply.conversation == conversation and reply.end is None
        ]
        return found, tuple(self.turns[conversation].values()), running

    async def list(self, owner: str, *, after: str | None, limit: int, search: str | None) -> Page:
        own = [each for each in reversed(self.known.values()) if each.owner == owner]
        found = [each for each in own if search is None or search.lower() in each.title.lower()]
        if after is not None:
            found = found[[each.id for each in found].index(after) + 1 :]
        page = tuple(found[:limit])
        return Page(page, page[-1].id if len(found) > limit else None)

    async def update(
        self, owner: str, conversation: str, changes: Mapping[str, object]
    ) -> Conversation:
        self._may()
        found = self._own(owner, conversation)
        if "leaf" in changes and changes["leaf"] not in self.turns[conversation]:
            raise NotFound("There is no such turn.", param="leaf")
        given: dict[str, Any] = dict(changes)
        changed = replace(found, revision=found.revision + 1, **given)
        self.known[conversation] = changed
        self._tell(changed)
        return changed

    async def delete(self, owner: str, conversation: str) -> None:
        self._may()
        found = self._own(owner, conversation)
        del self.known[conversation], self.turns[conversation]
        for listener, queue in self._listeners:
            if listener == found.owner:
                queue.put_nowait(ConversationChanged(conversation, None))

    async def send(self, turn: TurnAsk) -> FakeChatReply:
        self.sent.append(turn)
        self.arrived.set()
        if self.hold is not None:
            try:
                await self.hold.wait()
            except asyncio.CancelledError:
                self.send_cancelled.set()
                raise
        found = self._own(turn.owner, turn.conversation)
        known = self.asks.get((turn.conversation, turn.ask))
        if known is not None:
            if known[0] != turn.digest:
                raise Conflict("This id was used for something else.", param="id")
            return known[1]
        self._may()
        tree = self.turns[turn.conversation]
        parent = found.leaf if turn.at_leaf else turn.parent
        asked = parent if turn.content is None else turn.ask
        assert asked is not None
        if turn.content is not None:
            tree[asked] = Turn(
                id=asked, parent=parent, role=Role.USER, text=turn.content, created=1.0
            )
        reply = self.make_reply(
            turn.conversation, asked, f"{turn.conversation}.r{next(self._numbers)}"
        )
        self.asks[turn.conversation, turn.ask] = (turn.digest, reply)
        self.replies[reply.id] = reply
        self.known[turn.conversation] = replace(found, leaf=asked, revision=found.revision + 1)
        self._tell(self.known[turn.conversation])
        self.on_send(reply)
        return reply

    def keep(self, reply: FakeChatReply) -> None:
        """Put an ended reply into its tree."""
        assert reply.final is not None
        found = self.known[reply.conversation]
        self.turns[reply.conversation][reply.id] = Turn(
            id=reply.id,
            parent=reply.turn,
            role=Role.ASSISTANT,
            text=reply.text,
            created=2.0,
            final=orjson.dumps(reply.final.data),
        )
        self.known[reply.conversation] = replace(found, leaf=reply.id)

    async def reply(self, owner: str, reply: str) -> FakeChatReply:
        found = self.replies.get(reply)
        conversation = None if found is None else self.known.get(found.conversation)
        if found is None or conversation is None or conversation.owner != owner:
            raise NotFound("There is no such reply.")
        return found

    async def stop(self, owner: str, reply: str) -> None:
        self.stopping += 1
        if self.stop_hold is not None:
            await self.stop_hold.wait()
        found = await self.reply(owner, reply)
        if found.final is None:
            found.finish(data=DONE | {"finish_reason": "stop_requested"})
            self.keep(found)

    @contextlib.contextmanager
    def changes(self, owner: str) -> Generator[AsyncIterator[ConversationChanged]]:
        queue: asyncio.Queue[ConversationChanged | Exception] = asyncio.Queue()
        entry = (owner, queue)
        self._listeners.append(entry)
        try:
            yield self._heard(queue)
        finally:
            self._listeners.remove(entry)

    def typist(self, owner: str) -> None:
        """Nothing is computed ahead here."""

    @property
    def listeners(self) -> int:
        return len(self._listeners)

    @property
    def viewers(self) -> int:
        return sum(reply.viewers for reply in self.replies.values())

    async def _heard(
        self, queue: asyncio.Queue[ConversationChanged | Exception]
    ) -> AsyncIterator[ConversationChanged]:
        while True:
            change = await queue.get()
            if isinstance(change, Exception):
                raise change
            yield change

    def break_changes(self, fault: Exception) -> None:
        for _, queue in self._listeners:
            queue.put_nowait(fault)

    def _may(self) -> None:
        if self.refusal is not None:
            raise self.refusal

    def _own(self, owner: str, conversation: str) -> Conversation:
        found = self.known.get(conversation)
        if found is None or found.owner != owner:
            raise NotFound("There is no such conversation.")
        return found

    def _tell(self, conversation: Conversation) -> None:
        for owner, queue in self._listeners:
            if owner == conversation.owner:
                queue.put_nowait(ConversationChanged(conversation.id, conversation.revision))
