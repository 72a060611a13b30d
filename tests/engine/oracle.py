"""What the simulated model must answer, computed from token ids alone: no page, no batch, and none
of the model's own arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from chatserve.engine.plan import SampleOrder
from chatserve.engine.stream import Stream
from chatserve.engine.values import Emission, FinishReason, Receipt, Request
from chatserve.errors import ChatserveError

_MASK = (1 << 64) - 1
_WEIGHTS: list[int] = []  # of positions, from 0 on; as many as were asked for yet


def predict(tokens: Sequence[int], order: SampleOrder, vocabulary: int) -> int:
    """The token that the simulated model says after `tokens`: a hash of them and their positions,
    for a greedy order of nothing else."""
    for position in range(len(_WEIGHTS), len(tokens)):
        mixed = (position + 1) * 0x9E3779B97F4A7C15 & _MASK
        _WEIGHTS.append((mixed ^ mixed >> 31) * 0xBF58476D1CE4E5B9 & _MASK | 1)
    value = sum((token + 1) * weight for token, weight in zip(tokens, _WEIGHTS, strict=False))
    if order.sampling.temperature > 0.0:
        value ^= order.sampling.seed * 0x2545F4914F6CDD1D + order.sample * 0x9E3779B97F4A7C15
    value &= _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    token = (value ^ value >> 31) % vocabulary
    while token in order.banned:
        token = (token + 1) % vocabulary
    return token


@dataclass(frozen=True, slots=True)
class Answer:
    """One sample's tokens and how they end."""

    tokens: tuple[int, ...]
    finish: FinishReason | None


def expected(request: Request, sample: int, vocabulary: int) -> Answer:
    """The whole answer of one sample."""
    tokens = list(request.tokens)
    generated: list[int] = []
    while len(generated) < request.max_tokens:
        banned = tuple(sorted(request.stop_ids)) if len(generated) < request.min_tokens else ()
        order = SampleOrder(0, 0, request.sampling, sample, len(tokens), banned)
        token = predict(tokens, order, vocabulary)
        tokens.append(token)
        generated.append(token)
        if token in request.stop_ids:
            return Answer(tuple(generated), FinishReason.STOP)
    return Answer(tuple(generated), FinishReason.LENGTH)


@dataclass(slots=True)
class Heard:
    """What a consumer heard of one sample. Fails at a second final emission, or one after it."""

    tokens: list[int] = field(default_factory=list[int])
    finish: FinishReason | None = None
    error: ChatserveError | None = None
    receipts: list[Receipt] = field(default_factory=list[Receipt])

    def hear(self, emission: Emission) -> None:
        """One more emission."""
        assert self.finish is None, "an emission after the final one"
        self.tokens += emission.tokens
        self.finish, self.error = emission.finish, emission.error
        if emission.receipt is not None:
            self.receipts.append(emission.receipt)

    @property
    def answer(self) -> Answer:
        """The tokens and the end."""
        return Answer(tuple(self.tokens), self.finish)


async def listen(stream: Stream) -> list[Heard]:
    """Read a stream to its end."""
    heard = [Heard() for _ in range(stream.samples)]
    async for batch in stream:
        for emission in batch:
            heard[emission.sample].hear(emission)
    return heard


def assert_right(request: Request, heard: list[Heard], vocabulary: int) -> None:
    """Every sample ended well, with exactly the tokens of the model."""
    for sample, one in enumerate(heard):
        assert one.error is None, one.error
        want = expected(request, sample, vocabulary)
        assert one.answer == want, (request.request_id, sample, one.answer, want)
        assert len(one.receipts) == 1, "one receipt for each sample"


def assert_prefix(request: Request, heard: Heard, sample: int, vocabulary: int) -> None:
    """Whatever was heard of a sample that did not end well is right as far as it goes."""
    want = expected(request, sample, vocabulary).tokens
    assert tuple(heard.tokens) == want[: len(heard.tokens)], (request.request_id, sample)
