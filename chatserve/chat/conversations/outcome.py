"""What has become of a reply: the data of its final event, and what the store keeps.

Pure. A reply that was interrupted and taken up ends as if it never had been: its prompt is the
turn's, and all of its tokens are its completion.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from chatserve.chat.conversations.assignment import Assignment
from chatserve.chat.conversations.history import Prompt
from chatserve.chat.store.conversation import ReplyState, Role, Turn
from chatserve.chat.store.session_store import Ending
from chatserve.engine.values import Receipt
from chatserve.errors import ChatserveError, NotFound

TITLE_CHARACTERS_MAX = 60


@dataclass(frozen=True, slots=True)
class Outcome:
    """state: the store's; kind and data: the final event's."""

    state: ReplyState
    kind: str
    data: Mapping[str, object]


def done(
    assignment: Assignment,
    prompt: Prompt | None,
    receipt: Receipt | None,
    *,
    to_first_token: float | None,
    total: float,
) -> Outcome:
    """It has all it should have, or was stopped. prompt None: before it was made."""
    sample = assignment.said
    assert sample.end is not None
    prompt_tokens = 0 if prompt is None else len(prompt.tokens)
    completion = len(sample.token_ids)
    found = receipt or Receipt()
    # Of a reply that was taken up, the engine's prompt is longer: what it had said counts as said.
    device = min(found.device, prompt_tokens)
    host = min(found.host, prompt_tokens - device)
    disk = min(found.disk, prompt_tokens - device - host)
    cached = device + host + disk
    data = {
        "finish_reason": sample.end.finish_reason,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
        "receipt": {
            "device": device,
            "host": host,
            "disk": disk,
            "computed": 0 if receipt is None else prompt_tokens - cached,
            "saved": None if found.saved is None else round(found.saved, 6),
            "miss": None if found.miss is None else found.miss.as_mapping(),
            "left_out": 0 if prompt is None else prompt.left_out,
        },
        "timings": {
            "to_first_token": None if to_first_token is None else round(to_first_token, 6),
            "total": round(total, 6),
        },
    }
    return Outcome(ReplyState.DONE, "done", data)


def failed(error: ChatserveError) -> Outcome:
    """It could not be finished."""
    data = {"code": error.code, "message": error.message, "retry_after": error.retry_after}
    return Outcome(ReplyState.FAILED, "failed", data)


def interrupted(reason: str) -> Outcome:
    """The server ended, and the next one cannot take it up."""
    data = {"code": "interrupted", "message": reason, "retry_after": None}
    return Outcome(ReplyState.INTERRUPTED, "failed", data)


def unkept(outcome: Outcome) -> Outcome:
    """It came to this end, and the store has no place for it any more."""
    error = NotFound("The reply could not be kept: its conversation is gone.")
    data = {**outcome.data, **failed(error).data}
    return Outcome(ReplyState.FAILED, "failed", data)


def ending(
    assignment: Assignment, outcome: Outcome, prompt: Prompt | None, *, encoding: str, now: float
) -> Ending:
    """What the store keeps; the turn's token ids are still to be set."""
    record, text = assignment.record, "".join(assignment.said.texts)
    final = json.dumps(outcome.data).encode()
    turn = None
    if outcome.state is ReplyState.DONE:
        turn = Turn(
            id=record.id,
            parent=record.turn,
            role=Role.ASSISTANT,
            text=text,
            created=now,
            encoding=encoding,
            final=final,
        )
    return Ending(
        reply=record.id,
        epoch=record.epoch,
        state=outcome.state,
        final=final,
        text=text,
        turn=turn,
        prompt_ids=None if prompt is None else prompt.turn_ids,
        encoding=encoding,
        title=title_of(assignment.path[0].text) or None,
        now=now,
    )


def left_out_of(final: bytes | None) -> int | None:
    """How many turns a reply's prompt went without, of the data of its final event; None where
    that does not tell."""
    try:
        data = json.loads(final or b"null")
        found = data["receipt"]["left_out"]
    except (ValueError, TypeError, KeyError):
        return None
    return found if isinstance(found, int) and found >= 0 else None


def title_of(text: str) -> str:
    """A title from a first message: its first line with words, cut at a word."""
    line = " ".join(next((each for each in text.splitlines() if each.strip()), "").split())
    line = "".join(character for character in line if character.isprintable()).strip()
    if len(line) <= TITLE_CHARACTERS_MAX:
        return line
    cut = line[: TITLE_CHARACTERS_MAX - 1]
    head, space, _ = cut.rpartition(" ")
    return (head if space and len(head) > TITLE_CHARACTERS_MAX // 2 else cut) + "…"
