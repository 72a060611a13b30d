"""Whole layers as one chain of programs, and norms in one operation: where they are taken, and when
layers are left as they are. That they give what transformers gives is in test_parity.py, for the
families of `fused_families` here."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm

from chatserve.errors import ModelRefused
from chatserve.model import LoadedModel, fused, load_model, loader, quantized
from chatserve.model.blocks import BlockLinear
from chatserve.model.fused import Frames, FusedLayer, FusedNorm, fuse
from chatserve_kernels.cpu import native
from chatserve_kernels.linear import product_for
from tests.model.families import WINDOW, build
from tests.model.paging import Paging, Sequence

FUSED_FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]
SEED = 31


def load(folder: Path, **options: Any) -> LoadedModel:
    given = {"device": "cpu", "dtype": "float32", "page_size": 16} | options
    return load_model(folder, **given)


def fused_layers(model: LoadedModel) -> int:
    return sum(isinstance(each, FusedLayer) for each in model._model.modules())


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random model of a family whose layers are fused."""
    root = tmp_path_factory.mktemp("wide")
    return cache(lambda family: build(family, root, hidden_size=64, layers=3, seed=SEED))


@pytest.fixture
def as_layers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LoadedModel]:
    """Loads a model whose layers and norms are transformers' own."""

    def plainly(folder: Path, **options: Any) -> LoadedModel:
        with monkeypatch.context() as patch:
            patch.setattr(loader, "fuse", lambda _: fused.Fusion())
            return load(folder, **options)

    return plainly


def steps(model: LoadedModel) -> Tensor:
    """Logits of slices and decode rows of two sequences, in five steps."""
    paging = Paging(model, pages=16, seed=SEED)
    first = Sequence([(7 * i + 3) % 211 for i in range(90)])
    other = Sequence([(11 * i + 5) % 211 for i in range(70)])
    taken: list[Tensor] = []
    for mine, theirs in ((40, 1), (1, 35), (17, 32), (31, 1), (1, 1)):
        taken += paging.step([(first, mine), (other, theirs)])
    return torch.cat(taken)


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_a_chain_gives_what_the_layers_give(
    family: str,
    dtype: str,
    quantize: str,
    wide: Callable[[str], Path],
    as_layers: Callable[..., LoadedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if dtype == "bfloat16" and quantize == "none" and product_for(torch.bfloat16) is None:
        pytest.skip("bfloat16 is oneDNN's on this machine")
    monkeypatch.setattr(quantized, "QUANTIZED_ELEMENTS_MIN", 0)
    options = {"dtype": dtype, "quantize": quantize}
    model, plain = load(wide(family), **options), as_layers(wide(family), **options)
    assert fused_layers(model) == 3
    assert fused_layers(plain) == 0
    got, expected = steps(model), steps(plain)
    tolerance = 1e-5 if dtype == "float32" and quantize == "none" else 5e-2
    assert (got - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("size", [10, 12, 40])
def test_pages_of_any_size(
    size: int, wide: Callable[[str], Path], as_layers: Callable[..., LoadedModel]
) -> None:
    """Attention over some is torch's, in the middle of each layer."""
    model = load(wide("qwen3"), page_size=size)
    assert fused_layers(model) == 3
    expected = steps(as_layers(wide("qwen3")))
    torch.testing.assert_close(steps(model), expected, atol=2e-3, rtol=1e-4)


def test_a_sequence_that_is_not_finite_is_alone(wide: Callable[[str], Path]) -> None:
    model = load(wide("qwen3"))
    embeddings: Any = model._model.get_input_embeddings()
    embeddings.weight.data[9] = float("nan")
    paging = Paging(model, pages=8, seed=SEED)
    good, bad = paging.step([(Sequence([1, 2, 3]), 3), (Sequence([4, 9, 5]), 3)])
    assert good.isfinite().all()
    assert bad[1:].isnan().all()


def test_the_originals_are_let_go(wide: Callable[[str], Path]) -> None:
    model = load(wide("llama"))._model
    kinds = {type(each).__name__ for each in model.modules()}
    assert "FusedLayer" in kinds
    assert "FusedNorm" in kinds
    assert not any("Attention" in kind or "MLP" in kind for kind in kinds)
    assert [name for name, _ in model.named_parameters()] == ["model.embed_tokens.weight"]


def test_the_memory_of_its_file_is_let_go(wide: Callable[[str], Path]) -> None:
    model = load(wide("llama"))
    model.fingerprint()  # whoever hashes the file has read it
    assert str(wide("llama")) not in Path("/proc/self/maps").read_text()


def test_a_layer_that_computes_otherwise_stays(
    wide: Callable[[str], Path],
    as_layers: Callable[..., LoadedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its norms are still fused."""
    forward = Qwen3MLP.forward

    def clamping(self: Qwen3MLP, x: Tensor) -> Tensor:
        return forward(self, x.clamp(-2, 2))

    monkeypatch.setattr(Qwen3MLP, "forward", clamping)
    model = load(wide("qwen3"))
    assert fused_layers(model) == 0
    # Two of each layer, those of its heads, and the last.
    assert sum(isinstance(each, FusedNorm) for each in model._model.modules()) == 3 * 4 + 1
    expected = steps(as_layers(wide("qwen3")))
    torch.testing.assert_close(steps(model), expected, atol=1e-3, rtol=1e-4)


def test_one_layer_that_stays_keeps_the_others(
    wide: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is between them would read what is not there yet."""
    forward = Qwen3Attention.forward

    def other(self: Qwen3Attention, *arguments: Any, **others: Any) -> Any:
        output, weights = forward(self, *arguments, **others)
        return (2 * output if self.layer_idx == 1 else output), weights

    monkeypatch.setattr(Qwen3Attention, "forward", other)
    assert fused_layers(load(wide("qwen3"))) == 0


@pytest.mark.parametrize(
    "options", [{"hidden_act": "gelu"}, {"hidden_size": 80}, {"intermediate_size": 60}], ids=str
)
def test_what_is_not_served_stays(options: dict[str, Any], tmp_path: Path) -> None:
    model = load(build("qwen3", tmp_path, **options))
    assert fused_layers(model) == 0
    assert steps(model).isfinite().all()


def test_gelu_by_tanh_is_served(tmp_path: Path, as_layers: Callable[..., LoadedModel]) -> None:
    folder = build("llama", tmp_path, hidden_size=64, hidden_act="gelu_pytorch_tanh")
    model = load(folder)
    assert fused_layers(model) == 2
    torch.testing.assert_close(steps(model), steps(as_layers(folder)), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("fault", ["no chain", "no norms", "no rotation", "no gates"])
def test_without_machine_code_a_model_is_as_it_was(
    fault: str, wide: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "no chain":
        monkeypatch.setattr(native, "_chain", lambda: None)
    else:
        names = {"no norms": "norm_for", "no rotation": "rotation_for", "no gates": "gate_for"}
        monkeypatch.setattr(fused, names[fault], lambda *_, **__: None)
    model = load(wide("qwen3"))
    assert fused_layers(model) == 0
    assert steps(model).isfinite().all()


def test_a_chain_that_differs_is_undone(
    wide: Callable[[str], Path],
    as_layers: Callable[..., LoadedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The trial of a few rows does not know where they stand; the one of a whole model does."""
    begin = Frames.begin

    def wrong(self: Frames, parts: Any, hidden: Tensor, positions: Any) -> None:
        begin(self, parts, hidden, tuple(each.roll(hidden.shape[0] > 3, 1) for each in positions))

    monkeypatch.setattr(Frames, "begin", wrong)
    model = load(wide("qwen3"))
    assert fused_layers(model) == 0
    assert any(isinstance(each, BlockLinear) for each in model._model.modules()), "still packed"
    expected = steps(as_layers(wide("qwen3")))
    torch.testing.assert_close(steps(model), expected, atol=1e-3, rtol=1e-4)


def test_layers_of_one_chain_may_have_other_windows(
    tmp_path: Path, as_layers: Callable[..., LoadedModel]
) -> None:
    folder = build(
        "qwen3",
        tmp_path,
        layers=3,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )
    model = load(folder)
    assert fused_layers(model) == 3
    torch.testing.assert_close(steps(model), steps(as_layers(folder)), atol=1e-3, rtol=1e-4)


def test_what_we_do_not_know_is_refused(wide: Callable[[str], Path]) -> None:
    model = load(wide("qwen3"))
    layer = next(each for each in model._model.modules() if isinstance(each, FusedLayer))
    rows = torch.zeros(1, 2, 64)
    chain = native.new_chain()
    assert chain is not None
    recorder = fused._AttendsLater(chain)
    with pytest.raises(ModelRefused, match="'output_attentions'"):
        layer(rows, position_embeddings=(rows, rows), paged=recorder, output_attentions=True)
    with pytest.raises(ModelRefused, match="mask of its own"):
        layer(rows, rows, position_embeddings=(rows, rows), paged=recorder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [Qwen3RMSNorm, Gemma3RMSNorm])
def test_norms_are_fused_whatever_their_weight_means(
    kind: Callable[..., nn.Module], dtype: torch.dtype
) -> None:
    torch.manual_seed(SEED)
    norm = kind(48).to(dtype)
    norm.weight.data.normal_()
    model = nn.Sequential(norm)
    fuse(model)
    assert isinstance(model[0], FusedNorm)
    rows = torch.randn(2, 5, 48).to(dtype)
    with torch.inference_mode():
        expected, got = norm(rows), model(rows)
    assert got.shape == expected.shape
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def test_norms_of_another_kind_stay() -> None:
    class ShiftedRMSNorm(Qwen3RMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) + 0.1

    model = nn.Sequential(ShiftedRMSNorm(48), Qwen3RMSNorm(47))
    fusion = fuse(model)
    assert fusion.places == []
    assert isinstance(model[0], ShiftedRMSNorm)


def test_padding_attends_to_nothing(wide: Callable[[str], Path]) -> None:
    """Where another layer wants few numbers of rows."""
    model, padded = load(wide("qwen3")), load(wide("qwen3"))
    assert not model._pads
    padded._pads = True
    torch.testing.assert_close(steps(padded), steps(model), atol=1e-4, rtol=1e-5)


def test_frames_of_a_few_sizes_are_kept_and_no_large_one(wide: Callable[[str], Path]) -> None:
    """Each is memory for as long as the server runs."""
    model = load(wide("llama"))
    (frames,) = {each._frames for each in model._model.modules() if isinstance(each, FusedLayer)}
    paging, tokens = Paging(model, pages=24, seed=SEED), [5] * 350
    sequence = Sequence(tokens)
    sizes = [1, 2, 3, fused._KEPT_ROWS_MAX, 4, 5, fused._KEPT_ROWS_MAX + 1, 6, 7, 100]
    for rows in sizes:
        paging.step([(sequence, rows)])
    kept = [rows for rows in sizes if rows <= fused._KEPT_ROWS_MAX]
    assert list(frames._kept) == kept[-fused._KEPT_FRAMES_MAX :]
    assert frames._frame is None
