"""RedisLog: entries of running replies' logs, many in one trip.

It may not know what the entries say. Theory of operation: an entry's cursor is its stream id, and a
log that does not exist takes nothing, so what the server answers says what has become of a reply.

    an id                        written
    'equal or smaller'           the entry is there: it was sent before
                                 it is not: a later epoch has begun, the reply is superseded
    nothing (there is no log)    the reply has ended, and not by who still logs it: superseded
                                 it has not: gone, mostly with its conversation
    'WRONGTYPE'                  this log is damaged; the reply's end keeps the whole text
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, cast

from chatserve.chat.store.conversation import LogEntry, conversation_of
from chatserve.chat.store.redis_connections import Command
from chatserve.chat.store.redis_link import WRONG_TYPE
from chatserve.chat.store.redis_values import keys_of, log_fields, log_key
from chatserve.chat.store.session_store import Unlogged

TRIP_ENTRIES = 500  # in one trip: packing more would hold the loop
ALREADY_THERE = "equal or smaller"  # of a stream id, as the server says it


class Run(Protocol):
    """Commands' answers, in order; errors that say one of the excused things are among them."""

    def __call__(
        self, commands: Sequence[Command], *, excused: Sequence[str] = ()
    ) -> Awaitable[Sequence[object]]: ...


class RedisLog:
    """The logs of one store. tell: is told of an error that a server answered with."""

    def __init__(self, run: Run, tell: Callable[[Exception], None]) -> None:
        self._run = run
        self._tell = tell

    async def append(self, entries: Sequence[LogEntry]) -> Unlogged:
        """Write entries; the replies that are gone or superseded."""
        gone: set[str] = set()
        superseded: set[str] = set()
        for first in range(0, len(entries), TRIP_ENTRIES):
            part = entries[first : first + TRIP_ENTRIES]
            commands = [_append_command(entry) for entry in part]
            answers = await self._run(commands, excused=(ALREADY_THERE, WRONG_TYPE))
            known: list[LogEntry] = []
            nowhere: list[str] = []
            for entry, answer in zip(part, answers, strict=True):
                if answer is None:
                    nowhere.append(entry.reply)
                elif isinstance(answer, Exception) and WRONG_TYPE in str(answer):
                    self._tell(answer)
                elif isinstance(answer, Exception):
                    known.append(entry)
            superseded |= await self._gone_on(known)
            ended = await self._ended(nowhere)
            superseded |= ended
            gone |= set(nowhere) - ended
        return Unlogged(gone=frozenset(gone), superseded=frozenset(superseded))

    async def _gone_on(self, entries: Sequence[LogEntry]) -> set[str]:
        """Of entries that were refused: the replies whose log has gone on without them."""
        if not entries:
            return set()
        commands: list[Command] = []
        for entry in entries:
            key, cursor = log_key(conversation_of(entry.reply), entry.reply), str(entry.cursor)
            commands.append(("XRANGE", key, cursor, cursor))
        answers = await self._run(commands)
        superseded: set[str] = set()
        for entry, answer in zip(entries, answers, strict=True):
            if not answer:
                superseded.add(entry.reply)
                continue
            ((_, fields),) = cast("list[tuple[bytes, object]]", answer)
            assert _text_field(fields) == entry.text, "one cursor, two texts"
        return superseded

    async def _ended(self, replies: Sequence[str]) -> set[str]:
        """Of replies without a log: those that have ended."""
        if not replies:
            return set()
        commands: list[Command] = [
            ("HEXISTS", keys_of(conversation_of(reply))[7], reply) for reply in replies
        ]
        answers = await self._run(commands, excused=(WRONG_TYPE,))
        return {reply for reply, there in zip(replies, answers, strict=True) if there == 1}


def _append_command(entry: LogEntry) -> Command:
    assert entry.cursor.seq > 0, "an entry has text; 0 is an epoch's head"
    key = log_key(conversation_of(entry.reply), entry.reply)
    return ("XADD", key, "NOMKSTREAM", str(entry.cursor), *log_fields(entry))


def _text_field(fields: object) -> str:
    """Of a stream entry's fields, in a row."""
    row = cast("list[bytes]", fields)
    return dict(zip(row[::2], row[1::2], strict=True))[b"t"].decode("utf-8")
