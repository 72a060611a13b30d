"""Drives a real scheduler and a real model through random interleavings, recording logits.

Synchronous: the driver is the event loop and the runner's thread at once, so that a seed gives the
same interleaving each time. The oracle is the plain transformers model, run over each finished
sequence as a whole; it knows nothing of pages.
"""

import random
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from chatserve.cache.block_manager import BlockManager
from chatserve.cache.host_pages import HostPages
from chatserve.engine.model_runner import ModelRunner
from chatserve.engine.pace import Pace
from chatserve.engine.plan import StepPlan, StepResult
from chatserve.engine.runner import StepUnderWay
from chatserve.engine.scheduler import Outcome, Scheduler, SchedulerLimits
from chatserve.engine.sequence import PreparedRequest
from chatserve.engine.traffic import Delivery, Job, move
from chatserve.engine.values import FinishReason, Receipt, Request, Sampling
from chatserve.model import LoadedModel
from chatserve.model.graphs import Recorder
from prefix_store import PageNamer, RootFields, Slab
from tests.model.families import WINDOW
from tests.model.rounded import ROUNDED_EAGER, ROUNDED_TOLERANCE

LOGITS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Bound:
    """error: of a logit; usual: of some answers' logits. margin: below this one between the two
    best, greedy tokens may differ by rounding."""

    error: float
    usual: float
    margin: float


BOUNDS = {
    "auto": Bound(LOGITS_TOLERANCE, LOGITS_TOLERANCE, 1e-3),
    "fp8": Bound(ROUNDED_TOLERANCE, LOGITS_TOLERANCE, 2 * ROUNDED_TOLERANCE),
}


class RecordingModel:
    """A LoadedModel that remembers the logits of its last forward pass."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self.layout = model.layout
        self.device, self.dtype = model.device, model.dtype
        self.parameter_count = model.parameter_count
        self.vocabulary_size = model.vocabulary_size
        self.context_length = model.context_length
        self.logits = torch.empty(0)

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        logits = self._model.forward(*arguments, **options)
        self.logits = logits.clone()
        return logits


@dataclass
class Sampled:
    """What came out for one sample of one request."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    # Logits before each generated token; a token computed twice (preemption) has several.
    logits: dict[int, list[Tensor]] = field(default_factory=dict)


class Drive:
    """Scheduler, runner and results of one run. Fresh pages are full of NaN."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        pages: int,
        seed: int,
        depth: int,
        caching: bool = True,
        depot: Slab | None = None,
        slots: int = 0,
        graphs: Recorder | None = None,
        ahead: bool = False,
    ) -> None:
        """ahead: steps are launched before the one in flight is fetched, as on a GPU. graphs: what
        records decode steps, with a model that can be recorded."""
        size = model.layout.page_size
        self.random = random.Random(seed)
        self.depth = depth
        self.recorder = RecordingModel(model)
        self.runner = ModelRunner(
            self.recorder,  # pyright: ignore
            pages=pages,
            slots=slots,
            fill=float("nan"),
            recorder=graphs,
            sequences=12,
            ahead=ahead,
        )
        if graphs is not None:
            self._listen()
        host = HostPages(slots=slots, below=depot) if slots else None
        self.namer = PageNamer(b"parity-name-key!", page_size=size)
        self.pace = Pace(target_seconds=1e9, tokens_min=4, tokens_max=64)
        self.scheduler = Scheduler(
            lambda: BlockManager(pages=pages, page_size=size, caching=caching, below=host or depot),
            self.namer,
            self.pace,
            limits=SchedulerLimits(
                sequences_max=12,
                queued_max=1000,
                context_length=min(model.context_length, pages * size),
            ),
            clock=lambda: 0.0,
            host=host,
        )
        self.in_flight: deque[StepResult | StepUnderWay] = deque()
        self.results: dict[tuple[int, int], Sampled] = {}
        self.depot = depot
        self.jobs: deque[Job] = deque()
        self.receipts: list[Receipt] = []

    def _listen(self) -> None:
        """A graph's logits are not what a forward pass returned last."""
        logits = self.runner._logits  # pyright: ignore[reportPrivateUsage]

        def noted(*given: Any) -> Tensor:
            result = logits(*given)
            self.recorder.logits = result.clone()
            return result

        vars(self.runner)["_logits"] = noted

    def root(self, tenant: str) -> bytes:
        fields = RootFields(tenant=tenant, cache_salt="", fingerprint=b"f", layout="l")
        return self.namer.root(fields)

    def names(self, tokens: tuple[int, ...], tenant: str = "ann") -> list[bytes]:
        return self.namer.names(self.root(tenant), tokens)

    def page_named(self, name: bytes) -> int | None:
        pages = self.scheduler.blocks._index.pages()  # pyright: ignore[reportPrivateUsage]
        return next((page for page, its in pages.items() if its == name), None)

    def submit(self, request: Request) -> int:
        prepared = PreparedRequest(
            request=request,
            root=self.root(request.tenant),
            names=tuple(self.names(request.tokens, request.tenant)),
            digest=request.request_id.encode(),
        )
        group = self.scheduler.submit(prepared)
        for sample in range(request.samples):
            self.results[group, sample] = Sampled(request)
        return group

    def step(self) -> bool:
        """Plan and run, or commit, or move pages, as the dice say; False when nothing is left."""
        if self.depot is not None:
            tiers = self.scheduler.tiers
            tiers.order_keeps(idle=self.random.random() < 0.5)
            self.jobs += tiers.take_orders()
            if self.jobs and (not self.in_flight or self.random.random() < 0.3):
                self._move(self.jobs.popleft(), self.depot)
                return True
        can_plan = len(self.in_flight) < self.depth
        if can_plan and (not self.in_flight or self.random.random() < 0.7):
            # A ceiling that jumps: slices of any size, at any place.
            self.pace._ceiling = self.random.choice([4, 7, 16, 64])  # pyright: ignore
            plan = self.scheduler.plan()
            self.scheduler.check()
            if plan is not None:
                self.in_flight.append(self._run(plan))
                return True
            if not self.in_flight:
                return False
        step = self.in_flight.popleft()
        for outcome in self.scheduler.commit(step if isinstance(step, StepResult) else step()):
            self._take(outcome)
        self.scheduler.check()
        return True

    def _move(self, job: Job, depot: Slab) -> None:
        count = len(job.pages)
        done = move(job, 0, count, depot, self.runner.host or self.runner)
        self.scheduler.tiers.finish(Delivery(job, tuple(done), 0.0))
        self.scheduler.check()

    def run(self) -> None:
        while self.step() or (self.depot is not None and self._unkept()):
            pass
        assert not self.scheduler.busy

    def _unkept(self) -> bool:
        """Whether pages still wait for their copies; gives the next ones out."""
        self.scheduler.tiers.order_keeps(idle=True)
        self.jobs += self.scheduler.tiers.take_orders()
        return bool(self.jobs)

    def finished(self) -> list[Sampled]:
        return [item for item in self.results.values() if item.finish is not None]

    def _run(self, plan: StepPlan) -> StepResult | StepUnderWay:
        started = self.runner.start(plan)
        row = 0
        for item in plan.slices:
            for order in item.orders:
                sequence = self.scheduler.roster.alive(order.sequence, order.incarnation)
                assert sequence is not None
                sampled = self.results[sequence.group, order.sample]
                index = order.position - sequence.request.prompt_length
                sampled.logits.setdefault(index, []).append(self.recorder.logits[row])
                row += 1
        return started

    def _take(self, outcome: Outcome) -> None:
        emission = outcome.emission
        sampled = self.results[outcome.group, emission.sample]
        sampled.tokens += emission.tokens
        if emission.receipt is not None:
            self.receipts.append(emission.receipt)
        sampled.finish = emission.finish or sampled.finish


def plain_model(folder: Path, kv_dtype: str = "auto") -> PreTrainedModel:
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager" if kv_dtype == "auto" else ROUNDED_EAGER,
    )
    return model.eval()


def answers_are_right(drive: Drive, oracle: PreTrainedModel, kv_dtype: str = "auto") -> None:
    """At least eight of them, and at least fifty greedy tokens."""
    bound = BOUNDS[kv_dtype]
    results = [compare(oracle, item, margin=bound.margin) for item in drive.finished()]
    assert len(results) >= 8
    errors = sorted(error for error, _, _ in results)
    print(f"errors {errors}")
    assert errors[-1] <= bound.error
    # Of fp8 what was once rounded to the other side is in each answer that shares its page.
    assert errors[len(errors) // 4] <= bound.usual
    assert sum(compared for _, compared, _ in results) >= 50
    assert sum(different for _, _, different in results) == 0


@torch.inference_mode()
def compare(
    oracle: PreTrainedModel, sampled: Sampled, *, margin: float = BOUNDS["auto"].margin
) -> tuple[float, int, int]:
    """The largest error of a logit, greedy tokens compared, and those that differ.

    The oracle is forced along the sequence's own tokens, so that one difference within the margin
    does not end the comparison.
    """
    prompt = list(sampled.request.tokens)
    logits = oracle(torch.tensor([prompt + sampled.tokens])).logits[0]
    error, compared, different = 0.0, 0, 0
    for index, token in enumerate(sampled.tokens):
        expected = logits[len(prompt) + index - 1]
        for row in sampled.logits[index]:
            error = max(error, float((row - expected).abs().max()))
        best = expected.topk(2)
        if sampled.request.sampling.temperature == 0 and best.values[0] - best.values[1] > margin:
            compared += 1
            different += token != int(best.indices[0])
    return error, compared, different


def random_request(dice: random.Random, number: int, vocabulary: int, *, stems: int = 3) -> Request:
    """Prompts that share stems of up to three windows, some of them whole pages long."""
    stem = random.Random(dice.randrange(stems))
    shared = [stem.randrange(4, vocabulary) for _ in range(3 * WINDOW)]
    tail = [dice.randrange(4, vocabulary) for _ in range(dice.choice([0, 1, 5, 17]))]
    cut = dice.choice([1, 16, 32, 33, 47, 48, 3 * WINDOW])
    return Request(
        request_id=str(number),
        tokens=tuple(shared[:cut] + tail),
        max_tokens=dice.randrange(50, 60),
        samples=dice.choice([1, 1, 1, 3]),
        sampling=Sampling(temperature=dice.choice([0.0, 0.0, 0.8]), seed=dice.randrange(1 << 40)),
        tenant=dice.choice(["ann", "bob"]),
    )
