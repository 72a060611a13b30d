"""The first steps compile what later ones launch: over Triton's kernels on a GPU, else in its
interpreter, which tells as well with what constants a kernel is launched."""

import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from chatserve.cache.block_manager import PageCopy
from chatserve.engine.model_runner import ModelRunner
from chatserve.engine.plan import SampleOrder, Slice, StepPlan
from chatserve.engine.token_counts import TokenCounts
from chatserve.engine.values import Sampling
from chatserve.engine.warm_up import first_steps, run_first_steps
from chatserve.model import load_model
from chatserve_kernels import gpu
from tests.model.families import build

DEVICE = "cpu" if gpu.interpreted() else "cuda"
PAGE, PAGES = 8, 48
WAYS = (
    Sampling(temperature=0.0),
    Sampling(temperature=0.7),
    Sampling(temperature=0.7, top_k=5),
    Sampling(temperature=0.7, top_p=0.5, repetition_penalty=1.3),
    Sampling(temperature=0.0, presence_penalty=0.5, top_logprobs=3),
)


def test_what_later_steps_launch_the_first_ones_have_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = set[tuple[str, frozenset[tuple[str, Any]]]]()
    launched = gpu.launched

    def seen(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            launches.add((kernel.fn.__name__, frozenset(constants.items())))
            launched(kernel, grid)(*args, **constants)

        return launch

    monkeypatch.setattr(gpu, "launched", seen)
    folder = build("llama", tmp_path, layers=1)
    model = load_model(folder, device=DEVICE, dtype="bfloat16", page_size=PAGE)
    runner = ModelRunner(model, pages=PAGES, slots=2, fill=0.0, ahead=True)
    run_first_steps(runner, tokens=512, context_length=512, pages=PAGES, page_size=PAGE, slots=2)
    before = set(launches)
    heights = {dict(constants).get("HEIGHT") for name, constants in before if name == "attend"}
    assert len(heights) >= 3, heights
    kernels = {name for name, _ in before}
    assert {"attend", "join", "rotate", "append", "copy", "weighted_sum", "choose"} <= kernels
    assert {"adjust", "count_late"} <= kernels
    for plan in later_steps():
        runner.run(plan)
    runner.close()
    assert launches == before


def later_steps() -> list[StepPlan]:
    """Prompts of many lengths alone and together, decoding, and rows that share."""
    prompts = [step([(0, length, range(38))]) for length in (1, 2, 5, 9, 17, 33, 130, 300)]
    mixed = [step([(0, 90, range(12)), (0, 3, range(12, 14)), (40, 1, range(14, 20))])]
    apart = [step([(20 + row, 1, range(4 * row, 4 * row + 4)) for row in range(count)])
             for count in (1, 2, 7)]  # fmt: skip
    shared = [
        step([(100 + row, 1, (*range(12), 12 + 2 * row, 13 + 2 * row)) for row in range(count)])
        for count in (2, 3, 9)
    ]
    rows = shared[-1].slices
    written_before = [
        StepPlan(0, 0, (), tuple(each._replace(write=index > 0) for index, each in enumerate(some)))
        for some in (rows[:1], rows[:2], rows[:9])
    ]
    copied = [
        StepPlan(0, 0, tuple(PageCopy(0, 30 + each) for each in range(count)), rows[:2])
        for count in (1, 2, 3, 7)
    ]
    return [*prompts, *mixed, *apart, *shared, *written_before, *copied]


def step(rows: Sequence[tuple[int, int, Sequence[int]]]) -> StepPlan:
    """rows: where each begins, how many tokens it has, and its pages."""
    slices: list[Slice] = []
    for number, (start, count, pages) in enumerate(rows):
        end = start + count
        way = WAYS[(number + count) % len(WAYS)]
        counts = TokenCounts.of(array.array("i", [3] * end), 1)
        order = SampleOrder(number, 0, way, sample=0, position=end, counts=counts)
        table = array.array("i", pages).tobytes()
        tokens = tuple(1 + each % 50 for each in range(count))
        slices.append(Slice(number, 0, start, tokens, None, table, write=True, orders=(order,)))
    return StepPlan(0, 0, (), tuple(slices))


def test_what_finds_no_room_is_left_out() -> None:
    def pages_of(plans: Sequence[StepPlan]) -> set[int]:
        return {
            page
            for plan in plans
            for item in plan.slices
            for page in memoryview(item.pages).cast("i")
        } | {copy.target for plan in plans for copy in plan.copies}

    def steps(tokens: int = 512, context: int = 512, pages: int = 99) -> list[StepPlan]:
        return list(
            first_steps(tokens=tokens, context_length=context, pages=pages, page_size=PAGE, slots=0)
        )

    for pages in (1, 3, 17, 18, 19, 30):
        plans = steps(pages=pages)
        assert pages_of(plans) <= set(range(pages))
        assert any(len(plan.slices) == 2 for plan in plans) == (pages >= 18)
        assert max(len(plan.copies) for plan in plans) == {19: 1, 30: 8}.get(pages, 0)
    assert max(plan.token_count for plan in steps(tokens=30)) == 16
    assert max(item.end for plan in steps(context=20) for item in plan.slices) == 16
    assert all(not plan.moves.saves for plan in steps())
