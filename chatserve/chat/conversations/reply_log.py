"""ReplyLog: the one task that writes what all running replies say to the store.

It may not know streams, viewers or what a reply is about. Theory of operation: a reply only tells
that it has news (`touch`); once a tick the writer asks each such reply for one entry with all that
is new and sends them together. Nothing is queued per reply: the text is kept by the reply itself,
so a slow store makes entries longer, never more.

    touch ─▶ news ─▶ tick: entries of all with news ─▶ store.append ─▶ written
                                ▲                         │ Unavailable
                                └──── doubtful ◀──────────┘

After a failed call nobody knows what was written. Its entries are sent again as they were, since a
known cursor is ignored but the same text under a new one would be there twice; only then comes the
next entry of these replies. So each reply has one doubtful entry at the most. What the store has
lost, and what another process carries on, is not logged any more.

The tick's length is max(25 ms, replies / 2,000 s): the store sees at most 2,000 entries a second.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from chatserve.chat.audience import Clock
from chatserve.chat.backoff import Backoff
from chatserve.chat.store.conversation import LogEntry
from chatserve.chat.store.session_store import SessionStore, Unlogged
from chatserve.errors import ChatserveError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLimits:
    """tick_seconds: shortest time between two trips. entries_per_second: of all replies together.
    entries_per_trip: so that one trip stays short. retry_seconds_*: waits after a failed trip.
    """

    tick_seconds: float = 0.025
    entries_per_second: float = 2_000.0
    entries_per_trip: int = 256
    retry_seconds_first: float = 0.05
    retry_seconds_max: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LogStatistics:
    """replies: being logged now. doubtful: entries of a failed trip that are to be sent again."""

    replies: int
    doubtful: int
    trips_total: int
    entries_total: int
    failures_total: int


class Logged(Protocol):
    """A reply, as its log sees it."""

    @property
    def id(self) -> str: ...

    def take_entry(self) -> LogEntry | None:
        """All that is new since the last call; None where no text is new."""
        ...

    def give_way(self) -> None:
        """Another process has taken the reply up."""
        ...


class ReplyLog:
    """See the module. `run` is its task; the rest is called on the same loop."""

    def __init__(self, store: SessionStore, clock: Clock, limits: LogLimits | None = None) -> None:
        self._store = store
        self._clock = clock
        self._limits = limits or LogLimits()
        self._open: dict[str, Logged] = {}
        self._news: dict[str, Logged] = {}
        self._doubtful: dict[str, LogEntry] = {}
        self._on_the_way: frozenset[str] = frozenset()
        self._landed = asyncio.Event()
        self._called = asyncio.Event()  # there is news, or the writer is to end
        self._due = asyncio.Event()
        self._closed = False
        self._backoff = Backoff(self._limits.retry_seconds_first, self._limits.retry_seconds_max)
        self._trips = self._entries = self._failures = 0

    # For replies ---------------------------------------------------------------------------

    def enter(self, reply: Logged) -> None:
        """A reply is to be logged from now on."""
        assert reply.id not in self._open, "a reply is logged once at a time"
        self._open[reply.id] = reply

    def touch(self, reply: Logged) -> None:
        """A reply has news. Never waits."""
        if reply.id in self._open:
            self._news[reply.id] = reply
            self._called.set()

    def forget(self, reply: Logged) -> None:
        """Log nothing more of a reply; an entry may be on its way. Idempotent."""
        self._open.pop(reply.id, None)
        self._news.pop(reply.id, None)
        self._doubtful.pop(reply.id, None)

    async def leave(self, reply: Logged) -> None:
        """Log nothing more of a reply. An entry on its way arrives, or fails, before this returns:
        what the caller then writes comes after it. Cancelling it changes nothing about that."""
        self.forget(reply)
        while reply.id in self._on_the_way:
            await self._landed.wait()

    # The task ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Write until closed, and then once more what is left."""
        while not self._closed:
            await self._called.wait()
            self._called.clear()
            good = await self._flush()
            if self._news:
                self._called.set()
            await self._pause(self._tick() if good else self._backoff.next())
        await self._flush()

    def close(self) -> None:
        """Let the task write what there is and end. Synchronous, idempotent."""
        self._closed = True
        self._called.set()
        self._due.set()

    def _tick(self) -> float:
        limits = self._limits
        return max(limits.tick_seconds, len(self._open) / limits.entries_per_second)

    async def _pause(self, seconds: float) -> None:
        if self._closed:
            return
        self._due.clear()
        timer = self._clock.call_later(seconds, self._due.set)
        try:
            await self._due.wait()
        finally:
            timer.cancel()

    async def _flush(self) -> bool:
        """One entry of each reply with news. False where the store failed: the rest waits."""
        waiting = deque(self._news.values())
        while waiting:
            batch: list[LogEntry] = []
            while waiting and len(batch) < self._limits.entries_per_trip:
                reply = waiting.popleft()
                entry = self._next_entry(reply)
                if entry is not None:
                    batch.append(entry)
            if batch and not await self._send(batch):
                return False
        return True

    def _next_entry(self, reply: Logged) -> LogEntry | None:
        if reply.id not in self._open:
            return None  # it left while an earlier batch was on its way
        entry = self._doubtful.get(reply.id)
        if entry is not None:
            return entry  # and it keeps its place among the news
        del self._news[reply.id]
        return reply.take_entry()

    async def _send(self, batch: Sequence[LogEntry]) -> bool:
        self._on_the_way = frozenset(entry.reply for entry in batch)
        self._landed.clear()
        unlogged = Unlogged()
        good = False
        try:
            unlogged = await self._store.append(batch)
            good = True
        except ChatserveError as error:
            _log.debug("the log waits: %s", error.message)
        except Exception:
            _log.exception("the log cannot be written")
        finally:
            self._on_the_way = frozenset()
            self._landed.set()
        self._trips += 1
        for entry in batch:
            self._settle(entry, good=good)
        if good:
            self._entries += len(batch)
            self._backoff.reset()
        else:
            self._failures += 1
        self._drop(unlogged)
        return good

    def _drop(self, unlogged: Unlogged) -> None:
        """Log nothing more of these. Those that the store has lost go on: their end tells."""
        for reply in unlogged.superseded:
            left = self._open.pop(reply, None)
            self._news.pop(reply, None)
            if left is not None:
                left.give_way()
        lost = 0
        for reply in unlogged.gone:
            lost += self._open.pop(reply, None) is not None
            self._news.pop(reply, None)
        if lost:
            _log.warning("%d running replies are not in the store any more", lost)

    def _settle(self, entry: LogEntry, *, good: bool) -> None:
        reply = self._open.get(entry.reply)
        if reply is None:
            return
        if good:
            self._doubtful.pop(entry.reply, None)
        else:
            self._doubtful[entry.reply] = entry
            self._news[entry.reply] = reply

    def statistics(self) -> LogStatistics:
        """A frozen picture."""
        return LogStatistics(
            replies=len(self._open),
            doubtful=len(self._doubtful),
            trips_total=self._trips,
            entries_total=self._entries,
            failures_total=self._failures,
        )
