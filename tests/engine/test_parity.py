"""The engine over a real model against the plain model: same logits, same greedy tokens.

Slices, batch mates, cached prefixes, forks, preemption, aborts, one or two steps in flight: all at
random, over pages that were full of NaN.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chatserve.engine.plan import Slice
from chatserve.engine.values import Request, Sampling
from chatserve.model import LoadedModel, load_model
from tests.engine.parity_drive import (
    LOGITS_TOLERANCE,
    Drive,
    answers_are_right,
    compare,
    plain_model,
    random_request,
)
from tests.model.families import FAMILIES, VOCABULARY, build
from tests.seeds import drawn_seed


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(request.param, tmp_path_factory.mktemp("parity"), seed=7)


def load(folder: Path, page_size: int = 16, kv_dtype: str = "auto") -> LoadedModel:
    options = {"device": "cpu", "dtype": "float32", "kv_dtype": kv_dtype}
    return load_model(folder, page_size=page_size, **options)


@pytest.mark.parametrize(
    ("page_size", "pages", "depth", "ahead"),
    [(16, 40, 2, False), (16, 12, 2, True), (8, 24, 1, False), (64, 6, 2, True)],
)
def test_logits_and_greedy_tokens_equal_the_plain_model(
    folder: Path, page_size: int, pages: int, depth: int, ahead: bool
) -> None:
    _are_the_plain_models(folder, page_size, pages, depth, ahead=ahead)


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_pages_of_fp8_give_what_a_model_gives_that_rounds(family: str, tmp_path: Path) -> None:
    _are_the_plain_models(build(family, tmp_path, seed=7), 16, 12, 2, kv_dtype="fp8")


def _are_the_plain_models(
    folder: Path,
    page_size: int,
    pages: int,
    depth: int,
    *,
    ahead: bool = False,
    kv_dtype: str = "auto",
) -> None:
    seed = drawn_seed()
    dice = random.Random(seed)
    model = load(folder, page_size, kv_dtype)
    drive = Drive(model, pages=pages, seed=seed, depth=depth, ahead=ahead)
    groups: list[int] = []
    for number in range(12):
        request = random_request(dice, number, VOCABULARY)
        if number == 0:  # three samples that part in the middle of a page, in every run
            request = replace(request, tokens=tuple(range(10, 43)), samples=3)
            request = replace(request, sampling=Sampling(temperature=0))
        groups.append(drive.submit(request))
        for _ in range(dice.randrange(8)):
            drive.step()
        if dice.random() < 0.15:
            drive.scheduler.abort(dice.choice(groups[1:] or [0]))
    drive.run()
    for number in (12, 13):  # the second finds the first one's pages, in every run
        request = random_request(dice, number, VOCABULARY)
        drive.submit(replace(request, tokens=tuple(range(20, 90)), tenant="ann"))
        drive.run()
    counts = drive.scheduler.statistics()
    cache = drive.scheduler.blocks.statistics()
    assert cache.hit_tokens > 0, "the run was to use the cache"
    assert cache.copies_total > 0, "the run was to copy on write"
    if pages * page_size <= 200:
        assert counts.preemptions_total > 0, "the run was to preempt"
    answers_are_right(drive, plain_model(folder, kv_dtype), kv_dtype)


def test_a_full_hit_computes_one_position_and_writes_nothing(folder: Path) -> None:
    model = load(folder)
    oracle = plain_model(folder)
    for length in (31, 32, 33):
        drive = Drive(model, pages=16, seed=1, depth=1)
        prompt = tuple(random.Random(length).randrange(4, VOCABULARY) for _ in range(length))
        request = greedy(prompt, 50)
        drive.submit(request)
        drive.run()
        drive.submit(request)
        plan = drive.scheduler.plan()
        assert plan is not None
        (item,) = plan.slices
        expected_start = 31 if length == 32 else length - length % 16
        assert isinstance(item, Slice)
        assert (item.start, item.end, item.write) == (expected_start, length, length != 32)
        drive.in_flight.append(drive._run(plan))  # pyright: ignore[reportPrivateUsage]
        drive.run()
        first, second = drive.finished()
        assert first.tokens == second.tokens
        for item in (first, second):
            error, _, different = compare(oracle, item)
            assert error <= LOGITS_TOLERANCE
            assert not different


def test_a_damaged_page_changes_most_greedy_tokens(folder: Path) -> None:
    """The oracle's own test: were pages mixed up, the comparisons above would show it."""
    model = load(folder)
    changed = compared = 0
    for seed in range(24):
        dice = random.Random(seed)
        prompt, other = (
            tuple(dice.randrange(4, VOCABULARY) for _ in range(length)) for length in (20, 16)
        )
        tokens: list[list[int]] = []
        for damage in (False, True):
            drive = Drive(model, pages=16, seed=1, depth=1)
            for asked in (prompt, other):
                drive.submit(greedy(asked, 1))
                drive.run()
            if damage:  # the prompt's first page gets what the other prompt's holds
                mine, foreign = (drive.page_named(drive.names(it)[0]) for it in (prompt, other))
                pool = drive.runner._pool  # pyright: ignore[reportPrivateUsage]
                pool[mine] = pool[foreign]
            drive.submit(greedy(prompt, 1))
            drive.run()
            tokens.append(drive.finished()[2].tokens)
        compared += len(tokens[0])
        changed += sum(a != b for a, b in zip(*tokens, strict=True))
    assert changed >= 0.5 * compared


def greedy(tokens: tuple[int, ...], max_tokens: int, tenant: str = "ann") -> Request:
    return Request(
        request_id="r",
        tokens=tokens,
        max_tokens=max_tokens,
        tenant=tenant,
        sampling=Sampling(temperature=0.0),
    )


def test_another_tenant_shares_nothing(folder: Path) -> None:
    drive = Drive(load(folder), pages=16, seed=1, depth=2)
    prompt = tuple(range(10, 60))
    for tenant, hit in (("ann", 0), ("bob", 0), ("ann", 48)):
        before = drive.scheduler.blocks.statistics().hit_tokens
        drive.submit(greedy(prompt, 2, tenant))
        drive.run()
        assert drive.scheduler.blocks.statistics().hit_tokens - before == hit
