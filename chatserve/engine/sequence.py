"""Sequence: one line of tokens in flight, and the prepared request that it came from.

A sequence has *known* and *computed* tokens; there is no prefill and no decode. The scheduler is
its only writer, on the event loop.

    tokens      known ids: the prompt, then what was generated and committed
    pending     (step, output row) of a token that a step in flight will give, if any
    planned     positions 0..planned are computed, or ordered in a step in flight
    computed    positions 0..computed are committed
    emitted     generated tokens that were handed to the consumer
    counts      of the first of its tokens, for penalties; None where none were counted
    loads       how often pages were brought up from below for it; loaded: which (their indices),
                and whether from host memory
    incarnation grows when the sequence loses its pages or ends, so that a result for an older
                life is told from a current one
"""

from array import array
from dataclasses import dataclass, field
from enum import Enum

from chatserve.cache.page_table import PageTable
from chatserve.cache.prefix_index import Namespace
from chatserve.engine.token_counts import TokenCounts
from chatserve.engine.values import Emission, FinishReason, Receipt, Request, TokenLogprobs
from chatserve.errors import ChatserveError
from prefix_store.names import PageName, PublicNames, Root


class Life(Enum):
    """Where a sequence is. QUEUED ⇄ FOLLOWING, QUEUED → RUNNING → QUEUED, any → ENDED; from
    RUNNING by way of RETIRED while a step in flight computes it."""

    QUEUED = "queued"  # in the waiting queue, or held back as a suspect
    FOLLOWING = "following"  # waits for a leader's pages
    RUNNING = "running"  # holds pages
    RETIRED = "retired"  # nobody wants its tokens; what a step in flight computes is still named
    ENDED = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRequest:
    """A request with its page names. Made in any thread (`Engine.prepare`), used on the loop.

    public: the public names by which it was named and by which its line is named on, None where it
    shares nothing with other tenants.
    """

    request: Request
    root: Root
    names: tuple[PageName, ...]
    digest: bytes
    public: PublicNames | None = None

    @property
    def space(self) -> Namespace:
        """Whose pages it finds, those of public prompts apart."""
        return Namespace(self.request.tenant, self.root)

    @property
    def public_pages(self) -> int:
        """How many of the first names are public."""
        registered = frozenset[PageName]() if self.public is None else self.public.names
        return sum(name in registered for name in self.names)


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """Mutable state of one sample of one request."""

    id: int
    group: int
    prepared: PreparedRequest
    sample: int
    arrival: int
    arrived_at: float  # seconds, monotonic
    tokens: "array[int]"
    names: list[PageName]
    unforked: tuple[int, ...] = ()
    table: PageTable = field(default_factory=PageTable)
    life: Life = Life.QUEUED
    pending: tuple[int, int] | None = None
    planned: int = 0
    computed: int = 0
    incarnation: int = 0
    suppress_write: bool = False
    last_step: int = 0
    admission: int = 0
    priority: int = 0
    probation_until: int = 0
    faults: int = 0
    loads: int = 0
    loaded: dict[int, bool] = field(default_factory=dict[int, bool])
    loading_seconds: float = 0.0
    receipt: Receipt | None = None
    receipt_sent: bool = False
    emitted: int = 0
    counts: TokenCounts | None = None

    @property
    def request(self) -> Request:
        """What was asked."""
        return self.prepared.request

    @property
    def known(self) -> int:
        """Tokens that are known, or will be when the step in flight commits."""
        return len(self.tokens) + (self.pending is not None)

    @property
    def generated(self) -> int:
        """Committed tokens after the prompt."""
        return len(self.tokens) - len(self.request.tokens)

    @property
    def todo(self) -> int:
        """Positions that can be ordered now; 0 too where all tokens that it may generate are
        generated or on their way."""
        # Asked of every running sequence at every step, so without the other properties.
        known = len(self.tokens) + (self.pending is not None)
        request = self.prepared.request
        if known - len(request.tokens) >= request.max_tokens:
            return 0
        return known - self.planned

    def counted(self) -> TokenCounts:
        """Of all known tokens, kept from one time to the next. To be asked where a step is planned:
        all that are known then were emitted, and those nobody takes back."""
        if self.counts is None:
            self.counts = TokenCounts.of(self.tokens, self.request.prompt_length)
        for token in self.tokens[self.counts.length :]:
            self.counts = self.counts.with_one(token)
        return self.counts

    def emit(
        self,
        tokens: tuple[int, ...],
        logprobs: TokenLogprobs | None,
        *,
        finish: FinishReason | None = None,
        error: ChatserveError | None = None,
    ) -> Emission:
        """What the consumer gets now, booked as emitted; the first time with the receipt."""
        receipt = None if self.receipt_sent else self.receipt
        self.receipt_sent = True
        self.emitted += len(tokens)
        return Emission(
            sample=self.sample,
            tokens=tokens,
            logprobs=() if logprobs is None else (logprobs,),
            finish=finish,
            error=error,
            receipt=receipt,
        )
