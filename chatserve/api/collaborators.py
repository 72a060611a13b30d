"""What the API floor needs from others, as protocols: they arrive through `build_app`.

Nothing here is implemented; floor 4 and the wiring floor fit these shapes.
"""

from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from chatserve.chat.values import Ask, ReplyEvent


class Viewing(Protocol):
    """One viewer's mailbox of a reply: late viewers find deltas merged, one final event ends it."""

    def __aiter__(self) -> AsyncIterator[ReplyEvent]:
        """The events of the reply, up to its one Done or Failed."""
        ...


class Reply(Protocol):
    """A generation in flight, owned by a task of floor 4."""

    def view(self) -> AbstractContextManager[Viewing]:
        """Look at the reply for as long as the block lasts; leaving the last viewing ends it."""
        ...


class ChatService(Protocol):
    """Where asks go. `open` raises a ChatserveError, or gives a reply that is under way."""

    def check_room(self, tenant: str) -> None:
        """Raise what `open` would for any ask of a tenant now, a full queue above all."""
        ...

    async def open(self, ask: Ask) -> Reply:
        """Accept an ask. Cancelling the call leaves nothing behind."""
        ...


class Health(Protocol):
    """Whether the process is fit to serve. Read at every use, written by the wiring floor."""

    @property
    def ready(self) -> bool:
        """The model is loaded and requests are taken."""
        ...

    @property
    def healthy(self) -> bool:
        """The loop and the engine are alive."""
        ...

    @property
    def draining(self) -> bool:
        """Streams under way are finished, new ones are refused."""
        ...

    @property
    def retry_after(self) -> float:
        """Seconds after which it makes sense to come back."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The one served model. created: seconds since 1970. context_length: in tokens. short_name: may
    be asked for as well."""

    name: str
    created: int
    context_length: int
    owned_by: str = "chatserve"
    short_name: str | None = None
