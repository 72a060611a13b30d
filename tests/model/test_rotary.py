"""Position encodings that depend on the longest text in the batch are fixed at load."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from chatserve.errors import ModelRefused
from chatserve.model import LoadedModel, load_model
from tests.model.families import build
from tests.model.paging import Paging, Sequence
from tests.model.test_parity import plain_logits, plain_model, random_tokens

ORIGINAL = 64  # the original length of the longrope family


@pytest.mark.parametrize("context_length", [ORIGINAL, 400])
def test_one_prefix_has_one_kv_whatever_is_in_the_batch(
    folder_of: Callable[[str], Path], context_length: int
) -> None:
    model = load_model(
        folder_of("phi3_longrope"),
        device="cpu",
        dtype="float32",
        page_size=16,
        context_length=context_length,
    )
    generator = random.Random(1)
    prefix = random_tokens(generator, 32)
    mate_length = min(context_length, 130)
    pages: list[torch.Tensor] = []
    for with_mate in (False, True):
        paging = Paging(model, pages=12, seed=1)
        sequence = Sequence(prefix)
        slices = [(sequence, 32)]
        if with_mate:
            slices.append((Sequence(random_tokens(generator, mate_length)), mate_length))
        paging.step(slices)
        pages.append(paging.pool[sequence.pages])
    assert (pages[0] - pages[1]).abs().max() < 1e-5


@pytest.mark.parametrize("context_length", [ORIGINAL, ORIGINAL + 1, 400])
@pytest.mark.parametrize("length", [1, 40, 60, 200])
def test_longrope_equals_the_plain_model_in_a_text_of_the_served_length(
    folder_of: Callable[[str], Path], context_length: int, length: int
) -> None:
    """What transformers makes of a text that is as long as this server's may become."""
    folder = folder_of("phi3_longrope")
    model = load_model(
        folder, device="cpu", dtype="float32", page_size=16, context_length=context_length
    )
    length = min(length, context_length)
    tokens = random_tokens(random.Random(length), length)
    plain = plain_model(folder)
    expected = plain_logits(plain, tokens, in_a_text_of=min(context_length, 200))
    sequence = Sequence(tokens)
    (logits,) = Paging(model, pages=16, seed=1).step([(sequence, length)])
    assert (logits - expected).abs().max() < 1e-4
    if context_length > ORIGINAL >= length > 1:
        short = plain_logits(plain, tokens)
        assert (logits - short).abs().max() > 0.1, "a short text by itself has others"


def test_the_factors_follow_the_served_length(folder_of: Callable[[str], Path]) -> None:
    def fingerprint(context_length: int) -> bytes:
        model: LoadedModel = load_model(
            folder_of("phi3_longrope"),
            device="cpu",
            dtype="float32",
            page_size=16,
            context_length=context_length,
        )
        return model.fingerprint()

    assert fingerprint(ORIGINAL) == fingerprint(ORIGINAL - 10)
    assert fingerprint(ORIGINAL + 1) == fingerprint(400)
    assert fingerprint(ORIGINAL) != fingerprint(ORIGINAL + 1)


def test_dynamic_ntk_is_refused(tmp_path: Path) -> None:
    folder = build(
        "llama",
        tmp_path,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    )
    with pytest.raises(ModelRefused, match="Dynamic NTK"):
        load_model(folder, device="cpu", dtype="float32", page_size=16)
