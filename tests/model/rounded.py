"""What pages of fp8 are held against: transformers' own models, whose attention rounds K and V."""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from chatserve_kernels import fp8

ROUNDED_EAGER = "rounded_eager"
# Of a logit. Two ways to the same number differ in float32's last bits, and where it lies between
# two of e4m3, about once in some hundred tokens of these models, they are rounded apart.
ROUNDED_TOLERANCE = 0.3


def stored(rows: Tensor) -> Tensor:
    """What is read of [any, any, any, head_dim] after it was stored."""
    return fp8.widened(*fp8.rounded(rows), rows.dtype)


def rounded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [1, heads, rows, head_dim], the mask to be added."""
    group = query.shape[1] // key.shape[1]
    key, value = (stored(each).repeat_interleave(group, dim=1) for each in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scale + attention_mask
    return (scores.softmax(dim=3) @ value).transpose(1, 2), None


AttentionInterface.register(ROUNDED_EAGER, rounded_attention)
AttentionMaskInterface.register(ROUNDED_EAGER, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
