"""Audience: who looks at a reply, and for how long it goes on when nobody does.

It may not know what is looked at. One timer at most is set at any time:

    unviewed   before_first_view seconds       left by the first viewing
    viewed     no timer                        left by the last viewing that goes
    left       after_last_view seconds         left by the next viewing
    closed     no timer, and none any more

When a timer rings, `on_abandoned` is called, which ends the reply.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

ViewingT = TypeVar("ViewingT")


class Timer(Protocol):
    """A call that is due later."""

    def cancel(self) -> None: ...


CallLater = Callable[[float, Callable[[], None]], Timer]


@dataclass(frozen=True, slots=True)
class Clock:
    """Monotonic seconds, and calls at a later time. The loop's own, or a test's."""

    now: Callable[[], float]
    call_later: CallLater

    async def sleep(self, seconds: float) -> None:
        """Wait by this clock."""
        over = asyncio.Event()
        timer = self.call_later(seconds, over.set)
        try:
            await over.wait()
        finally:
            timer.cancel()


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Seconds for which a reply goes on without anybody looking. after_last_view: 0 ends it at
    once."""

    before_first_view: float
    after_last_view: float


class Audience(Generic[ViewingT]):
    """The viewings of one reply."""

    def __init__(self, clock: Clock, patience: Patience, on_abandoned: Callable[[], None]) -> None:
        self.viewings: set[ViewingT] = set()
        self._clock = clock
        self._patience = patience
        self._on_abandoned = on_abandoned
        self._closed = False
        self._timer: Timer | None = clock.call_later(patience.before_first_view, on_abandoned)

    def join(self, viewing: ViewingT) -> None:
        """Somebody looks."""
        self.rest()
        self.viewings.add(viewing)

    def leave(self, viewing: ViewingT) -> None:
        """Somebody looks away. Idempotent."""
        if viewing not in self.viewings:
            return
        self.viewings.discard(viewing)
        if self.viewings or self._closed:
            return
        if self._patience.after_last_view > 0:
            self._timer = self._clock.call_later(self._patience.after_last_view, self._on_abandoned)
        else:
            self._on_abandoned()

    def rest(self) -> None:
        """Nobody need be waited for, until the last viewing goes."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """The reply has ended: it waits for nobody any more."""
        self._closed = True
        self.rest()
