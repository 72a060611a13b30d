"""Pages of fp8 in a model: where they lie, what they cost in exactness, and what is refused."""

import logging
import random
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from chatserve.errors import ModelRefused, SettingsError
from chatserve.model import KVLayout, LayerShape, LoadedModel, load_model
from chatserve.model.loader import ready_model
from chatserve_kernels import attention_in_chain, fp8
from tests.model.paging import Paging, Sequence
from tests.model.test_parity import random_tokens

LAYOUT = KVLayout(8, fp8.FP8, (LayerShape(2, 24), LayerShape(1, 64)))


def load(folder: Path, **options: Any) -> LoadedModel:
    given: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_dtype": "fp8"}
    return load_model(folder, page_size=16, **(given | options))


def views(pool: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    scales = LAYOUT.layer_scales(pool, layer)
    assert scales is not None
    return LAYOUT.layer_view(pool, layer), scales


def test_a_page_is_elements_and_scales_of_layer_after_layer() -> None:
    sizes = [2 * 8 * each.kv_heads * (each.head_dim + 4) for each in LAYOUT.layers]
    assert LAYOUT.page_bytes == LAYOUT.page_elements == sum(sizes)
    pool = LAYOUT.allocate(3, "cpu", fill=0.0)
    assert (pool.dtype, pool.shape) == (torch.uint8, (3, LAYOUT.page_bytes))
    every: list[tuple[int, int]] = []
    for layer, (kv_heads, head_dim) in enumerate(((2, 24), (1, 64))):
        kv, scales = views(pool, layer)
        assert (kv.shape, kv.dtype) == ((3, 2, 8, kv_heads, head_dim), fp8.FP8)
        assert (scales.shape, scales.dtype) == ((3, 2, kv_heads, 8), torch.float32)
        for view in (kv, scales):
            assert view.data_ptr() % 16 == 0
            assert view.stride(0) * view.element_size() == LAYOUT.page_bytes
            first = view.data_ptr() - pool.data_ptr()
            every.append((first, first + view[0].numel() * view.element_size()))
    assert [first for first, _ in every] == [0, *(end for _, end in every[:-1])]
    assert every[-1][1] == LAYOUT.page_bytes
    plain = replace(LAYOUT, dtype=torch.bfloat16)
    assert plain.layer_scales(plain.allocate(1, "cpu"), 0) is None


def test_nothing_but_nan_is_in_pages_that_are_filled_with_it() -> None:
    pool = LAYOUT.allocate(2, "cpu", fill=float("nan"))
    for layer in (0, 1):
        assert all(bool(view.float().isnan().all()) for view in views(pool, layer))
    with pytest.raises(AssertionError):
        LAYOUT.allocate(2, "cpu", fill=1.0)


def test_no_other_pages_are_taken_for_them(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("llama")
    names = {load(folder, kv_dtype=each).fingerprint() for each in ("auto", "fp8")}
    assert len(names) == 2
    assert load(folder).fingerprint() in names


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_decoding_gives_about_what_it_gives_with_plain_pages(
    family: str, model_of: Callable[..., LoadedModel]
) -> None:
    seed = 21
    print(f"seed {seed}")
    tokens = random_tokens(random.Random(seed), 70)
    logits: list[Tensor] = []
    for kv_dtype in ("auto", "fp8"):
        paging, sequence = Paging(model_of(family, kv_dtype), pages=8, seed=seed), Sequence(tokens)
        paging.step([(sequence, 40)])
        logits.append(torch.cat([paging.step([(sequence, 1)])[0] for _ in range(30)]))
    distance = float((logits[1] - logits[0]).norm() / logits[0].norm())
    print(f"distance {distance:.3f}")
    assert 1e-3 < distance < 0.2


def test_a_chain_leaves_them_to_torch(
    model_of: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model whose layers are in one."""
    asked: list[object] = []

    def noted(*arguments: Any, **options: Any) -> object:
        asked.append(attention_in_chain(*arguments, **options))
        return asked[-1]

    monkeypatch.setattr("chatserve.model.attention.attention_in_chain", noted)
    for kv_dtype in ("auto", "fp8"):
        Paging(model_of("qwen2", kv_dtype), pages=4, seed=1).step([(Sequence([5, 6, 7]), 3)])
    plain, rounded = asked
    assert plain is not None
    assert rounded is None


def test_the_log_says_how_far_they_lead_and_what_they_cost(
    folder_of: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        model = load(folder_of("opt"), dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    # Heads of 12: a third of an element's byte is its share of a scale.
    assert "pages are fp8, 4096 bytes in place of 6144; logits through them differ by 0.0" in (
        caplog.text
    )
    assert "slower to read" in caplog.text


@pytest.mark.parametrize("wrong", ["scales", "no number"])
def test_a_model_that_they_change_too_much_is_refused(
    wrong: str, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = fp8.widened

    def changed(elements: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        read = right(elements, torch.ones_like(scales), dtype)
        return read * float("nan") if wrong == "no number" else read

    monkeypatch.setattr(fp8, "widened", changed)
    with pytest.raises(ModelRefused, match=r"other logits with --kv-dtype fp8.*try without"):
        load(folder_of("llama"))
    load(folder_of("llama"), kv_dtype="auto")


def test_another_type_is_refused(folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(SettingsError, match="auto or fp8, not 'fp4'"):
        load(folder_of("llama"), kv_dtype="fp4")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_dtype": "fp4"}, "auto or fp8, not 'fp4'"),
        ({"quantize": "int4"}, "none or int8, not 'int4'"),
        ({"quantize": "int8", "dtype": torch.float16}, "not float16"),
    ],
    ids=["pages", "weights", "float16"],
)
def test_a_model_without_files_is_refused_them_too(
    options: dict[str, Any], words: str, folder_of: Callable[[str], Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder_of("llama"))
    digest: Future[bytes] = Future()
    digest.set_result(bytes(32))
    given: dict[str, Any] = {"name": "random", "folder": Path(), "dtype": torch.float32}
    given |= {"fields": "", "weights": digest, "page_size": 16, "context_length": 64}
    with pytest.raises(SettingsError, match=words):
        ready_model(model, **(given | options))
    assert ready_model(model, **(given | {"kv_dtype": "fp8"})).layout.dtype == fp8.FP8
