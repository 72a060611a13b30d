"""Whole layers of models on a device, in few launches: on a GPU, else in Triton's interpreter."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from chatserve.model import LoadedModel, load_model, loader
from chatserve.model.fusion import Fusion
from chatserve.model.on_device import LayerOnDevice, fuse_on_device
from chatserve_kernels import gpu
from tests.model.decoding import Decoding
from tests.model.families import FAMILIES, WINDOW, build, random_model

DEVICE = "cpu" if gpu.interpreted() else "cuda"
SEED = 31
BOUNDS = {"float32": 1e-4, "bfloat16": 0.1}
LENGTHS = [WINDOW + 9, 20]
# Of torch, what tells the device nothing.
HOST = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "lift_fresh"}


def load(folder: Path, **options: Any) -> LoadedModel:
    given = {"device": DEVICE, "dtype": "float32", "page_size": 16} | options
    return load_model(folder, **given)


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LoadedModel]:
    """Loads a model whose parts are transformers' own; from then on no kernel serves."""

    def loaded(folder: Path, **options: Any) -> LoadedModel:
        monkeypatch.setattr(loader, "fuse", lambda _: Fusion())
        monkeypatch.setattr(gpu, "serves", lambda device_type: False)
        return load(folder, **options)

    return loaded


def layers_of(model: LoadedModel) -> list[nn.Module]:
    inner: Any = model._model  # pyright: ignore[reportPrivateUsage]
    return list(inner.model.layers)


def steps(model: LoadedModel) -> tuple[list[Tensor], Tensor]:
    """Logits of two decode steps behind prompts, the second also with only one row's K and V kept
    again; and K of the last layer."""
    drive = Decoding(model, lengths=LENGTHS, shared=0, seed=SEED)
    first, second = drive.decode(2), drive.decode(2)
    again = replace(second, written=np.asarray([False, True]))
    logits = [
        drive._forward(inputs)[1].clone()  # pyright: ignore[reportPrivateUsage]
        for inputs in (first, second, again)
    ]
    kept = model.layout.layer_view(drive.pool, len(model.layout.layers) - 1).float()
    return logits, kept.nan_to_num(1e3)


def distance(mine: Tensor, theirs: Tensor) -> float:
    return float((mine.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize(
    ("family", "dtype", "layers"),
    [
        ("llama", "float32", 2),
        ("qwen2", "float32", 1),
        ("qwen3", "bfloat16", 1),
        ("mistral", "float32", 1),
    ],
)
def test_layers_give_what_transformers_give(
    family: str, dtype: str, layers: int, tmp_path: Path, plainly: Callable[..., LoadedModel]
) -> None:
    folder = build(family, tmp_path, layers=layers, seed=SEED)
    mine = load(folder, dtype=dtype)
    assert [type(each) for each in layers_of(mine)] == [LayerOnDevice] * layers
    logits, kept = steps(mine)
    theirs = plainly(folder, dtype=dtype)
    assert not any(isinstance(each, LayerOnDevice) for each in layers_of(theirs))
    right, expected = steps(theirs)
    for one, other in zip(logits, right, strict=True):
        assert distance(one, other) < BOUNDS[dtype]
    assert distance(logits[2], logits[1]) < BOUNDS[dtype]
    assert distance(kept, expected) < BOUNDS[dtype]


class Launches(TorchDispatchMode):
    """What a device is told, one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._inside = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not (self._inside or func.is_view or name in HOST):
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    @contextmanager
    def one(self, name: str) -> Generator[None]:
        """Whatever happens meanwhile is one launch."""
        self.names.append(name)
        self._inside = True
        try:
            yield
        finally:
            self._inside = False


def launches(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a decode step of two rows."""
    drive = Decoding(model, lengths=LENGTHS, shared=0, seed=SEED)
    given, told = drive.decode(2).on(model.device), Launches()
    right = gpu.launched

    def launched(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: Any, **options: Any) -> None:
            with told.one(kernel.fn.__name__):
                right(kernel, grid)(*arguments, **options)

        return run

    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(gpu, "launched", launched)
        work = (given.tokens, given.positions, given.attention)
        # The first finds out what it is to launch, once for a step.
        model.forward(*work, pool=drive.pool, logit_rows=given.logit_rows)
        told.names.clear()
        with told:
            model.forward(*work, pool=drive.pool, logit_rows=given.logit_rows)
    return told.names


def test_a_layer_is_nine_launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [build("qwen3", tmp_path / str(layers), layers=layers) for layers in (1, 2)]
    one, two = (launches(load(folder), monkeypatch) for folder in folders)
    layer = ["norm", "linear", "rotate", "attend", "addmm_", "norm", "linear", "gate", "addmm_"]
    begin = one.index("norm")
    assert two[begin:-2] == [*layer, *layer, "norm"]
    assert one[begin:-2] == [*layer, "norm"]


def as_layers(layer: nn.Module) -> nn.Module:
    model = nn.Sequential(layer).to(DEVICE)
    fuse_on_device(model, Fusion())
    return model[0]


def qwen3_layer(**options: Any) -> nn.Module:
    family = FAMILIES["qwen3"]
    config = family.config(**(family.options | {"num_hidden_layers": 1} | options))
    config._attn_implementation = "chatserve_paged"
    model: Any = random_model(config, seed=SEED)
    return model.model.layers[0]


def test_weights_are_there_once() -> None:
    layer: Any = qwen3_layer()
    fused = as_layers(layer)
    assert isinstance(fused, LayerOnDevice)
    attention, feed_forward = layer.self_attn, layer.mlp
    for group in (
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [feed_forward.gate_proj, feed_forward.up_proj],
    ):
        assert len({each.weight.untyped_storage().data_ptr() for each in group}) == 1
        ends = [each.weight.data_ptr() + each.weight.nbytes for each in group]
        assert [each.weight.data_ptr() for each in group[1:]] == ends[:-1]


class Shifted(Qwen3Attention):
    """Attention of another kind under the same layer."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        mixed, weights = super().forward(*arguments, **options)
        return mixed + 0.5, weights


def test_a_bias_of_one_product_of_three_is_kept() -> None:
    layer: Any = qwen3_layer()
    layer.self_attn.q_proj.bias = nn.Parameter(torch.randn(4 * 32))
    assert isinstance(as_layers(layer), LayerOnDevice)
    assert layer.self_attn.k_proj.bias is not None
    assert not layer.self_attn.k_proj.bias.any()


@pytest.mark.parametrize("other", ["activation", "bias of the output", "linear", "attention"])
def test_layers_of_another_kind_stay(other: str, caplog: pytest.LogCaptureFixture) -> None:
    class Linear(nn.Linear):
        pass

    layer: Any = qwen3_layer(hidden_act="gelu" if other == "activation" else "silu")
    if other == "bias of the output":
        layer.self_attn.o_proj.bias = nn.Parameter(torch.ones(64))
    elif other == "linear":
        layer.self_attn.q_proj.__class__ = Linear
    elif other == "attention":
        layer.self_attn.__class__ = Shifted
    assert as_layers(layer) is layer
    (warning,) = [each for each in caplog.records if each.levelname == "WARNING"]
    assert warning.getMessage() == "1 of 1 layers stay as transformers has them"


def test_a_layer_without_pages_is_the_originals() -> None:
    layer: Any = qwen3_layer()
    fused: Any = as_layers(layer)
    layer.self_attn.config._attn_implementation = "eager"
    rows = torch.randn(1, 5, 64, device=DEVICE)
    positions = torch.randn(2, 1, 5, 32, device=DEVICE)
    given = {"position_embeddings": (positions[0], positions[1])}
    with torch.inference_mode():
        assert torch.equal(fused(rows, **given), layer(rows, **given))
    fusion = Fusion([(nn.Sequential(fused), "0", layer)])
    fusion.settle()
    with pytest.raises(AssertionError, match="with pages alone"):
        fused(rows, **given)
