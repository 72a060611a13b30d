"""The frozen values that cross the engine's doors: requests in, emissions out.

Nothing here knows text (floor 4) or tensors (`batch.py`, `model_runner.py`, `page_mover.py`).
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from chatserve.cache.misses import Miss
from chatserve.errors import ChatserveError

LOCAL_TENANT = "local"


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"  # a stop id was sampled, or the text floor found a stop string
    LENGTH = "length"  # max_tokens, or the end of the context
    ABORT = "abort"  # the asker left
    ERROR = "error"  # see Emission.error


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Every field is in range when it gets here.

    temperature 0 means greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 mean off.
    The noise is a function of (seed, sample index, absolute position) alone, so a token does not
    depend on its batch mates, on preemption, or on how the prompt was sliced.
    top_logprobs: None = no logprobs; k = the chosen token's and the k best ones'.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    top_logprobs: int | None = None

    @property
    def counts_tokens(self) -> bool:
        """Whether the tokens so far change the logits."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked, in tokens.

    tokens: the prompt's ids, at least one. max_tokens 0: a draft, of which only the full pages are
    wanted. stop_ids: ids that end a sequence (the id itself is
    emitted, so that a chat can keep it). min_tokens: stop ids are banned before that many.
    answered: how many of the last tokens were generated before, when the same request was cut
    off: penalties and min_tokens count those as generated, max_tokens does not.
    priority: smaller is earlier (vLLM's meaning); whoever takes requests in bounds it, since
    waiting makes up for so much per second only. cache_salt narrows sharing within the tenant.
    """

    request_id: str
    tokens: tuple[int, ...]
    max_tokens: int
    tenant: str = LOCAL_TENANT
    cache_salt: str = ""
    samples: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    answered: int = 0
    priority: int = 0

    @property
    def prompt_length(self) -> int:
        """How many of the first tokens were not generated."""
        return len(self.tokens) - self.answered


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities for one generated token.

    top: (token id, logprob) pairs, best first, as many as were asked for.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Where a request's prompt tokens came from. device + host + disk + computed = the prompt's
    length.

    For a full hit the one recomputed position counts as computed. saved: seconds that computing
    what was found would have taken, by what was measured lately or else by a trial at the start,
    less those that loading it took; None where there was neither. miss: why the first whole page
    that was not found was not; None where all were.
    """

    device: int = 0
    host: int = 0
    disk: int = 0
    computed: int = 0
    saved: float | None = None
    miss: Miss | None = None

    @property
    def cached(self) -> int:
        """Prompt tokens that were not computed again."""
        return self.device + self.host + self.disk


class Emission(NamedTuple):
    """New tokens of one sample, merged over as many steps as the consumer was late.

    `finish` is set in exactly one emission of a sample, its last. logprobs is empty, or as long
    as tokens. `receipt` comes with a sample's first emission.
    """

    sample: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    error: ChatserveError | None = None
    receipt: Receipt | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a request is, for its asker: requests ahead of it, and prompt tokens computed."""

    queued: int
    prompt_tokens: int
    computed: int


@dataclass(frozen=True, slots=True)
class Flushed:
    """Pages that were forgotten at once because somebody wished it."""

    device: int = 0
    host: int = 0
