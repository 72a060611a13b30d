"""What cannot be served is refused at load, in one clear sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BloomConfig,
    DeepseekV3Config,
    GPTNeoXConfig,
    MambaConfig,
    T5Config,
)

from chatserve.errors import ModelRefused, SettingsError
from chatserve.model import load_model
from chatserve.model.loader import choose_dtype
from tests.model.families import build, edit_config, random_model, save


def refusal(folder: Path | str, **options: Any) -> str:
    """The one line that a user sees."""
    with pytest.raises(ModelRefused) as caught:
        load_model(folder, **({"device": "cpu", "dtype": "auto", "page_size": 16} | options))
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400
    print(caught.value.message)
    return caught.value.message


@pytest.fixture
def llama(folder_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(folder_of("llama"), tmp_path / "llama")


def test_a_missing_folder(tmp_path: Path) -> None:
    assert "no model folder" in refusal(tmp_path / "nothing")
    assert "no model folder" in refusal("./nothing")
    assert "no model folder" in refusal("")


def test_a_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "neither a model folder nor" in refusal("nobody-at-all/no-such-model")


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    assert "not a folder" in refusal(tmp_path / "model")


def test_a_folder_without_a_config(llama: Path) -> None:
    (llama / "config.json").unlink()
    assert "no config.json" in refusal(llama)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "no-such-kind"}'])
def test_a_broken_config(llama: Path, text: str) -> None:
    (llama / "config.json").write_text(text)
    assert "cannot be used" in refusal(llama)


def test_pickled_weights_are_never_read(llama: Path) -> None:
    torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    assert "convert them to safetensors" in refusal(llama)


def test_no_weights_at_all(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(llama)


def test_a_missing_shard_and_a_broken_index(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    index = llama / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert "lacks the weight file 'model-00001" in refusal(llama)
    index.write_text("{}")
    assert "weight index" in refusal(llama)


def test_remote_code_is_not_run(llama: Path) -> None:
    (llama / "evil.py").write_text("raise SystemExit(99)")
    edit_config(llama, auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    load_model(llama, device="cpu", dtype="float32", page_size=16)
    edit_config(llama, model_type="evil")
    assert "never run" in refusal(llama)


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


NAME = "model.layers.1.mlp.up_proj.weight"


def test_missing_weights_are_never_filled_in(llama: Path) -> None:
    change_weights(llama, lambda weights: weights.pop(NAME))
    assert f"lacks '{NAME}'" in refusal(llama)


def test_unexpected_weights(llama: Path) -> None:
    change_weights(llama, lambda weights: weights.update(surprise=torch.ones(1)))
    assert "does not know: 'surprise'" in refusal(llama)


def test_weights_of_another_shape(llama: Path) -> None:
    change_weights(llama, lambda weights: weights.update({NAME: torch.ones(3, 3)}))
    assert f"another shape for '{NAME}'" in refusal(llama)


def test_weights_that_are_not_finite(llama: Path) -> None:
    change_weights(llama, lambda weights: weights[NAME].fill_(float("nan")))
    assert "not finite" in refusal(llama)


def test_a_truncated_weight_file(llama: Path) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot be loaded" in refusal(llama)
    path.write_bytes(b"\xff" * 20)
    assert "is broken" in refusal(llama)


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
OTHERS: dict[str, tuple[Any, str]] = {
    "state space": (MambaConfig(**SMALL, state_size=4), "state-space"),
    "encoder–decoder": (T5Config(vocab_size=64, d_model=32, num_layers=2), "encoder–decoder"),
    "latent KV": (DeepseekV3Config(**SMALL), "MLA"),
    "not a language model": (None, "not a causal language model"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures(llama: Path, kind: str) -> None:
    config, words = OTHERS[kind]
    if config is None:
        (llama / "config.json").write_text(json.dumps({"model_type": "vit"}))
    else:
        config.save_pretrained(llama)
    assert words in refusal(llama)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_kv_shared_layers": 1}, "shares KV"),
        ({"alibi": True}, "ALiBi"),
        ({"attn_config": {"alibi": True}}, "ALiBi"),
        ({"add_cross_attention": True}, "cross-attention"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "Quantized"),
        ({"max_position_embeddings": 0}, "how many positions"),
    ],
)
def test_settings_that_pages_cannot_serve(llama: Path, changes: dict[str, Any], words: str) -> None:
    edit_config(llama, **changes)
    assert words in refusal(llama)


@pytest.mark.parametrize("kind", ["linear_attention", "chunked_attention"])
def test_layers_of_other_kinds(folder_of: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(folder_of("qwen3"), tmp_path / "qwen3")
    edit_config(folder, layer_types=["full_attention", kind])
    assert "layers" in refusal(folder)


@pytest.mark.parametrize("positions", [None, 64])
def test_bloom_is_refused_for_its_alibi(tmp_path: Path, positions: int | None) -> None:
    """No field of its config says so, nor how many positions it has."""
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    save(random_model(config, seed=1), tmp_path / "bloom")
    if positions is not None:
        edit_config(tmp_path / "bloom", max_position_embeddings=positions)
    assert "ALiBi" in refusal(tmp_path / "bloom")


def test_a_bias_in_the_attention_mask_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no config tells, the trials must find it."""
    monkeypatch.setattr("chatserve.model.suitability._has_alibi", lambda kind, settings: False)
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    save(random_model(config, seed=1), tmp_path / "bloom")
    edit_config(tmp_path / "bloom", max_position_embeddings=64)
    assert "attention interface" in refusal(tmp_path / "bloom")


def test_a_partial_rotary_model_passes(tmp_path: Path) -> None:
    config = GPTNeoXConfig(**SMALL, num_attention_heads=4, intermediate_size=64)
    save(random_model(config, seed=1), tmp_path / "neox")
    load_model(tmp_path / "neox", device="cpu", dtype="float32", page_size=16)


def test_types_are_chosen_by_checkpoint_and_device(
    monkeypatch: pytest.MonkeyPatch, llama: Path
) -> None:
    cpu = torch.device("cpu")
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("chatserve.model.loader._cpu_has_bf16", lambda fast=fast: fast)
        assert choose_dtype("auto", stored="BF16", device=cpu) == expected
        assert choose_dtype("auto", stored="F16", device=cpu) == torch.float32
        assert choose_dtype("auto", stored="F32", device=cpu) == torch.float32
    assert choose_dtype("bfloat16", stored="F32", device=cpu) == torch.bfloat16
    assert "no dtype 'int3'" in refusal(llama, dtype="int3")


@pytest.mark.parametrize("device", ["cuda:77", "no-such-device"])
def test_a_device_that_is_not_there(llama: Path, device: str) -> None:
    with pytest.raises(SettingsError, match=f"'{device}' cannot be used"):
        load_model(llama, device=device, dtype="auto", page_size=16)


def test_a_model_is_named_after_its_folder(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama)
    assert load_model(".", device="cpu", dtype="float32", page_size=16).name == "llama"


def test_generation_defaults_and_context(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = build("qwen2", tmp_path)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [5, 9], "do_sample": True, "temperature": 0.6, "top_k": 20})
    )
    model = load_model(folder, device="cpu", dtype="float32", page_size=16, context_length=100)
    defaults = model.generation
    assert (defaults.eos_ids, defaults.do_sample) == ((5, 9), True)
    assert (defaults.temperature, defaults.top_k, defaults.top_p) == (0.6, 20, 1.0)
    assert model.context_length == 100
    plain = load_model(
        folder_of("gpt2"), device="cpu", dtype="float32", page_size=16, context_length=10_000
    )
    assert plain.context_length == 512
    assert plain.generation.top_k == 0
    assert plain.generation.eos_ids == (2,)
