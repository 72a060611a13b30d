"""What answering is given: one reply to make, and what all replies are made with.

Frozen values, but for the crowd, which is counted on the event loop alone.
"""

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Generic

from chatserve.chat.audience import Clock, Patience
from chatserve.chat.conversations.changes import Changes
from chatserve.chat.conversations.history import History
from chatserve.chat.conversations.named_pages import NamedPages
from chatserve.chat.conversations.reply_log import ReplyLog
from chatserve.chat.crowd import Crowd
from chatserve.chat.meter import ReplyMeter
from chatserve.chat.service import EngineDoor, PreparedT
from chatserve.chat.store.conversation import Conversation, ReplyRecord, Turn
from chatserve.chat.store.session_store import SessionStore
from chatserve.chat.text.sample import SampleText, TextRule
from chatserve.chat.text.stop_strings import StopStrings
from chatserve.chat.text.text_floor import TextFloor
from chatserve.chat.values import Generation

CHAT_PATIENCE = Patience(before_first_view=300.0, after_last_view=300.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """patience: of a reply that nobody looks at. retry_seconds_*: waits for the engine's queue and
    for a store that is away. retry_after: told to viewers whose reply will be taken up later."""

    patience: Patience = CHAT_PATIENCE
    retry_seconds_first: float = 0.1
    retry_seconds_max: float = 1.0
    retry_after: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerMeans(Generic[PreparedT]):
    """What answering needs. wall: seconds since 1970."""

    engine: EngineDoor[PreparedT]
    text: TextFloor
    history: History
    store: SessionStore
    log: ReplyLog
    changes: Changes
    crowd: Crowd
    meter: ReplyMeter
    executor: Executor
    clock: Clock
    wall: Callable[[], float]
    options: AnswerOptions
    named: NamedPages = field(default_factory=NamedPages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What to answer, and how. path: turns up to the user's turn that is answered.

    said: the sample as the log has it, where the reply is taken up again. prompt_logged: the log
    has the prompt's ids. obstacle: why it cannot go on; it is ended with its text.
    """

    conversation: Conversation
    path: tuple[Turn, ...]
    record: ReplyRecord
    generation: Generation
    said: SampleText
    prompt_logged: bool = False
    obstacle: str | None = None


def text_rule(generation: Generation, text: TextFloor) -> TextRule:
    """How a chat's reply is read: a new message is a text of its own."""
    own = frozenset[int]() if generation.ignore_eos else text.stop_ids
    return TextRule(
        stops=StopStrings(generation.stop),
        silent_stop_ids=own | frozenset(generation.stop_token_ids),
        searched_after=generation.min_tokens,
    )
