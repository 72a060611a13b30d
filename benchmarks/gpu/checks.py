"""What all cases of the grid have in common: poison, bounds, and who computed the result."""

import zlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Row
from chatserve_kernels import Rotary, gpu

# Of the norm of what is right: what rounding results, and in the short types weights, comes to.
BOUNDS = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}

TRITON, TORCH, OTHER = "Triton", "torch", "a CPU's own ways"


@contextmanager
def poisoned() -> Generator[None]:
    """Memory that nobody has written yet is NaN, or -1."""
    empty = torch.empty

    def filled(*arguments: Any, **options: Any) -> Tensor:
        result = empty(*arguments, **options)
        return result.fill_(float("nan") if result.is_floating_point() else -1)

    torch.empty = filled
    try:
        yield
    finally:
        torch.empty = empty


def case_seed(name: str) -> int:
    """Of a case's numbers: another one for each, the same in each run."""
    return zlib.crc32(name.encode())


def checked(name: str, error: float, bound: float, *, seed: int, by: str) -> Row:
    """A case's row: failed with an error over the bound, or NaN, and where a kernel was to serve
    and did not."""
    right = error <= bound
    note = f"by {by}, seed {seed}, bound {bound:g}"
    if by == TORCH:
        note = f"left to torch; {note}"
    return Row(
        name=name,
        value=error,
        unit="error",
        share=error / bound if bound else None,
        beside="bound",
        note=note,
        failed=not right or by == TORCH,
    )


# Who serves a door's tensors. Where Triton could and does not, they are left to torch.


def by_attention(query: Tensor, kv: Tensor, *, soft_cap: float | None, sinks: Tensor | None) -> str:
    """For `ops.paged_attention`."""
    if not gpu.serves(query.device.type):
        return OTHER
    from chatserve_kernels.gpu import attention

    served = attention.served(query, kv, soft_cap=soft_cap, sinks=sinks)
    return TRITON if served else TORCH


def by_pages(device: torch.device) -> str:
    """For `ops.append_kv` to plain pages, `ops.copy_pages` and `ops.page_checksums`."""
    if not gpu.serves(device.type):
        return OTHER
    from chatserve_kernels.gpu import pages

    return TRITON if pages.served(device) else TORCH


def by_rounding(device: torch.device) -> str:
    """For `ops.append_kv` to pages of fp8."""
    if not gpu.serves(device.type):
        return OTHER
    from chatserve_kernels.gpu import pages

    return TRITON if pages.rounds(device) else TORCH


def by_rotation(query: Tensor, key: Tensor, value: Tensor, kv: Tensor, rotary: Rotary) -> str:
    """For `rotate_append`."""
    if not gpu.serves(query.device.type):
        return OTHER
    from chatserve_kernels.gpu import rotation

    return TRITON if rotation.serves(query, key, value, kv, rotary) else TORCH


def by_norm(rows: Tensor) -> str:
    """For `ops.rms_norm`."""
    if not gpu.serves(rows.device.type):
        return OTHER
    from chatserve_kernels.gpu import rows as kernels

    return TRITON if kernels.serves_norm(rows) else TORCH


def by_gate(gates: Tensor, *, gelu: bool) -> str:
    """For `ops.gated`."""
    if not gpu.serves(gates.device.type):
        return OTHER
    from chatserve_kernels.gpu import rows as kernels

    return TRITON if kernels.serves_gate(gates, gelu=gelu) else TORCH


def by_choice(logits: Tensor) -> str:
    """For `sampling.choose_tokens`."""
    if not gpu.serves(logits.device.type):
        return OTHER
    from chatserve_kernels.gpu import sampling

    return TRITON if sampling.served(logits) else TORCH
