"""Memory that is not to be had in a step, wherever in it: one request ends, or none."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chatserve.engine import model_runner
from chatserve.engine.model_runner import ModelRunner
from chatserve.engine.page_mover import PageMover
from chatserve.engine.plan import Moves, PageMove, StepPlan
from chatserve.engine.runner import DeviceLost, OutOfMemory, StepRunner
from chatserve.engine.values import FinishReason, Request, Sampling
from chatserve.engine.warm_up import largest_step
from chatserve.model import LoadedModel, load_model
from chatserve.model.sampling import SampleRow, Samples, sample
from tests.engine.parity_drive import LOGITS_TOLERANCE, Drive, compare, plain_model
from tests.model.families import VOCABULARY, build

POISON = VOCABULARY - 1  # a token of one prompt alone
GUILTY_SEED = 77


class FakeMemory:
    """A device's memory that only counts how often it was asked to let go."""

    def __init__(self) -> None:
        self.let_go_calls = 0

    def total(self) -> int:
        return 0

    def free(self) -> int:
        return 0

    def reserved(self) -> int:
        return 0

    def begin_peak(self) -> None:
        pass

    def peak(self) -> int:
        return 0

    def let_go(self) -> None:
        self.let_go_calls += 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("memory"), seed=3)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[LoadedModel]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model(folder, device="cpu", dtype="float32", page_size=16)
    torch.set_num_threads(before)


def requests() -> list[Request]:
    dice = random.Random(5)
    prompts = [tuple(dice.randrange(4, POISON) for _ in range(20)) for _ in range(4)]
    prompts.append((*prompts[0], POISON))
    return [
        Request(
            request_id=str(number),
            tokens=prompt,
            max_tokens=8,
            sampling=Sampling(temperature=0.0, seed=GUILTY_SEED if POISON in prompt else number),
        )
        for number, prompt in enumerate(prompts)
    ]


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")


def in_forward(drive: Drive, patch: pytest.MonkeyPatch) -> None:
    forward = drive.recorder.forward

    def failing(tokens: Tensor, *others: Any, **options: Any) -> Tensor:
        if POISON in tokens.tolist():
            out_of_memory()
        return forward(tokens, *others, **options)

    patch.setattr(drive.recorder, "forward", failing)


def in_sampling(drive: Drive, patch: pytest.MonkeyPatch) -> None:
    def failing(logits: Tensor, rows: tuple[SampleRow, ...], *late: Any) -> Samples:
        if any(row.seed == GUILTY_SEED for row in rows):
            out_of_memory()
        return sample(logits, rows, *late)

    patch.setattr(model_runner, "sample", failing)


@pytest.mark.parametrize("where", [in_forward, in_sampling], ids=["forward", "sampling"])
def test_one_request_that_no_memory_is_enough_for_ends_alone(
    where: Callable[[Drive, pytest.MonkeyPatch], None],
    folder: Path,
    model: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drive = Drive(model, pages=40, seed=1, depth=2)
    drive.runner = ModelRunner(drive.recorder, pages=40, fill=torch.nan, memory=FakeMemory())  # pyright: ignore
    steps = StepRunner(drive.runner)
    failures = 0

    def answered(plan: StepPlan) -> Any:
        """As the runner's thread has it: whatever is raised becomes a result."""
        nonlocal failures
        result = steps.run(plan)
        failures += result.failure is not None and not result.failure.void
        return result

    where(drive, monkeypatch)
    groups = [drive.submit(request) for request in requests()]
    _drive(drive, answered)
    oracle = plain_model(folder)
    for group in groups[:-1]:
        result = drive.results[group, 0]
        assert result.finish is FinishReason.LENGTH
        assert compare(oracle, result)[0] <= LOGITS_TOLERANCE
    assert drive.results[groups[-1], 0].finish is FinishReason.ERROR
    assert drive.scheduler.broken is None
    assert failures > 1, "in company, and alone"
    assert drive.runner._memory.let_go_calls == failures, "once for each, before the next step"  # pyright: ignore
    drive.scheduler.check()


def _drive(drive: Drive, answered: Callable[[StepPlan], Any]) -> None:
    """One step after the other; logits are kept of those that gave any."""
    while True:
        plan = drive.scheduler.plan()
        if plan is None:
            assert not drive.scheduler.busy
            return
        result = answered(plan)
        orders = [order for item in plan.slices for order in item.orders]
        if result.failure is None:
            for row, order in enumerate(orders):
                sequence = drive.scheduler.roster.alive(order.sequence, order.incarnation)
                assert sequence is not None
                kept = drive.results[sequence.group, order.sample].logits
                index = order.position - len(sequence.request.tokens)
                kept.setdefault(index, []).append(drive.recorder.logits[row])
        for outcome in drive.scheduler.commit(result):
            drive._take(outcome)  # pyright: ignore[reportPrivateUsage]
        drive.scheduler.check()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), OutOfMemory),
        (MemoryError("17 bytes"), OutOfMemory),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), OutOfMemory),
        # Page-locked memory of the host: what drivers say looks like a device that is gone.
        (torch.AcceleratorError("CUDA error: out of memory"), OutOfMemory),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), OutOfMemory),
        (RuntimeError("Triton Error [CUDA]: out of memory"), OutOfMemory),
        (torch.AcceleratorError("CUDA error: an illegal memory access"), DeviceLost),
        (RuntimeError("shapes do not match"), RuntimeError),
    ],
    ids=lambda value: None if isinstance(value, type) else str(value)[:30],
)
def test_moves_and_whoever_else_runs_out_of_memory_do_not_end_the_server(
    error: Exception, kind: type[Exception], model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = FakeMemory()
    runner = ModelRunner(model, pages=4, slots=2, fill=0.0, memory=memory)
    begin, left = PageMover.begin, [error]

    def failing(mover: PageMover, moves: Moves) -> Any:
        if left:
            raise left.pop()
        return begin(mover, moves)

    monkeypatch.setattr(PageMover, "begin", failing)
    plan = StepPlan(1, 0, (), (), Moves(saves=(PageMove(3, 1),)))
    with pytest.raises(kind):
        runner.run(plan)
    assert memory.let_go_calls == 0, "what was raised holds on to what is to be let go"
    for _ in range(2):
        assert len(runner.run(plan).saved) == 1
    assert memory.let_go_calls == (kind is OutOfMemory)
    runner.close()


@pytest.mark.parametrize(
    ("tokens", "sequences", "context", "counts"),
    [
        (100, 4, 512, [97, 1, 1, 1]),
        (100, 4, 40, [40, 40, 19, 1]),
        (100, 2, 40, [40, 40]),
        (3, 8, 512, [1, 1, 1]),
        (64, 1, 512, [64]),
    ],
)
def test_the_largest_step_has_all_tokens_and_rows_that_fit(
    tokens: int, sequences: int, context: int, counts: list[int], model: LoadedModel
) -> None:
    plan, pages = largest_step(
        tokens=tokens, sequences=sequences, context_length=context, page_size=16
    )
    assert [len(item.tokens) for item in plan.slices] == counts
    assert plan.token_count == sum(counts) <= tokens
    touched = [page for item in plan.slices for page in memoryview(item.pages).cast("i")]
    assert sorted(touched) == list(range(pages)), "no page is two sequences'"
    runner = ModelRunner(model, pages=pages, fill=0.0)
    result = runner.run(plan)
    assert (len(result.tokens), all(result.finite)) == (len(counts), True)
    assert all(result.logprobs)
    runner.close()
