"""What viewers of a chat's reply get, in order: accepted, progress, deltas, one final event.

    accepted   progress*   (delta | snapshot)*   final

`delta`, `snapshot` and `final` carry a cursor, at which a viewer may come back; the others are
about this viewing only. A snapshot replaces all text that a viewer has.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from chatserve.chat.store.conversation import ReplyCursor


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyAccepted:
    """The turn and its reply are kept; nothing acknowledged is lost from here on."""

    conversation: str
    turn: str
    reply: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyProgress:
    """Before the first token: requests ahead, prompt tokens in all and computed."""

    queued: int
    prompt_tokens: int
    computed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyDelta:
    """Text that follows what the viewer has. cursor: at its end. tokens: of the whole reply so far,
    those too whose text is held back; None where nobody counts them any more."""

    cursor: ReplyCursor
    text: str
    tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplySnapshot:
    """The whole text so far, in the place of what the viewer has. cursor, tokens: as a delta's."""

    cursor: ReplyCursor
    text: str
    tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyFinal:
    """The one final event. kind: `done` or `failed`. data: what is sent and stored, as JSON goes:
    done {finish_reason, usage, receipt, timings}, failed {code, message, retry_after}.
    """

    cursor: ReplyCursor
    kind: str
    data: Mapping[str, object]


ChatEvent = ReplyAccepted | ReplyProgress | ReplyDelta | ReplySnapshot | ReplyFinal


@dataclass(frozen=True, slots=True)
class ConversationChanged:
    """For an owner's other tabs: this conversation has a new revision; None = it was deleted.

    A conversation of None: anything may have changed, list them anew.
    """

    conversation: str | None
    revision: int | None
