"""Which models fit pages at all, judged by their config and class, before any weight is read.

May not know: pages' contents, devices. What a config cannot tell is left to the probe, which runs
the model; the refusals here give the reason in words.
"""

from typing import Any, cast

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from chatserve.errors import ModelRefused

_ATTENTION_TYPES = frozenset({"full_attention", "sliding_attention"})
# Kinds of layers whose state is not a K and V per position.
_OTHER_STATE = frozenset({"linear_attention", "mamba", "recurrent", "conv", "hybrid"})


def check_config(config: PreTrainedConfig) -> None:
    """Raises ModelRefused with one sentence for a model that pages cannot serve."""
    kind = config.model_type
    settings: dict[str, Any] = config.to_dict()
    if config.is_encoder_decoder:
        raise ModelRefused(f"'{kind}' is an encoder–decoder model, which is not supported")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelRefused(f"'{kind}' is not a causal language model that transformers knows")
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if getattr(model_class, "_is_stateful", False):
        raise ModelRefused(f"'{kind}' is a state-space model; its state does not fit KV pages")
    if settings.get("kv_lora_rank"):
        raise ModelRefused(f"'{kind}' keeps latent KV (MLA), which does not fit the page layout")
    if settings.get("num_kv_shared_layers"):
        raise ModelRefused(f"'{kind}' shares KV between layers, which is not supported")
    if _has_alibi(kind, settings):
        raise ModelRefused(f"'{kind}' puts a bias (ALiBi) in its attention mask, not supported")
    if settings.get("add_cross_attention"):
        raise ModelRefused(f"'{kind}' with cross-attention is not supported")
    if settings.get("quantization_config"):
        raise ModelRefused("Quantized checkpoints are not supported")
    for layer_type in settings.get("layer_types") or ():
        if layer_type in _OTHER_STATE:
            raise ModelRefused(f"'{kind}' has state-space layers; their state does not fit pages")
        if layer_type not in _ATTENTION_TYPES:
            raise ModelRefused(f"'{kind}' has layers of kind '{layer_type}', not supported")


def _has_alibi(kind: str, settings: dict[str, Any]) -> bool:
    """Some families say so in a field; BLOOM's config has none, since it knows nothing else."""
    inner: object = settings.get("attn_config")  # MPT's
    return (
        kind == "bloom"
        or bool(settings.get("alibi"))
        or settings.get("position_embedding_type") == "alibi"
        or (isinstance(inner, dict) and bool(cast("dict[str, Any]", inner).get("alibi")))
    )


def expected_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """Each layer's sliding window by the config; None where a layer sees everything."""
    window: int | None = getattr(config, "sliding_window", None)
    layers: int = config.num_hidden_layers
    types: list[str] | None = getattr(config, "layer_types", None)
    if window is None or types is None:
        return (window,) * layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)
