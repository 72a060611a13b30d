"""ChatReply: what a chat's reply has said so far, for its viewers and its log.

It may not know streams, stores or tasks: `answering.py` is the task that feeds it. Theory of
operation: the text only grows (`sample.py`), and a Viewing reads it from its own position, so it is
a mailbox that merges; a viewer that is late finds one delta, and nothing grows for it.

    Answering ─▶ ChatReply ─▶ ChatViewing, ChatViewing      accepted, progress, deltas, final
                     └──────▶ ReplyLog                      entries with what is new

A viewing ends with the final event, or breaks off: then the reply goes on in a later epoch, and who
comes back with the last cursor finds it there.

A cursor `<epoch>-<seq>` says what a viewer has:

    cursor's epoch   seq                          the viewer gets
    this             within the text              a delta from there on
    this             the final event's            the final event
    earlier          within what that one logged  a delta from there on
    any other                                     a snapshot: its text may never have been kept

An ended reply is a KeptReply: the same from the store, without anything that grows.
"""

import json
from collections.abc import Callable, Mapping
from typing import Protocol, Self

from chatserve.bell import Bell
from chatserve.chat.audience import Audience, Clock, Patience, Timer
from chatserve.chat.conversations.reply_events import (
    ChatEvent,
    ReplyAccepted,
    ReplyDelta,
    ReplyFinal,
    ReplyProgress,
    ReplySnapshot,
)
from chatserve.chat.store.conversation import (
    LogEntry,
    ReplyCursor,
    ReplyRecord,
    ReplyState,
    conversation_of,
)
from chatserve.chat.text.sample import Cursor, SampleText
from chatserve.engine.values import Emission, Progress

PROGRESS_SECONDS = 0.2  # between two looks at how far the prompt is


class Viewed(Protocol):
    """A reply, as a viewing sees it."""

    conversation: str
    turn: str
    id: str
    epoch: int
    logged: tuple[int, ...]
    progress: ReplyProgress | None
    final: ReplyFinal | None
    broken_off: bool

    @property
    def texts(self) -> list[str]:
        """The text so far, in pieces; only ever appended to."""
        ...

    @property
    def length(self) -> int:
        """Code points of the text so far."""
        ...

    @property
    def tokens(self) -> int | None:
        """Tokens of the reply so far; None where nobody counts them any more."""
        ...

    def attach(self, viewing: "ChatViewing") -> None:
        """Called by a viewing as its block begins."""
        ...

    def detach(self, viewing: "ChatViewing") -> None:
        """Called by a viewing as its block ends. Idempotent."""
        ...


class ChatViewing:
    """One viewer's place in a reply: iterates over its events, up to the final one if it has one.

    Use it as a context manager, once. `close()` is synchronous and idempotent; a reader that
    waits finds the iteration at its end.
    """

    def __init__(self, reply: Viewed, after: ReplyCursor | None) -> None:
        self._reply = reply
        self._accepted = False
        self._progress: ReplyProgress | None = None
        place = 0 if after is None else _place(reply, after)
        self._replaces = place is None  # the first text comes as a snapshot
        self._skip = place or 0  # code points that the viewer has
        self._texts = 0  # pieces of the text that were given
        self._arrived = Bell()
        self._over = False

    def __enter__(self) -> Self:
        assert not self._over, "a viewing is entered once"
        self._reply.attach(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Look away."""
        self._over = True
        self._arrived.ring()
        self._reply.detach(self)

    def wake(self) -> None:
        """Called by the reply: there is news."""
        self._arrived.ring()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ChatEvent:
        while not self._over:
            event = self._next()
            if event is not None:
                return event
            if self._reply.broken_off:
                break
            self._arrived.mute()
            await self._arrived.wait()
        raise StopAsyncIteration

    def _next(self) -> ChatEvent | None:
        reply = self._reply
        if not self._accepted:
            self._accepted = True
            return ReplyAccepted(conversation=reply.conversation, turn=reply.turn, reply=reply.id)
        text = self._next_text()
        if text is not None:
            return text
        if reply.final is not None:
            self._over = True
            return reply.final
        # Before the first token only: who has text is past caring.
        if reply.progress != self._progress and not reply.length:
            self._progress = reply.progress
            return reply.progress
        return None

    def _next_text(self) -> ReplyDelta | ReplySnapshot | None:
        reply = self._reply
        if self._texts == len(reply.texts) and not self._replaces:
            return None
        text = "".join(reply.texts[self._texts :])
        self._texts = len(reply.texts)
        cursor = ReplyCursor(reply.epoch, reply.length)
        if self._replaces:
            self._replaces = False
            return ReplySnapshot(cursor=cursor, text=text, tokens=reply.tokens)
        text, self._skip = text[self._skip :], max(0, self._skip - len(text))
        return ReplyDelta(cursor=cursor, text=text, tokens=reply.tokens) if text else None


def _place(reply: Viewed, cursor: ReplyCursor) -> int | None:
    """Code points that a viewer at this cursor has; None where that is not certain."""
    if cursor.seq < 0:
        return None
    if cursor.epoch == reply.epoch:
        if reply.final is not None and cursor == reply.final.cursor:
            return reply.length
        return cursor.seq if cursor.seq <= reply.length else None
    if not 1 <= cursor.epoch <= min(len(reply.logged), reply.epoch - 1):
        return None
    kept = cursor.seq <= min(reply.logged[cursor.epoch - 1], reply.length)
    return cursor.seq if kept else None


class ChatReply:
    """A chat's reply under way. Fed by its task; `view` is for the response that shows it."""

    def __init__(
        self,
        record: ReplyRecord,
        sample: SampleText,
        *,
        owner: str,
        clock: Clock,
        patience: Patience,
        on_abandoned: Callable[[], None],
        on_superseded: Callable[[], None],
    ) -> None:
        self.id = record.id
        self.turn = record.turn
        self.conversation = conversation_of(record.id)
        self.owner = owner
        self.epoch = record.epoch
        self.logged = record.logged
        self.progress: ReplyProgress | None = None
        self.final: ReplyFinal | None = None
        self.broken_off = False
        self.first_token_at: float | None = None
        self.sample = sample
        self._clock = clock
        self._audience: Audience[ChatViewing] = Audience(clock, patience, on_abandoned)
        self._on_superseded = on_superseded
        self._look: Callable[[], Progress | None] | None = None
        self._look_timer: Timer | None = None
        self._prompt_ids: tuple[int, ...] | None = None
        # What the log has, or will have once the entries that were taken are written.
        self._logged_to = Cursor(len(sample.texts), sample.received)

    # For the response ------------------------------------------------------------------------

    @property
    def texts(self) -> list[str]:
        """The text so far, in pieces."""
        return self.sample.texts

    @property
    def length(self) -> int:
        """Code points of the text so far."""
        return self.sample.length

    @property
    def tokens(self) -> int | None:
        """Tokens of the reply so far; None once it is over, where its usage tells."""
        return self.sample.received if self.sample.end is None else None

    @property
    def over(self) -> bool:
        """Nothing more comes of it in this process."""
        return self.final is not None or self.broken_off

    @property
    def end(self) -> ReplyCursor | None:
        """The final event's cursor, None without one."""
        return None if self.final is None else self.final.cursor

    def view(self, after: ReplyCursor | None = None) -> ChatViewing:
        """Look at the reply for as long as the `with` block lasts."""
        return ChatViewing(self, after)

    def attach(self, viewing: ChatViewing) -> None:
        """Called by a viewing as its block begins."""
        if not self.over:
            self._audience.join(viewing)
            if self._look is not None and self._look_timer is None:
                self._show_progress()

    def detach(self, viewing: ChatViewing) -> None:
        """Called by a viewing as its block ends. The last one starts the grace period."""
        self._audience.leave(viewing)

    # For its task ----------------------------------------------------------------------------

    def watch(self, look: Callable[[], Progress | None]) -> None:
        """From now on, until the first token, viewers are told how far the prompt is."""
        self._look = look
        if self._audience.viewings:
            self._show_progress()

    def take(self, emission: Emission) -> bool:
        """New tokens. True if a stop string was just found: the engine should stop."""
        if emission.tokens and self.first_token_at is None:
            self.first_token_at = self._clock.now()
            self._stop_looking()
        before = self.sample.length
        found = self.sample.feed(emission)
        if self.sample.length != before:
            self._wake()
        return found

    def settle_prompt(self, prompt_ids: tuple[int, ...] | None) -> None:
        """What the user's turn appends goes with the first entry; None: the log has it."""
        self._prompt_ids = prompt_ids

    def conclude(self, kind: str, data: Mapping[str, object]) -> None:
        """The one final event."""
        assert not self.over, "a second end"
        cursor = ReplyCursor(self.epoch, self.length + 1)
        self.final = ReplyFinal(cursor=cursor, kind=kind, data=data)
        self._part()

    def break_off(self) -> None:
        """It has no end here: a later epoch goes on with it."""
        assert not self.over, "a second end"
        self.broken_off = True
        self._part()

    def _part(self) -> None:
        self._stop_looking()
        self._audience.close()
        self._wake()

    # For the log -----------------------------------------------------------------------------

    def take_entry(self) -> LogEntry | None:
        """What is new since the last entry. Nothing once the sample has ended: the end keeps the
        whole text, and a reply that is taken up before it is kept says its last words again.

        The ids are all that were received, those too whose text is held back: fed anew they lead
        to this very state.
        """
        sample, logged = self.sample, self._logged_to
        if len(sample.texts) == logged.texts or sample.end is not None:
            return None
        entry = LogEntry(
            reply=self.id,
            cursor=ReplyCursor(self.epoch, sample.length),
            text="".join(sample.texts[logged.texts :]),
            token_ids=sample.received_from(logged.tokens),
            prompt_ids=self._prompt_ids,
        )
        self._prompt_ids = None
        self._logged_to = Cursor(len(sample.texts), sample.received)
        return entry

    def give_way(self) -> None:
        """Another process has taken the reply up."""
        self._on_superseded()

    # Inside ----------------------------------------------------------------------------------

    def _wake(self) -> None:
        for viewing in self._audience.viewings:
            viewing.wake()

    def _show_progress(self) -> None:
        """Look, tell if it changed, and look again as long as somebody cares."""
        self._look_timer = None
        if self._look is None or not self._audience.viewings:
            return
        found = self._look()
        if found is not None:
            shown = ReplyProgress(
                queued=found.queued, prompt_tokens=found.prompt_tokens, computed=found.computed
            )
            if shown != self.progress:
                self.progress = shown
                self._wake()
        self._look_timer = self._clock.call_later(PROGRESS_SECONDS, self._show_progress)

    def _stop_looking(self) -> None:
        self._look = None
        if self._look_timer is not None:
            self._look_timer.cancel()
            self._look_timer = None


class KeptReply:
    """An ended reply, as the store has it."""

    def __init__(self, record: ReplyRecord) -> None:
        assert record.final is not None, "only an ended reply is kept"
        self.id = record.id
        self.turn = record.turn
        self.conversation = conversation_of(record.id)
        self.epoch = record.epoch
        self.logged = record.logged
        self.progress: ReplyProgress | None = None
        self.broken_off = False
        self.texts = [record.text] if record.text else []
        self.length = len(record.text)
        self.tokens: int | None = None
        kind = "done" if record.state is ReplyState.DONE else "failed"
        self.end = ReplyCursor(record.epoch, self.length + 1)
        data: dict[str, object] = json.loads(record.final)
        self.final: ReplyFinal | None = ReplyFinal(cursor=self.end, kind=kind, data=data)

    def view(self, after: ReplyCursor | None = None) -> ChatViewing:
        """Look at it."""
        return ChatViewing(self, after)

    def attach(self, viewing: ChatViewing) -> None:
        """Nothing depends on who looks."""

    def detach(self, viewing: ChatViewing) -> None:
        """Nothing depends on who looks."""
