"""Position encodings that depend on the batch, made independent of it.

May not know: pages, attention, requests.

Theory: longrope has two sets of rotary factors, for short and for long texts, and transformers
picks one by the longest position in the batch. A longer batch mate would then change the KV of a
prefix, so a page would no longer be a function of its prefix. The set is fixed here once, by the
served context length, on the rotary module itself: whoever runs the model afterwards, paged or
eager, uses the same factors. Dynamic NTK grows its base with the text and cannot be fixed.
"""

import hashlib
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from chatserve.errors import ModelRefused

# Not a name that transformers knows: it leaves the factors of such a module alone.
_FIXED = "fixed by chatserve"


def check_rotary(config: Any) -> None:
    """Raises ModelRefused for dynamic NTK scaling, where the config says so."""
    parameters: object = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return
    given = cast("dict[str, object]", parameters)
    # Some models have a set for each type of layers.
    for item in (given, *given.values()):
        if isinstance(item, dict):
            _refuse_dynamic(str(cast("dict[str, object]", item).get("rope_type")))


def _refuse_dynamic(rope_type: str) -> None:
    if "dynamic" in rope_type:
        raise ModelRefused(
            "Dynamic NTK rotary scaling depends on the length of the text, so its KV pages "
            "cannot be shared; such a model is not supported"
        )


def fix_rotary(model: nn.Module, context_length: int) -> None:
    """Fix every length-dependent rotary module to the factors for `context_length` positions.

    Raises ModelRefused for dynamic NTK scaling.
    """
    for module, layer_type, rope_type in _rotary_modules(model):
        _refuse_dynamic(rope_type)
        if rope_type != "longrope":
            continue
        config: Any = module.config
        parameters = config.rope_parameters
        if layer_type is not None:
            parameters = parameters[layer_type]
        original = parameters["original_max_position_embeddings"]
        prefix = "" if layer_type is None else f"{layer_type}_"
        buffer = getattr(module, f"{prefix}inv_freq")
        extra = {} if layer_type is None else {"layer_type": layer_type}
        # Any length on the right side of the original one selects the set.
        length = original + 1 if context_length > original else original
        factors, _ = ROPE_INIT_FUNCTIONS["longrope"](config, buffer.device, length, **extra)
        buffer.copy_(factors)
        getattr(module, f"{prefix}original_inv_freq").copy_(factors)
        if layer_type is None:
            vars(module)["rope_type"] = _FIXED
        else:
            types: dict[str, str] = module.rope_type  # pyright: ignore[reportAssignmentType]
            types[layer_type] = _FIXED


def rotary_digest(model: nn.Module) -> bytes:
    """32 bytes over the rotary factors in use: they are part of what a page holds."""
    digest = hashlib.blake2b(digest_size=32)
    for name, buffer in sorted(model.named_buffers()):
        if name.endswith("inv_freq") and "original" not in name:
            values: Any = buffer.detach().double().cpu().numpy()
            digest.update(f"{name}:{values.size};".encode())
            digest.update(np.ascontiguousarray(values).tobytes())
    for name, module in model.named_modules():
        for attribute, value in sorted(vars(module).items()):
            if attribute.endswith("attention_scaling") and isinstance(value, int | float):
                digest.update(f"{name}.{attribute}={float(value).hex()};".encode())
    return digest.digest()


def _rotary_modules(model: nn.Module) -> Iterator[tuple[nn.Module, str | None, str]]:
    """(module, layer type or None, rope type) of each rotary embedding."""
    for module in model.modules():
        rope_type: object = getattr(module, "rope_type", None)
        if isinstance(rope_type, str):
            yield module, None, rope_type
        elif isinstance(rope_type, dict):
            types: dict[str, str] = rope_type
            for layer_type, name in list(types.items()):
                yield module, layer_type, name


def positions_max(config: Any) -> int:
    """The most positions that the config allows. Raises ModelRefused when it does not say."""
    value = getattr(config, "max_position_embeddings", None)
    if not isinstance(value, int) or value < 1:
        raise ModelRefused("The model's config does not say how many positions it has")
    return value
