"""What clients were told of their chats, and whether a conversation as it is kept agrees with it.

Pure. `Chat` is the client's side: its asks in order, each with what was seen of its reply. The
other side is the JSON of `GET /api/conversations/{id}`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.wiring.chat_client import ReplyView
from tests.wiring.server import ENDLESS


@dataclass(frozen=True)
class Line:
    """One ask of a script. content None: the reply to the line before is made again."""

    content: str | None
    max_tokens: int = 64
    ignore_eos: bool = False

    def turn(self, parent: str | None) -> dict[str, object]:
        body: dict[str, object] = {"max_tokens": self.max_tokens} | (
            ENDLESS if self.ignore_eos else {}
        )
        if self.content is None:
            return body | {"parent": parent}
        return body | {"content": self.content}


@dataclass(frozen=True)
class Answer:
    """What an undisturbed server says to a line."""

    text: str
    finish_reason: str
    tokens: tuple[int, int]


@dataclass
class Chat:
    """One conversation, and what its client was told of it: asks in order, with their lines."""

    conversation: str
    script: int
    asked: list[tuple[Line, ReplyView]] = field(default_factory=list)


def answer_of(view: ReplyView) -> Answer:
    """What a reply that has ended came to."""
    assert view.kind == "done", view.final
    assert view.final is not None
    usage = view.final["usage"]
    tokens = (usage["prompt_tokens"], usage["completion_tokens"])
    return Answer(view.text, view.final["finish_reason"], tokens)


def check_promised(whole: Mapping[str, Any], line: Line, view: ReplyView, *, ended: bool) -> None:
    """An acknowledged turn is there once, and its reply: ended, or running. ended: its client had
    been told so before this was asked for."""
    turns = [turn for turn in whole["turns"] if turn["id"] == view.turn]
    assert [turn["role"] for turn in turns] == ["user"], f"turn {view.turn} is lost or doubled"
    if line.content is not None:
        assert view.turn == view.ask
        assert turns[0]["content"] == line.content
    kept = [turn for turn in whole["turns"] if turn["id"] == view.reply]
    running = [each for each in whole["replies"] if each["id"] == view.reply]
    assert [each["state"] for each in running] == ["running"] * len(running), running
    assert len(kept) + len(running) == 1, f"reply {view.reply}: {kept} {running}"
    assert kept or not ended, "a final event was told, and the reply runs"


def check_nothing_doubled(whole: Mapping[str, Any], chat: Chat) -> None:
    """No turn that was not asked for, and no more replies than asks."""
    asks = {view.ask for line, view in chat.asked if line.content is not None}
    users = [turn["id"] for turn in whole["turns"] if turn["role"] == "user"]
    assert len(set(users)) == len(users)
    assert set(users) <= asks
    replies = [turn["id"] for turn in whole["turns"] if turn["role"] == "assistant"]
    replies += [each["id"] for each in whole["replies"]]
    assert len(set(replies)) == len(replies)
    assert len(replies) <= len(chat.asked), "a retry has made a second reply"


def check_told(whole: Mapping[str, Any], chat: Chat) -> None:
    """The tree of a chat whose replies have all ended."""
    assert whole["replies"] == [], json.dumps(whole["replies"])
    told: list[tuple[object, ...]] = []
    leaf = None
    for line, view in chat.asked:
        if line.content is not None:
            told.append((view.ask, leaf, "user", line.content, None))
        told.append((view.reply, view.turn, "assistant", view.text, view.final))
        leaf = view.reply
    fields = ("id", "parent", "role", "content", "final")
    kept = [tuple(turn.get(name) for name in fields) for turn in whole["turns"]]
    assert sorted(kept, key=str) == sorted(told, key=str)
    assert whole["leaf"] == leaf
