"""From decoded JSON to the values of conversations: turns, changes, cursors, socket frames.

It may not know sockets or replies. Theory of operation: as in `schema.py`, with the very fields
and limits of `/v1` for sampling: what `/v1` refuses is refused here, and `n`, `stream`,
`messages` and `logprobs` are unknown. What is handed down is canonical (defaults left out, numbers
of one type, `stop` a list), so that equal meanings have equal digests. What overrides a setting
with its default does say something.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import orjson
from msgspec import Struct

from chatserve.api.chat_collaborators import TurnAsk
from chatserve.api.fields import Positive, SamplingFields
from chatserve.api.limits import Limits
from chatserve.api.neutral import without_neutral
from chatserve.api.schema import check_token_ids, convert, stop_strings, token_bias
from chatserve.chat.conversations.draft_ask import DraftAsk
from chatserve.chat.store.conversation import ReplyCursor
from chatserve.errors import NotFound, RequestError

_DIGEST_BYTES = 32
_ASK = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,160}")  # of a turn or reply: two such names and a dot
_CURSOR = re.compile(r"([1-9][0-9]{0,9})-(0|[1-9][0-9]{0,9})")
# Of a line: what ends it, and what turns the direction of the text around it.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class ChatSampling(SamplingFields, kw_only=True):
    """The settings of a conversation, and what a turn may say besides."""

    max_completion_tokens: Positive | None = None


class NewConversation(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /api/conversations`. id: the client's, which makes a retry safe."""

    id: str | None = None
    title: str | None = None
    system: str | None = None
    settings: dict[str, object] = {}


class SocketFrame(Struct, kw_only=True, forbid_unknown_fields=True):
    """What a client's frame says apart from a turn's own fields."""

    type: Literal["send", "stop", "attach", "detach", "focus", "draft", "ping"]
    request: str
    conversation: str | None = None
    reply: str | None = None
    after: str | None = None


_SAMPLING_NAMES = frozenset(ChatSampling.__struct_fields__)
_CHANGEABLE = frozenset({"title", "system", "settings", "leaf"})
# What each type of frame needs, and what it may have; a `send` may have a turn's fields too, what
# is typed its own.
_FRAME_NEEDS: dict[str, tuple[str, ...]] = {
    "send": ("conversation",),
    "stop": ("reply",),
    "attach": ("reply",),
    "detach": ("reply",),
    "focus": (),
    "draft": (),
    "ping": (),
}
_FRAME_MAY: dict[str, tuple[str, ...]] = {
    "attach": ("after",),
    "focus": ("conversation",),
    "draft": ("conversation",),
}
_FRAME_FIELDS: dict[str, frozenset[str]] = {
    "focus": frozenset({"system"}),
    "draft": frozenset({"parent", "text", "system"}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientFrame:
    """A frame of a socket. target: the conversation, or the reply of an `attach`, a `detach` or a
    `stop`. turn: the fields of a turn, or of what is typed."""

    kind: str
    request: str
    target: str
    after: ReplyCursor | None
    turn: dict[str, object]


def sampling(
    fields: Mapping[str, object], limits: Limits, *, within: str = ""
) -> dict[str, object]:
    """The sampling fields that say something, canonical. within: what their names follow."""
    try:
        given = without_neutral(dict(fields), _SAMPLING_NAMES)
        body = convert(given, ChatSampling)
        check_token_ids(body, limits)
        stops = stop_strings(body.stop, limits)
        bias = token_bias(body.logit_bias, limits)
        told = _told_tokens(body)
    except RequestError as error:
        if within and error.param:
            error.param = f"{within}.{error.param}"
        raise
    values: dict[str, object] = {name: getattr(body, name) for name in given}
    values.pop("max_completion_tokens", None)
    if told is not None:
        values["max_tokens"] = told
    if "stop" in values:
        values["stop"] = list(stops)
    if "logit_bias" in values:
        values["logit_bias"] = {str(token): weight for token, weight in bias}
    return values


def _told_tokens(body: ChatSampling) -> int | None:
    told = body.max_tokens if body.max_tokens is not None else body.max_completion_tokens
    if body.max_completion_tokens is not None and body.max_completion_tokens != told:
        raise _bad("max_tokens", "max_tokens and max_completion_tokens contradict each other.")
    if told is not None and body.min_tokens > told:
        raise _bad("min_tokens", "min_tokens is greater than max_tokens.")
    return told


def turn_ask(
    fields: dict[str, object], *, owner: str, conversation: str, limits: Limits
) -> TurnAsk:
    """A turn's body: `{"id", "content"?, "parent"?, ...sampling}`."""
    rest = dict(fields)
    ask = rest.pop("id", None)
    if not isinstance(ask, str) or not _ASK.fullmatch(ask):
        raise _bad("id", "A turn needs an id: 1 to 64 of the characters A-Z a-z 0-9 _ and -.")
    content = rest.pop("content", None)
    if content is not None and not (isinstance(content, str) and content):
        raise _bad("content", "The content is a text, and not an empty one.")
    at_leaf = "parent" not in rest
    parent = rest.pop("parent", None)
    if parent is not None and not (isinstance(parent, str) and _NAME.fullmatch(parent)):
        raise _bad("parent", "The parent is the id of a turn, or null for a new first message.")
    if content is None and parent is None and not at_leaf:
        raise _bad("content", "A new first message needs a content.")
    values = sampling(rest, limits)
    meaning = {"content": content, "at_leaf": at_leaf, "parent": parent, "sampling": values}
    return TurnAsk(
        owner=owner,
        conversation=conversation,
        ask=ask,
        digest=_digest(meaning),
        content=content,
        at_leaf=at_leaf,
        parent=parent,
        sampling=values,
    )


def _digest(meaning: Mapping[str, object]) -> bytes:
    spelled = orjson.dumps(meaning, option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(spelled, digest_size=_DIGEST_BYTES).digest()


def new_conversation(fields: dict[str, object], limits: Limits) -> NewConversation:
    """The body of `POST /api/conversations`, its title and settings checked."""
    body = convert(
        {name: value for name, value in fields.items() if value is not None}, NewConversation
    )
    if body.id is not None:
        body.id = turn_name(body.id, "id")
    if body.title is not None:
        body.title = title(body.title, limits)
    body.settings = sampling(body.settings, limits, within="settings")
    return body


def changes(fields: dict[str, object], limits: Limits) -> dict[str, object]:
    """The body of `PATCH /api/conversations/{id}`: some of title, system, settings and leaf."""
    unknown = sorted(fields.keys() - _CHANGEABLE)
    if unknown:
        raise _bad(unknown[0][:64], "Only title, system, settings and leaf can be changed.")
    if not fields:
        raise RequestError("Nothing is to be changed.")
    checked = dict(fields)
    if "title" in fields:
        checked["title"] = title(fields["title"], limits)
    if "system" in fields and not isinstance(fields["system"], str | None):
        raise _bad("system", "The system prompt is a text, or null for none.")
    if "settings" in fields:
        settings = fields["settings"]
        if not isinstance(settings, dict):
            raise _bad("settings", "The settings are an object of sampling fields.")
        checked["settings"] = sampling(cast(dict[str, object], settings), limits, within="settings")
    if "leaf" in fields:
        checked["leaf"] = turn_name(fields["leaf"], "leaf")
    return checked


def title(value: object, limits: Limits) -> str:
    """One line of text that is not empty."""
    if not isinstance(value, str) or not value.strip() or _CONTROL.search(value):
        raise _bad("title", "The title is one line of text.")
    if len(value) > limits.title_length_max:
        raise _bad("title", f"The title may have {limits.title_length_max} characters.")
    return value.strip()


def turn_name(value: object, param: str) -> str:
    """The id of a turn."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise _bad(param, "This is not the id of a turn.")
    return value


def known_name(value: str) -> str:
    """A conversation's or reply's id out of a path: what cannot be one is not there."""
    if not _NAME.fullmatch(value):
        raise NotFound("There is no such conversation or reply.")
    return value


def cursor(text: str) -> ReplyCursor:
    """`<epoch>-<seq>`, as it came with an event."""
    matched = _CURSOR.fullmatch(text)
    if matched is None:
        raise _bad("after", "An event's id is <epoch>-<seq>.")
    return ReplyCursor(int(matched[1]), int(matched[2]))


def page_query(query: Mapping[str, str], limits: Limits) -> tuple[str | None, int, str | None]:
    """`?after`, `?limit` and `?search` of the list of conversations."""
    limit, after, search = query.get("limit"), query.get("after"), query.get("search")
    size = limits.page_conversations
    if limit is not None:
        if not (limit.isascii() and limit.isdecimal() and len(limit) <= 9 and int(limit)):
            raise _bad("limit", "The limit is a number from 1 on.")
        size = min(int(limit), limits.page_conversations_max)
    if after is not None and not 1 <= len(after) <= limits.search_length_max:
        raise _bad("after", "This is not where a page begins.")
    if search is not None and len(search) > limits.search_length_max:
        raise _bad("search", f"A search may have {limits.search_length_max} characters.")
    return after, size, search or None


def client_frame(fields: dict[str, object], limits: Limits) -> ClientFrame:
    """A frame that a socket's client sent, its `request` known to be a short string."""
    kind = fields.get("type")
    envelope = {name: fields[name] for name in SocketFrame.__struct_fields__ if name in fields}
    turn = {name: value for name, value in fields.items() if name not in envelope}
    body = convert(envelope, SocketFrame)
    needs, may = _FRAME_NEEDS[body.type], _FRAME_MAY.get(body.type, ())
    for name in ("conversation", "reply", "after"):
        given = getattr(body, name) is not None
        if name in needs and not given:
            raise _bad(name, f"A frame of type {kind} needs this field.")
        if given and name not in needs and name not in may:
            raise _bad(name, f"A frame of type {kind} has no such field.")
    unknown = () if body.type == "send" else turn.keys() - _FRAME_FIELDS.get(body.type, ())
    if unknown:
        raise _bad(min(unknown)[:64], f"A frame of type {kind} has no such field.")
    target = body.conversation or body.reply or ""
    return ClientFrame(
        kind=body.type,
        request=body.request,
        target=known_name(target) if needs or target else "",
        after=None if body.after is None else cursor(body.after),
        turn=turn,
    )


def draft_ask(frame: ClientFrame) -> DraftAsk:
    """What a `focus` or a `draft` frame says. Without a conversation it is about a new one."""
    text, system = frame.turn.get("text"), frame.turn.get("system")
    if frame.kind == "draft" and not isinstance(text, str):
        raise _bad("text", "A draft has a text.")
    if system is not None and (frame.target or not isinstance(system, str)):
        raise _bad("system", "The system prompt is a text, and a conversation has its own.")
    parent = frame.turn.get("parent")
    return DraftAsk(
        request=frame.request,
        conversation=frame.target or None,
        text=text if isinstance(text, str) else "",
        at_leaf="parent" not in frame.turn,
        parent=None if parent is None else turn_name(parent, "parent"),
        system=system,
    )


def request_of(fields: Mapping[str, object], limits: Limits) -> str | None:
    """What the answer to a frame repeats; None = the frame has none that can be repeated."""
    request = fields.get("request")
    if isinstance(request, str) and len(request) <= limits.request_name_length_max:
        return request
    return None


def _bad(param: str, message: str) -> RequestError:
    return RequestError(message, param=param)
