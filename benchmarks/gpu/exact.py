"""What the operations mean, in float64 and many numbers at a time.

`chatserve_kernels.reference` says it in plain loops, which take hours for the contexts of a GPU;
a test holds these functions against it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from chatserve_kernels import AttentionBatch


def paged_attention(
    query: Tensor,
    kv: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """As `reference.paged_attention` has them; the result is float64."""
    result = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    group = query.shape[1] // kv.shape[3]
    for sequence, context in enumerate(batch.context_lengths):
        rows = slice(batch.query_starts[sequence], batch.query_starts[sequence + 1])
        table = batch.page_tables[sequence, : -(-context // batch.page_size)].long()
        # [2, heads, context, head_dim]
        both = kv[table].transpose(0, 1).flatten(1, 2)[:, :context].double().transpose(1, 2)
        key, value = both.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,hkd->hqk", query[rows].double(), key) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        position = torch.arange(context, device=query.device)
        own = position[context - scores.shape[1] :, None]
        seen = position <= own
        if window is not None:
            seen &= position > own - window
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            added = sinks.double()[:, None, None].expand(*scores.shape[:2], 1)
            scores = torch.cat((scores, added), dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :context]
        result[rows] = torch.einsum("hqk,hkd->qhd", weights, value)
    return result


def rms_norm(rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """As `reference.rms_norm`, in float64."""
    wide = rows.double()
    return wide / (wide.square().mean(dim=1, keepdim=True) + epsilon).sqrt() * weight.double()


def rotated(
    heads: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, epsilon: float
) -> Tensor:
    """As `reference.rotated`, in float64."""
    wide = heads.double()
    if weight is not None:
        wide = wide / (wide.square().mean(dim=2, keepdim=True) + epsilon).sqrt() * weight.double()
    low, high = wide.chunk(2, dim=2)
    across = torch.cat((-high, low), dim=2)
    return wide * cos.double()[:, None] + across * sin.double()[:, None]


def gated(gates: Tensor, ups: Tensor, *, gelu: bool) -> Tensor:
    """As `reference.gated`, in float64."""
    wide = gates.double()
    return (F.gelu(wide, approximate="tanh") if gelu else F.silu(wide)) * ups.double()


def error(result: Tensor, right: Tensor) -> float:
    """The norm of their difference by that of what is right; NaN where anything is NaN."""
    return float((result.double() - right.double()).norm() / right.double().norm())
