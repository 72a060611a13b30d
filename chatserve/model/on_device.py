"""Norms and gates of a model on a GPU, each in one operation.

May not know: requests, page ownership. Nothing here is needed: a model is right without it, and
`fused.py` takes a part where it gives what transformers' own gives.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from chatserve_kernels import gated, rms_norm

_GATES_MAX = 8.0  # beyond it activations are nothing, or what they are given


class NormOnDevice(nn.Module):
    """RMSNorm. weight: float32 [columns]."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self._weight, self._epsilon = weight, epsilon

    def forward(self, rows: Tensor) -> Tensor:
        """[..., columns] → the same."""
        flat = rows.reshape(-1, rows.shape[-1])
        return rms_norm(flat, self._weight, self._epsilon).view(rows.shape)


class FeedForwardOnDevice(nn.Module):
    """down(activation(gate) * up), with the linear layers of transformers' own."""

    def __init__(self, original: nn.Module, *, tanh: bool) -> None:
        super().__init__()
        parts: Any = original
        self.gate_proj: nn.Module = parts.gate_proj
        self.up_proj: nn.Module = parts.up_proj
        self.down_proj: nn.Module = parts.down_proj
        self._tanh = tanh

    def forward(self, rows: Tensor) -> Tensor:
        """[..., hidden] → the same."""
        gates, ups = self.gate_proj(rows), self.up_proj(rows)
        both = (each.reshape(-1, gates.shape[-1]) for each in (gates, ups))
        return self.down_proj(gated(*both, gelu=self._tanh).view(gates.shape))


def feed_forward_on_device(original: nn.Module) -> FeedForwardOnDevice | None:
    """None where its activation is neither SiLU nor GELU by tanh."""
    parts: Any = original
    points = torch.linspace(-_GATES_MAX, _GATES_MAX, 97, device=parts.gate_proj.weight.device)
    given = parts.act_fn(points)
    for tanh, known in ((False, silu(points)), (True, gelu(points, approximate="tanh"))):
        if torch.allclose(given, known, rtol=1e-5, atol=1e-5):
            return FeedForwardOnDevice(original, tanh=tanh)
    return None
