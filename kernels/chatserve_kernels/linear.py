"""Linear layers on a CPU whose weights lie in blocks of outputs, as machine code reads them.

May not know: chatserve, models. `cpu/linear.py` has the code, and the layout of the weights;
`int8.py` rounds weights.

Theory: a step of few rows does nothing but read weights, so they lie in the order in which they are
read, and layers that have their inputs in common (query, key and value; gate and up) are one call.
There is no way without machine code: the products say where there is none.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from chatserve_kernels.cpu import memory, native

try:
    from chatserve_kernels.cpu import linear as code
except ImportError:  # LLVM's package is not for every machine
    code: Any = None

# Rows that one thread rounds, and products that it adds up, before it costs more than waking
# another one.
_ONE_THREAD_ROWS, _ONE_THREAD_PRODUCTS = 16, 1 << 18
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class LinearWeights:
    """One layer's.

    packed: bfloat16 or int8 [blocks, pairs of inputs, 64 outputs, 2], or float32 [blocks, inputs,
    64 outputs]; scales: float32 [blocks, groups of inputs, 64 outputs], for int8; bias: float32
    [64 * blocks]. Outputs and inputs to spare are 0.
    """

    out_features: int
    in_features: int
    packed: Tensor
    scales: Tensor | None
    bias: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.packed.dtype

    def plain(self) -> Tensor:
        """The weight that `in_blocks` was given, to the bit. Raises ValueError for int8."""
        if self.dtype == torch.int8:
            raise ValueError("int8 weights are not what they were made of")
        blocks = self.packed
        if self.dtype == torch.bfloat16:
            blocks = blocks.flatten(2).view(torch.float32)  # a pair is one number
        rows = blocks.transpose(1, 2).reshape(-1, blocks.shape[1])[: self.out_features]
        return rows.contiguous().view(self.dtype)

    @property
    def nbytes(self) -> int:
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.packed.nbytes + scales + self.bias.nbytes

    def table(self) -> Any:
        """Of each block the addresses of weights, scales and bias: int64 [blocks, 3]."""
        parts = (self.packed, self.scales, self.bias.view(-1, code.BLOCK))
        table = np.zeros((self.packed.shape[0], code.TABLE_COLUMNS), dtype=np.int64)
        for column, part in enumerate(parts):
            if part is not None:
                step = part.stride(0) * part.element_size()
                table[:, column] = part.data_ptr() + step * np.arange(len(table))
        return table


def in_blocks(weight: Tensor, bias: Tensor | None) -> LinearWeights:
    """As they are: weight float32, or bfloat16 of an even number of inputs, [out_features,
    in_features]; bias [out_features]. Raises ValueError for others."""
    outputs, inputs = weight.shape
    whole = weight.detach().contiguous()
    if weight.dtype == torch.bfloat16 and inputs % 2 == 0:
        whole = whole.view(torch.float32)  # a pair is one number
    elif weight.dtype != torch.float32:
        raise ValueError("weights are float32, or bfloat16 of an even number of inputs")
    if outputs % code.BLOCK:
        whole = pad(whole, (0, 0, 0, -outputs % code.BLOCK))
    blocks = whole.view(-1, code.BLOCK, whole.shape[1]).transpose(1, 2)
    packed = memory.empty(blocks.shape, blocks.dtype).copy_(blocks)
    if weight.dtype == torch.bfloat16:
        packed = packed.view(torch.bfloat16).view(*packed.shape[:2], code.BLOCK, 2)
    return LinearWeights(outputs, inputs, packed, None, wide_bias(bias, packed.shape[0]))


def wide_bias(bias: Tensor | None, blocks: int) -> Tensor:
    """float32 [64 * blocks], zeros behind the layer's own."""
    wide = torch.zeros(blocks * code.BLOCK)
    if bias is not None:
        wide[: len(bias)] = bias.detach()
    return wide


class JoinedWeights:
    """One or several layers' of as many inputs and of one type, whose results lie side by side,
    each from a whole block on. Raises ValueError for layers that do not go together."""

    def __init__(self, parts: Sequence[LinearWeights]) -> None:
        if len({(part.in_features, part.dtype) for part in parts}) != 1:
            raise ValueError("only layers of as many inputs and of one type are joined")
        self.parts = tuple(parts)  # the table has addresses of what they own
        self.in_features, self.dtype = parts[0].in_features, parts[0].dtype
        self.pairs = -(-self.in_features // 2)
        self.table: Any = np.concatenate([part.table() for part in parts])
        ends = np.cumsum([part.packed.shape[0] * code.BLOCK for part in parts]).tolist()
        self.width: int = ends[-1]  # of a row of results
        firsts = [0, *ends[:-1]]
        self.columns = tuple(
            slice(first, first + part.out_features)
            for first, part in zip(firsts, parts, strict=True)
        )
        self._arguments: Any = None

    def arguments(self, function: native.Function) -> Any:
        """What all calls with these weights have in common; to be copied."""
        if self._arguments is None:
            given = {"pairs": self.pairs, "columns": self.in_features, "blocks": len(self.table)}
            self._arguments = function.arguments(given | {"table": self.table.ctypes.data})
        return self._arguments


@dataclass(frozen=True, slots=True, eq=False)
class LinearProduct:
    """Compiled for rows of one type and weights of one. round: for int8 alone."""

    dtype: torch.dtype
    weights_dtype: torch.dtype
    round: native.Function | None
    multiply: native.Function

    def run(self, rows: Tensor, weights: JoinedWeights) -> Tensor:
        """rows: [any, in_features] in the dtype → [any, weights.width]: of each layer, in its
        columns, rows · weightsᵀ + bias.

        With int8 a row with a number that is not finite gives NaN. Raises ValueError.
        """
        if rows.ndim == 2 and rows.stride(1) != 1:
            rows = rows.contiguous()
        result = torch.empty(rows.shape[0], weights.width, dtype=self.dtype)
        arguments, _rounded = self._arguments(rows, weights, result)
        count = rows.shape[0]
        if self.round is not None:
            self.round.call(arguments, "round_next", 1 if count < _ONE_THREAD_ROWS else count)
        small = count * weights.in_features * weights.width <= _ONE_THREAD_PRODUCTS
        self.multiply.call(arguments, "multiply_next", 1 if small else len(weights.table))
        return result

    def add(
        self,
        chain: native.Chain,
        rows: Tensor,
        weights: JoinedWeights,
        result: Tensor,
        *,
        added: bool = False,
    ) -> None:
        """The same in a chain, into a result of that shape; added: to what is there. Elements of
        rows and results lie side by side. Raises ValueError."""
        arguments, rounded = self._arguments(rows, weights, result)
        arguments[self.multiply.places["added"]] = added
        if self.round is not None:
            chain.add(self.round, arguments, "round_next", rows.shape[0])
        blocks = len(weights.table)
        chain.add(self.multiply, arguments, "multiply_next", blocks, rows, weights, result, rounded)

    def _arguments(
        self, rows: Tensor, weights: JoinedWeights, result: Tensor
    ) -> tuple[Any, tuple[Tensor, ...]]:
        """And what rows are rounded to."""
        check("rows", rows, self.dtype, (rows.shape[0], weights.in_features))
        check("result", result, self.dtype, (rows.shape[0], weights.width))
        if weights.dtype != self.weights_dtype:
            raise ValueError("these weights are of another type")
        arguments, places = native.copied(weights.arguments(self.multiply)), self.multiply.places
        arguments[places["rows"]] = count = rows.shape[0]
        arguments[places["source"]] = rows.data_ptr()
        arguments[places["source_row"]] = rows.stride(0) * self.dtype.itemsize
        arguments[places["result"]] = result.data_ptr()
        arguments[places["result_row"]] = result.stride(0) * self.dtype.itemsize
        if self.round is None:
            return arguments, ()
        # An odd number of inputs leaves a place beside the last one, whose weight is 0.
        rounded = torch.empty(count, 2 * weights.pairs, dtype=torch.int16)
        row_scales = torch.empty(count, -(-weights.in_features // code.GROUP))
        arguments[places["round_tasks"]] = count
        arguments[places["rounded"]] = rounded.data_ptr()
        arguments[places["row_scales"]] = row_scales.data_ptr()
        return arguments, (rounded, row_scales)


def product_for(dtype: torch.dtype) -> LinearProduct | None:
    """For rows and weights of a type, bfloat16 or float32; None, with a line in the log, where this
    machine has none.

    With AMX there is none for bfloat16: prompts are several times as fast by oneDNN, which has its
    own layout.
    """
    if code is None or dtype not in native.DTYPES or not native.wanted():
        return None
    return compiled_product(dtype)


@cache
def compiled_product(dtype: torch.dtype) -> LinearProduct | None:
    """The same, once; it is known then."""
    wide = native.wide_registers()
    if dtype == torch.float32:
        text = code.float32_text(wide=wide)
    elif native.has_pair_dots() and not native.has_tiles():
        text = code.bfloat16_text(wide=wide)
    else:
        return None
    functions = native.functions_of(text, code.FIELDS, ("multiply",))
    if functions is None:
        return None
    product = LinearProduct(dtype, dtype, None, *functions)
    numbers = torch.Generator().manual_seed(1)
    weight = torch.randn((70, 206), generator=numbers).to(dtype)
    bias = torch.randn(70, generator=numbers)
    if not agrees(product, in_blocks(weight, bias), weight.double(), bias.double()):
        _log.warning("linear layers as machine code are wrong on this machine")
        return None
    return product


def agrees(product: LinearProduct, weights: LinearWeights, weight: Tensor, bias: Tensor) -> bool:
    """Whether a few rows give what plain arithmetic gives, and one with NaN gives NaN. weight:
    float64 [out_features, in_features], bias: float64 [out_features]."""
    numbers = torch.Generator().manual_seed(2)
    rows = torch.randn((8, weights.in_features), generator=numbers).to(product.dtype)
    rows[7, -1] = float("nan")
    joined = JoinedWeights([weights])
    result = product.run(rows, joined)[:, joined.columns[0]].double()
    expected = rows.double() @ weight.T + bias
    allowed = _TOLERANCE[product.dtype] * expected[:7].abs().max()
    right = bool(((result - expected)[:7].abs() <= allowed).all())
    return right and bool(result[7].isnan().all())


def check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raises ValueError for another tensor, or one whose elements do not lie side by side."""
    fits = tensor.shape == shape and tensor.dtype == dtype and tensor.stride(-1) == 1
    if not fits or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}, "
            f"not {shape} of {dtype} on cpu with elements side by side"
        )
