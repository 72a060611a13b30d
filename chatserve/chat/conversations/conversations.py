"""Conversations: the door of the chat floor for chats that are kept.

It may not know HTTP, the store's kind or pages. What is kept belongs to the store; what is here is
what runs: the replies under way in this process, by id and by the ask that they answer.

    send     busy? ▸ store.accept (trip 1) ▸ Answering under way      ─┐
    resume   store.resume, store.log ▸ the sample fed with the log    ─┼▶ a reply that is live
    reply    live ▸ else the store's: ended ▸ KeptReply, running ▸ taken up as above

Whoever accepts a turn does it in a task of its own: a caller that is cancelled leaves a turn that
is kept and answered, or none. Where the store did not answer, the turn may be kept all the same: it
is looked for until the store says so, and answered if it is there. So every reply that is `running`
in the store is live here, or about to be.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Generic, Protocol

from chatserve.chat.conversations.assignment import AnswerMeans, AnswerOptions
from chatserve.chat.conversations.changes import Changes
from chatserve.chat.conversations.chat_reply import ChatReply, KeptReply
from chatserve.chat.conversations.chat_request import ChatRequest
from chatserve.chat.conversations.deletion import Deletions
from chatserve.chat.conversations.drafts import DraftDoor, DraftMeans, Drafts, Typist
from chatserve.chat.conversations.history import History
from chatserve.chat.conversations.imports import ID_BYTES, import_id, taken_in
from chatserve.chat.conversations.live_replies import LiveLimits, LiveReplies
from chatserve.chat.conversations.recall import first_assignment
from chatserve.chat.conversations.reply_events import ConversationChanged
from chatserve.chat.conversations.reply_log import LogLimits, LogStatistics, ReplyLog
from chatserve.chat.conversations.residence import Residence
from chatserve.chat.conversations.wish_door import WishDoor
from chatserve.chat.meter import ReplyMeter, Unmetered
from chatserve.chat.service import EngineDoor, PreparedT, Workshop, draw_seed
from chatserve.chat.store.conversation import (
    REPLY_SEPARATOR,
    Conversation,
    ReplyRecord,
    ReplyState,
    Turn,
)
from chatserve.chat.store.session_store import (
    Elsewhere,
    NewTurn,
    Page,
    SessionStore,
    conflict,
    no_reply,
)
from chatserve.chat.text.text_floor import TextFloor
from chatserve.errors import Busy, Conflict, Unavailable


class TurnAsk(Protocol):
    """A turn as its client sent it; floor 5's TurnAsk fits."""

    @property
    def owner(self) -> str: ...
    @property
    def conversation(self) -> str: ...
    @property
    def ask(self) -> str: ...
    @property
    def digest(self) -> bytes: ...
    @property
    def content(self) -> str | None: ...
    @property
    def at_leaf(self) -> bool: ...
    @property
    def parent(self) -> str | None: ...
    @property
    def sampling(self) -> Mapping[str, object]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationOptions:
    """Patience, waits and limits of what a conversation's replies are made with."""

    answers: AnswerOptions = field(default_factory=AnswerOptions)
    log: LogLimits = field(default_factory=LogLimits)
    live: LiveLimits = field(default_factory=LiveLimits)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationStatistics:
    """running: replies under way; waiting: of those, the ones without a place in the engine.
    deletions: begun and not finished."""

    running: int
    waiting: int
    accepted_total: int
    resumed_total: int
    doubts: int
    subscribers: int
    draining: bool
    log: LogStatistics
    deletions: int = 0


def draw_id() -> str:
    """An id that nobody guesses: no dot, and no dash that a command would take for an option."""
    return secrets.token_hex(ID_BYTES)


_Ask = tuple[str, str, str]  # owner, conversation, the client's id


@dataclass(slots=True)
class _Known:
    """A turn on its way into the store, or whose reply is live."""

    digest: bytes
    reply: "asyncio.Future[ChatReply | KeptReply]"
    live: bool = False


class Conversations(Generic[PreparedT]):
    """See the module. One per process, on the event loop."""

    def __init__(
        self,
        store: SessionStore,
        engine: EngineDoor[PreparedT],
        history: History,
        *,
        text: TextFloor,
        workshop: Workshop,
        options: ConversationOptions | None = None,
        drafts: DraftDoor[PreparedT] | None = None,
        wishes: WishDoor[PreparedT] | None = None,
        meter: ReplyMeter | None = None,
        wall: Callable[[], float] = time.time,
        draw_seed: Callable[[], int] = draw_seed,
    ) -> None:
        self._store = store
        self._engine = engine
        self._history = history
        self._text = text
        self._workshop = workshop
        self._options = options or ConversationOptions()
        self._wall = wall
        self._draw_seed = draw_seed
        self._crowd = workshop.crowd
        self._changes = Changes(workshop.clock)
        self._log = ReplyLog(store, workshop.clock, self._options.log)
        self._means = AnswerMeans(
            engine=engine,
            text=text,
            history=history,
            store=store,
            log=self._log,
            changes=self._changes,
            crowd=self._crowd,
            meter=meter or Unmetered(),
            executor=workshop.executor,
            clock=workshop.clock,
            wall=wall,
            options=self._options.answers,
        )
        self._live = LiveReplies(self._means, workshop.task_group, self._options.live)
        self._drafts = None
        if drafts is not None:
            means = DraftMeans(
                engine=drafts,
                history=history,
                store=store,
                changes=self._changes,
                executor=workshop.executor,
                wishes=wishes,
                clock=workshop.clock,
            )
            self._drafts = Drafts(means)
        self._deletions = Deletions(self._means, self._live, self._drafts)
        self._residence = None
        if wishes is not None:
            self._residence = Residence(self._means, self._live, self._drafts, wishes)
        self._asks: dict[_Ask, _Known] = {}
        self._writer: asyncio.Task[None] | None = None
        self._accepted_total = 0

    # Life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to write logs. Before anything else, once."""
        assert self._writer is None, "started once"
        self._writer = self._workshop.task_group.create_task(self._log.run(), name="reply log")

    async def resume_all(self) -> None:
        """Take up every reply that was running when the process before this one ended.

        Waits for a store that is away. Returns when all are under way or are being ended; so are
        the deletions that it left.
        """
        await self._deletions.finish_all()
        await self._live.resume_all()

    def begin_drain(self) -> None:
        """Refuse new turns; what runs goes on. Synchronous, idempotent."""
        self._live.draining = True

    async def wait_quiet(self) -> None:
        """Wait until no reply is under way."""
        await self._live.wait_quiet()

    async def close(self) -> None:
        """End: what still runs stays `running` in the store, with all that it has said logged."""
        self._deletions.close()
        await self._live.suspend_all()
        self._log.close()
        if self._writer is not None:
            await asyncio.wait((self._writer,))

    # Conversations ---------------------------------------------------------------------------

    async def create(
        self, owner: str, *, title: str | None, system: str | None, settings: Mapping[str, object]
    ) -> Conversation:
        """A new conversation. Its id cannot be guessed."""
        now = self._wall()
        conversation = Conversation(
            id=draw_id(),
            owner=owner,
            title=title or "",
            created=now,
            updated=now,
            system=system,
            settings=dict(settings),
        )
        await self._store.create(conversation)
        return self._changed(conversation)

    async def get(
        self, owner: str, conversation: str
    ) -> tuple[Conversation, Sequence[Turn], Sequence[ReplyRecord]]:
        """With all turns and the replies that are running or have no turn. Raises NotFound."""
        return await self._store.tree(owner, conversation)

    async def list(self, owner: str, *, after: str | None, limit: int, search: str | None) -> Page:
        """A part of the owner's conversations, latest first."""
        return await self._store.list(owner, after=after, limit=limit, search=search)

    async def update(
        self, owner: str, conversation: str, changes: Mapping[str, object]
    ) -> Conversation:
        """Set some of title, system, settings and leaf. Raises NotFound."""
        found = await self._store.update(owner, conversation, changes, now=self._wall())
        return self._changed(found)

    async def delete(self, owner: str, conversation: str) -> None:
        """Forget it everywhere; its running replies end. Raises NotFound, and Unavailable where
        that is not done yet (see `Deletions.delete`)."""
        await self._deletions.delete(owner, conversation)

    async def forget(self, conversation: str) -> None:
        """The same for an admin, who may name any owner's."""
        await self._deletions.delete(await self._deletions.owner(conversation), conversation)

    async def add(
        self,
        owner: str,
        conversation: Conversation,
        turns: Sequence[Turn],
        *,
        ask: str | None = None,
    ) -> Conversation:
        """Import: a fresh id, the turns as given (parents first). Raises TooLarge.

        ask: the client's id of this import. The same again is the same conversation, as it is now.
        """
        name = draw_id()
        if ask is not None:
            name = await asyncio.to_thread(import_id, owner, ask, conversation, turns)
        added, kept = await asyncio.to_thread(taken_in, owner, conversation, turns, id=name)
        self._live.found(owner, added.id)
        await self._store.create(added, kept)
        if ask is not None:
            added = await self._store.get(owner, name)
        return self._changed(added)

    @property
    def residence(self) -> Residence[PreparedT]:
        """Where what was kept of a conversation is to be. Only where `wishes` were given."""
        assert self._residence is not None, "wired with wishes"
        return self._residence

    def changes(self, owner: str) -> AbstractContextManager[AsyncIterator[ConversationChanged]]:
        """The owner's conversations as they change, merged: the latest revision of each."""
        return self._changes.subscribe(owner)

    def typist(self, owner: str) -> Typist[PreparedT] | None:
        """Who types at one socket; None where drafts are off."""
        return None if self._drafts is None else self._drafts.typist(owner)

    def _changed(self, conversation: Conversation) -> Conversation:
        self._changes.publish(conversation.owner, conversation.id, conversation.revision)
        return conversation

    # Turns -----------------------------------------------------------------------------------

    async def send(self, turn: TurnAsk) -> ChatReply | KeptReply:
        """Accept a turn, or find the reply of a known ask. When this returns, it is kept.

        Raises Busy or Unavailable where there is no room for a new one, and what the store's
        `accept` raises. A cancelled call leaves a turn that is kept and answered, or none.
        """
        key = (turn.owner, turn.conversation, turn.ask)
        known = self._asks.get(key)
        if known is not None:
            if known.digest != turn.digest:
                raise conflict("digest")
            return await asyncio.shield(known.reply)
        try:
            self._check_room(turn.owner)
        except (Busy, Unavailable):
            record = await self._store.find(
                turn.owner, turn.conversation, ask=turn.ask, digest=turn.digest
            )
            if record is None:
                raise
            return await self._shown(turn.owner, record)
        self._crowd.enter(turn.owner)  # its place, until it has one as a reply
        try:
            accepting = self._live.spawn(self._accept(turn, key), name="accepting a turn")
        except Unavailable:
            self._crowd.leave(turn.owner)
            raise
        self._asks[key] = _Known(turn.digest, accepting)
        accepting.add_done_callback(lambda _: self._arrived(key))
        return await asyncio.shield(accepting)

    def _check_room(self, owner: str) -> None:
        if self._live.draining:
            raise self._live.shutting_down()
        self._engine.check_room(owner, self._crowd.count, self._crowd.of(owner))

    def _arrived(self, key: _Ask) -> None:
        """A turn is through the store. Its ask is known here for as long as its reply is live."""
        self._crowd.leave(key[0])
        known = self._asks.get(key)
        if known is not None and not known.live:
            del self._asks[key]

    def _forget(self, key: _Ask) -> None:
        self._asks.pop(key, None)

    async def _accept(self, turn: TurnAsk, key: _Ask) -> ChatReply | KeptReply:
        request = ChatRequest(
            sampling=turn.sampling, seed=self._draw_seed(), encoding=self._history.encoding
        )
        new = NewTurn(
            conversation=turn.conversation,
            owner=turn.owner,
            ask=turn.ask,
            digest=turn.digest,
            content=turn.content,
            at_leaf=turn.at_leaf,
            parent=turn.parent,
            reply=f"{turn.conversation}{REPLY_SEPARATOR}{draw_id()}",
            request=request.to_json(),
            now=self._wall(),
        )
        try:
            accepted = await self._store.accept(new)
        except Elsewhere:
            raise
        except Unavailable:
            self._live.doubt(turn.owner, new.reply)
            raise
        if accepted.known:
            return await self._shown(turn.owner, accepted.record)
        self._accepted_total += 1
        self._changed(accepted.conversation)
        assignment = first_assignment(accepted, self._text)
        self._asks[key].live = True
        return self._live.begin(assignment, lambda: self._forget(key))

    # Replies ---------------------------------------------------------------------------------

    async def reply(self, owner: str, reply: str) -> ChatReply | KeptReply:
        """A reply, live or as it was kept. Raises NotFound."""
        live = self._live.by_id.get(reply)
        if live is None:
            return await self._shown(owner, await self._store.reply(owner, reply))
        if live.reply.owner != owner:
            raise no_reply()
        return live.reply

    async def stop(self, owner: str, reply: str) -> None:
        """End a reply with what it has; an ended one stays as it is. Raises NotFound."""
        found = await self.reply(owner, reply)
        live = self._live.by_id.get(found.id)
        if live is not None:
            live.stop()

    async def _shown(self, owner: str, record: ReplyRecord) -> ChatReply | KeptReply:
        """What the store said of a reply, as it is by now."""
        if record.state is ReplyState.RUNNING:
            try:
                return await self._live.take_up(record.id)
            except Conflict:  # it has ended since
                record = await self._store.reply(owner, record.id)
        return KeptReply(record)

    def statistics(self) -> ConversationStatistics:
        """A frozen picture."""
        return ConversationStatistics(
            running=len(self._live),
            waiting=self._crowd.count,
            accepted_total=self._accepted_total,
            resumed_total=self._live.resumed_total,
            doubts=self._live.doubts,
            subscribers=self._changes.subscribers,
            draining=self._live.draining,
            log=self._log.statistics(),
            deletions=self._deletions.unfinished,
        )
