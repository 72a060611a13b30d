"""Steps that go past transformers' forward: when they do, and that they give the same bits."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3RotaryEmbedding

from chatserve.errors import ModelRefused
from chatserve.model import LoadedModel, direct, load_model, quantized
from chatserve.model.direct import DirectPass
from chatserve_kernels.linear import product_for
from tests.model.families import build
from tests.model.paging import Paging, Sequence
from tests.model.test_fused import FUSED_FAMILIES

SEED = 47
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}


def load(folder: Path, **options: Any) -> LoadedModel:
    given = {"device": "cpu", "dtype": "float32", "page_size": 16} | options
    return load_model(folder, **given)


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random model of a family whose layers are fused."""
    root = tmp_path_factory.mktemp("direct")
    return cache(lambda family: build(family, root, hidden_size=64, seed=SEED))


def steps(model: LoadedModel) -> Tensor:
    """Logits of slices and decode rows of two sequences: of all rows, of some, of some again and in
    another order, and of none."""
    paging = Paging(model, pages=16, seed=SEED)
    first = Sequence([(7 * i + 3) % 211 for i in range(90)])
    other = Sequence([(11 * i + 5) % 211 for i in range(90)])
    taken: list[Tensor] = []
    for mine, theirs, rows in (
        (40, 1, None),
        (1, 35, [35, 35, 0]),
        (17, 32, [48]),
        (5, 5, []),
        (1, 1, [1, 0]),
        (1, 1, [1]),
        (1, 1, None),
        (1, 1, [0, 1, 1]),
    ):
        taken += paging.step([(first, mine), (other, theirs)], logit_rows=rows)
    return torch.cat(taken)


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_it_gives_what_transformers_forward_gives(
    family: str,
    dtype: str,
    quantize: str,
    wide: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if dtype == "bfloat16" and quantize == "none" and product_for(torch.bfloat16) is None:
        pytest.skip("bfloat16 is oneDNN's on this machine")
    monkeypatch.setattr(quantized, "QUANTIZED_ELEMENTS_MIN", 0)
    model = load(wide(family), dtype=dtype, quantize=quantize)
    assert isinstance(model._way, DirectPass)
    assert model._way.frequencies is not None
    assert model._way.output_blocks is not None
    with monkeypatch.context() as patch:
        patch.setattr(model._model, "forward", None)  # nobody calls it
        got = steps(model)
    model._way = model._model
    expected = steps(model)
    assert got.isfinite().all()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_are_exact_at_any_position(dtype: torch.dtype, wide: Callable[[str], Path]) -> None:
    """bfloat16 holds whole numbers up to 256 only, float32 up to 16,777,216."""
    way: Any = load(wide("llama"))._way
    positions = torch.arange(3, 130_000, 257)
    hidden = torch.empty(len(positions), 64, dtype=dtype)
    expected = way.rotary(hidden[None], positions[None])
    for mine, theirs in zip(way._positions(hidden, positions), expected, strict=True):
        assert torch.equal(mine.to(dtype).repeat(1, 2), theirs[0])


@pytest.mark.parametrize("plain", [True, False])
def test_positions_that_are_scaled_or_not_plain(
    plain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rotary embedding than ours is asked itself."""
    if not plain:
        forward = Qwen3RotaryEmbedding.forward

        def turned(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            cos, sin = forward(self, x, position_ids)
            return cos, -sin

        monkeypatch.setattr(Qwen3RotaryEmbedding, "forward", turned)
    given = YARN | {"original_max_position_embeddings": 64}
    folder = build("qwen3", tmp_path, hidden_size=64, seed=SEED, rope_parameters=given)
    model = load(folder)
    assert isinstance(model._way, DirectPass)
    assert (model._way.frequencies is not None) == plain
    assert not plain or model._way.scaling > 1.05
    got = steps(model)
    model._way = model._model
    assert torch.equal(got, steps(model))


@pytest.mark.parametrize("family", ["gemma3", "qwen3_moe", "gpt2"])
def test_other_models_are_called_as_they_are(family: str, folder_of: Callable[[str], Path]) -> None:
    model = load(folder_of(family))
    assert model._way is model._model


def test_a_model_that_does_more_between_its_parts_is_called_as_it_is(
    wide: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial at load notices; its layers stay in a chain."""
    forward = Qwen3ForCausalLM.forward

    def louder(self: Any, *given: Any, **named: Any) -> Any:
        output = forward(self, *given, **named)
        output.logits = output.logits * 2 - output.logits.roll(1, -1)
        return output

    with monkeypatch.context() as patch:
        patch.setattr(direct, "_MODELS", frozenset[str]())
        expected = load(wide("qwen3"))
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", louder)
    model = load(wide("qwen3"))
    assert model._way is model._model
    assert any(type(each).__name__ == "FusedLayer" for each in model._model.modules())
    logits = steps(expected)
    assert torch.equal(steps(model), logits)


def test_what_it_does_not_know_it_refuses(wide: Callable[[str], Path]) -> None:
    model = load(wide("llama"))
    way: Any = model._way
    one = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ModelRefused, match="brings an attention mask"):
        way(input_ids=one, position_ids=one, logits_to_keep=one[0], paged=None, attention_mask=one)
    with pytest.raises(ModelRefused, match="'output_attentions', which is not supported"):
        way(input_ids=one, position_ids=one, logits_to_keep=one[0], paged=None,
            output_attentions=True)  # fmt: skip
