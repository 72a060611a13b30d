"""Wire shapes of a chat's events: one serialization per frame, for SSE and for the socket.

It may not know connections. Theory of operation: an event becomes its name, its id where it has a
cursor, and the object of its data. SSE puts name and id into lines of their own; a socket's frame
is the same object with `event`, `id`, `conversation` and `reply` beside its fields. Long texts
are cut into several events (`pieces`), each with the cursor of its own end, so that no frame is
large and a viewer can come back at any of them. `tokens` is there where they are counted.
"""

from collections.abc import Iterator

import orjson

from chatserve.api import sse
from chatserve.api.wire import JsonObject
from chatserve.chat.conversations.reply_events import (
    ChatEvent,
    ConversationChanged,
    ReplyAccepted,
    ReplyDelta,
    ReplyFinal,
    ReplyProgress,
    ReplySnapshot,
)
from chatserve.chat.store.conversation import ReplyCursor
from chatserve.errors import ChatserveError


def pieces(event: ChatEvent, text_max: int) -> Iterator[ChatEvent]:
    """The event, or several that mean the same, each with at most `text_max` code points."""
    if not isinstance(event, ReplyDelta | ReplySnapshot) or len(event.text) <= text_max:
        yield event
        return
    epoch, begin = event.cursor.epoch, event.cursor.seq - len(event.text)
    for place in range(0, len(event.text), text_max):
        text = event.text[place : place + text_max]
        cursor = ReplyCursor(epoch, begin + place + len(text))
        # What follows the first part of a snapshot is an ordinary delta.
        kind = ReplyDelta if place else type(event)
        yield kind(cursor=cursor, text=text, tokens=event.tokens)


def shape(event: ChatEvent) -> tuple[str, ReplyCursor | None, JsonObject]:
    """Name, cursor and data."""
    match event:
        case ReplyAccepted():
            return (
                "accepted",
                None,
                {
                    "conversation": event.conversation,
                    "turn": event.turn,
                    "reply": event.reply,
                },
            )
        case ReplyProgress():
            return (
                "progress",
                None,
                {
                    "queued": event.queued,
                    "prompt_tokens": event.prompt_tokens,
                    "computed": event.computed,
                },
            )
        case ReplyDelta():
            return "delta", event.cursor, _said(event)
        case ReplySnapshot():
            return "snapshot", event.cursor, _said(event)
        case ReplyFinal():
            assert event.kind in ("done", "failed"), event.kind
            return event.kind, event.cursor, dict(event.data)


def _said(event: ReplyDelta | ReplySnapshot) -> JsonObject:
    data: JsonObject = {"seq": event.cursor.seq, "text": event.text}
    return data if event.tokens is None else data | {"tokens": event.tokens}


def sse_frame(event: ChatEvent) -> bytes:
    """An SSE event; its name and id hold no text, so they cannot break a line."""
    name, cursor, data = shape(event)
    head = f"event: {name}\n" if cursor is None else f"event: {name}\nid: {cursor}\n"
    return head.encode("ascii") + sse.frame(data)


def socket_frame(
    event: ChatEvent, *, conversation: str, reply: str, request: str | None = None
) -> str:
    """A socket's frame. request: of the frame that this answers; only `accepted` repeats it."""
    name, cursor, data = shape(event)
    frame: JsonObject = {"event": name}
    if cursor is not None:
        frame["id"] = str(cursor)
    if request is not None and isinstance(event, ReplyAccepted):
        frame["request"] = request
    return _text(data | frame | {"conversation": conversation, "reply": reply})


def failed_frame(error: ChatserveError, *, request: str | None, reply: str | None = None) -> str:
    """The answer to a frame that cannot be met, or word that a viewing broke off.

    It has no id: it is no event of a reply, whatever becomes of that.
    """
    frame: JsonObject = {
        "event": "failed",
        "request": request,
        "code": error.code,
        "message": error.message,
        "param": error.param,
        "retry_after": error.retry_after,
    }
    return _text(frame if reply is None else frame | {"reply": reply})


def ended_frame(accepted: ReplyAccepted, request: str) -> str:
    """The answer to an `attach` at the final event: there is nothing left to see."""
    _, _, data = shape(accepted)
    return _text(data | {"event": "accepted", "request": request, "ended": True})


def detached_frame(reply: str, request: str) -> str:
    """The answer to a `detach`: no event of the reply comes after it."""
    return _text({"event": "detached", "request": request, "reply": reply})


def pong_frame(request: str) -> str:
    """The answer to a `ping`."""
    return _text({"event": "pong", "request": request})


def changed_frame(change: ConversationChanged) -> str:
    """Word of a conversation's new revision; null = it is gone."""
    return _text(
        {
            "event": "changed",
            "conversation": change.conversation,
            "revision": change.revision,
        }
    )


def _text(frame: JsonObject) -> str:
    return orjson.dumps(frame).decode()
