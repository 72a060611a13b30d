"""Weights of linear layers rounded to int8: half of bfloat16's bytes to read.

May not know: chatserve, models. `linear.py` multiplies with them.

Theory: each group of 128 inputs of an output has a scale, the largest weight by 127, and its
weights are rounded to whole multiples of it. Inputs are rounded as well, each group of 128 of a row
to 16 bits (`cpu/linear.py`): beside the weights' rounding that is nothing, unless one input is some
thousand times as large as the others of its group, which then lose bits; other groups do not.
"""

import logging
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from chatserve_kernels.cpu import memory, native
from chatserve_kernels.linear import LinearProduct, LinearWeights, agrees, code, wide_bias

LEVELS = 127  # on either side of 0
_ROUNDED_AT_ONCE = 1 << 18  # weights; more leave larger holes in the heap

_log = logging.getLogger(__name__)


def quantized(weight: Tensor, bias: Tensor | None) -> LinearWeights:
    """weight: [out_features, in_features], bias: [out_features], of any type of floats."""
    outputs, inputs = weight.shape
    block, group = code.BLOCK, code.GROUP
    blocks, pairs, groups = (-(-size // by) for size, by in
                             ((outputs, block), (inputs, 2), (inputs, group)))  # fmt: skip
    packed = memory.empty((blocks, pairs, block, 2), torch.int8)
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
    return LinearWeights(outputs, inputs, packed, scales, wide_bias(bias, blocks))


def dequantized(weights: LinearWeights) -> Tensor:
    """The weights that these stand for, float32 [out_features, in_features]."""
    assert weights.scales is not None, "these are not int8"
    blocks, pairs, block, _ = weights.packed.shape
    whole = weights.packed.transpose(1, 2).reshape(blocks * block, 2 * pairs)
    scales = weights.scales.transpose(1, 2).reshape(blocks * block, -1)
    scales = scales.repeat_interleave(code.GROUP, dim=1)[:, : 2 * pairs]
    return (whole * scales)[: weights.out_features, : weights.in_features]


def product_for(dtype: torch.dtype) -> LinearProduct | None:
    """For rows of a type; None, with a line in the log, where this machine has none."""
    if code is None or dtype not in native.DTYPES or not native.wanted():
        return None
    return compiled_product(dtype)


@cache
def compiled_product(dtype: torch.dtype) -> LinearProduct | None:
    """The same, once; it is known then."""
    text = code.int8_text(bfloat16=dtype == torch.bfloat16, wide=native.wide_registers())
    functions = native.functions_of(text, code.FIELDS, ("round", "multiply"))
    if functions is None:
        return None
    product = LinearProduct(dtype, torch.int8, *functions)
    numbers = torch.Generator().manual_seed(1)
    weights = quantized(*(torch.randn(size, generator=numbers) for size in ((70, 205), (70,))))
    if not agrees(product, weights, dequantized(weights).double(), weights.bias[:70].double()):
        _log.warning("int8 layers as machine code are wrong on this machine")
        return None
    return product
