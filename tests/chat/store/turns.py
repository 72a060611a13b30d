"""Turns, endings and log entries to fill a store with."""

from chatserve.chat.store.conversation import (
    Conversation,
    LogEntry,
    ReplyCursor,
    ReplyState,
    Role,
    Turn,
)
from chatserve.chat.store.session_store import Accepted, Ending, NewTurn, SessionStore

OWNER, OTHER = "owner", "other"


def conversation(identity: str = "c", *, owner: str = OWNER, updated: float = 1.0) -> Conversation:
    return Conversation(id=identity, owner=owner, title="", created=1.0, updated=updated)


def new_turn(
    ask: str,
    *,
    content: str | None = "hello",
    at_leaf: bool = True,
    parent: str | None = None,
    digest: bytes = b"\x00digest",
    reply: str | None = None,
    of: str = "c",
    now: float = 10.0,
) -> NewTurn:
    return NewTurn(
        conversation=of,
        owner=OWNER,
        ask=ask,
        digest=digest,
        content=content,
        at_leaf=at_leaf,
        parent=parent,
        reply=reply or f"{of}.{ask}",
        request=b'{"seed": 1}',
        now=now,
    )


def ending(
    accepted: Accepted,
    text: str | None = "answer",
    *,
    state: ReplyState = ReplyState.DONE,
    now: float = 20.0,
    title: str | None = "A title",
    prompt_ids: tuple[int, ...] | None = (1, 2, 3),
) -> Ending:
    record = accepted.record
    turn = Turn(
        id=record.id,
        parent=record.turn,
        role=Role.ASSISTANT,
        text=text or "",
        created=now,
        token_ids=(4, 1 << 31, 0),
        encoding="model",
        final=b'{"finish_reason": "stop"}',
    )
    return Ending(
        reply=record.id,
        epoch=record.epoch,
        state=state,
        final=b'{"finish_reason": "stop"}',
        text=text or "",
        turn=None if text is None else turn,
        prompt_ids=prompt_ids,
        encoding="model",
        title=title,
        now=now,
    )


def entry(reply: str, seq: int, text: str, *, epoch: int = 1) -> LogEntry:
    return LogEntry(reply=reply, cursor=ReplyCursor(epoch, seq), text=text, token_ids=(7,))


async def exchange(store: SessionStore, ask: str, text: str = "answer", **where: object) -> str:
    """A turn and its answer; the answer's id."""
    accepted = await store.accept(new_turn(ask, **where))  # type: ignore[arg-type]
    await store.end(ending(accepted, text))
    return accepted.record.id
