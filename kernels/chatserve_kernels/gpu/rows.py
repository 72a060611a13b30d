"""Norms and gates of rows on a GPU: tensors to the kernels of `row_programs.py`.

May not know: layers. The doors in `ops.py` have checked what comes in.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from chatserve_kernels import gpu
from chatserve_kernels.gpu import row_programs
from chatserve_kernels.gpu.tiles import power_of_two
from chatserve_kernels.trial import TOLERANCE

# What a program holds at a time: a whole row, or as many short ones.
NORM_ELEMENTS_MAX = 1 << 14
NORM_ELEMENTS = 1 << 11
GATE_ELEMENTS = 1 << 10
EPSILON = 1e-5  # in trials


def serves_norm(rows: Tensor) -> bool:
    """Whether the kernel takes rows like these, [any, columns], and has passed its trial."""
    if not gpu.serves(rows.device.type) or rows.dtype not in TOLERANCE:
        return False
    columns = rows.shape[1]
    if not 0 < columns <= NORM_ELEMENTS_MAX:
        return False
    return gpu.interpreted() or _norm_trusted(columns, rows.dtype, rows.device)


def serves_gate(gates: Tensor, *, gelu: bool) -> bool:
    """Whether the kernel takes rows like these, and has passed its trial."""
    if not gpu.serves(gates.device.type) or gates.dtype not in TOLERANCE:
        return False
    return gpu.interpreted() or _gate_trusted(gelu, gates.dtype, gates.device)


def rms_norm(rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """As `ops.rms_norm` has them."""
    count, columns = rows.shape
    result = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    if count == 0:
        return result
    rows = _side_by_side(rows)
    elements = power_of_two(columns)
    together = max(1, NORM_ELEMENTS // elements)
    gpu.launched(row_programs.norm, (-(-count // together),))(
        rows,
        weight.contiguous(),
        result,
        count,
        rows.stride(0),
        epsilon,
        COLUMNS=columns,
        ELEMENTS=elements,
        TOGETHER=together,
        num_warps=16 if elements > NORM_ELEMENTS else 4,
    )
    return result


def gated(gates: Tensor, ups: Tensor, *, gelu: bool) -> Tensor:
    """As `ops.gated` has them."""
    rows, columns = gates.shape
    result = torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)
    if result.numel() == 0:
        return result
    gates, ups = _side_by_side(gates), _side_by_side(ups)
    gpu.launched(row_programs.gate, (rows, -(-columns // GATE_ELEMENTS)))(
        gates,
        ups,
        result,
        gates.stride(0),
        ups.stride(0),
        columns,
        GELU=gelu,
        TOGETHER=GATE_ELEMENTS,
        num_warps=4,
    )
    return result


def _side_by_side(rows: Tensor) -> Tensor:
    """The same, elements of a row next to each other."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


@cache
def _norm_trusted(columns: int, dtype: torch.dtype, device: torch.device) -> bool:
    return gpu.passes("norms", device, lambda: _norm_agrees(columns, dtype, device))


@cache
def _gate_trusted(gelu: bool, dtype: torch.dtype, device: torch.device) -> bool:
    return gpu.passes("gates", device, lambda: _gate_agrees(gelu, dtype, device))


def _norm_agrees(columns: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether small and large rows, more than a program's, come out as float64 has them."""
    count = 3 + max(1, NORM_ELEMENTS // power_of_two(columns))
    numbers = torch.Generator().manual_seed(1)
    rows = torch.randn((count, columns), generator=numbers).to(dtype)
    rows[1] *= 100
    weight = torch.randn(columns, generator=numbers)
    result = rms_norm(rows.to(device), weight.to(device), EPSILON)
    wide = rows.double()
    scale = (wide.square().mean(dim=1, keepdim=True) + EPSILON).rsqrt()
    return _close(result, wide * scale * weight)


def _gate_agrees(gelu: bool, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether two rows that end in the middle of a program come out as float64 has them."""
    numbers = torch.Generator().manual_seed(1)
    gates, ups = torch.randn((2, 2, GATE_ELEMENTS + 5), generator=numbers).to(dtype)
    gates[1] *= 30
    wide = gates.double()
    active = F.gelu(wide, approximate="tanh") if gelu else F.silu(wide)
    return _close(gated(gates.to(device), ups.to(device), gelu=gelu), active * ups.double())


def _close(result: Tensor, expected: Tensor) -> bool:
    difference = (result.cpu().double() - expected).norm(dim=1)
    return bool((difference <= TOLERANCE[result.dtype] * expected.norm(dim=1)).all())
