"""Errand: what the exchange has yet to do for one reply, on this connection or the next.

It may not know sockets. Theory of operation: nothing that goes out is queued; what an errand lacks
is read from its phase, so after a lost connection only the phase has to be put back.

    phase     left by
    WANTED    its frame goes out (`send`, or `attach` at the cursor once the reply has an id)
    ASKED     `accepted`, or a refusal: back to WANTED after a wait, or the end
    OPEN      the final event, or a viewing that broke off: back to WANTED
    any       the connection is lost, or the server shows the reply no more: WANTED

A reply that is over here while the server shows it, or is about to, because it was closed or made
no sense, is left there too: `detach` goes out as soon as it has an id.

A `send` that went out and was not answered is in doubt: the server may have kept it. It is
sent again with the same id, which the server knows, until it says what has become of it. What was
certainly not kept, because it never went out or was refused, is given up early.
"""

from dataclasses import dataclass, field
from enum import Enum, auto

from chatserve.client.backoff import Backoff
from chatserve.client.errors import ChatError, Refused
from chatserve.client.limits import ClientLimits
from chatserve.client.reply import Reply
from chatserve.client.wire import JsonObject

_BUSY = 429
_UNAVAILABLE = 503


class Phase(Enum):
    """See the module."""

    WANTED = auto()
    ASKED = auto()
    OPEN = auto()


@dataclass(slots=True, kw_only=True, eq=False)
class Errand:
    """One per reply. opening: the fields of its `send`; empty for one that is attached to.

    Times are the event loop's. trouble_since: since when nothing has come.
    """

    reply: Reply
    opening: JsonObject
    backoff: Backoff
    phase: Phase = Phase.WANTED
    request: str = ""
    stop_request: str = ""  # of the `stop` that went out on this connection
    in_doubt: bool = False
    not_before: float = 0.0
    trouble_since: float | None = field(default=None)

    def next_frame(self, now: float, request: str) -> JsonObject | None:
        """What is to go out now; it counts as gone."""
        reply = self.reply
        if reply.over:
            return self._detach(request)
        if self.not_before > now:
            return None
        if self.phase is Phase.WANTED:
            self.phase, self.request = Phase.ASKED, request
            if reply.id is None:
                return {"type": "send", "request": request, **self.opening}
            after = {} if reply.cursor is None else {"after": str(reply.cursor)}
            return {"type": "attach", "request": request, "reply": reply.id, **after}
        if reply.stop_wanted and self.phase is Phase.OPEN and not self.stop_request:
            assert reply.id is not None, "open without an id"
            self.stop_request = request
            return {"type": "stop", "request": request, "reply": reply.id}
        return None

    def _detach(self, request: str) -> JsonObject | None:
        if not self.is_left or self.reply.id is None:
            return None
        self.not_shown()
        return {"type": "detach", "request": request, "reply": self.reply.id}

    @property
    def is_left(self) -> bool:
        """The server shows it, or is about to, and nobody looks."""
        return self.reply.over and self.phase is not Phase.WANTED

    def not_shown(self) -> None:
        """The server shows it no more, or will not."""
        self.phase = Phase.WANTED

    def opened(self) -> None:
        """The server shows the reply."""
        self.phase = Phase.OPEN
        self.trouble_since = None

    def heard(self) -> None:
        """Something of the reply has come."""
        self.backoff.reset()

    def lost(self, reason: str, now: float) -> None:
        """The connection has gone."""
        if self.phase is Phase.ASKED:
            self.in_doubt = True
        self._again(reason, now)

    def stop_refused(self, refusal: Refused, now: float) -> None:
        """Ask once more, if that can make sense; else the reply's end tells."""
        if refusal.status in (_BUSY, _UNAVAILABLE):
            self.stop_request = ""
            self.not_before = now + self.backoff.next()

    def refused(self, refusal: Refused, now: float, limits: ClientLimits) -> None:
        """The server does not show it: end, or come back later."""
        definite = refusal.status == _BUSY and not self._pursued
        transient = refusal.status in (_BUSY, _UNAVAILABLE) and not definite
        if transient and refusal.status == _UNAVAILABLE:
            self.in_doubt = True  # its store may have kept what it could not answer for
        if not transient:
            self.not_shown()
            self.reply.fail(refusal)
            return
        self._again(refusal.message, now)
        asked = min(refusal.retry_after or 0.0, limits.retry_after_seconds_max)
        self.not_before = now + max(self.backoff.next(), asked)
        self.give_up(refusal, now, limits)

    def _again(self, reason: str, now: float) -> None:
        self.phase = Phase.WANTED
        self.stop_request = ""
        if self.trouble_since is None:
            self.trouble_since = now
        self.reply.wait_for(reason)

    @property
    def _pursued(self) -> bool:
        """The server keeps it, or may do."""
        return self.reply.id is not None or self.in_doubt

    def patience_ends(self, limits: ClientLimits) -> float:
        """When it is given up."""
        assert self.trouble_since is not None, "nothing is wrong"
        patience = limits.outage_seconds_max if self._pursued else limits.unsent_seconds_max
        return self.trouble_since + patience

    def give_up(self, error: ChatError, now: float, limits: ClientLimits) -> None:
        """End it with this error if it has had its time."""
        if self.trouble_since is None:
            self.trouble_since = now
        if now >= self.patience_ends(limits):
            self.reply.fail(error)
