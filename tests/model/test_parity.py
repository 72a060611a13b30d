"""Logits through pages equal those of the plain transformers model, in float32; through pages of
fp8 those of one whose attention rounds K and V as they are stored."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from chatserve.model import LoadedModel, load_model
from tests.model.families import FAMILIES, MORE_FAMILIES, VOCABULARY
from tests.model.paging import Paging, Sequence
from tests.model.rounded import ROUNDED_EAGER, ROUNDED_TOLERANCE

TOLERANCE = 1e-4
LENGTH = 90


def plain_model(folder: Path, kv_dtype: str = "auto") -> PreTrainedModel:
    """transformers alone."""
    attention = "eager" if kv_dtype == "auto" else ROUNDED_EAGER
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()


def plain_logits(model: PreTrainedModel, tokens: list[int], *, in_a_text_of: int = 0) -> Tensor:
    """in_a_text_of: tokens that there are at least; what comes behind changes nothing before it,
    but for longrope, whose factors transformers chooses by the length of the text."""
    text = tokens + [0] * (in_a_text_of - len(tokens))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
    return logits[: len(tokens)]


def random_tokens(generator: random.Random, length: int) -> list[int]:
    return [generator.randrange(VOCABULARY) for _ in range(length)]


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_slices_in_any_company_equal_the_plain_model(
    family: str,
    kv_dtype: str,
    folder_of: Callable[[str], Path],
    model_of: Callable[..., LoadedModel],
) -> None:
    seed = 11
    print(f"seed {seed}")
    generator = random.Random(seed)
    model = model_of(family, kv_dtype)
    plain = plain_model(folder_of(family), kv_dtype)
    sequences = [Sequence(random_tokens(generator, n)) for n in (LENGTH, LENGTH // 2, 70, 3, 1)]
    # Long enough for the factors of long texts, which a server of long ones has throughout.
    expected = [plain_logits(plain, each.tokens, in_a_text_of=LENGTH) for each in sequences]
    paging = Paging(model, pages=40, seed=seed)
    got: list[list[Tensor]] = [[] for _ in sequences]
    # The first in one whole slice, the others in random ones, so that mates come and go.
    got[0] += paging.step([(sequences[0], LENGTH)])
    while any(s.computed < len(s.tokens) for s in sequences):
        slices: list[tuple[Sequence, int]] = []
        for sequence in generator.sample(sequences, len(sequences)):
            left = len(sequence.tokens) - sequence.computed
            if left and generator.random() < 0.7:
                slices.append((sequence, min(left, generator.choice((1, 1, 2, 7, 20)))))
        if slices:
            for (sequence, _), logits in zip(slices, paging.step(slices), strict=True):
                got[sequences.index(sequence)].append(logits)
    pairs = zip(got, expected, strict=True)
    errors = sorted(float((torch.cat(rows) - wanted).abs().max()) for rows, wanted in pairs)
    assert errors[2] < TOLERANCE
    assert errors[-1] < (TOLERANCE if kv_dtype == "auto" else ROUNDED_TOLERANCE)


@pytest.mark.parametrize(
    ("family", "kv_dtype"),
    [*((family, "auto") for family in FAMILIES), ("gpt2", "fp8"), ("qwen2", "fp8")],
)
def test_a_full_hit_computes_one_token_without_writing(
    family: str, kv_dtype: str, model_of: Callable[..., LoadedModel]
) -> None:
    model = model_of(family, kv_dtype)
    tokens = random_tokens(random.Random(2), 48)
    paging = Paging(model, pages=8, seed=2)
    first = Sequence(tokens)
    (logits,) = paging.step([(first, 48)])
    before = paging.pool.clone()
    second = Sequence(tokens, computed=47, pages=first.pages)
    (again,) = paging.step([(second, 1)], suppress_writes=True)
    error = (again[0] - logits[-1]).abs().max()
    assert error < (TOLERANCE if kv_dtype == "auto" else ROUNDED_TOLERANCE)
    torch.testing.assert_close(paging.pool, before, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_sees_a_swapped_page(
    family: str, model_of: Callable[[str], LoadedModel]
) -> None:
    """What parity rests on: a wrong page changes most greedy tokens."""
    seed, trials = 3, 24
    print(f"seed {seed}")
    generator = random.Random(seed)
    model = model_of(family)
    changed = 0
    for trial in range(trials):
        paging = Paging(model, pages=8, seed=trial)
        mine = Sequence(random_tokens(generator, 49))
        other = Sequence(random_tokens(generator, 48))
        paging.step([(mine, 48), (other, 48)])
        right = Sequence(mine.tokens, computed=48, pages=[*mine.pages, paging.free.pop()])
        wrong = Sequence(mine.tokens, computed=48, pages=[*mine.pages, paging.free.pop()])
        # Within the window of every family.
        wrong.pages[2] = other.pages[2]
        good, bad = paging.step([(right, 1), (wrong, 1)])
        changed += int(good.argmax() != bad.argmax())
    print(f"{family}: {changed} of {trials} changed")
    assert changed >= trials / 2


def test_bfloat16_is_close_and_float32_logits_come_out(folder_of: Callable[[str], Path]) -> None:
    model = load_model(folder_of("llama"), device="cpu", dtype="bfloat16", page_size=8)
    assert model.layout.dtype == torch.bfloat16
    tokens = random_tokens(random.Random(4), 60)
    paging = Paging(model, pages=12, seed=4)
    sequence = Sequence(tokens)
    logits = torch.cat([paging.step([(sequence, 33)])[0], paging.step([(sequence, 27)])[0]])
    assert logits.dtype == torch.float32
    plain = plain_logits(plain_model(folder_of("llama")), tokens)
    assert (logits - plain).norm() / plain.norm() < 0.08


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
@pytest.mark.parametrize("rows", [[], [4], [0, 3, 3]])
def test_logits_come_for_the_rows_asked_for(
    model_of: Callable[[str], LoadedModel], family: str, rows: list[int]
) -> None:
    """Also none: a step in the middle of a long prompt wants no logits."""
    model = model_of(family)
    paging = Paging(model, pages=4, seed=1)
    (everything,) = paging.step([(Sequence(list(range(5))), 5)])
    (logits,) = paging.step([(Sequence(list(range(5))), 5)], logit_rows=rows)
    assert everything.shape == (5, model.vocabulary_size)
    assert logits.shape == (len(rows), model.vocabulary_size)
    torch.testing.assert_close(logits, everything[rows])


def test_forward_checks_its_shapes(model_of: Callable[[str], LoadedModel]) -> None:
    model = model_of("llama")
    paging = Paging(model, pages=2, seed=0)
    paging.pool = paging.pool[:, 1:]
    with pytest.raises(ValueError, match="the pool must be"):
        paging.step([(Sequence([1, 2]), 2)])
