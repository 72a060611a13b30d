"""MemoryStore: a SessionStore that forgets at the end of the process.

It serves where no Redis can be had, and in tests as the plain statement of what the Redis store
must do. Its calls are coroutines as the door has it; none of them waits, so each is atomic.
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from chatserve.chat.store.conversation import (
    Conversation,
    LogEntry,
    ReplyCursor,
    ReplyRecord,
    ReplyState,
    Role,
    Turn,
    conversation_of,
)
from chatserve.chat.store.conversation_list import Place, holds
from chatserve.chat.store.session_store import (
    CHANGEABLE,
    TURNS_MAX,
    Accepted,
    Ending,
    NewTurn,
    Page,
    StoreStatistics,
    Superseded,
    Unlogged,
    conflict,
    no_conversation,
    no_leaf,
    no_parent,
    no_reply,
)

SEARCH_CHARACTERS_MAX = 1 << 20  # looked at in one call of `list`: a few milliseconds


@dataclass(frozen=True, slots=True)
class _Began:
    """How a conversation was when a reply was accepted."""

    revision: int
    settings: Mapping[str, object]
    system: str | None


@dataclass(slots=True)
class _Kept:
    """One conversation. began: of the replies that are running. system_since: the revision at
    which the system prompt last changed. refused: replies that are not to be accepted any more."""

    conversation: Conversation
    turns: dict[str, Turn]
    system_since: int = 0
    refused: set[str] = field(default_factory=set[str])
    asks: dict[str, tuple[bytes, str]] = field(default_factory=dict[str, tuple[bytes, str]])
    records: dict[str, ReplyRecord] = field(default_factory=dict[str, ReplyRecord])
    began: dict[str, _Began] = field(default_factory=dict[str, _Began])
    names: dict[str, tuple[bytes, ...]] = field(default_factory=dict[str, tuple[bytes, ...]])
    logs: dict[str, list[LogEntry]] = field(default_factory=dict[str, list[LogEntry]])

    def path(self, turn: str | None) -> tuple[Turn, ...]:
        """From a first message to `turn`."""
        turns: list[Turn] = []
        while turn is not None:
            turns.append(self.turns[turn])
            turn = turns[-1].parent
        return tuple(reversed(turns))

    def change(self, now: float, **changes: object) -> Conversation:
        """One more revision."""
        old = self.conversation
        self.conversation = replace(
            old,
            updated=max(old.updated, now),
            revision=old.revision + 1,
            **changes,  # pyright: ignore[reportArgumentType]
        )
        return self.conversation

    def record(self, reply: str) -> ReplyRecord:
        """A reply's record, with the text of an ended one wherever that is kept."""
        record, turn = self.records[reply], self.turns.get(reply)
        return record if turn is None else replace(record, text=turn.text)


class MemoryStore:
    """All owners' conversations, in dictionaries."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}
        self._deletions: dict[str, tuple[str, set[bytes]]] = {}
        self._calls = 0

    async def create(self, conversation: Conversation, turns: Sequence[Turn] = ()) -> None:
        """Keep a new conversation; the same one again is there already."""
        self._calls += 1
        assert len(turns) <= TURNS_MAX, "refused where it is imported"
        there = self._kept.get(conversation.id)
        assert there is None or there.conversation.owner == conversation.owner, "ids are drawn"
        if there is None:
            self._kept[conversation.id] = _Kept(conversation, {turn.id: turn for turn in turns})

    async def get(self, owner: str, conversation: str) -> Conversation:
        """Raises NotFound."""
        return self._of(owner, conversation).conversation

    async def tree(
        self, owner: str, conversation: str
    ) -> tuple[Conversation, tuple[Turn, ...], tuple[ReplyRecord, ...]]:
        """With all turns, and the replies that are running or have no turn. Raises NotFound."""
        kept = self._of(owner, conversation)
        records = tuple(record for record in kept.records.values() if record.id not in kept.turns)
        return kept.conversation, tuple(kept.turns.values()), records

    async def list(
        self, owner: str, *, after: str | None = None, limit: int = 50, search: str | None = None
    ) -> Page:
        """Latest update first."""
        self._calls += 1
        found: list[Conversation] = []
        room, last = SEARCH_CHARACTERS_MAX, None
        for place, kept in self._listed(owner, None if after is None else Place.read(after)):
            if len(found) == limit or room < 0:
                assert last is not None
                return Page(tuple(found), last.written())
            last = place
            if search:
                room -= sum(len(turn.text) for turn in kept.turns.values())
                texts = (turn.text for turn in kept.turns.values())
                if not holds(search.casefold(), kept.conversation.title, texts):
                    continue
            found.append(kept.conversation)
        return Page(tuple(found), None)

    def _listed(self, owner: str, after: Place | None) -> Iterator[tuple[Place, _Kept]]:
        places = [
            (Place.of(kept.conversation), kept)
            for kept in self._kept.values()
            if kept.conversation.owner == owner
        ]
        places.sort(key=lambda item: item[0], reverse=True)
        return ((place, kept) for place, kept in places if after is None or place < after)

    async def update(
        self, owner: str, conversation: str, changes: Mapping[str, object], *, now: float
    ) -> Conversation:
        """Set some of title, system, settings and leaf. Raises NotFound."""
        assert changes.keys() <= CHANGEABLE, changes
        kept = self._of(owner, conversation)
        if "leaf" in changes and changes["leaf"] not in kept.turns:
            raise no_leaf()
        system = cast("str | None", changes.get("system", kept.conversation.system))
        changed = system != kept.conversation.system
        kept.change(now, **changes)
        if changed:
            kept.system_since = kept.conversation.revision
            for turn in [turn for turn in kept.turns.values() if turn.parent is None]:
                kept.turns[turn.id] = replace(turn, token_ids=None, encoding="")
        return kept.conversation

    async def owner(self, conversation: str) -> str:
        """Raises NotFound."""
        self._calls += 1
        kept = self._kept.get(conversation)
        if kept is None:
            raise no_conversation()
        return kept.conversation.owner

    async def page_names(self, conversation: str) -> frozenset[bytes]:
        """What the endings of its replies told."""
        self._calls += 1
        kept = self._kept.get(conversation)
        rows = () if kept is None else kept.names.values()
        return frozenset(name for row in rows for name in row)

    async def named(self, owner: str, conversation: str) -> frozenset[str]:
        """The replies whose endings had names. Raises NotFound."""
        return frozenset(self._of(owner, conversation).names)

    async def delete(
        self, owner: str, conversation: str, *, names: Iterable[bytes] = ()
    ) -> tuple[str, ...]:
        """The replies that were running. Raises NotFound."""
        kept = self._of(owner, conversation)
        del self._kept[conversation]
        gone = self._deletions.setdefault(conversation, (owner, set()))[1]
        gone.update(names, *kept.names.values())
        return tuple(kept.began)

    async def deletions(self) -> tuple[tuple[str, str], ...]:
        """Owners and conversations."""
        self._calls += 1
        return tuple((owner, name) for name, (owner, _) in self._deletions.items())

    async def forgotten_names(self, conversation: str) -> frozenset[bytes]:
        """Of a deletion under way."""
        self._calls += 1
        _, names = self._deletions.get(conversation, ("", set[bytes]()))
        return frozenset(names)

    async def end_deletion(self, conversation: str) -> None:
        """There are no files."""
        self._calls += 1
        self._deletions.pop(conversation, None)

    async def accept(self, turn: NewTurn) -> Accepted:
        """Append the user's turn and a running reply, or find the known one."""
        kept = self._of(turn.owner, turn.conversation)
        known = kept.asks.get(turn.ask)
        if known is not None:
            digest, reply = known
            if digest != turn.digest:
                raise conflict("digest")
            record = kept.record(reply)
            again = reply == turn.reply and reply in kept.began  # this very call, sent twice
            return Accepted(
                conversation=kept.conversation,
                record=record,
                path=kept.path(record.turn) if again else (),
                known=not again,
            )
        if turn.reply in kept.refused:
            raise conflict("refused")
        parent = kept.conversation.leaf if turn.at_leaf else turn.parent
        _check_parent(kept, turn, parent)
        if turn.content is None:
            assert parent is not None, "checked"
            answered = parent
        else:
            answered = turn.ask
            kept.turns[answered] = Turn(
                id=answered, parent=parent, role=Role.USER, text=turn.content, created=turn.now
            )
        record = ReplyRecord(
            id=turn.reply,
            turn=answered,
            state=ReplyState.RUNNING,
            created=turn.now,
            request=turn.request,
        )
        conversation = kept.change(turn.now, leaf=answered)
        kept.asks[turn.ask] = turn.digest, turn.reply
        kept.records[turn.reply] = record
        kept.began[turn.reply] = _Began(
            conversation.revision, conversation.settings, conversation.system
        )
        kept.logs[turn.reply] = []
        return Accepted(
            conversation=conversation, record=record, path=kept.path(answered), known=False
        )

    async def find(
        self, owner: str, conversation: str, *, ask: str, digest: bytes
    ) -> ReplyRecord | None:
        """The reply of a known ask."""
        kept = self._of(owner, conversation)
        known = kept.asks.get(ask)
        if known is None:
            return None
        if known[0] != digest:
            raise conflict("digest")
        return kept.record(known[1])

    async def settle(self, owner: str, reply: str) -> bool:
        """Whether a reply in doubt was accepted; if not, it never will be. Raises NotFound."""
        kept = self._of(owner, conversation_of(reply))
        if reply in kept.records:
            return True
        kept.refused.add(reply)
        return False

    async def append(self, entries: Sequence[LogEntry]) -> Unlogged:
        """Write log entries; the replies that are gone or superseded."""
        self._calls += 1
        gone: set[str] = set()
        superseded: set[str] = set()
        for entry in entries:
            kept = self._kept.get(conversation_of(entry.reply))
            record = None if kept is None else kept.records.get(entry.reply)
            if kept is None or record is None:
                gone.add(entry.reply)
                continue
            if entry.reply not in kept.began or entry.cursor.epoch < record.epoch:
                superseded.add(entry.reply)
                continue
            log = kept.logs[entry.reply]
            if not log or log[-1].cursor < entry.cursor:
                log.append(entry)
        return Unlogged(gone=frozenset(gone), superseded=frozenset(superseded))

    async def end(self, ending: Ending) -> Conversation:
        """Keep the assistant's turn and the end of the reply. Raises NotFound, Superseded."""
        kept = self._of_reply(ending.reply)
        if ending.epoch < kept.records[ending.reply].epoch:
            raise Superseded
        if ending.reply not in kept.began:
            return kept.conversation
        record, old = kept.records[ending.reply], kept.conversation
        began = kept.began.pop(ending.reply)
        del kept.logs[ending.reply]
        if ending.names is not None:
            kept.names[ending.reply] = ending.names
        answered = kept.turns[record.turn]
        # A first message's ids hold the system prompt: of a former one they are worth nothing.
        if ending.prompt_ids is not None and (
            answered.parent is not None or kept.system_since <= began.revision
        ):
            kept.turns[answered.id] = replace(
                answered, token_ids=ending.prompt_ids, encoding=ending.encoding
            )
        kept.records[ending.reply] = replace(
            record,
            state=ending.state,
            final=ending.final,
            text=ending.text if ending.turn is None else "",
        )
        leaf = old.leaf
        if ending.turn is not None:
            assert (ending.turn.id, ending.turn.parent) == (record.id, record.turn), ending.turn.id
            kept.turns[ending.turn.id] = ending.turn
            leaf = ending.turn.id if leaf == record.turn else leaf
        return kept.change(ending.now, leaf=leaf, title=old.title or ending.title or "")

    async def reply(self, owner: str, reply: str) -> ReplyRecord:
        """Raises NotFound."""
        kept = self._of_reply(reply)
        if kept.conversation.owner != owner:
            raise no_reply()
        return kept.record(reply)

    async def log(self, reply: str) -> tuple[LogEntry, ...]:
        """What was logged of a running reply."""
        self._calls += 1
        kept = self._kept.get(conversation_of(reply))
        return () if kept is None else tuple(kept.logs.get(reply, ()))

    async def running(self) -> tuple[str, ...]:
        """Nothing outlives the process before this one, so these are its own."""
        self._calls += 1
        return tuple(reply for kept in self._kept.values() for reply in kept.began)

    async def resume(self, reply: str) -> tuple[Conversation, tuple[Turn, ...], ReplyRecord]:
        """Take up a running reply. Raises NotFound, Conflict if it has ended."""
        kept = self._of_reply(reply)
        if reply not in kept.began:
            raise conflict("ended")
        record, log = kept.records[reply], kept.logs[reply]
        end = log[-1].cursor if log else ReplyCursor(0, 0)
        record = replace(record, epoch=record.epoch + 1, logged=(*record.logged, end.seq))
        kept.records[reply] = record
        began, path = kept.began[reply], kept.path(record.turn)
        if kept.system_since > began.revision:
            path = (replace(path[0], token_ids=None, encoding=""), *path[1:])
        conversation = replace(kept.conversation, settings=began.settings, system=began.system)
        return conversation, path, record

    async def handed_back(self) -> None:
        """It is this process's alone."""
        await asyncio.Event().wait()

    def statistics(self) -> StoreStatistics:
        """It never fails and takes no time worth counting."""
        return StoreStatistics(
            kind="memory",
            available=True,
            durable=False,
            calls=self._calls,
            failures=0,
            seconds_total=0.0,
        )

    def _of(self, owner: str, conversation: str) -> _Kept:
        self._calls += 1
        kept = self._kept.get(conversation)
        if kept is None or kept.conversation.owner != owner:
            raise no_conversation()
        return kept

    def _of_reply(self, reply: str) -> _Kept:
        self._calls += 1
        kept = self._kept.get(conversation_of(reply))
        if kept is None or reply not in kept.records:
            raise no_reply()
        return kept


def _check_parent(kept: _Kept, turn: NewTurn, parent: str | None) -> None:
    """Whether a turn may go there; `session_store.py` says when it may not."""
    if len(kept.turns) + 2 > TURNS_MAX:
        raise conflict("full")
    if parent is None:
        if turn.content is None:
            raise conflict("nothing")
    elif parent in kept.began:
        raise conflict("running")
    elif parent not in kept.turns:
        raise no_parent()
    elif any(kept.records[reply].turn == parent for reply in kept.began):
        raise conflict("running")
    elif turn.content is not None and kept.turns[parent].role is Role.USER:
        raise conflict("user")
    elif turn.content is None and kept.turns[parent].role is Role.ASSISTANT:
        raise conflict("assistant")
    if turn.content is not None and (turn.ask in kept.turns or turn.ask in kept.records):
        raise conflict("taken")
