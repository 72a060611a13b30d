"""What a decoder does with each row by itself, on a CPU: norms, rotary embedding, gates.

May not know: chatserve, models. `cpu/rows.py` has the code, and the meaning.

Theory: torch does each of these in several operations of some microseconds, and a step of one row
has hundreds of them. There is no way without machine code: the functions that end in `_for` say
where there is none, and torch goes on.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from chatserve_kernels.cpu import native
from chatserve_kernels.linear import check

try:
    from chatserve_kernels.cpu import rows as code
except ImportError:  # LLVM's package is not for every machine
    code: Any = None

HEAD_DIM_STEP = 8
# Elements that one thread computes before it costs more than waking another one.
_ONE_THREAD_ELEMENTS = 1 << 15


class Norm:
    """RMSNorm with one weight: float32 [columns]."""

    def __init__(
        self, function: native.Function, dtype: torch.dtype, weight: Tensor, epsilon: float
    ) -> None:
        check("weight", weight, torch.float32, (weight.shape[0],))
        self._function, self._dtype, self._weight = function, dtype, weight
        self._columns = weight.shape[0]
        self._given = function.arguments(
            {
                "columns": self._columns,
                "weight": weight.data_ptr(),
                "epsilon": native.bits(epsilon),
            }
        )

    def run(self, rows: Tensor) -> Tensor:
        """rows: [any, columns] in the dtype → the same shape, contiguous,
        x / sqrt(mean(x²) + epsilon) * weight. Raises ValueError."""
        result = torch.empty_like(rows, memory_format=torch.contiguous_format)
        arguments = self._arguments(rows, result)
        self._function.call(arguments, "next", _tasks(rows.shape[0], self._columns))
        return result

    def add(self, chain: native.Chain, rows: Tensor, result: Tensor) -> None:
        """The same in a chain, into a result of that shape. Raises ValueError."""
        arguments = self._arguments(rows, result)
        chain.add(self._function, arguments, "next", rows.shape[0], rows, result, self)

    def _arguments(self, rows: Tensor, result: Tensor) -> Any:
        for name, tensor in (("rows", rows), ("result", result)):
            check(name, tensor, self._dtype, (rows.shape[0], self._columns))
        arguments, places = native.copied(self._given), self._function.places
        arguments[places["rows"]] = rows.shape[0]
        arguments[places["source"]] = rows.data_ptr()
        arguments[places["source_row"]] = rows.stride(0) * self._dtype.itemsize
        arguments[places["target"]] = result.data_ptr()
        arguments[places["target_row"]] = result.stride(0) * self._dtype.itemsize
        return arguments


class Rotation:
    """The norms of heads, where there are any, and rotary embedding by halves.

    norms: the weights of query and key, float32 [head_dim], and epsilon.
    """

    def __init__(
        self,
        function: native.Function,
        dtype: torch.dtype,
        head_dim: int,
        norms: tuple[Tensor, Tensor, float] | None,
    ) -> None:
        self._function, self._dtype, self._head_dim = function, dtype, head_dim
        self._norms = norms  # the addresses are of what they own
        given: dict[str, int] = {}
        if norms is not None:
            for name, weight in zip(("query", "key"), norms[:2], strict=True):
                check(f"{name} norm", weight, torch.float32, (head_dim,))
                given[f"{name}_weight"] = weight.data_ptr()
            given["epsilon"] = native.bits(norms[2])
        self._given = function.arguments(given)

    def add(
        self, chain: native.Chain, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
    ) -> None:
        """In place, in a chain. query: [rows, heads, head_dim], key: [rows, kv_heads, head_dim],
        cos and sin: [rows, head_dim], all in the dtype; elements side by side. Raises
        ValueError."""
        rows, heads, kv_heads = query.shape[0], query.shape[1], key.shape[1]
        arguments, places = native.copied(self._given), self._function.places
        arguments[places["rows"]] = rows
        arguments[places["heads"]] = heads
        arguments[places["kv_heads"]] = kv_heads
        item = self._dtype.itemsize
        for name, tensor in (("cos", cos), ("sin", sin)):
            check(name, tensor, self._dtype, (rows, self._head_dim))
            arguments[places[name]] = tensor.data_ptr()
            arguments[places[f"{name}_row"]] = tensor.stride(0) * item
        for name, tensor, count in (("query", query, heads), ("key", key, kv_heads)):
            check(name, tensor, self._dtype, (rows, count, self._head_dim))
            arguments[places[name]] = tensor.data_ptr()
            arguments[places[f"{name}_row"]] = tensor.stride(0) * item
            arguments[places[f"{name}_head"]] = tensor.stride(1) * item
        chain.add(self._function, arguments, "next", rows, query, key, cos, sin, self)


class Gate:
    """An activation of one half of a row, times the other."""

    def __init__(self, function: native.Function, dtype: torch.dtype) -> None:
        self._function, self._dtype = function, dtype

    def add(self, chain: native.Chain, gate: Tensor, up: Tensor, result: Tensor) -> None:
        """gate, up: [rows, columns] in the dtype, elements side by side; the columns are a multiple
        of 16 → result, of the same shape, activation(gate) * up. In a chain. Raises ValueError."""
        rows, columns = gate.shape
        if columns % code.LANES:
            raise ValueError(f"{columns} columns are no multiple of {code.LANES}")
        row_tasks = -(-columns // code.GATE_COLUMNS)
        values = {"tasks": rows * row_tasks, "row_tasks": row_tasks, "columns": columns}
        for name, tensor in (("gate", gate), ("up", up), ("target", result)):
            check(name, tensor, self._dtype, (rows, columns))
            values[name] = tensor.data_ptr()
            values[f"{name}_row"] = tensor.stride(0) * self._dtype.itemsize
        arguments = self._function.arguments(values)
        chain.add(self._function, arguments, "next", rows * row_tasks, gate, up, result)


def norm_for(weight: Tensor, epsilon: float, dtype: torch.dtype) -> Norm | None:
    """For rows of a type; None where this machine, or the number of columns, has none."""
    if not _served(dtype) or weight.shape[0] % code.LANES:
        return None
    function = _norm(dtype)
    return None if function is None else Norm(function, dtype, weight, epsilon)


def rotation_for(
    head_dim: int, norms: tuple[Tensor, Tensor, float] | None, dtype: torch.dtype
) -> Rotation | None:
    """norms: as `Rotation` wants them. None where this machine, or the size, has none."""
    if not _served(dtype) or head_dim % HEAD_DIM_STEP:
        return None
    function = _rotation(dtype, head_dim, norms is not None)
    return None if function is None else Rotation(function, dtype, head_dim, norms)


def gate_for(columns: int, dtype: torch.dtype, *, gelu: bool) -> Gate | None:
    """gelu: by tanh; SiLU otherwise. None where this machine, or the number of columns, has
    none."""
    if not _served(dtype) or columns % code.LANES:
        return None
    function = _gate(dtype, gelu)
    return None if function is None else Gate(function, dtype)


def _served(dtype: torch.dtype) -> bool:
    return code is not None and dtype in native.DTYPES and native.wanted()


@cache
def _norm(dtype: torch.dtype) -> native.Function | None:
    text = code.norm_text(bfloat16=dtype == torch.bfloat16)
    functions = native.functions_of(text, code.NORM_FIELDS, ("norm",))
    return None if functions is None else functions[0]


@cache
def _rotation(dtype: torch.dtype, head_dim: int, norms: bool) -> native.Function | None:
    text = code.rotate_text(bfloat16=dtype == torch.bfloat16, head_dim=head_dim, norms=norms)
    functions = native.functions_of(text, code.ROTATE_FIELDS, ("rotate",))
    return None if functions is None else functions[0]


@cache
def _gate(dtype: torch.dtype, gelu: bool) -> native.Function | None:
    text = code.gate_text(bfloat16=dtype == torch.bfloat16, gelu=gelu)
    functions = native.functions_of(text, code.GATE_FIELDS, ("gate",))
    return None if functions is None else functions[0]


def _tasks(rows: int, columns: int) -> int:
    """How many threads are worth waking, at most."""
    return 1 if rows * columns <= _ONE_THREAD_ELEMENTS else rows
