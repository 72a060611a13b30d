"""Linear layers whose weights lie as they are read, packed once when a model is loaded.

May not know: attention, pages, single model families.

Theory: torch multiplies with weights as they lie in the checkpoint, row by row, and oneDNN wants
them in blocks. It reorders them in each call, or reads them worse: a step of one row, which does
nothing but read weights, takes up to twice the time. Our own code reads them in order (`blocks.py`)
where there is machine code for it. For bfloat16 elsewhere torch has operators for weights packed
beforehand (its compiler uses them); they are private. Each layer must give what it gave before, and
a layer, or a torch, that does not is left as it is. Weights in blocks can be put back in order, so
the layer's own are let go at once: together they would be the whole model once more, unless they
are a mapped file's.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chatserve.model.blocks import BlockLinear
from chatserve_kernels import gpu
from chatserve_kernels.linear import in_blocks, product_for

_TRIAL_ROWS = 3
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}

_log = logging.getLogger(__name__)


class PackedLinear(nn.Module):
    """`nn.Linear` for inference. Raises RuntimeError or AttributeError where torch cannot pack."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        # No parameter: oneDNN's layout is opaque to everything else.
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self._multiply: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise

    def forward(self, rows: Tensor) -> Tensor:
        """rows: [..., in_features] in the weights' dtype → [..., out_features]."""
        return self._multiply(rows, self._packed, self.bias, "none", [], "")


@dataclass(frozen=True, slots=True)
class Packing:
    """What was packed, and how to undo it."""

    places: tuple[tuple[nn.Module, str, nn.Linear], ...]

    def undo(self) -> None:
        """Every layer as it was."""
        for parent, name, linear in self.places:
            block = getattr(parent, name)
            if linear.weight.numel() == 0 and isinstance(block, BlockLinear):
                linear.weight = nn.Parameter(block.weights.plain(), requires_grad=False)
            setattr(parent, name, linear)


def pack_linears(model: nn.Module) -> Packing:
    """Replace the linear layers of a model on a CPU that gain by it. Its other parts, and kinds of
    layers that are derived from `nn.Linear`, stay."""
    places: list[tuple[nn.Module, str, nn.Linear]] = []
    users = Counter(id(each) for _, each in model.named_parameters(remove_duplicate=False))
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or layer.weight.device.type != "cpu":
                continue
            if gpu.serves("cpu"):
                continue  # in Triton's interpreter a CPU is treated as a GPU is
            if layer.weight.dtype not in _TOLERANCE:
                continue
            packed = _packed(layer)
            if packed is None:
                Packing(tuple(places)).undo()
                return Packing(())
            setattr(parent, name, packed)
            places.append((parent, name, layer))
            # What embeddings have in common with a layer stays theirs.
            if isinstance(packed, BlockLinear) and users[id(layer.weight)] == 1:
                layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
    return Packing(tuple(places))


def leave_file(model: nn.Module) -> None:
    """Give the parameters that are left memory of their own: the last of them lets go of the mapped
    checkpoint, whose pages would stay resident beside the packed weights."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _packed(linear: nn.Linear) -> nn.Module | None:
    """None where there is nothing better, or, with a line in the log, where that does not give what
    the layer gives."""
    dtype = linear.weight.dtype
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(_TRIAL_ROWS, linear.in_features, generator=generator).to(dtype)
    reason: Any
    try:
        with torch.inference_mode():
            packed = _in_blocks(linear)
            if packed is None:
                if dtype != torch.bfloat16:
                    return None  # there packing gains little
                packed = PackedLinear(linear)
            expected, result = linear(rows).float(), packed(rows).float()
            difference = float((result - expected).norm() / expected.norm().clamp_min(1e-6))
        if difference <= _TOLERANCE[dtype]:
            return packed
        reason = f"relative difference {difference:.2g}"
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = error
    _log.info("linear layers are left as they are: %s", reason)
    return None


def _in_blocks(linear: nn.Linear) -> BlockLinear | None:
    if linear.weight.dtype == torch.bfloat16 and linear.in_features % 2:
        return None
    product = product_for(linear.weight.dtype)
    return None if product is None else BlockLinear(in_blocks(linear.weight, linear.bias), product)
