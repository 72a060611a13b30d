"""Norms and gates of models as kernels: on a GPU, else in Triton's interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3MLP, Qwen3RMSNorm

from chatserve.model.fused import FusedNorm, fuse
from chatserve.model.on_device import FeedForwardOnDevice, NormOnDevice
from chatserve_kernels import gpu
from chatserve_kernels.gpu import rows as on_gpu
from tests.model.families import FAMILIES, MORE_FAMILIES, random_model

DEVICE = torch.device("cpu" if gpu.interpreted() else "cuda")
SEED = 31
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were launched."""
    names: list[str] = []
    for name in ("rms_norm", "gated"):
        right = getattr(on_gpu, name)

        def noted(*arguments: Any, name: str = name, right: Any = right, **options: Any) -> Tensor:
            names.append(name)
            return right(*arguments, **options)

        monkeypatch.setattr(on_gpu, name, noted)
    return names


def error(result: Tensor, right: Tensor) -> float:
    return float((result.double() - right.double()).norm() / right.double().norm())


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("kind", [Qwen3RMSNorm, Gemma3RMSNorm])
def test_norms_are_kernels_whatever_their_weight_means(
    kind: Callable[..., nn.Module], dtype: torch.dtype, launches: list[str]
) -> None:
    torch.manual_seed(SEED)
    norm: Any = kind(47, eps=0.1).to(DEVICE, dtype)
    norm.weight.data.normal_()
    model = nn.Sequential(norm)
    fuse(model)
    assert isinstance(model[0], NormOnDevice)
    rows = torch.randn(2, 5, 47, device=DEVICE).to(dtype)
    launches.clear()
    with torch.inference_mode():
        assert error(model(rows), norm(rows)) < BOUNDS[dtype]
    assert launches == ["rms_norm"]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "relu", "gelu"])
def test_gates_are_kernels_where_their_activation_is_known(
    activation: str, dtype: torch.dtype, launches: list[str]
) -> None:
    torch.manual_seed(SEED)
    config = Qwen3Config(hidden_size=24, intermediate_size=40, hidden_act=activation)
    original = Qwen3MLP(config).to(DEVICE, dtype)
    model = nn.Sequential(original)
    fuse(model)
    launches.clear()
    if activation in ("relu", "gelu"):
        assert model[0] is original
        return
    assert isinstance(model[0], FeedForwardOnDevice)
    rows = 20 * torch.randn(1, 5, 24, device=DEVICE).to(dtype)
    with torch.inference_mode():
        assert error(model(rows), original(rows)) < BOUNDS[dtype]
    assert launches == ["gated"]


def test_parts_of_another_kind_stay() -> None:
    class ShiftedRMSNorm(Qwen3RMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) + 0.1

    class ShiftedMLP(Qwen3MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0.1

    config = Qwen3Config(hidden_size=24, intermediate_size=40)
    parts = ShiftedRMSNorm(24), ShiftedMLP(config)
    model = nn.Sequential(*parts).to(DEVICE)
    assert fuse(model).places == []
    assert list(model.children()) == list(parts)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_a_model_says_the_same(family: str, launches: list[str]) -> None:
    kind = (FAMILIES | MORE_FAMILIES)[family]
    config = kind.config(**(kind.options | {"num_hidden_layers": 2}))
    model = random_model(config, seed=SEED).to(DEVICE)
    tokens = torch.arange(1, 8, device=DEVICE)[None]
    with torch.inference_mode():
        before = model(tokens).logits
        fusion = fuse(model)
        launches.clear()
        assert error(model(tokens).logits, before) < 1e-5
    # Two layers, and the last norm.
    norms = {"qwen3": 4, "gemma3": 6}[family]
    assert launches.count("rms_norm") == 2 * norms + 1
    assert launches.count("gated") == 2
    assert not any(isinstance(each, FusedNorm) for each in model.modules())
    fusion.undo()
    assert not any(isinstance(each, NormOnDevice) for each in model.modules())
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, before)
