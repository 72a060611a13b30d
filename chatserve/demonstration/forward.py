"""The model's forward pass for training: rows of any lengths in one slice, without padding.

    ids        [tokens]             the rows of a slice, one after the other
    lengths    (row, row, ...)      their lengths, which add up to `tokens`
    hidden     [tokens, 256]

It reads the weights of a transformers Qwen3 and computes what that computes, which a test compares.
Written out because on a CPU it is twice as fast: nothing is padded, weights are cast once a step,
and attention multiplies whole blocks of queries with what lies before them, which beats the fused
CPU kernel in bf16.  Gradients of the norms and of attention are written out for the same reason.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import Qwen3ForCausalLM

EMBEDDING = "model.embed_tokens.weight"
QUERY_BLOCK = 256

Weights = Mapping[str, torch.Tensor]


class Norm(torch.autograd.Function):
    """Root mean square norm over the last axis; the sums are taken in float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Scale each vector to length one, by component, and by the weight."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (length.square() / x.shape[-1] + epsilon).rsqrt().to(x.dtype)
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """The part of the gradient along the vector itself drops out."""
        (grad,) = grads
        unit, scale, weight = ctx.saved_tensors
        along_weight = (grad * unit).flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype)
        inner = grad * weight
        share = (inner * unit).sum(-1, keepdim=True, dtype=torch.float32) / unit.shape[-1]
        return (inner - unit * share.to(unit.dtype)) * scale, along_weight, None


class CausalAttention(torch.autograd.Function):
    """Causal attention within each row.

    q, out  [heads, tokens, size]      k, v  [kv heads, tokens, size]

    The heads that share a kv head lie behind each other, so a block of their queries is one matrix.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: Sequence[int],
    ) -> torch.Tensor:
        """Softmax of scaled products, block of queries by block of queries."""
        groups, size = k.shape[0], q.shape[2]
        q = q * size**-0.5
        out = torch.empty_like(q)
        shares: list[torch.Tensor] = []
        for row, first, last in blocks(lengths):
            queries = q[:, first:last].reshape(groups, -1, size)
            scores = torch.bmm(queries, k[:, row:last].transpose(1, 2))
            mask_later(scores, first - row, last - first)
            share = functional.softmax(scores, -1)
            shares.append(share)
            out[:, first:last] = torch.bmm(share, v[:, row:last]).view(-1, last - first, size)
        ctx.save_for_backward(q, k, v, *shares)
        ctx.lengths = lengths
        return out

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        """The same blocks again; keys and values gather their gradients in float32."""
        (grad,) = grads
        q, k, v, *shares = ctx.saved_tensors
        groups, size = k.shape[0], q.shape[2]
        q_grad = torch.empty_like(q)
        k_grad = torch.zeros_like(k, dtype=torch.float32)
        v_grad = torch.zeros_like(v, dtype=torch.float32)
        for (row, first, last), share in zip(blocks(ctx.lengths), shares, strict=True):
            queries = q[:, first:last].reshape(groups, -1, size)
            out = grad[:, first:last].reshape(groups, -1, size)
            v_grad[:, row:last] += torch.bmm(share.transpose(1, 2), out)
            inner = torch.bmm(out, v[:, row:last].transpose(1, 2))
            scores = torch.ops.aten._softmax_backward_data(inner, share, -1, share.dtype)
            k_grad[:, row:last] += torch.bmm(scores.transpose(1, 2), queries)
            q_grad[:, first:last] = torch.bmm(scores, k[:, row:last]).view(-1, last - first, size)
        return q_grad * size**-0.5, k_grad.to(k.dtype), v_grad.to(v.dtype), None


def blocks(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Each block of queries: where its row begins, where it begins, and where it ends."""
    found: list[tuple[int, int, int]] = []
    row = 0
    for length in lengths:
        for first in range(0, length, QUERY_BLOCK):
            found.append((row, row + first, row + min(length, first + QUERY_BLOCK)))
        row += length
    return found


def mask_later(scores: torch.Tensor, before: int, count: int) -> None:
    """Hide the keys after each query; `before` keys lie before the block of `count` queries."""
    own = scores.view(-1, count, scores.shape[-1])[:, :, before:]
    later = torch.ones((count, count), dtype=torch.bool, device=scores.device).triu(1)
    own.masked_fill_(later, float("-inf"))


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: x `[heads, tokens, size]`, cos and sin `[tokens, size / 2]`."""
    left, right = x.chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


def cast(model: Qwen3ForCausalLM, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights as leaves of this precision; the embedding keeps its own, to add up well."""
    return {
        name: value if name == EMBEDDING else value.detach().to(dtype).requires_grad_()
        for name, value in model.named_parameters()
    }


def hidden_states(
    model: Qwen3ForCausalLM, weights: Weights, ids: torch.Tensor, lengths: Sequence[int]
) -> torch.Tensor:
    """What the model makes of each token, normed for the output layer."""
    config = model.config
    epsilon, size = config.rms_norm_eps, config.head_dim
    dtype = weights["model.norm.weight"].dtype
    x = functional.embedding(ids, weights[EMBEDDING]).to(dtype)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(ids.device)
    cos, sin = model.model.rotary_emb(x[None], positions[None])
    cos, sin = (part[0, :, : size // 2].to(dtype) for part in (cos, sin))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return Norm.apply(x, weights[name], epsilon)  # pyright: ignore[reportReturnType]

    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}."

        def project(x: torch.Tensor, name: str, layer: str = layer) -> torch.Tensor:
            return functional.linear(x, weights[f"{layer}{name}_proj.weight"])

        y = norm(x, f"{layer}input_layernorm.weight")
        q, k, v = (
            project(y, f"self_attn.{part}").view(len(ids), -1, size).transpose(0, 1)
            for part in "qkv"
        )
        q = rotated(norm(q, f"{layer}self_attn.q_norm.weight"), cos, sin)
        k = rotated(norm(k, f"{layer}self_attn.k_norm.weight"), cos, sin)
        y: torch.Tensor = CausalAttention.apply(q, k, v, lengths)  # pyright: ignore[reportAssignmentType]
        x = x + project(y.transpose(0, 1).reshape(len(ids), -1), "self_attn.o")
        y = norm(x, f"{layer}post_attention_layernorm.weight")
        y = functional.silu(project(y, "mlp.gate")) * project(y, "mlp.up")
        x = x + project(y, "mlp.down")
    return norm(x, "model.norm.weight")
