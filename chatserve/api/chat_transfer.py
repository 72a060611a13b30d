"""Conversations as JSON: how they are shown, and the file that `export` gives and `import` takes.

It may not know where they are kept. The file, version 1:

    {"format": "chatserve.conversation", "version": 1,
     "title": text, "system": text | null, "settings": {sampling fields}, "leaf": turn id | null,
     "created": seconds since 1970, "id"?: the client's id of this import,
     "turns": [{"id", "parent": turn id | null, "role": "user" | "assistant", "content": text,
                "created", "final"?: what an assistant's turn ended with}]}

Parents come before their children; a turn without a parent is a first message, of which a tree may
have several; roles alternate on every branch, from a user on; the leaf is one of the turns. Token
ids are not in it: they are a cache, and another model's would mean something else.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, cast

import orjson
from msgspec import Meta, Struct

from chatserve.api.chat_schema import sampling, title, turn_name
from chatserve.api.limits import Limits
from chatserve.api.schema import convert
from chatserve.api.wire import JsonObject
from chatserve.chat.store.conversation import Conversation, ReplyRecord, Role, Turn
from chatserve.errors import RequestError

FORMAT = "chatserve.conversation"
VERSION = 1
_FINAL_BYTES_MAX = 64 * 1024  # usage, receipt and timings have less than one

Seconds = Annotated[float, Meta(ge=0.0, le=2.0**53)]


class TurnFields(Struct, kw_only=True, forbid_unknown_fields=True):
    """A turn in a file."""

    id: str
    parent: str | None
    role: Literal["user", "assistant"]
    content: str
    created: Seconds | None = None
    final: dict[str, object] | None = None


class FileFields(Struct, kw_only=True, forbid_unknown_fields=True):
    """A file, its turns not looked at."""

    format: str
    version: int
    id: str | None = None
    title: str = ""
    system: str | None = None
    settings: dict[str, object] = {}
    leaf: str | None = None
    created: Seconds | None = None
    turns: list[object] = []


def shown(conversation: Conversation) -> JsonObject:
    """A conversation without its turns."""
    return {
        "id": conversation.id,
        "title": conversation.title,
        "system": conversation.system,
        "settings": dict(conversation.settings),
        "created": conversation.created,
        "updated": conversation.updated,
        "revision": conversation.revision,
        "leaf": conversation.leaf,
    }


def shown_whole(
    conversation: Conversation, turns: Sequence[Turn], replies: Sequence[ReplyRecord]
) -> JsonObject:
    """A conversation with its turns, and the replies that are running or have none."""
    return shown(conversation) | {
        "turns": [_turn(turn) for turn in turns],
        "replies": [
            {
                "id": record.id,
                "turn": record.turn,
                "state": record.state.value,
                "created": record.created,
                "content": record.text,
                "final": None if record.final is None else orjson.Fragment(record.final),
            }
            for record in replies
        ],
    }


def _turn(turn: Turn) -> JsonObject:
    fields: JsonObject = {
        "id": turn.id,
        "parent": turn.parent,
        "role": turn.role.value,
        "content": turn.text,
        "created": turn.created,
    }
    if turn.final is not None:
        fields["final"] = orjson.Fragment(turn.final)
    return fields


def exported(conversation: Conversation, turns: Sequence[Turn]) -> JsonObject:
    """The file's content."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": conversation.title,
        "system": conversation.system,
        "settings": dict(conversation.settings),
        "leaf": conversation.leaf,
        "created": conversation.created,
        "turns": [_turn(turn) for turn in turns],
    }


def import_name(fields: Mapping[str, object]) -> str | None:
    """The client's id of this import, if it gives one. Raises RequestError."""
    given = fields.get("id")
    return None if given is None else turn_name(given, "id")


def imported(
    fields: Mapping[str, object], owner: str, limits: Limits
) -> tuple[Conversation, tuple[Turn, ...]]:
    """The values that a file stands for; the conversation has no id yet. Raises RequestError."""
    if fields.get("format") != FORMAT:
        raise RequestError(f"The format is not {FORMAT}.", param="format")
    if fields.get("version") != VERSION:
        raise RequestError(f"The only known version is {VERSION}.", param="version")
    body = convert(dict(fields), FileFields)
    if len(body.turns) > limits.import_turns_max:
        raise RequestError(f"There may be at most {limits.import_turns_max} turns.", param="turns")
    now = time.time()
    turns: dict[str, Turn] = {}
    for index, each in enumerate(body.turns):
        turn = _imported_turn(each, index, turns, now)
        turns[turn.id] = turn
    if (body.leaf is None) != (not turns) or (body.leaf and body.leaf not in turns):
        raise RequestError("The leaf must be one of the turns.", param="leaf")
    conversation = Conversation(
        id="",
        owner=owner,
        title=title(body.title, limits) if body.title else "",
        created=now if body.created is None else body.created,
        updated=now,
        system=body.system,
        settings=sampling(body.settings, limits, within="settings"),
        leaf=body.leaf,
    )
    return conversation, tuple(turns.values())


def _imported_turn(value: object, index: int, above: Mapping[str, Turn], now: float) -> Turn:
    at = f"turns[{index}]"
    if not isinstance(value, dict):
        raise RequestError(f"{at} is not an object.", param=at)
    try:
        body = convert(cast(dict[str, object], value), TurnFields)
        turn_name(body.id, "id")
    except RequestError as error:
        error.param = f"{at}.{error.param}" if error.param else at
        raise
    if body.id in above:
        raise RequestError(f"{at}: this id is there twice.", param=f"{at}.id")
    role = Role(body.role)
    if body.parent is None:
        if role is not Role.USER:
            raise RequestError(f"{at}: the first message is a user's.", param=f"{at}.role")
    elif body.parent not in above:
        raise RequestError(f"{at}: its parent is not before it.", param=f"{at}.parent")
    elif above[body.parent].role is role:
        raise RequestError(f"{at}: its parent has the same role.", param=f"{at}.role")
    if role is Role.USER and (not body.content or body.final is not None):
        raise RequestError(f"{at}: a user's turn is a text.", param=f"{at}.content")
    final = None if body.final is None else orjson.dumps(body.final)
    if final is not None and len(final) > _FINAL_BYTES_MAX:
        raise RequestError(f"{at}: this is too long.", param=f"{at}.final")
    return Turn(
        id=body.id,
        parent=body.parent,
        role=role,
        text=body.content,
        created=now if body.created is None else body.created,
        final=final,
    )
