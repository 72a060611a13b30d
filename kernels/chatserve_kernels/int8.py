"""Linear layers whose weights are int8, on a CPU: half of bfloat16's bytes to read.

May not know: chatserve, models. `cpu/linear.py` has the code, and the layout of the weights.

Theory: a step of few rows does nothing but read weights. Each group of 128 inputs of an output has
a scale, the largest weight by 127, and its weights are rounded to whole multiples of it. What comes
of rounded weights is as exact as the type that the results have; the loss is in their rounding
alone. There is no way without machine code: `product_for` says where there is none.
"""

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from chatserve_kernels.cpu import native

try:
    from chatserve_kernels.cpu import linear
except ImportError:  # LLVM's package is not for every machine
    linear: Any = None

LEVELS = 127  # on either side of 0
_ROUNDED_AT_ONCE = 1 << 18  # weights; more leave larger holes in the heap
# Rows that one thread rounds before it costs more than waking another one.
_ONE_THREAD_ROWS = 16
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weights:
    """packed: int8 [blocks, pairs of inputs, 64 outputs, 2]; scales: float32 [blocks, groups of
    inputs, 64 outputs]; bias: float32 [64 * blocks]. Outputs and inputs to spare are 0."""

    out_features: int
    in_features: int
    packed: Tensor
    scales: Tensor
    bias: Tensor

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes + self.bias.nbytes

    def dequantized(self) -> Tensor:
        """The weights that these stand for, float32 [out_features, in_features]."""
        blocks, pairs, block, _ = self.packed.shape
        whole = self.packed.transpose(1, 2).reshape(blocks * block, 2 * pairs)
        scales = self.scales.transpose(1, 2).reshape(blocks * block, -1)
        scales = scales.repeat_interleave(linear.GROUP, dim=1)[:, : 2 * pairs]
        return (whole * scales)[: self.out_features, : self.in_features]


def quantized(weight: Tensor, bias: Tensor | None) -> Int8Weights:
    """weight: [out_features, in_features], bias: [out_features], of any type of floats."""
    outputs, inputs = weight.shape
    block, group = linear.BLOCK, linear.GROUP
    blocks, pairs, groups = (-(-size // by) for size, by in
                             ((outputs, block), (inputs, 2), (inputs, group)))  # fmt: skip
    packed = torch.empty(blocks, pairs, block, 2, dtype=torch.int8)
    scales = torch.empty(blocks, groups, block)
    step = block * max(1, _ROUNDED_AT_ONCE // (block * inputs))
    for first in range(0, outputs, step):
        part = weight[first : first + step].detach().float()
        part = pad(part, (0, groups * group - inputs, 0, -part.shape[0] % block))
        grouped = part.view(-1, groups, group)
        sizes = grouped.abs().amax(dim=2) / LEVELS
        whole = (grouped / sizes.clamp_min(1e-30)[..., None]).round_().to(torch.int8)
        whole = whole.view(torch.int16).view(-1, block, groups * group // 2)  # a pair is one number
        here = slice(first // block, first // block + whole.shape[0])
        packed.view(torch.int16)[here, ..., 0] = whole[..., :pairs].transpose(1, 2)
        scales[here] = sizes.view(-1, block, groups).transpose(1, 2)
    wide = torch.zeros(blocks * block)
    if bias is not None:
        wide[:outputs] = bias.detach()
    return Int8Weights(outputs, inputs, packed, scales, wide)


@dataclass(frozen=True, slots=True, eq=False)
class Int8Product:
    """Compiled for rows of one type."""

    dtype: torch.dtype
    round: native.Function
    multiply: native.Function

    def run(self, rows: Tensor, weights: Int8Weights) -> Tensor:
        """rows: [any, in_features] in the dtype → [any, out_features], rows · weightsᵀ + bias.

        A row with a number that is not finite gives NaN. Raises ValueError.
        """
        if rows.ndim != 2 or rows.shape[1] != weights.in_features:
            raise ValueError(f"rows are {tuple(rows.shape)}, not [any, {weights.in_features}]")
        if rows.dtype != self.dtype or rows.device.type != "cpu":
            raise ValueError(f"rows are {rows.dtype} on {rows.device}, not {self.dtype} on cpu")
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        count, item = rows.shape[0], rows.element_size()
        blocks, pairs, block, _ = weights.packed.shape
        result = torch.empty(count, blocks * block, dtype=self.dtype)
        # An odd number of inputs leaves a place beside the last one, whose weight is 0.
        rounded = torch.empty(count, 2 * pairs, dtype=torch.int16)
        row_scales = torch.empty(count)
        arguments = self.round.arguments(
            {
                "round_tasks": count,
                "rows": count,
                "columns": weights.in_features,
                "pairs": pairs,
                "blocks": blocks,
                "source": rows.data_ptr(),
                "source_row": rows.stride(0) * item,
                "rounded": rounded.data_ptr(),
                "row_scales": row_scales.data_ptr(),
                "weights": weights.packed.data_ptr(),
                "scales": weights.scales.data_ptr(),
                "bias": weights.bias.data_ptr(),
                "result": result.data_ptr(),
                "result_row": result.stride(0) * item,
            }
        )
        self.round.call(arguments, "round_next", 1 if count < _ONE_THREAD_ROWS else count)
        self.multiply.call(arguments, "multiply_next", blocks)
        return result[:, : weights.out_features]


@cache
def product_for(dtype: torch.dtype) -> Int8Product | None:
    """None, with a line in the log, where this machine has none."""
    if linear is None or dtype not in native.DTYPES:
        return None
    text = linear.linear_text(
        bfloat16=dtype == torch.bfloat16, rows_together=4 if native.wide_registers() else 1
    )
    functions = native.functions_of(text, linear.FIELDS, ("round", "multiply"))
    if functions is None:
        return None
    product = Int8Product(dtype, *functions)
    if not _agrees(product):
        _log.warning("int8 layers as machine code are wrong on this machine")
        return None
    return product


def _agrees(product: Int8Product) -> bool:
    """Whether a few rows give what plain arithmetic gives, and one with NaN gives NaN."""
    numbers = torch.Generator().manual_seed(1)
    weights = quantized(*(torch.randn(size, generator=numbers) for size in ((70, 205), (70,))))
    rows = torch.randn((8, 205), generator=numbers).to(product.dtype)
    rows[7, 204] = float("nan")
    result = product.run(rows, weights).double()
    expected = rows.double() @ weights.dequantized().double().T + weights.bias[:70].double()
    allowed = _TOLERANCE[product.dtype] * expected[:7].abs().max()
    right = bool(((result - expected)[:7].abs() <= allowed).all())
    return right and bool(result[7].isnan().all())
