"""Models whose linear layers are int8: what they give, what stays as it is, what their pages are
called."""

import logging
import random
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.models.llama.modeling_llama import LlamaMLP

from chatserve.errors import ModelRefused, SettingsError
from chatserve.model import LoadedModel, load_model, quantized
from chatserve.model.blocks import BlockLinear
from chatserve.model.quantized import quantize_linears
from chatserve_kernels.cpu import native
from chatserve_kernels.int8 import compiled_product
from chatserve_kernels.linear import LinearWeights
from tests.model.families import FAMILIES, MORE_FAMILIES, VOCABULARY, build
from tests.model.paging import Paging, Sequence
from tests.model.test_parity import plain_logits, plain_model

SEED = 5
TOLERANCE = 3e-3  # of logits of about 5 to 50: activations are rounded to 16 bits
INT8_FAMILIES = [*FAMILIES, *MORE_FAMILIES]


@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "QUANTIZED_ELEMENTS_MIN", 0)


def load(folder: Path, *, quantize: str = "int8", dtype: str = "float32") -> LoadedModel:
    return load_model(folder, device="cpu", dtype=dtype, page_size=16, quantize=quantize)


@pytest.fixture(scope="session")
def int8_of(folder_of: Callable[[str], Path]) -> Callable[[str], LoadedModel]:
    """A loaded model of a family, every linear layer of it int8."""

    @cache
    def loaded(family: str) -> LoadedModel:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quantized, "QUANTIZED_ELEMENTS_MIN", 0)
            return load(folder_of(family))

    return loaded


def rounded(weight: Tensor) -> Tensor:
    """In plain torch: the multiples of the 127th part of each group's largest."""
    groups = pad(weight, (0, -weight.shape[1] % 128)).unflatten(1, (-1, 128))
    steps = groups.abs().amax(dim=2, keepdim=True) / 127
    whole = torch.where(steps > 0, groups / steps, 0.0).round()
    return (whole * steps).flatten(1)[:, : weight.shape[1]]


def random_tokens(length: int) -> list[int]:
    generator = random.Random(SEED)
    return [generator.randrange(VOCABULARY) for _ in range(length)]


def logits(model: LoadedModel) -> Tensor:
    return Paging(model, pages=4, seed=1).step([(Sequence(list(range(40))), 40)])[0]


@pytest.mark.parametrize("family", INT8_FAMILIES)
def test_a_model_is_that_of_the_rounded_weights(
    family: str, folder_of: Callable[[str], Path], int8_of: Callable[[str], LoadedModel]
) -> None:
    print(f"seed {SEED}")
    model = int8_of(family)
    plain = plain_model(folder_of(family))
    linears = {name: each for name, each in plain.named_modules() if type(each) is nn.Linear}
    assert set(model.quantization.names) == set(linears)
    for each in linears.values():
        each.weight = nn.Parameter(rounded(each.weight.detach()))
    tokens = random_tokens(60)
    expected = plain_logits(plain, tokens, in_a_text_of=90)
    paging, sequence = Paging(model, pages=8, seed=SEED), Sequence(tokens)
    got = torch.cat([paging.step([(sequence, count)])[0] for count in (33, 1, 7, 19)])
    assert (got - expected).norm() / expected.norm() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hit_gives_what_a_miss_gave(family: str, int8_of: Callable[[str], LoadedModel]) -> None:
    print(f"seed {SEED}")
    model, tokens = int8_of(family), random_tokens(48)
    paging = Paging(model, pages=8, seed=SEED)
    first = Sequence(tokens)
    (missed,) = paging.step([(first, 48)])
    before = paging.pool.clone()
    second = Sequence(tokens, computed=47, pages=first.pages)
    (hit,) = paging.step([(second, 1)], suppress_writes=True)
    torch.testing.assert_close(hit[0], missed[-1], atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(paging.pool, before, atol=0, rtol=0, equal_nan=True)


def test_in_bfloat16_it_is_close_to_the_plain_model(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("llama")
    plain = logits(load(folder, quantize="none", dtype="bfloat16"))
    model = load(folder, dtype="bfloat16")
    assert len(model.quantization.names) == 15
    assert model.quantization.bytes_after < model.quantization.bytes_before
    difference = (logits(model) - plain).norm() / plain.norm()
    assert 0 < difference < 0.08


def test_an_output_head_that_is_the_embedding_becomes_a_copy(tmp_path: Path) -> None:
    model = load(build("llama", tmp_path, tie_word_embeddings=True))._model
    assert isinstance(model.get_output_embeddings(), BlockLinear)
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    assert model.get_input_embeddings().weight.dtype == torch.float32


def test_small_layers_and_other_kinds_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    monkeypatch.setattr(quantized, "QUANTIZED_ELEMENTS_MIN", 64 * 32)
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(64, 31), nn.Linear(64, 32), Scaled(64, 64), nn.LayerNorm(64))
    assert quantize_linears(model).names == ("1",)
    assert [type(each) for each in model] == [nn.Linear, BlockLinear, Scaled, nn.LayerNorm]


def test_each_layer_is_let_go_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(SEED)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    layers = [weakref.ref(each) for each in model]
    alive: list[int] = []
    rounding = quantized.quantized

    def counted(weight: Tensor, bias: Tensor | None) -> LinearWeights:
        alive.append(sum(each() is not None for each in layers))
        return rounding(weight, bias)

    monkeypatch.setattr(quantized, "quantized", counted)
    quantize_linears(model)
    assert alive == [4, 3, 2, 1]


@pytest.mark.parametrize("value", [20.0, float("nan"), float("inf")])
def test_a_layer_that_rounding_serves_badly_stays(
    value: float, caplog: pytest.LogCaptureFixture
) -> None:
    """A few weights that are far larger than the others leave these few levels."""
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.normal_()[:, ::128] = value
    with caplog.at_level(logging.WARNING):
        assert quantize_linears(model).names == ("1",)
    assert "'0' stays as it is" in caplog.text


def test_what_stays_is_packed(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "QUANTIZED_ELEMENTS_MIN", 48 * 64)
    model = load(folder_of("llama"), dtype="bfloat16")
    kinds = {torch.int8: 0, torch.bfloat16: 0}
    for each in model._model.modules():
        if isinstance(each, BlockLinear):
            kinds[each.weights.dtype] += 1
        assert type(each) is not nn.Linear
    assert kinds[torch.int8] == 7
    # Where there are no blocks of bfloat16 torch packs them.
    assert kinds[torch.bfloat16] in (0, 8)


def test_where_the_program_fails_the_model_is_the_plain_one(
    folder_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = load(folder_of("llama"), quantize="none")
    compiled_product.cache_clear()
    monkeypatch.setattr(native, "compiled", lambda *_: None)
    with caplog.at_level(logging.WARNING):
        model = load(folder_of("llama"))
    compiled_product.cache_clear()
    assert "nothing is int8" in caplog.text
    assert model.quantization.names == ()
    assert model.fingerprint() == plain.fingerprint()
    assert torch.equal(logits(model), logits(plain))


def test_a_model_without_linear_layers_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert quantize_linears(nn.Sequential(nn.LayerNorm(4))).names == ()
    assert "nothing is int8" in caplog.text


def test_a_model_that_asks_its_layers_for_their_weights_is_refused(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlamaMLP.forward

    def asking(self: LlamaMLP, x: Tensor) -> Tensor:
        assert self.down_proj.weight.shape[1] == self.intermediate_size
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", asking)
    with pytest.raises(ModelRefused, match=r"--quantize int8; try without"):
        load(folder_of("llama"))


def test_pages_are_called_by_what_computed_them(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of("qwen3")
    names = [load(folder, quantize=quantize).fingerprint() for quantize in ("none", "int8")]
    assert load(folder).fingerprint() == names[1]
    monkeypatch.setattr(quantized, "QUANTIZED_ELEMENTS_MIN", 64 * 64 + 1)
    names.append(load(folder).fingerprint())  # fewer layers are int8
    assert len(set(names)) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "meta"}, "for a CPU; the device is 'meta'"),
        ({"dtype": "float16"}, "not float16"),
        ({"quantize": "int4"}, "none or int8, not 'int4'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_a_sentence(
    options: dict[str, str], said: str, folder_of: Callable[[str], Path]
) -> None:
    given = {"device": "cpu", "dtype": "float32", "quantize": "int8"} | options
    with pytest.raises(SettingsError, match=said):
        load_model(folder_of("llama"), page_size=16, **given)


def test_the_log_says_how_much_stays(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Embedding(1 << 18, 8), nn.Linear(64, 64, bias=False))
    with caplog.at_level(logging.INFO):
        quantize_linears(model)
    assert "8.0 MiB stay as they are" in caplog.text
