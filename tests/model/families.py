"""Small random models of each family, built with transformers' own classes.

Weights have a standard deviation of 0.1 or more: with transformers' default of 0.02 and tied
embeddings a swapped page changes no greedy token, so a parity test would not see it.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCABULARY = 211
WINDOW = 24  # smaller than what the tests attend to
WEIGHT_STD = 0.25

_ROTARY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": None,
}


# Layers of these are computed as one chain of programs; those of the others have sizes that are not
# served so.
_FUSED = _ROTARY | {"hidden_size": 64}


@dataclass(frozen=True)
class Family:
    """One kind of model; `options` go to its config class."""

    config: Callable[..., PreTrainedConfig]
    options: dict[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "llama": Family(
        LlamaConfig,
        _ROTARY
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen2": Family(Qwen2Config, _FUSED),
    "qwen3": Family(Qwen3Config, _FUSED | {"head_dim": 32}),
    "mistral": Family(MistralConfig, _FUSED | {"sliding_window": WINDOW}),
    "opt": Family(
        OPTConfig,
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "word_embed_proj_dim": 48,
            "ffn_dim": 64,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "pad_token_id": 1,
            "bos_token_id": 2,
            "eos_token_id": 2,
        },
    ),
    "gpt2": Family(
        GPT2Config,
        {
            "vocab_size": VOCABULARY,
            "n_embd": 48,
            "n_head": 4,
            "n_positions": 512,
            "bos_token_id": 2,
            "eos_token_id": 2,
        },
    ),
}

# Their layers run as torch's operations.
MORE_FAMILIES: dict[str, Family] = {
    "gemma3": Family(
        Gemma3TextConfig,
        _ROTARY
        | {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
        },
    ),
    "qwen3_moe": Family(
        Qwen3MoeConfig,
        _ROTARY
        | {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "phi3_longrope": Family(
        Phi3Config,
        _ROTARY
        | {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 64,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
            },
        },
    ),
}


def build(family: str, folder: Path, *, layers: int = 2, seed: int = 0, **options: Any) -> Path:
    """Write a random model of `family` into `folder`/`family` and return that folder.

    options override the family's config values.
    """
    kind = (FAMILIES | MORE_FAMILIES)[family]
    layers_key = "n_layer" if kind.config is GPT2Config else "num_hidden_layers"
    config = kind.config(**(kind.options | {layers_key: layers} | options))
    target = folder / family
    save(random_model(config, seed=seed), target)
    return target


def random_model(config: PreTrainedConfig, *, seed: int) -> PreTrainedModel:
    """A causal model in float32 with normal weights of WEIGHT_STD (norm weights around 1)."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * WEIGHT_STD
            is_norm_weight = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(noise + 1.0 if is_norm_weight else noise)
    return model.eval()


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write config, generation config and model.safetensors."""
    if folder.exists():
        shutil.rmtree(folder)
    model.save_pretrained(folder)


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of config.json in place."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))
