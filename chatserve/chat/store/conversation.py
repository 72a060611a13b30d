"""The frozen values of conversations: a tree of turns, and the replies that grow it.

They may not know Redis, HTTP or pages. A conversation is a tree; a branch is a path from a first
message to a leaf. A turn keeps its text (the truth) and the token ids that it adds to those of the
turns above it (see `history.py`), so that the next prompt is made by appending.

    conversation ─▶ user turn ─▶ assistant turn ─▶ user turn ─▶ …
                         └─────▶ assistant turn (regenerated)

    reply     state          left by
              running        its end, or a restart that takes it up again (the epoch grows)
              done           -    its turn is in the tree
              failed         -    no turn, or what was said before the fault; final says why
              interrupted    -    as failed: the server ended and nobody could take it up

An assistant's turn has the id of the reply that wrote it. A reply's id begins with its
conversation's, so either is found from it alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

REPLY_SEPARATOR = "."


class Role(Enum):
    """Who speaks."""

    USER = "user"
    ASSISTANT = "assistant"


class ReplyState(Enum):
    """What has become of a reply; a table is in the module's head."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message of the tree.

    token_ids: what it appends to the ids of the turns above; None = never computed (imported, or
    the server stopped before): it is tokenized when it is needed. encoding: names the tokenizer and
    template that made them; ids of another encoding count as None. created: seconds since 1970.
    final: the data of the reply's final event (assistant's turns; JSON as sent), or None.
    """

    id: str
    parent: str | None
    role: Role
    text: str
    created: float
    token_ids: tuple[int, ...] | None = None
    encoding: str = ""
    final: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """All but the turns. settings: sampling fields as OpenAI spells them. Times: since 1970.

    revision grows with every change that another tab should show. leaf: the turn after which
    the next one goes when it names no parent; None = no turns.
    """

    id: str
    owner: str
    title: str
    created: float
    updated: float
    system: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict[str, object])
    revision: int = 1
    leaf: str | None = None


@dataclass(frozen=True, slots=True, order=True)
class ReplyCursor:
    """A place in a reply's text; written `<epoch>-<seq>`.

    seq: code points up to there, one more than the whole text for the final event. epoch: from 1,
    one more each time a reply is taken up after a crash.
    """

    epoch: int
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.seq}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyRecord:
    """What is kept of a reply beside its log.

    turn: the user's turn that it answers. request: how it was asked for, as JSON (the sampling
    fields and the drawn seed), enough to take it up again. logged: for each epoch that is over,
    the code points of the text at its end; a cursor of that epoch beyond it saw text that was
    lost. final: the data of the final event as JSON, None while running. text: the text at the
    end where no turn keeps it (failed, interrupted).
    """

    id: str
    turn: str
    state: ReplyState
    created: float
    request: bytes
    epoch: int = 1
    logged: tuple[int, ...] = ()
    final: bytes | None = None
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """New text of a running reply. cursor.seq counts code points up to the end of this text.

    token_ids: the ids whose text this entry completes. prompt_ids: in a reply's first entry, the
    ids that its user's turn appends.
    """

    reply: str
    cursor: ReplyCursor
    text: str
    token_ids: tuple[int, ...]
    prompt_ids: tuple[int, ...] | None = None


def conversation_of(reply: str) -> str:
    """The conversation's id that a reply's id begins with."""
    return reply.partition(REPLY_SEPARATOR)[0]
