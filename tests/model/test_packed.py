"""Linear layers packed at load: what they give, and when they are left as they are. That whole
models give what transformers gives with them is in test_parity.py; what layers in blocks give is in
tests/kernels."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from chatserve.model import LoadedModel, load_model, packed
from chatserve.model.blocks import BlockLinear
from chatserve.model.packed import PackedLinear, pack_linears
from chatserve_kernels.linear import LinearWeights
from tests.model.paging import Paging, Sequence

DTYPES = [torch.float32, torch.bfloat16]


def packed_layers(model: nn.Module) -> int:
    return sum(isinstance(each, PackedLinear | BlockLinear) for each in model.modules())


@pytest.fixture
def _no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose bfloat16 is oneDNN's."""
    monkeypatch.setattr(packed, "product_for", lambda _: None)


def logits(model: LoadedModel) -> Tensor:
    return Paging(model, pages=4, seed=1).step([(Sequence(list(range(40))), 40)])[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_a_packed_layer_gives_what_the_layer_gave(
    dtype: torch.dtype, bias: bool, rows: int
) -> None:
    torch.manual_seed(2)
    layer = nn.Linear(72, 40, bias=bias, dtype=dtype)
    given = torch.randn(1, rows, 72).to(dtype)
    with torch.inference_mode():
        result, expected = PackedLinear(layer)(given), layer(given)
    assert result.shape == expected.shape
    assert result.dtype == dtype
    # bfloat16: two roundings of the same sum.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(result, expected, atol=tolerance, rtol=tolerance)


def test_layers_lie_in_blocks_where_there_is_machine_code() -> None:
    model = nn.Sequential(nn.Linear(64, 31), nn.Linear(3, 32), nn.Linear(64, 32).half())
    pack_linears(model)
    assert [type(each) for each in model] == [BlockLinear, BlockLinear, nn.Linear]


@pytest.mark.usefixtures("_no_blocks")
def test_elsewhere_bfloat16_is_packed_by_torch() -> None:
    model = nn.Sequential(nn.Linear(64, 64).bfloat16(), nn.Linear(3, 32).bfloat16())
    pack_linears(model)
    assert [type(each) for each in model] == [PackedLinear, PackedLinear]
    model = nn.Sequential(nn.Linear(64, 64))
    pack_linears(model)
    assert type(model[0]) is nn.Linear


def test_other_kinds_of_layers_stay() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(Scaled(8, 8).bfloat16(), nn.Embedding(8, 8).bfloat16())
    assert pack_linears(model).places == ()
    assert isinstance(model[0], Scaled)


def test_undo_puts_every_layer_back() -> None:
    layers = [nn.Linear(16, 16).bfloat16() for _ in range(3)]
    model = nn.Sequential(layers[0], nn.Sequential(*layers[1:]))
    packing = pack_linears(model)
    assert packed_layers(model) == 3
    packing.undo()
    assert [each for each in model.modules() if isinstance(each, nn.Linear)] == layers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_not_there_twice_while_they_are_packed(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the layers' own only those that are still to come; and undo has every bit of them."""
    layers = [nn.Linear(64, outputs).to(dtype) for outputs in (64, 40, 7, 100)]
    model = nn.Sequential(*layers)
    before = [layer.weight.detach().clone() for layer in layers]
    theirs = [weakref.ref(layer.weight) for layer in layers]
    alive: list[int] = []
    in_blocks = packed.in_blocks

    def counted(weight: Tensor, bias: Tensor | None) -> LinearWeights:
        alive.append(sum(each() is not None for each in theirs))
        return in_blocks(weight, bias)

    monkeypatch.setattr(packed, "in_blocks", counted)
    packing = pack_linears(model)
    assert alive == [4, 3, 2, 1]
    assert [each() for each in theirs] == [None] * 4
    packing.undo()
    for layer, weight in zip(layers, before, strict=True):
        assert torch.equal(layer.weight, weight)


def test_weights_that_an_embedding_has_too_stay_its_own() -> None:
    embedding, layer = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
    layer.weight = embedding.weight
    packing = pack_linears(nn.Sequential(embedding, layer))
    assert embedding.weight.shape == (64, 32)
    packing.undo()
    assert layer.weight is embedding.weight


@pytest.mark.usefixtures("_no_blocks")
@pytest.mark.parametrize("fault", ["wrong", "absent", "refused"])
def test_what_torch_does_otherwise_is_left_as_it_is(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the layers that were packed before the one that fails."""

    class Faulty(PackedLinear):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__(linear)
            if linear.out_features == 8:
                if fault == "absent":
                    torch.ops.mkldnn._is_not_in_this_release(linear.weight)
                self._multiply = self._other

        def _other(self, rows: Tensor, *_: Any) -> Tensor:
            if fault == "refused":
                raise RuntimeError("could not create a primitive")
            return rows[..., :8] * 1.05

    monkeypatch.setattr(packed, "PackedLinear", Faulty)
    model = nn.Sequential(nn.Linear(16, 16).bfloat16(), nn.Linear(16, 8).bfloat16())
    assert pack_linears(model).places == ()
    assert packed_layers(model) == 0


def test_a_loaded_model_is_counted_as_before(
    model_of: Callable[[str], LoadedModel], folder_of: Callable[[str], Path]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "product_for", lambda _: None)
        plain = load_model(folder_of("llama"), device="cpu", dtype="float32", page_size=16)
    model = model_of("llama")
    assert packed_layers(plain._model) == 0
    assert packed_layers(model._model) > 10
    assert model.parameter_count == plain.parameter_count > 10_000
    assert model.vocabulary_size == plain.vocabulary_size
    assert model.fingerprint() == plain.fingerprint()
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-4, rtol=1e-4)


def test_a_model_that_asks_its_layers_for_their_weights_is_served_unpacked(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlamaMLP.forward

    def asking(self: LlamaMLP, x: Tensor) -> Tensor:
        assert self.down_proj.weight.shape[1] == self.intermediate_size
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", asking)
    model = load_model(folder_of("llama"), device="cpu", dtype="bfloat16", page_size=16)
    assert packed_layers(model._model) == 0
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_packed_model_lets_go_of_its_file(
    folder_of: Callable[[str], Path], quantize: str, tmp_path: Path
) -> None:
    """Else the weights would be resident twice: packed, and as the pages of the file."""
    stored: Any = AutoModelForCausalLM.from_pretrained(folder_of("llama"), dtype=torch.bfloat16)
    stored.save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu", dtype="bfloat16", page_size=16, quantize=quantize)
    model.fingerprint()  # whoever hashes the file has read it
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
