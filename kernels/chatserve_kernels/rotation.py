"""Rotary embedding of a step's rows, on their way into pages.

May not know: layers, models. `gpu/rotation.py` has the kernel; machine code for a CPU is elsewhere
(`rows.py`), since there the rotation is one program of a chain.

Theory: a decoder norms the heads of query and key, where its family does that, turns pairs of their
elements by the angles of the row's position (RoFormer, arXiv 2104.09864; element i with element
i + head_dim / 2) and keeps key and value. On a GPU these are some twenty launches of torch for each
layer, each of which takes longer to begin than to compute where there are few rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from chatserve_kernels import gpu
from chatserve_kernels.batch import AttentionBatch
from chatserve_kernels.ops import append_kv, check_append


@dataclass(frozen=True, slots=True, eq=False)
class HeadNorms:
    """RMSNorms of the heads of query and key. query, key: float32 [head_dim], their weights."""

    query: Tensor
    key: Tensor
    epsilon: float


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """What a layer's query and key still lack.

    cos, sin: [rows, head_dim], of the angles of each row's position. norms: before them, or None.
    """

    cos: Tensor
    sin: Tensor
    norms: HeadNorms | None = None


def rotate_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv: Tensor,
    batch: AttentionBatch,
    rotary: Rotary,
    scales: Tensor | None = None,
) -> None:
    """Norms of heads and rotary embedding of query and key, then `append_kv`.

    query: [rows, heads, head_dim], changed in place: what `paged_attention` takes. key, value, kv,
    batch, scales: as `append_kv` has them; whether the key is changed is not said. query and key:
    any strides, but no two elements in one place; rotary: of the query's dtype. Arithmetic in
    float32, rounded once to that dtype; pages of fp8 then get what `append_kv` would make of it.
    Raises ValueError.
    """
    check_append(key, value, kv, batch, scales)
    _check(query, key, rotary)
    if gpu.serves(query.device.type):
        from chatserve_kernels.gpu import rotation as on_gpu

        if on_gpu.serves(query, key, value, kv, rotary):
            if batch.write_rows is None:
                on_gpu.rotate_append(query, key, value, kv, batch, rotary, scales)
                return
            on_gpu.rotate(query, key, rotary)
            append_kv(key, value, kv, batch, scales)
            return
    query.copy_(rotated(query, rotary, None if rotary.norms is None else rotary.norms.query))
    key = rotated(key, rotary, None if rotary.norms is None else rotary.norms.key)
    append_kv(key, value, kv, batch, scales)


def rotated(heads: Tensor, rotary: Rotary, weight: Tensor | None) -> Tensor:
    """[rows, any, head_dim] → the same, by torch. weight: float32 [head_dim], of their norm."""
    wide = heads.float()
    if weight is not None:
        assert rotary.norms is not None, "a weight is of norms"
        mean = wide.square().mean(dim=-1, keepdim=True)
        wide = wide * (mean + rotary.norms.epsilon).rsqrt_() * weight
    low, high = wide.chunk(2, dim=-1)
    across = torch.cat((-high, low), dim=-1)
    cos, sin = rotary.cos.float()[:, None], rotary.sin.float()[:, None]
    return (wide * cos + across * sin).to(heads.dtype)


def _check(query: Tensor, key: Tensor, rotary: Rotary) -> None:
    rows, kv_heads, head_dim = key.shape
    if query.ndim != 3 or query.shape[0] != rows or query.shape[2] != head_dim:
        raise ValueError(f"query is {tuple(query.shape)}, not [{rows}, heads, {head_dim}]")
    if query.shape[1] % kv_heads:
        raise ValueError(f"{query.shape[1]} heads are no multiple of {kv_heads} kv heads")
    if head_dim % 2:
        raise ValueError(f"heads of {head_dim} elements have no halves")
    if query.dtype != key.dtype:
        raise ValueError(f"query is {query.dtype}, key {key.dtype}")
    for name, tensor in (("cos", rotary.cos), ("sin", rotary.sin)):
        if tensor.shape != (rows, head_dim) or tensor.dtype != query.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"not {query.dtype} {(rows, head_dim)}"
            )
    if rotary.norms is None:
        return
    for name, tensor in (("query", rotary.norms.query), ("key", rotary.norms.key)):
        if tensor.shape != (head_dim,) or tensor.dtype != torch.float32:
            raise ValueError(
                f"the {name}'s norm is {tensor.dtype} {tuple(tensor.shape)}, "
                f"not torch.float32 {(head_dim,)}"
            )
