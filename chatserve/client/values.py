"""What the client gives: frozen values, by the server's nouns. They may not know the wire.

A conversation is a tree of turns; a branch is a path from a first message to a leaf. An assistant's
turn has the id of the reply that wrote it. Times are seconds since 1970.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Role = Literal["user", "assistant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """All but its turns. leaf: the turn after which the next one goes; None = no turns."""

    id: str
    title: str
    system: str | None
    settings: Mapping[str, object]
    created: float
    updated: float
    revision: int
    leaf: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens, as OpenAI counts them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """Why not the whole prompt was found. position: of the first token that differs from what the
    server had; reason: new, evicted, quicker (to compute than to load) or other_model (kept by
    one that is not served now)."""

    position: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Where the prompt's tokens came from. left_out: turns that did not fit into the context.
    saved: seconds, None where the server has not measured yet. miss: None where all was found."""

    device: int = 0
    host: int = 0
    disk: int = 0
    remote: int = 0
    computed: int = 0
    left_out: int = 0
    saved: float | None = None
    miss: Miss | None = None

    @property
    def cached(self) -> int:
        """Tokens that were not computed again."""
        return self.device + self.host + self.disk + self.remote


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds since the server accepted the turn."""

    to_first_token: float | None = None
    total: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Final:
    """How a reply ended."""

    finish_reason: str
    usage: Usage
    receipt: Receipt
    timings: Timings


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message. final: how it ended, of an assistant's turn where that is known."""

    id: str
    parent: str | None
    role: Role
    text: str
    created: float
    final: Final | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenReply:
    """A reply without a turn: it runs, or it ended with a fault. turn: the one it answers."""

    id: str
    turn: str
    state: str
    text: str
    created: float

    @property
    def running(self) -> bool:
        """It can be attached to."""
        return self.state == "running"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """A conversation with its turns, parents before their children, and its open replies."""

    conversation: Conversation
    turns: tuple[Turn, ...]
    replies: tuple[OpenReply, ...]

    def branch(self, leaf: str | None = None) -> tuple[Turn, ...]:
        """From the first message to this turn; without one, to the conversation's leaf."""
        by_id = {turn.id: turn for turn in self.turns}
        path: list[Turn] = []
        turn = by_id.get(leaf or self.conversation.leaf or "")
        while turn is not None and len(path) < len(by_id):
            path.append(turn)
            turn = by_id.get(turn.parent or "")
        return tuple(reversed(path))

    def siblings(self, turn: Turn) -> tuple[Turn, ...]:
        """All turns at this one's place, itself among them, oldest first."""
        return tuple(
            each for each in self.turns if (each.parent, each.role) == (turn.parent, turn.role)
        )

    def leaf_below(self, turn: Turn) -> Turn:
        """The end of the newest branch through this turn."""
        ways, newest = {turn.id}, turn
        for each in self.turns:
            if each.parent in ways:
                ways.add(each.id)
                newest = each
        return newest


# What happens to a reply, for those who want to see more than its text. ----------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyProgress:
    """Before the first token: requests ahead, prompt tokens in all and computed."""

    queued: int
    prompt_tokens: int
    computed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """Text that follows what the reader has."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSnapshot:
    """The whole text so far, in the place of what the reader has."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyWaiting:
    """There is no connection, or the server wants us to come back; the client tries again.
    reason None: that is over."""

    reason: str | None


ReplyEvent = ReplyProgress | TextDelta | TextSnapshot | ReplyWaiting
