"""Pages that were on disk against the plain model: same logits, same greedy tokens.

A real model, a real page store, a pool so small that pages go down and come back all the time,
straight or by way of host memory;
then the same prompts after the store was closed and opened again, and after a kill, whose files are
those of a moment at which nobody had finished anything.
"""

import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chatserve.engine.values import Sampling
from chatserve.model import LoadedModel
from prefix_store import MasterSecret, PageShape, PageStore, Slab
from tests.engine.parity_drive import Drive, answers_are_right, plain_model, random_request
from tests.engine.test_parity import load
from tests.model.families import VOCABULARY, build
from tests.seeds import drawn_seed

SECRET = MasterSecret(b"a secret of thirty-two bytes ...")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["gpt2", "llama", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(request.param, tmp_path_factory.mktemp("tiers"), seed=11)


def _opened(place: Path, model: LoadedModel) -> tuple[PageStore, Slab]:
    store = PageStore.open(place, SECRET, capacity_bytes=256 << 20)
    shape = PageShape(
        fingerprint=model.fingerprint(),
        page_bytes=model.layout.page_bytes,
        page_tokens=model.layout.page_size,
    )
    return store, store.slab(shape)


@pytest.mark.parametrize("slots", [0, 40], ids=["disk", "host"])
@pytest.mark.parametrize(("page_size", "pages"), [(8, 28), (16, 14), (64, 7)])
def test_what_comes_from_below_is_what_the_plain_model_computes(
    folder: Path, tmp_path: Path, page_size: int, pages: int, slots: int
) -> None:
    _what_comes_is_right(folder, tmp_path, page_size, pages, slots)


def test_what_comes_from_below_is_right_in_pages_of_fp8(tmp_path: Path) -> None:
    folder = build("qwen3", tmp_path, seed=11)
    _what_comes_is_right(folder, tmp_path, 16, 14, 40, "fp8")


def _what_comes_is_right(
    folder: Path, tmp_path: Path, page_size: int, pages: int, slots: int, kv_dtype: str = "auto"
) -> None:
    seed = drawn_seed()
    model, oracle = load(folder, page_size, kv_dtype), plain_model(folder, kv_dtype)
    living, killed = tmp_path / "living", tmp_path / "killed"
    store, slab = _opened(living, model)
    first = _drive(model, pages, seed, slab, slots)
    shutil.copytree(living, killed)
    later = random.Random(seed)
    answers_are_right(first, oracle, kv_dtype)
    receipts = [first.receipts]
    for place, close in ((living, store), (killed, None)):
        if close is not None:
            close.close()
        reopened, slab = _opened(place, model)
        again = _drive(model, pages, later.random(), slab, slots)
        answers_are_right(again, oracle, kv_dtype)
        receipts.append(again.receipts)
        reopened.close()
    loaded = [sum(receipt.disk for receipt in row) for row in receipts]
    print(f"tokens from disk: {loaded}")
    assert all(loaded[1:]), "what was there before is loaded, after a clean end and after a kill"
    raised = [sum(receipt.host for receipt in row) for row in receipts]
    print(f"tokens from host memory: {raised}")
    assert bool(slots) == any(raised)


def _drive(model: LoadedModel, pages: int, seed: float, slab: Slab, slots: int) -> Drive:
    """Random requests of few stems."""
    dice = random.Random(seed)
    drive = Drive(
        model,
        pages=pages,
        seed=dice.randrange(1 << 32),
        depth=2,
        depot=slab,
        slots=slots,
        ahead=bool(slots),
    )
    # Prompts that are longer than a page, whatever its size.
    opening = tuple(range(4, 4 + model.layout.page_size // 2 * 3))
    for number in range(8):
        request = random_request(dice, number, VOCABULARY, stems=2)
        if number < 2:  # answers whose tokens can be compared, in every run
            request = replace(request, sampling=Sampling(temperature=0))
        drive.submit(replace(request, tokens=(*opening, *request.tokens)))
        for _ in range(dice.randrange(60)):
            drive.step()
    drive.run()
    return drive
