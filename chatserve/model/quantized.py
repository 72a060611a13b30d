"""Linear layers of int8 weights, made of a model's own when it is loaded (`--quantize int8`).

May not know: attention, pages, single model families.

Theory: a step of few rows on a CPU does nothing but read weights, and int8 is half of bfloat16.
Layers are taken one by one, each plain one let go before the next, so that a model never lies in
memory twice. Embeddings, norms and the experts of a mixture, which are no linear layers in
transformers, stay; an output head that is the embedding becomes a copy of its own. Each layer must
give about what it gave before: one whose weights are badly served by rounding is left as it is.
"""

import hashlib
import logging
from dataclasses import dataclass

import torch
from torch import nn

from chatserve.model.blocks import BlockLinear
from chatserve.model.packed import leave_file
from chatserve_kernels.int8 import product_for, quantized

QUANTIZATIONS = ("none", "int8")
QUANTIZED_DTYPES = (torch.bfloat16, torch.float32)
# Smaller layers cost as much to reach as they have to read.
QUANTIZED_ELEMENTS_MIN = 1 << 15
# Of a layer's results. Rounding normal weights gives 0.7 %, and no weights more than 2.6 %: those
# where one of each group is so large that the others are nothing beside it.
ERROR_MAX = 0.015
_FORMAT = "int8, groups of 128, activations of 16 bits in groups of 128"
_TRIAL_ROWS = 3

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Quantization:
    """What was done. names: the layers that are int8 now; bytes: of their weights."""

    names: tuple[str, ...] = ()
    bytes_before: int = 0
    bytes_after: int = 0

    @property
    def text(self) -> str:
        """For the fingerprint: another one where any layer is computed otherwise."""
        if not self.names:
            return "none"
        digest = hashlib.blake2b("\n".join(self.names).encode(), digest_size=16).hexdigest()
        return f"{_FORMAT}: {digest}"


def quantize_linears(model: nn.Module) -> Quantization:
    """Replace the linear layers of a model on a CPU that gain by it, for good; kinds of layers that
    are derived from `nn.Linear` stay. What stays is told in the log."""
    names: list[str] = []
    before = after = 0
    places = [
        (parent, name, f"{path}.{name}".lstrip("."))
        for path, parent in model.named_modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear and layer.weight.numel() >= QUANTIZED_ELEMENTS_MIN
    ]
    for parent, name, full in places:
        layer: nn.Linear = getattr(parent, name)  # nothing else here may hold a layer
        product = product_for(layer.weight.dtype)
        if product is None:
            _log.warning("--quantize int8: this machine has no program for it; nothing is int8")
            return Quantization()
        replaced = BlockLinear(quantized(layer.weight, layer.bias), product)
        error = _error(layer, replaced)
        if not error <= ERROR_MAX:  # not: NaN must stay as well
            _log.warning("'%s' stays as it is: int8 would change it by %.2g", full, error)
            continue
        setattr(parent, name, replaced)
        names.append(full)
        before, after = before + layer.weight.nbytes, after + replaced.weights.nbytes
    if not names:
        _log.warning("--quantize int8: the model has no layer that it serves; nothing is int8")
    else:
        leave_file(model)
        stay = sum(weight.nbytes for weight in model.parameters())
        sizes = (size / 2**20 for size in (before, after, stay))
        _log.info(
            "%d linear layers are int8: %.1f MiB of weights are %.1f; %.1f MiB stay as they are",
            *(len(names), *sizes),
        )
    return Quantization(tuple(names), before, after)


def _error(linear: nn.Linear, replaced: BlockLinear) -> float:
    """The relative difference of what they give for a few rows."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(_TRIAL_ROWS, linear.in_features, generator=generator)
    rows = rows.to(linear.weight.dtype)
    with torch.inference_mode():
        expected, result = linear(rows).float(), replaced(rows).float()
    return float((result - expected).norm() / expected.norm().clamp_min(1e-6))
