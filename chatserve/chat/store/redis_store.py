"""RedisStore: conversations, turns, replies and their logs in Redis or Valkey.

It may not know the server's process or the wire protocol. Theory of operation: whatever must be
atomic is one script over one conversation's keys (`redis_values.py` draws them), and a call is one
trip. Two indexes stand beside the conversations and are kept as supersets: written before what they
list, cleaned after it, so that a crash between the two hides nothing. What is written after
(`_chores`) rides with the next call: nobody waits for it, and losing it loses nothing.

    accept   SADD cs:running ▸ script          the script has: user's turn, reply, empty log
    append   XADD NOMKSTREAM …                 no log: gone or ended; 'equal or smaller': there
    end      script ▸ (later) SREM cs:running  the script has: assistant's turn, ending, no log

A log entry's cursor is its stream id, so that resending one is harmless, and one of a former epoch
is refused by the server itself (`redis_log.py`).
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar, cast

from chatserve.chat.store.conversation import (
    Conversation,
    LogEntry,
    ReplyRecord,
    Role,
    Turn,
    conversation_of,
)
from chatserve.chat.store.conversation_list import Place
from chatserve.chat.store.redis_lease import RedisLease
from chatserve.chat.store.redis_link import (
    WRONG_TYPE,
    Argument,
    Command,
    RedisLink,
    ServerFacts,
)
from chatserve.chat.store.redis_list import RedisList
from chatserve.chat.store.redis_log import ALREADY_THERE, TRIP_ENTRIES, RedisLog
from chatserve.chat.store.redis_rewrite import RedisRewrite
from chatserve.chat.store.redis_values import (
    DELETIONS_KEY,
    OWNER_INDEX,
    RUNNING_INDEX,
    Damaged,
    Items,
    encoded_ids,
    ending_value,
    forgotten_key,
    keys_of,
    meta_arguments,
    meta_key,
    names_key,
    pack,
    pack_names,
    pack_settings,
    read_conversation,
    read_log,
    read_names,
    read_record,
    read_turns,
    turn_arguments,
    turn_value,
    unpack,
)
from chatserve.chat.store.session_store import (
    CHANGEABLE,
    TURNS_MAX,
    Accepted,
    Elsewhere,
    Ending,
    NewTurn,
    Page,
    StoreStatistics,
    Superseded,
    Unlogged,
    Unreadable,
    conflict,
    no_conversation,
    no_leaf,
    no_parent,
    no_reply,
)
from chatserve.errors import ChatserveError, Unavailable

T = TypeVar("T")

CHORES_MAX = 4_096  # index entries to be mended with the next call; the oldest are forgotten
READ_ON_LOOP_BYTES_MAX = 128 << 10  # a longer answer is read in a thread: about a millisecond


class RedisStore:
    """All owners' conversations, behind one link. lease: None where no other server can come."""

    def __init__(self, link: RedisLink, lease: RedisLease | None = None) -> None:
        self._link = link
        self._lease = lease
        self._lease_id = "" if lease is None else lease.id
        self._list = RedisList(link)
        self._log = RedisLog(self._run, link.tell)
        self._rewrite = RedisRewrite(link)
        self._facts: ServerFacts | None = None
        self._chores: dict[tuple[Argument, ...], Command] = {}

    async def check(self) -> ServerFacts:
        """Whether this server will do, and what to warn of. Raises StartError, Unavailable."""
        trial = self._link.script("get", keys_of("nobody's"), ("",))
        self._facts = await self._link.facts(trial)
        return self._facts

    async def create(self, conversation: Conversation, turns: Sequence[Turn] = ()) -> None:
        """Keep a new conversation."""
        assert len(turns) <= TURNS_MAX, "refused where it is imported"
        fields = meta_arguments(conversation)
        index = OWNER_INDEX + conversation.owner
        listed = ("ZADD", index, "GT", repr(conversation.updated), conversation.id)
        arguments = (conversation.owner, len(fields), *fields)
        if turns:
            arguments += await asyncio.to_thread(_turns_arguments, turns)
        status, _ = await self._script("create", conversation.id, arguments, before=[listed])
        assert status == "ok", "ids are drawn"

    async def get(self, owner: str, conversation: str) -> Conversation:
        """Raises NotFound."""
        status, items = await self._script("get", conversation, (owner,))
        self._check(status, no_conversation)
        return await self._read(lambda items: read_conversation(conversation, items), items)

    async def tree(
        self, owner: str, conversation: str
    ) -> tuple[Conversation, tuple[Turn, ...], tuple[ReplyRecord, ...]]:
        """With all turns, and the replies that are running or have no turn. Raises NotFound."""
        status, items = await self._script("tree", conversation, (owner,))
        self._check(status, no_conversation)

        def read(items: Items) -> tuple[Conversation, tuple[Turn, ...], tuple[ReplyRecord, ...]]:
            head = read_conversation(conversation, items)
            count = int(next(items) or b"0")
            records = tuple(
                read_record((next(items) or b"").decode("utf-8"), items) for _ in range(count)
            )
            turns = read_turns(items)
            turns.sort(key=lambda item: item[0])
            return head, tuple(turn for _, turn in turns), records

        return await self._read(read, items)

    async def list(
        self, owner: str, *, after: str | None = None, limit: int = 50, search: str | None = None
    ) -> Page:
        """Latest update first."""
        place = None if after is None else Place.read(after)
        await self._do_chores()
        return await self._list.page(owner, after=place, limit=limit, search=search)

    async def update(
        self, owner: str, conversation: str, changes: Mapping[str, object], *, now: float
    ) -> Conversation:
        """Set some of title, system, settings and leaf. Raises NotFound."""
        assert changes.keys() <= CHANGEABLE, changes
        arguments: list[Argument] = [owner, repr(now)]
        for name, value in changes.items():
            if name == "system" and value is None:
                arguments += ["no system", ""]
            elif name == "settings":
                settings = cast("Mapping[str, object]", value)
                arguments += [name, pack_settings(settings)]
            else:
                arguments += [name, cast("str | None", value) or ""]
        status, items = await self._script("update", conversation, arguments)
        if status == "leaf":
            raise no_leaf()
        self._check(status, no_conversation)
        return await self._changed(conversation, items)

    async def named(self, owner: str, conversation: str) -> frozenset[str]:
        """The replies whose endings had names. Raises NotFound."""
        await self.get(owner, conversation)
        (replies,) = await self._run([("HKEYS", names_key(conversation))])
        return frozenset(reply.decode("utf-8") for reply in cast("list[bytes]", replies))

    async def delete(
        self, owner: str, conversation: str, *, names: Iterable[bytes] = ()
    ) -> tuple[str, ...]:
        """The replies that were running. Raises NotFound."""
        arguments = (owner, conversation, pack_names(names))
        status, items = await self._script("delete", conversation, arguments)
        self._check(status, no_conversation)
        running = await self._read(_identities, items)
        self._later(("ZREM", OWNER_INDEX + owner, conversation))
        for reply in running:
            self._later(("SREM", RUNNING_INDEX, reply))
        return running

    async def deletions(self) -> tuple[tuple[str, str], ...]:
        """Owners and conversations."""
        (found,) = await self._run([("HGETALL", DELETIONS_KEY)])
        row = [item.decode("utf-8") for item in cast("list[bytes]", found)]
        return tuple(zip(row[1::2], row[::2], strict=True))

    async def forgotten_names(self, conversation: str) -> frozenset[bytes]:
        """Of a deletion under way."""
        return await self._names(("LRANGE", forgotten_key(conversation), 0, -1))

    async def owner(self, conversation: str) -> str:
        """Raises NotFound."""
        (found,) = await self._run([("HGET", meta_key(conversation), "owner")])
        if found is None:
            raise no_conversation()
        try:
            return cast("bytes", found).decode("utf-8")
        except UnicodeDecodeError as error:
            raise Unreadable from error

    async def page_names(self, conversation: str) -> frozenset[bytes]:
        """What the endings of its replies told, whoever owns it."""
        return await self._names(("HVALS", names_key(conversation)))

    async def _names(self, command: Command) -> frozenset[bytes]:
        (found,) = await self._run([command])
        rows = cast("list[bytes]", found)
        try:
            return frozenset(name for packed in rows for name in read_names(packed))
        except Damaged as error:
            raise Unreadable from error

    async def end_deletion(self, conversation: str) -> None:
        """A server of our own writes its files anew; another's are its owner's matter."""
        await self._run([("UNLINK", forgotten_key(conversation))])
        if self._lease is None:
            await self._rewrite.done()
        await self._run([("HDEL", DELETIONS_KEY, conversation)])

    async def accept(self, turn: NewTurn) -> Accepted:
        """Append the user's turn and a running reply, or find the known one."""
        has_content = turn.content is not None
        arguments: tuple[Argument, ...] = (turn.owner, turn.ask, turn.digest.hex(), turn.reply)
        arguments += (pack((repr(turn.now).encode("ascii"), turn.request)), repr(turn.now))
        arguments += (TURNS_MAX, "content" if has_content else "")
        arguments += (turn_value(turn.now, turn.content) if turn.content is not None else "",)
        arguments += ("leaf" if turn.at_leaf else "parent", turn.parent or "", self._lease_id)
        listed = ("SADD", RUNNING_INDEX, turn.reply)
        status, items = await self._script("accept", turn.conversation, arguments, before=[listed])
        if status != "accepted":
            self._later(("SREM", RUNNING_INDEX, turn.reply))
            if status == "parent":
                raise no_parent()
            if status != "known":
                self._check(status, no_conversation)

        def read(items: Items) -> Accepted:
            conversation = read_conversation(turn.conversation, items)
            record = read_record((next(items) or b"").decode("utf-8"), items)
            path = tuple(turn for _, turn in reversed(read_turns(items)))
            return Accepted(
                conversation=conversation, record=record, path=path, known=status == "known"
            )

        accepted = await self._read(read, items)
        self._listed(accepted.conversation)
        return accepted

    async def find(
        self, owner: str, conversation: str, *, ask: str, digest: bytes
    ) -> ReplyRecord | None:
        """The reply of a known ask."""
        status, items = await self._script("find", conversation, (owner, ask, digest.hex()))
        if status == "new":
            return None
        if status != "known":
            self._check(status, no_conversation)
        return await self._read(
            lambda items: read_record((next(items) or b"").decode("utf-8"), items), items
        )

    async def settle(self, owner: str, reply: str) -> bool:
        """Whether a reply in doubt was accepted; if not, it never will be. Raises NotFound."""
        status, _ = await self._script("settle", conversation_of(reply), (owner, reply))
        if status == "known":
            return True
        self._later(("SREM", RUNNING_INDEX, reply))
        if status != "refused":
            self._check(status, no_conversation)
        return False

    async def append(self, entries: Sequence[LogEntry]) -> Unlogged:
        """Write log entries; the replies that are gone or superseded."""
        return await self._log.append(entries)

    async def end(self, ending: Ending) -> Conversation:
        """Keep the assistant's turn and the end of the reply. Raises NotFound, Superseded."""
        turn = ending.turn
        value = ending_value(ending.state, ending.final, ending.text, has_turn=turn is not None)
        arguments: tuple[Argument, ...] = (ending.reply, ending.epoch, value, repr(ending.now))
        arguments += (ending.title or "", encoded_ids(ending.prompt_ids, ending.encoding))
        arguments += ("" if ending.names is None else b"=" + pack_names(ending.names),)
        if turn is None:
            arguments += ("", "", "")
        else:
            assert turn.id == ending.reply, turn.id
            assert turn.role is Role.ASSISTANT
            arguments += ("turn", turn_value(turn.created, turn.text, turn.final))
            arguments += (encoded_ids(turn.token_ids, turn.encoding),)
        identity = conversation_of(ending.reply)
        status, items = await self._script("end", identity, arguments)
        if status == "superseded":
            raise Superseded  # and perhaps it runs
        self._later(("SREM", RUNNING_INDEX, ending.reply))
        self._check(status, no_reply)
        return await self._changed(identity, items)

    async def reply(self, owner: str, reply: str) -> ReplyRecord:
        """Raises NotFound."""
        status, items = await self._script("reply", conversation_of(reply), (owner, reply))
        self._check(status, no_reply)
        return await self._read(lambda items: read_record(reply, items), items)

    async def log(self, reply: str) -> tuple[LogEntry, ...]:
        """What was logged of a running reply."""
        _, items = await self._script("log", conversation_of(reply), (reply,))
        return await self._read(lambda items: read_log(reply, items), items)

    async def running(self) -> tuple[str, ...]:
        """Replies that run, as their conversations have it; others are taken off the index."""
        (answer,) = await self._run([("SMEMBERS", RUNNING_INDEX)])
        listed = sorted(member.decode("utf-8") for member in cast("list[bytes]", answer))
        running: list[str] = []
        for first in range(0, len(listed), TRIP_ENTRIES):
            part = listed[first : first + TRIP_ENTRIES]
            # One whose conversation is damaged counts: whoever takes it up is told so.
            there = await self._run([_is_running(reply) for reply in part], excused=(WRONG_TYPE,))
            running += [reply for reply, runs in zip(part, there, strict=True) if runs]
            stale = [reply for reply, runs in zip(part, there, strict=True) if not runs]
            if stale:
                # One that was being accepted comes back.
                await self._run([("SREM", RUNNING_INDEX, *stale)])
                there = await self._run(
                    [_is_running(reply) for reply in stale], excused=(WRONG_TYPE,)
                )
                back = [reply for reply, runs in zip(stale, there, strict=True) if runs]
                if back:
                    await self._run([("SADD", RUNNING_INDEX, *back)])
        return tuple(running)

    async def resume(self, reply: str) -> tuple[Conversation, tuple[Turn, ...], ReplyRecord]:
        """Take up a running reply. Raises NotFound, Conflict if it has ended."""
        identity = conversation_of(reply)
        status, items = await self._script("resume", identity, (reply, self._lease_id))
        self._check(status, no_reply)

        def read(items: Items) -> tuple[Conversation, tuple[Turn, ...], ReplyRecord]:
            conversation, record = read_conversation(identity, items), read_record(reply, items)
            return conversation, tuple(turn for _, turn in reversed(read_turns(items))), record

        return await self._read(read, items)

    async def handed_back(self) -> None:
        """Wait until the store is ours again after another server had it."""
        await (asyncio.Event().wait() if self._lease is None else self._lease.handed_back())

    def statistics(self) -> StoreStatistics:
        """A frozen picture. Kind and durability are known once the server was checked."""
        link, facts = self._link.statistics(), self._facts
        return StoreStatistics(
            kind="redis" if facts is None else facts.kind,
            available=link.available,
            durable=facts is not None and facts.durable,
            calls=link.calls,
            failures=link.failures,
            seconds_total=link.seconds_total,
            ours=self._lease is None or not self._lease.lost,
        )

    # Inside ----------------------------------------------------------------------------------

    async def _script(
        self,
        name: str,
        conversation: str,
        arguments: Sequence[Argument],
        *,
        before: Sequence[Command] = (),
    ) -> tuple[str, bytes]:
        """How it went, and the packed row that says so in its first value."""
        command = self._link.script(name, keys_of(conversation), arguments)
        try:
            answers = await self._run([*before, command], excused=(ALREADY_THERE,))
            packed = answers[-1]
            status = next(unpack(packed), None)
        except Damaged as error:
            raise Unreadable from error
        except Unavailable as refusal:
            if _is_of_damage(refusal.__cause__):
                raise Unreadable from refusal
            raise
        assert status is not None, name
        return status.decode("ascii"), cast("bytes", packed)

    async def _run(
        self, commands: Sequence[Command], *, excused: Sequence[str] = ()
    ) -> Sequence[object]:
        """With the chores before them."""
        chores, self._chores = self._chores, {}
        try:
            answers = await self._link.run(
                [*chores.values(), *commands], optional=len(chores), excused=excused
            )
        except BaseException:
            self._chores = chores | self._chores
            raise
        return answers[len(chores) :]

    async def _do_chores(self) -> None:
        if self._chores:
            await self._run([("PING",)])

    def _later(self, command: Command) -> None:
        """Do it with the next call. A later word on the same thing takes the former's place."""
        key = command[:2] + command[-1:]
        self._chores.pop(key, None)
        self._chores[key] = command
        if len(self._chores) > CHORES_MAX:
            del self._chores[next(iter(self._chores))]

    def _listed(self, conversation: Conversation) -> None:
        index, score = OWNER_INDEX + conversation.owner, repr(conversation.updated)
        self._later(("ZADD", index, "XX", "GT", score, conversation.id))

    async def _changed(self, identity: str, items: bytes) -> Conversation:
        conversation = await self._read(lambda items: read_conversation(identity, items), items)
        self._listed(conversation)
        return conversation

    async def _read(self, read: Callable[[Items], T], packed: bytes) -> T:
        """What stands behind the first value. Much of it is read off the loop."""

        def behind_first() -> T:
            items = unpack(packed)
            next(items)
            return read(items)

        try:
            if len(packed) > READ_ON_LOOP_BYTES_MAX:
                return await asyncio.to_thread(behind_first)
            return behind_first()
        except Damaged as error:
            raise Unreadable from error

    @staticmethod
    def _check(status: str, gone: Callable[[], ChatserveError]) -> None:
        if status == "gone":
            raise gone()
        if status == "elsewhere":
            raise Elsewhere
        if status not in ("ok", "accepted"):
            raise conflict(status)


def _is_of_damage(error: BaseException | None) -> bool:
    """Whether a script met keys or values that no script of ours writes. It reads before it writes:
    then nothing was changed."""
    text = str(error)
    return "script" in text and (WRONG_TYPE in text or "attempt to" in text)


def _turns_arguments(turns: Sequence[Turn]) -> tuple[Argument, ...]:
    return tuple(argument for turn in turns for argument in turn_arguments(turn))


def _identities(items: Items) -> tuple[str, ...]:
    return tuple((item or b"").decode("utf-8") for item in items)


def _is_running(reply: str) -> Command:
    running = keys_of(conversation_of(reply))[6]
    return ("HEXISTS", running, reply)
