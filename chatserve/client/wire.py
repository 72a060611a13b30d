"""From the server's JSON to values. It may not know connections.

Theory of operation: what the client needs must be there and of its type, else BrokenProtocol;
what it does not know is left alone, so that a newer server can say more.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from chatserve.client.errors import BrokenProtocol, Refused, status_of
from chatserve.client.values import (
    Conversation,
    Final,
    Miss,
    OpenReply,
    Receipt,
    ReplyProgress,
    Timings,
    Tree,
    Turn,
    Usage,
)

SUBPROTOCOL = "chatserve.v1"
JsonObject = Mapping[str, object]
_CURSOR = re.compile(r"([1-9][0-9]{0,9})-(0|[1-9][0-9]{0,9})")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in a reply, `<epoch>-<seq>`: seq code points of text are before it."""

    epoch: int
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.seq}"


def decoded(text: str | bytes) -> JsonObject:
    """A JSON object."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BrokenProtocol("The server's answer is not JSON.") from error
    return _object(value)


def conversation_of(fields: JsonObject) -> Conversation:
    """A conversation without its turns."""
    return Conversation(
        id=field(fields, "id", str),
        title=field(fields, "title", str),
        system=optional(fields, "system", str),
        settings=_object(fields.get("settings", {})),
        created=number(fields, "created"),
        updated=number(fields, "updated"),
        revision=field(fields, "revision", int),
        leaf=optional(fields, "leaf", str),
    )


def page_of(fields: JsonObject) -> tuple[tuple[Conversation, ...], str | None]:
    """A part of the list, and where the next one begins."""
    found = tuple(conversation_of(each) for each in objects(fields, "conversations"))
    return found, optional(fields, "next", str)


def tree_of(fields: JsonObject) -> Tree:
    """A conversation with its turns."""
    return Tree(
        conversation=conversation_of(fields),
        turns=tuple(_turn(each) for each in objects(fields, "turns")),
        replies=tuple(
            OpenReply(
                id=field(each, "id", str),
                turn=field(each, "turn", str),
                state=field(each, "state", str),
                text=field(each, "content", str),
                created=number(each, "created"),
            )
            for each in objects(fields, "replies")
        ),
    )


def _turn(fields: JsonObject) -> Turn:
    final = fields.get("final")
    role = field(fields, "role", str)
    if role not in ("user", "assistant"):
        raise BrokenProtocol("A turn is a user's or an assistant's.")
    return Turn(
        id=field(fields, "id", str),
        parent=optional(fields, "parent", str),
        role=role,
        text=field(fields, "content", str),
        created=number(fields, "created"),
        final=None if final is None else final_of(_object(final)),
    )


def final_of(fields: JsonObject) -> Final:
    """How a reply ended. An imported turn may say anything, so nothing has to be there."""
    usage, receipt = _within(fields, "usage"), _within(fields, "receipt")
    details, timings = _within(usage, "prompt_tokens_details"), _within(fields, "timings")
    first, reason = timings.get("to_first_token"), fields.get("finish_reason")
    return Final(
        finish_reason=reason if isinstance(reason, str) else "",
        usage=Usage(
            prompt_tokens=_count(usage, "prompt_tokens"),
            completion_tokens=_count(usage, "completion_tokens"),
            total_tokens=_count(usage, "total_tokens"),
            cached_tokens=_count(details, "cached_tokens"),
        ),
        receipt=_receipt(receipt),
        timings=Timings(
            to_first_token=float(first) if isinstance(first, int | float) else None,
            total=number(timings, "total") if "total" in timings else 0.0,
        ),
    )


def _receipt(fields: JsonObject) -> Receipt:
    saved, told = fields.get("saved"), _within(fields, "miss")
    position, reason = told.get("position"), told.get("reason")
    miss = None
    if isinstance(position, int) and isinstance(reason, str):
        miss = Miss(position=position, reason=reason)
    return Receipt(
        device=_count(fields, "device"),
        host=_count(fields, "host"),
        disk=_count(fields, "disk"),
        remote=_count(fields, "remote"),
        computed=_count(fields, "computed"),
        left_out=_count(fields, "left_out"),
        saved=float(saved) if isinstance(saved, int | float) else None,
        miss=miss,
    )


def progress_of(fields: JsonObject) -> ReplyProgress:
    """How far a prompt is."""
    return ReplyProgress(
        queued=field(fields, "queued", int),
        prompt_tokens=field(fields, "prompt_tokens", int),
        computed=field(fields, "computed", int),
    )


def cursor_of(frame: JsonObject) -> Cursor:
    """A frame's id."""
    matched = _CURSOR.fullmatch(field(frame, "id", str))
    if matched is None:
        raise BrokenProtocol("An event's id is <epoch>-<seq>.")
    return Cursor(int(matched[1]), int(matched[2]))


def refusal_of_frame(frame: JsonObject) -> Refused:
    """What a `failed` frame without an id says."""
    code = field(frame, "code", str)
    return Refused(
        field(frame, "message", str),
        code=code,
        status=status_of(code),
        param=optional(frame, "param", str),
        retry_after=seconds_of(frame),
    )


def refusal_of_answer(status: int, body: bytes, retry_after: str | None) -> Refused:
    """What an HTTP answer with an error says; a proxy's may say nothing of use."""
    try:
        error = _within(decoded(body), "error")
    except BrokenProtocol:
        error = {}
    message, code, param = error.get("message"), error.get("code"), error.get("param")
    seconds = float(retry_after) if retry_after and re.fullmatch(r"\d{1,9}", retry_after) else None
    return Refused(
        message if isinstance(message, str) else f"The server answered with status {status}.",
        code=code if isinstance(code, str) else f"http_{status}",
        status=status,
        param=param if isinstance(param, str) else None,
        retry_after=seconds,
    )


def seconds_of(fields: JsonObject) -> float | None:
    """`retry_after`."""
    value = fields.get("retry_after")
    return float(value) if isinstance(value, int | float) else None


# Fields --------------------------------------------------------------------------------------


def field(fields: JsonObject, name: str, kind: type[T]) -> T:
    """A field that must be there."""
    value = fields.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BrokenProtocol(f"The server's answer has no {name} that is one.")
    return value


def optional(fields: JsonObject, name: str, kind: type[T]) -> T | None:
    """A field that may be null or absent."""
    return None if fields.get(name) is None else field(fields, name, kind)


def number(fields: JsonObject, name: str) -> float:
    """A field that is a number."""
    value = fields.get(name)
    if not isinstance(value, int | float):
        raise BrokenProtocol(f"The server's answer has no {name} that is one.")
    return float(value)


def objects(fields: JsonObject, name: str) -> Sequence[JsonObject]:
    """A field that is a list of objects."""
    found = fields.get(name)
    if not isinstance(found, list):
        raise BrokenProtocol(f"The server's answer has no {name} that is one.")
    return [_object(each) for each in cast(list[object], found)]


def _object(value: object) -> JsonObject:
    if not isinstance(value, dict):
        raise BrokenProtocol("The server's answer is not an object.")
    return cast(dict[str, object], value)


def _within(fields: JsonObject, name: str) -> JsonObject:
    value = fields.get(name)
    return cast(dict[str, object], value) if isinstance(value, dict) else {}


def _count(fields: JsonObject, name: str) -> int:
    value = fields.get(name)
    return value if isinstance(value, int) else 0
