"""Thousands of greedy answers from a pool that is always full equal those without any cache."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chatserve.engine.values import Sampling
from chatserve.model import load_model
from tests.engine.parity_drive import (
    LOGITS_TOLERANCE,
    Drive,
    compare,
    plain_model,
    random_request,
)
from tests.model.families import VOCABULARY, build
from tests.seeds import drawn_seed

ANSWERS = 3000


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.soak
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_greedy_answers_from_a_full_pool_equal_the_plain_model(family: str, tmp_path: Path) -> None:
    seed = drawn_seed()
    dice = random.Random(seed)
    folder = build(family, tmp_path, seed=seed % 1000)
    model = load_model(folder, device="cpu", dtype="float32", page_size=16)
    oracle = plain_model(folder)
    drive = Drive(model, pages=24, seed=seed, depth=2)
    answers = compared = 0
    for number in range(ANSWERS // 3):
        request = random_request(dice, number, VOCABULARY, stems=8)
        sampling = Sampling(temperature=0.0)
        drive.submit(replace(request, max_tokens=dice.randrange(1, 64), sampling=sampling))
        while len(drive.scheduler.roster) > 10 and drive.step():
            pass
        if number % 50 == 49:
            drive.run()
            for sampled in drive.finished():
                error, count, different = compare(oracle, sampled)
                assert error <= LOGITS_TOLERANCE
                assert different == 0
                answers += 1
                compared += count
            drive.results.clear()
    counts, cache = drive.scheduler.statistics(), drive.scheduler.blocks.statistics()
    print(f"{answers} answers, {compared} tokens, {counts.preemptions_total} preemptions, {cache}")
    assert answers >= ANSWERS // 3
    assert counts.preemptions_total > 0
    assert cache.evicted_for_space_total > 0
    assert cache.hit_tokens > 0
