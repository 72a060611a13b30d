"""The engine over a real model whose decode steps are graphs: same logits as the plain model."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from chatserve.engine.model_runner import ModelRunner
from chatserve.engine.plan import SampleOrder, Slice, StepPlan
from chatserve.engine.values import Sampling
from chatserve.model import load_model
from chatserve.model.graphs import DecodeGraphs
from tests.engine.parity_drive import (
    LOGITS_TOLERANCE,
    Drive,
    compare,
    plain_model,
    random_request,
)
from tests.model.decoding import ReadBack, Reruns
from tests.model.families import VOCABULARY, WINDOW, build
from tests.seeds import drawn_seed

WINDOWS = {"qwen3": (None,), "gemma3": (WINDOW, None)}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(family: str, folder: Path) -> tuple[Path, Any]:
    path = build(family, folder, seed=7)
    model = load_model(path, device="cpu", dtype="float32", page_size=16)
    return path, ReadBack(model, *WINDOWS[family])


@pytest.mark.parametrize(("pages", "depth", "ahead"), [(40, 2, True), (12, 1, False)])
@pytest.mark.parametrize("family", WINDOWS)
def test_logits_and_greedy_tokens_equal_the_plain_model(
    family: str, pages: int, depth: int, ahead: bool, tmp_path: Path
) -> None:
    folder, model = model_of(family, tmp_path)
    seed = drawn_seed()
    dice = random.Random(seed)
    reruns = Reruns()
    drive = Drive(model, pages=pages, seed=seed, depth=depth, graphs=reruns, ahead=ahead)
    for number in range(8):
        drive.submit(random_request(dice, number, VOCABULARY))
        for _ in range(dice.randrange(8)):
            drive.step()
    drive.run()
    # Whatever the dice say: one alone, whose steps are all alike.
    request = random_request(dice, 8, VOCABULARY)
    before = reruns.replayed
    drive.submit(request)
    drive.run()
    assert reruns.replayed - before > request.max_tokens // 2
    oracle = plain_model(folder)
    results = [compare(oracle, item) for item in drive.finished()]
    assert len(results) >= 8
    assert max(error for error, _, _ in results) <= LOGITS_TOLERANCE
    assert sum(different for _, _, different in results) == 0


def test_a_step_is_no_slower_for_what_is_recorded_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does anybody wait for that to hear of the step before."""
    _, model = model_of("qwen3", tmp_path)
    done: list[str] = []
    learn = DecodeGraphs.learn

    def learned(graphs: DecodeGraphs, *given: Any) -> float:
        done.append("learn")
        return learn(graphs, *given) + 1000.0

    monkeypatch.setattr(DecodeGraphs, "learn", learned)
    runner = ModelRunner(model, pages=4, fill=0.0, recorder=Reruns())
    monkeypatch.setattr(runner, "_on_cpu", False)
    order = SampleOrder(1, 1, Sampling(), 0, 1)
    table = torch.tensor([2], dtype=torch.int32).numpy().tobytes()
    plan = StepPlan(1, 0, (), (Slice(1, 1, 0, (4,), None, table, True, (order,)),))
    seconds = [runner.run(plan, lambda: done.append("computing")).seconds for _ in range(2)]
    assert done == ["computing", "learn", "computing"], "the second one is a graph"
    assert seconds[0] == 0.0, "what is left of it"
    assert seconds[1] > 0.0
    runner.close()
