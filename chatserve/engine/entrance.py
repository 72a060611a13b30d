"""Entrance: which requests are let in.

It changes nothing but the count of refusals, from which the time to come back is told.
"""

from collections.abc import Callable

from chatserve.engine.planner import SchedulerLimits
from chatserve.engine.refusals import Refusals
from chatserve.engine.roster import Roster
from chatserve.engine.sequence import PreparedRequest
from chatserve.engine.suspects import Suspects
from chatserve.errors import Busy, ContextLengthExceeded, Quarantined, RequestError

OWN_PART = 7


class Entrance:
    """Refuses what can never run, what broke a step before, and more than can wait."""

    def __init__(
        self,
        roster: Roster,
        suspects: Suspects,
        *,
        limits: SchedulerLimits,
        clock: Callable[[], float],
    ) -> None:
        self._roster = roster
        self._suspects = suspects
        self._limits = limits
        self._refusals = Refusals(clock)

    def check(self, prepared: PreparedRequest) -> None:
        """Raise ContextLengthExceeded or RequestError for what can never run, Quarantined for an
        input that broke a step before, Busy for a full queue; else return."""
        request, limits, blocks = prepared.request, self._limits, self._roster.blocks
        self.check_room(request.tenant, samples=min(request.samples, limits.sequences_max))
        assert request.tokens, "a request has at least one token"
        assert request.max_tokens > 0, "a request asks for at least one token"
        assert 0 <= request.answered < len(request.tokens), "there was a prompt before the answer"
        length = len(request.tokens) + request.max_tokens
        if length > limits.context_length:
            raise ContextLengthExceeded(
                f"The context is {limits.context_length} tokens; this request needs {length}: "
                f"{len(request.tokens)} of the prompt and {request.max_tokens} to generate."
            )
        prompt_pages = blocks.pages_for(len(request.tokens) + 1) + request.samples - 1
        if request.samples > limits.sequences_max or prompt_pages > blocks.pool.total:
            raise RequestError(f"n={request.samples} is more than this server can run.", param="n")
        if self._suspects.refuses(prepared.digest):
            raise Quarantined("The same request broke this server before; it is not run again.")

    def check_room(
        self, tenant: str, preparing: int = 0, own_preparing: int = 0, *, samples: int = 1
    ) -> None:
        """Raise Busy for a queue that is full, or of which this tenant has its part; else return.

        A tenant may wait with up to OWN_PART times as many as there are places left (the dynamic
        thresholds of Choudhury and Hahne, ToN'98): alone with seven eighths of the queue, and
        whoever comes after one that fills it still finds places.

        Those for whom there is a seat are not waiting for one, only for the next plan.
        `preparing` requests were let in before and will be submitted: of each, one sample has its
        place (how many it wants is not known yet: `check` looks again).
        """
        places, roster = self._limits.queued_max, self._roster
        waiting = roster.waiting_length + preparing
        seats = max(0, self._limits.sequences_max - roster.seats_taken)
        left = places + seats - waiting
        # Only where even one that waits alone could have too many are its own counted.
        if waiting - seats > OWN_PART * left >= OWN_PART:
            own = roster.waiting_of(tenant) + own_preparing - seats
            if own > OWN_PART * left:
                raise Busy("This key has too many waiting.", retry_after=self._refusals.refuse())
        if waiting < places:
            return
        if waiting < places + seats:
            seated, seats = roster.seated(seats)
            if seats >= preparing + samples or max(0, waiting - seated - seats) < places:
                return
        raise Busy("Too many requests are waiting.", retry_after=self._refusals.refuse())
