"""The probe and the attention function: what differs from the plain model is noticed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, PreTrainedModel

from chatserve.errors import ModelRefused
from chatserve.model import attention, load_model
from chatserve.model.attention import ATTENTION_NAME, paged_attention_forward
from chatserve.model.layout import KVLayout
from chatserve.model.probe import compare_with_eager, survey_layers
from tests.model.families import FAMILIES, build, random_model


def paged_model(**options: Any) -> PreTrainedModel:
    config = MistralConfig(**(FAMILIES["mistral"].options | {"num_hidden_layers": 2} | options))
    model = random_model(config, seed=0)
    model.set_attn_implementation(ATTENTION_NAME)
    return model


def test_the_probe_sees_a_hidden_window_and_a_wrong_scale() -> None:
    model = paged_model()
    with pytest.raises(ModelRefused, match="has the window 24"):
        survey_layers(model, windows=(None, None), context_length=512)
    shapes = survey_layers(model, windows=(24, 24), context_length=512)
    layout = KVLayout(16, torch.float32, shapes)
    assert compare_with_eager(model, layout, 512) < 1e-5
    with pytest.raises(ModelRefused, match="each must do so once"):
        survey_layers(model, windows=(24,), context_length=512)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_the_probe_sees_other_logits(monkeypatch: pytest.MonkeyPatch, offset: float) -> None:
    """Also under a large common offset, which means nothing."""
    model = paged_model()
    model.lm_head.bias = torch.nn.Parameter(torch.full((model.config.vocab_size,), offset))
    layout = KVLayout(16, torch.float32, survey_layers(model, windows=(24, 24), context_length=512))
    right = attention.paged_attention

    def wrong(*arguments: Any, scale: float, **options: Any) -> torch.Tensor:
        return right(*arguments, scale=scale * 1.05, **options)

    monkeypatch.setattr(attention, "paged_attention", wrong)
    with pytest.raises(ModelRefused, match="gives other logits through pages"):
        compare_with_eager(model, layout, 512)


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "phi3_longrope"])
def test_a_deep_model_in_bfloat16_is_not_refused_for_its_rounding(
    family: str, tmp_path: Path
) -> None:
    """Random weights in twelve layers amplify rounding beyond any fixed threshold."""
    options: dict[str, Any] = {}
    if family == "gemma3":
        options["layer_types"] = ["sliding_attention"] * 12
    folder = build(family, tmp_path, layers=12, **options)
    load_model(folder, device="cpu", dtype="bfloat16", page_size=16)


def test_the_probe_sees_a_wrong_scale_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    model = paged_model().bfloat16()
    shapes = survey_layers(model, windows=(24, 24), context_length=512)
    layout = KVLayout(16, torch.bfloat16, shapes)
    compare_with_eager(model, layout, 512)
    right = attention.paged_attention

    def wrong(*arguments: Any, scale: float, **options: Any) -> torch.Tensor:
        return right(*arguments, scale=scale * 2, **options)

    monkeypatch.setattr(attention, "paged_attention", wrong)
    with pytest.raises(ModelRefused, match="gives other logits through pages"):
        compare_with_eager(model, layout, 512)


def test_unknown_keywords_are_refused() -> None:
    module = paged_model().model.layers[0].self_attn
    rows = torch.zeros((1, 4, 1, 12))

    class Echo:
        def attend(self, call: Any) -> torch.Tensor:
            return call.query

    def call(**keywords: Any) -> None:
        paged_attention_forward(module, rows, rows, rows, **({"paged": Echo()} | keywords))

    call(position_ids=rows, use_cache=False, dropout=0.0, new_thing=None)
    for keywords, words in (
        ({"new_thing": 0.5}, "new_thing"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "is_causal"),
        ({"attention_mask": rows}, "mask"),
        ({"paged": None}, "keyword arguments"),
    ):
        with pytest.raises(ModelRefused, match=words):
            call(**keywords)
    module.is_causal = False
    with pytest.raises(ModelRefused, match="not causal"):
        call()
    module.is_causal, module.layer_idx = True, None
    with pytest.raises(ModelRefused, match="know its layer"):
        call()
