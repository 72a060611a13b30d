"""SessionStore: what the chat floor needs of whatever keeps conversations.

Two stores fit it: `redis_store.py`, the real one, and `memory_store.py`, which forgets at the end
of the process. Each call is atomic for its conversation. Any call may raise Unavailable with a
retry_after where the store does not answer in time; then a write may or may not have happened,
and repeating the same call is safe: `accept` knows its `ask`, `append` its cursors, `end` its
reply. It raises Unreadable, of the same kind, where one conversation's own keys are damaged.

Whoever takes a reply up begins its next epoch. From then on what is written under an earlier one
changes nothing, and its writer is told: it is superseded.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from chatserve.chat.store.conversation import (
    Conversation,
    LogEntry,
    ReplyRecord,
    ReplyState,
    Turn,
)
from chatserve.errors import Conflict, NotFound, Unavailable

TURNS_MAX = 10_000  # of one conversation: a path is walked, and a tree read, in one call
CHANGEABLE = frozenset(("title", "system", "settings", "leaf"))

_CONFLICTS = {
    "digest": "This id was used for another turn.",
    "taken": "The id is one that the conversation's turns already have.",
    "running": "A reply is running there: wait for its end, or stop it.",
    "user": "A message without an answer cannot be followed by another: ask for its answer, or "
    "name the turn before it as the parent.",
    "assistant": "There is nothing to answer: 'content' is missing.",
    "nothing": "There is nothing to answer: the conversation has no turn there.",
    "full": f"The conversation has its {TURNS_MAX} turns.",
    "ended": "The reply has ended.",
    "refused": "This call was given up before it arrived.",
}

ELSEWHERE_RETRY_SECONDS = 5.0  # told to those who come to the wrong one of two servers


class Unreadable(Unavailable):
    """What is kept of one conversation is not what was written there. Nothing was changed, and
    asking again helps only once somebody has mended it."""

    def __init__(self) -> None:
        super().__init__("This conversation cannot be read.", retry_after=1.0)


class Elsewhere(Unavailable):
    """Another server has these conversations: it begins replies, and takes them up. Nothing was
    changed."""

    def __init__(self) -> None:
        super().__init__(
            "Another chatserve has these conversations.", retry_after=ELSEWHERE_RETRY_SECONDS
        )


class Superseded(Conflict):
    """A later epoch of the reply exists: another process carries it on, or has ended it."""

    def __init__(self) -> None:
        super().__init__("The reply was taken up by another server.")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTurn:
    """A turn to be accepted, as its client sent it.

    ask: the client's id of this request; also the id of the user's turn where there is content.
    digest: of the whole body; the same ask with another digest is a Conflict. content None: answer
    the user's turn `parent` once more. parent: a turn's id, None for a new first message; with
    `at_leaf` it is not looked at and the current leaf is meant.
    """

    conversation: str
    owner: str
    ask: str
    digest: bytes
    content: str | None
    at_leaf: bool
    parent: str | None
    reply: str
    request: bytes
    now: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The reply's record, and for a new one the path of turns up to the user's turn it answers.

    known: this ask was accepted before, and `record` is its reply; path is empty then. The same
    NewTurn again, with its reply still running, counts as new: its first answer was lost.
    """

    conversation: Conversation
    record: ReplyRecord
    path: tuple[Turn, ...]
    known: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """The end of a reply. epoch: the one it was answered in. turn: the assistant's turn, None where
    there is nothing to keep in the tree. prompt_ids: what the user's turn appends, None where it
    was never tokenized, in the same encoding as the turn's own. names: of the pages that were
    computed for it, of 32 bytes, but for those that an earlier reply's ending had; None = cannot be
    told. title: for a conversation that has none yet.
    """

    reply: str
    epoch: int
    state: ReplyState
    final: bytes
    text: str
    turn: Turn | None
    prompt_ids: tuple[int, ...] | None
    encoding: str
    title: str | None
    now: float
    names: tuple[bytes, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlogged:
    """Replies of which nothing more can be logged. gone: the store has lost them, mostly with their
    conversation. superseded: a later epoch is there, or the end that it came to."""

    gone: frozenset[str] = frozenset()
    superseded: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Page:
    """A part of an owner's conversations, latest first. next: where the following part begins,
    None at the end. A search's work is bounded by call: a part may hold few, or none, and yet not
    be the last."""

    conversations: tuple[Conversation, ...]
    next: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStatistics:
    """What a store can say of itself. kind: `redis`, `valkey` or `memory`. durable: what was
    acknowledged survives a crash of this process. failures: calls that raised Unavailable. ours:
    no other server is known to keep its conversations there.
    """

    kind: str
    available: bool
    durable: bool
    calls: int
    failures: int
    seconds_total: float
    ours: bool = True


class SessionStore(Protocol):
    """Keeps conversations, turns, replies and their logs. `owner` is checked by every call that
    takes one: another owner's conversation is NotFound."""

    async def create(self, conversation: Conversation, turns: Sequence[Turn] = ()) -> None:
        """Keep a new conversation, with its turns where it is imported (parents first; no more
        than TURNS_MAX). One of this id and owner is left as it is."""
        ...

    async def get(self, owner: str, conversation: str) -> Conversation:
        """Raises NotFound."""
        ...

    async def tree(
        self, owner: str, conversation: str
    ) -> tuple[Conversation, tuple[Turn, ...], tuple[ReplyRecord, ...]]:
        """A conversation with all its turns (parents first) and the records of replies that are
        running or have no turn. Raises NotFound."""
        ...

    async def list(
        self, owner: str, *, after: str | None = None, limit: int = 50, search: str | None = None
    ) -> Page:
        """Latest update first. search: in titles and texts, whatever the case."""
        ...

    async def update(
        self, owner: str, conversation: str, changes: Mapping[str, object], *, now: float
    ) -> Conversation:
        """Set some of title, system, settings and leaf. Raises NotFound, also for a leaf that is
        no turn of the conversation (param `leaf`). A new system prompt makes the ids of first
        messages None: they hold the old one."""
        ...

    async def owner(self, conversation: str) -> str:
        """Whose conversation it is. Raises NotFound. For an admin's questions alone."""
        ...

    async def page_names(self, conversation: str) -> frozenset[bytes]:
        """The names, of 32 bytes each, that the endings of its replies told, whoever owns it; none
        of what is not here."""
        ...

    async def named(self, owner: str, conversation: str) -> frozenset[str]:
        """The replies whose endings had names. Raises NotFound."""
        ...

    async def delete(
        self, owner: str, conversation: str, *, names: Iterable[bytes] = ()
    ) -> tuple[str, ...]:
        """Begin to forget a conversation: from now on it is nowhere, and its deletion is under way;
        the replies that were running. names: of its pages, beside those that are kept of its
        replies. Raises NotFound."""
        ...

    async def deletions(self) -> tuple[tuple[str, str], ...]:
        """Owners and conversations whose deletion is under way."""
        ...

    async def forgotten_names(self, conversation: str) -> frozenset[bytes]:
        """The names of a deletion's pages; none where it is not under way, or nearly over."""
        ...

    async def end_deletion(self, conversation: str) -> None:
        """The pages are gone: so are the names, and what the store's own files still held of the
        conversation, as far as that is in its hands. Then it is not under way any more. May take
        seconds, and be repeated."""
        ...

    async def accept(self, turn: NewTurn) -> Accepted:
        """Append the user's turn and a running reply, in one atomic step; or find the known one.

        Raises NotFound for the conversation or the parent, Conflict where the ask is known with
        another digest, where a reply is running at the parent, or where the parent cannot be
        followed (a user's turn without an answer by content; an assistant's by none).
        """
        ...

    async def find(
        self, owner: str, conversation: str, *, ask: str, digest: bytes
    ) -> ReplyRecord | None:
        """The reply of a known ask, as `accept` would give it; None where the ask is new. Writes
        nothing. Raises NotFound for the conversation, Conflict for another digest."""
        ...

    async def settle(self, owner: str, reply: str) -> bool:
        """After an `accept` that was not answered: whether its reply was accepted. If not, it never
        will be: the call may still be on its way, and is a Conflict when it arrives, while another
        reply to the same ask is accepted. Raises NotFound where the conversation is gone."""
        ...

    async def append(self, entries: Sequence[LogEntry]) -> Unlogged:
        """Write log entries of many replies in one trip; those of a known cursor are there already.
        Returns the replies whose entries found no log to go to.
        """
        ...

    async def end(self, ending: Ending) -> Conversation:
        """Keep the assistant's turn and the end of the reply, in one atomic step; then the log is
        dropped. The leaf moves to the new turn if it is still at the turn that was answered.
        Raises NotFound where the conversation is gone, and Superseded for an earlier epoch. An
        ended reply stays as it ended.
        """
        ...

    async def reply(self, owner: str, reply: str) -> ReplyRecord:
        """An ended one's with its text, also where a turn keeps that (so does `accept` for a known
        ask). Raises NotFound."""
        ...

    async def log(self, reply: str) -> tuple[LogEntry, ...]:
        """What was logged of a running reply, oldest first; empty once it has ended."""
        ...

    async def running(self) -> tuple[str, ...]:
        """Replies that were running when the process before this one ended, of all owners."""
        ...

    async def resume(self, reply: str) -> tuple[Conversation, tuple[Turn, ...], ReplyRecord]:
        """Take up a running reply: its epoch grows, and `logged` gets what the log holds of the
        text. Gives the path up to the turn it answers, and the conversation with the settings and
        the system prompt that it had when the reply was accepted: ids of another system prompt are
        left out. Raises NotFound, Conflict if it has ended.
        """
        ...

    async def handed_back(self) -> None:
        """Wait until the store is ours again after another server had it, whose running replies
        are nobody's now. Where no other can have it this never returns."""
        ...

    def statistics(self) -> StoreStatistics:
        """A frozen picture."""
        ...


def no_conversation() -> NotFound:
    """Nothing of this id, or somebody else's: the answers are the same."""
    return NotFound("There is no such conversation.")


def no_reply() -> NotFound:
    """Nothing of this id, or somebody else's."""
    return NotFound("There is no such reply.")


def no_parent() -> NotFound:
    """The named parent is no turn of the conversation."""
    return NotFound("The conversation has no turn of this id.", param="parent")


def no_leaf() -> NotFound:
    """The named leaf is no turn of the conversation."""
    return NotFound("The conversation has no turn of this id.", param="leaf")


def conflict(reason: str) -> Conflict:
    """A refusal by its short name, the same in every store."""
    return Conflict(_CONFLICTS[reason])
