"""How conversations lie in Redis: the keys of one, and its values as bytes.

It may not know the network. What scripts read or change stands in hashes of small fields; what they
only carry is packed here. The scripts' heads (`redis_scripts/prelude.lua`) hold the same table.

    cs:{<conversation>}:meta      hash: owner, title, created, updated, system, settings, revision,
                                  leaf, since (revision of the system prompt), bytes (of texts)
                       :parents   hash: turn -> role (u, a), place in the turns' order, ' ', parent
                       :turns     hash: turn -> pack(created, text, final)
                       :ids       hash: turn -> pack(encoding, token ids)
                       :asks      hash: ask -> digest in hex, ' ', reply
                       :replies   hash: reply -> pack(created, request)
                       :running   hash: reply -> '<epoch> <revision> <logged,…|-> <turn>'
                       :ended     hash: reply -> pack(what it was under running, state, final, text)
                       :refused   set: replies that were in doubt and are accepted no more
                       :names     hash: reply -> names of the pages that were computed for it, 32
                                  bytes each, as far as a reply before it on its path has them not
                       :forgotten list: names, as above, of a deleted conversation
                       :log:<reply>  stream: '<epoch>-<seq>' -> t text, i token ids, p prompt ids;
                                  '<epoch>-0' is an epoch's head: the log exists, even empty,
                                  and takes nothing of former epochs; the first head also has
                                  settings and system, as the reply was accepted with them
    cs:lease                      the chatserve whose conversations these are; expires
                                  (`redis_lease.py`)
    cs:deletions                  hash: conversation -> owner: deletions under way
    cs:running                    set of replies: all that run, perhaps more
    cs:owner:<owner>              sorted set: conversation -> updated: all of an owner, perhaps more

`pack` is a row of '<length>:<bytes>', with '-:' for None: scripts make and read it at no cost, and
a whole path comes as one value, for the client's parser takes microseconds for each. Token ids are
32-bit little-endian; text is UTF-8.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

from chatserve.chat.store.conversation import (
    Conversation,
    LogEntry,
    ReplyCursor,
    ReplyRecord,
    ReplyState,
    Role,
    Turn,
)

LEASE_KEY = "cs:lease"
DELETIONS_KEY = "cs:deletions"
RUNNING_INDEX = "cs:running"
OWNER_INDEX = "cs:owner:"

NAME_BYTES = 32  # of a page's name

_PARTS = (
    "meta",
    "parents",
    "turns",
    "ids",
    "asks",
    "replies",
    "running",
    "ended",
    "refused",
    "names",
    "forgotten",
    "log:",
)
META_FIELDS = ("owner", "title", "created", "updated", "system", "settings", "revision", "leaf")
SEARCHED_FIELDS = (*META_FIELDS, "bytes")

_ROLE_LETTERS = {Role.USER: "u", Role.ASSISTANT: "a"}
_ROLES = {letter: role for role, letter in _ROLE_LETTERS.items()}

Items = Iterator[bytes | None]


class Damaged(Exception):
    """Stored bytes that are not what was written: somebody else's hand, or an eviction."""


def keys_of(conversation: str) -> list[str]:
    """The keys that every script gets: a conversation's (the last is the beginning of its logs'),
    the lease, and the deletions under way."""
    return [*(f"cs:{{{conversation}}}:{part}" for part in _PARTS), LEASE_KEY, DELETIONS_KEY]


def meta_key(conversation: str) -> str:
    """The hash of a conversation itself."""
    return f"cs:{{{conversation}}}:meta"


def names_key(conversation: str) -> str:
    """The hash of page names by reply."""
    return f"cs:{{{conversation}}}:names"


def forgotten_key(conversation: str) -> str:
    """The list of page names of a deletion under way."""
    return f"cs:{{{conversation}}}:forgotten"


def log_key(conversation: str, reply: str) -> str:
    """The stream of a reply's log."""
    return f"cs:{{{conversation}}}:log:{reply}"


# Packing ---------------------------------------------------------------------------------------


def pack(items: Iterable[bytes | None]) -> bytes:
    """A row of values as one."""
    return b"".join(b"-:" if item is None else b"%d:%b" % (len(item), item) for item in items)


def unpack(packed: object) -> Items:
    """The values of a row, one after the other. Raises Damaged."""
    if not isinstance(packed, bytes):
        raise Damaged(type(packed).__name__)
    return _unpack(packed)


def _unpack(packed: bytes) -> Items:
    place, end = 0, len(packed)
    while place < end:
        colon = packed.find(b":", place, place + 12)
        length = packed[place:colon]
        place = colon + 1
        if length == b"-":
            yield None
            continue
        if colon < 0 or not length.isdigit() or place + int(length) > end:
            raise Damaged("a row of values")
        yield packed[place : place + int(length)]
        place += int(length)


def _next(items: Items) -> bytes:
    value = next(items, None)
    if value is None:
        raise Damaged("a value is missing")
    return value


def _text(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Damaged("text") from error


def _number(value: bytes) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise Damaged("a number") from error


# Conversations ---------------------------------------------------------------------------------


def pack_settings(settings: Mapping[str, object]) -> bytes:
    """Settings as JSON."""
    return json.dumps(dict(settings), separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def meta_arguments(conversation: Conversation) -> list[str | bytes]:
    """Field, value, field, value, …"""
    fields: list[str | bytes] = ["owner", conversation.owner, "title", conversation.title]
    fields += ["created", repr(conversation.created), "updated", repr(conversation.updated)]
    fields += ["settings", pack_settings(conversation.settings)]
    fields += ["revision", str(conversation.revision)]
    if conversation.system is not None:
        fields += ["system", conversation.system]
    if conversation.leaf is not None:
        fields += ["leaf", conversation.leaf]
    return fields


def read_conversation(identity: str, items: Items) -> Conversation:
    """From META_FIELDS, in order. Raises Damaged."""
    owner, title, created, updated = (_next(items) for _ in range(4))
    system, settings, revision, leaf = next(items), _next(items), _next(items), next(items)
    try:
        read = json.loads(settings)
    except ValueError as error:
        raise Damaged("settings") from error
    if not isinstance(read, dict):
        raise Damaged("settings")
    return Conversation(
        id=identity,
        owner=_text(owner),
        title=_text(title),
        created=_number(created),
        updated=_number(updated),
        system=None if system is None else _text(system),
        settings=cast("dict[str, object]", read),
        revision=int(_number(revision)),
        leaf=None if leaf is None else _text(leaf),
    )


# Page names ------------------------------------------------------------------------------------


def pack_names(names: Iterable[bytes]) -> bytes:
    """Page names in a row."""
    return b"".join(names)


def read_names(packed: bytes) -> tuple[bytes, ...]:
    """Raises Damaged."""
    if len(packed) % NAME_BYTES:
        raise Damaged("page names")
    return tuple(packed[at : at + NAME_BYTES] for at in range(0, len(packed), NAME_BYTES))


# Turns -----------------------------------------------------------------------------------------


def pack_ids(token_ids: Sequence[int]) -> bytes:
    """Token ids, four bytes each."""
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def read_ids(packed: bytes) -> tuple[int, ...]:
    """Raises Damaged."""
    if len(packed) % 4:
        raise Damaged("token ids")
    return struct.unpack(f"<{len(packed) // 4}I", packed)


def encoded_ids(token_ids: Sequence[int] | None, encoding: str) -> bytes:
    """A value of `:ids`; empty where there are none."""
    if token_ids is None:
        return b""
    return pack((encoding.encode("utf-8"), pack_ids(token_ids)))


def turn_value(created: float, text: str, final: bytes | None = None) -> bytes:
    """A value of `:turns`."""
    return pack((repr(created).encode("ascii"), text.encode("utf-8"), final))


def turn_arguments(turn: Turn) -> list[str | bytes]:
    """Id, role letter, parent, value, ids: as the scripts take a turn."""
    return [
        turn.id,
        _ROLE_LETTERS[turn.role],
        turn.parent or "",
        turn_value(turn.created, turn.text, turn.final),
        encoded_ids(turn.token_ids, turn.encoding),
    ]


def read_turns(items: Items) -> list[tuple[int, Turn]]:
    """All that is left of `items`: id, parents, value, ids of each turn; with their places in the
    order in which they came to be. Raises Damaged."""
    turns: list[tuple[int, Turn]] = []
    for identity in items:
        parents, value, ids = _text(_next(items)), unpack(_next(items)), next(items, None)
        ordinal, _, parent = parents[1:].partition(" ")
        role = _ROLES.get(parents[:1])
        if identity is None or role is None or not ordinal.isdigit():
            raise Damaged("a turn")
        created, text, final = _number(_next(value)), _text(_next(value)), next(value, None)
        encoding, token_ids = "", None
        if ids is not None:
            encoded = unpack(ids)
            encoding, token_ids = _text(_next(encoded)), read_ids(_next(encoded))
        turn = Turn(
            id=_text(identity),
            parent=parent or None,
            role=role,
            text=text,
            created=created,
            token_ids=token_ids,
            encoding=encoding,
            final=final,
        )
        turns.append((int(ordinal), turn))
    return turns


def read_text(value: bytes | None) -> str:
    """The text alone of a value of `:turns`. Raises Damaged."""
    items = unpack(value)
    _next(items)
    return _text(_next(items))


# Replies ---------------------------------------------------------------------------------------


def ending_value(state: ReplyState, final: bytes, text: str, *, has_turn: bool) -> bytes:
    """What a script puts behind a running reply's value to end it. With a turn, that keeps the
    final event and the text."""
    state_name = state.value.encode("ascii")
    return pack((state_name, None, None) if has_turn else (state_name, final, text.encode("utf-8")))


def read_record(reply: str, items: Items) -> ReplyRecord:
    """From the next four items: value under replies, running, ended, and its turn's. Raises
    Damaged."""
    kept, running, ended = unpack(_next(items)), next(items), next(items)
    turn_packed = next(items)
    state, final, text = ReplyState.RUNNING, None, ""
    if ended is not None:
        ending = unpack(ended)
        running = _next(ending)
        state = _state(_next(ending))
        final, said = next(ending, None), next(ending, None)
        text = "" if said is None else _text(said)
        if turn_packed is not None:
            turn = unpack(turn_packed)
            _next(turn)
            text, final = _text(_next(turn)), next(turn, None)
    if running is None:
        raise Damaged("a reply that neither runs nor has ended")
    epoch, _, logged, turn_id = (_text(running).split(" ", 3) + [""] * 3)[:4]
    if not epoch.isdigit() or not turn_id:
        raise Damaged("a reply")
    return ReplyRecord(
        id=reply,
        turn=turn_id,
        state=state,
        created=_number(_next(kept)),
        request=_next(kept),
        epoch=int(epoch),
        logged=() if logged == "-" else tuple(int(end) for end in logged.split(",")),
        final=final,
        text=text,
    )


def _state(name: bytes) -> ReplyState:
    try:
        return ReplyState(name.decode("ascii"))
    except ValueError as error:
        raise Damaged("a reply's state") from error


# Logs ------------------------------------------------------------------------------------------


def log_fields(entry: LogEntry) -> list[str | bytes]:
    """A log entry as the fields of a stream's."""
    fields: list[str | bytes] = ["t", entry.text, "i", pack_ids(entry.token_ids)]
    if entry.prompt_ids is not None:
        fields += ["p", pack_ids(entry.prompt_ids)]
    return fields


def read_log(reply: str, items: Items) -> tuple[LogEntry, ...]:
    """All that is left of `items`: cursor, text, ids, prompt ids of each entry. Raises Damaged."""
    entries: list[LogEntry] = []
    for cursor in items:
        text, ids, prompt_ids = _text(_next(items)), read_ids(_next(items)), next(items, None)
        epoch, _, seq = _text(cursor or b"").partition("-")
        if not (epoch.isdigit() and seq.isdigit()):
            raise Damaged("a cursor")
        entry = LogEntry(
            reply=reply,
            cursor=ReplyCursor(int(epoch), int(seq)),
            text=text,
            token_ids=ids,
            prompt_ids=None if prompt_ids is None else read_ids(prompt_ids),
        )
        entries.append(entry)
    return tuple(entries)
