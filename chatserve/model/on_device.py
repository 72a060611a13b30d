"""Layers, norms and gates of a model on a GPU, in fewer launches.

May not know: requests, page ownership. Nothing here is needed: a model is right without it.

Theory: a decode step of few rows reads the weights once and does little else, so what counts is how
many kernels stand between the matrices: each takes some microseconds, however small. transformers'
layer is some thirty launches, a layer of a known class here about ten:

    norm ─ query, key and value in one product ─ norms of heads, rotary embedding and the way into
    pages ─ attention ─ output, added to the rows ─ norm ─ gate and up in one product ─ gate
    ─ down, added to the rows

Weights that are multiplied with the same rows lie one after the other; the original's are views of
them, so nothing is there twice. Of other classes norms become one launch each, and gates, where
transformers' own give the same.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu

from chatserve.model.attention import LayerCall, Paged, check_asked
from chatserve.model.device_memory import device_memory
from chatserve.model.fusion import (
    GELU,
    LAYERS,
    AttendsAtRandom,
    Fusion,
    ReplacedLayer,
    agree,
    head_norms,
    norm_weights,
    random_positions,
    random_rows,
    tried,
)
from chatserve_kernels import HeadNorms, Rotary, gated, rms_norm
from chatserve_kernels.rotation import rotated

_GATES_MAX = 8.0  # beyond it activations are nothing, or what they are given

_log = logging.getLogger(__name__)


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


@dataclass(frozen=True, slots=True, eq=False)
class _Parts:
    """Of a layer: x += output(attention(first norm(x))), x += down(gate(second norm(x))).

    projections: weight [query, key and value of all heads, hidden] and its bias, or None. output,
    down: [hidden, any]. gate_and_up: [2 * any, hidden].
    """

    head_dim: int
    kv_heads: int
    first_norm: NormOnDevice
    projections: tuple[Tensor, Tensor | None]
    norms: HeadNorms | None
    output: Tensor
    second_norm: NormOnDevice
    gate_and_up: Tensor
    tanh: bool
    down: Tensor


class LayerOnDevice(ReplacedLayer):
    """A decoder layer. asked: what its attention asks for."""

    def __init__(self, original: nn.Module, parts: _Parts, asked: LayerCall) -> None:
        super().__init__(original)
        self._parts = parts
        self._layer, self._scale = asked.layer, asked.scale
        self._window, self._soft_cap = asked.window, asked.soft_cap

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        paged: Paged | None = None,
        **others: Any,
    ) -> Tensor:
        """hidden_states: [1, rows, hidden], which become the result, of the same shape. Raises
        ModelRefused as `paged_attention_forward` does."""
        if paged is None:
            return self.without_pages(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                **others,
            )
        check_asked(self.name, attention_mask, others)
        parts, x = self._parts, hidden_states[0]
        projected = linear(parts.first_norm(x), *parts.projections)
        heads = projected.unflatten(1, (-1, parts.head_dim))
        query, key, value = heads.tensor_split((-2 * parts.kv_heads, -parts.kv_heads), dim=1)
        cos, sin = position_embeddings
        mixed = paged.attend(
            LayerCall(
                layer=self._layer,
                query=query,
                key=key,
                value=value,
                scale=self._scale,
                window=self._window,
                soft_cap=self._soft_cap,
                sinks=None,
                rotary=Rotary(cos[0], sin[0], parts.norms),
            )
        )
        x.addmm_(mixed.reshape(x.shape[0], -1), parts.output.T)
        gates, ups = linear(parts.second_norm(x), parts.gate_and_up).chunk(2, dim=1)
        x.addmm_(gated(gates, ups, gelu=parts.tanh), parts.down.T)
        return hidden_states


def fuse_on_device(model: nn.Module, fusion: Fusion) -> None:
    """Replace what gains by it among the parts of a model. The log warns of layers that are of a
    known class and stay."""
    known = sum(type(each).__name__ in LAYERS for each in model.modules())
    _fuse_children(model, fusion)
    made = sum(isinstance(each, LayerOnDevice) for each in model.modules())
    if made < known:
        _log.warning("%d of %d layers stay as transformers has them", known - made, known)


def _fuse_children(parent: nn.Module, fusion: Fusion) -> None:
    for name, child in list(parent.named_children()):
        kind, better = type(child).__name__, None
        if kind in LAYERS:
            better = tried(child, _as_layer)
        elif kind.endswith("RMSNorm"):
            better = tried(child, _as_norm)
        elif kind.endswith("MLP"):
            better = tried(child, _as_feed_forward)
        if better is None:
            _fuse_children(child, fusion)
        else:
            fusion.put(parent, name, better)


def _as_norm(original: nn.Module) -> NormOnDevice | None:
    for weight, epsilon, dtype in norm_weights(original):
        norm = NormOnDevice(weight, epsilon)
        rows = random_rows(weight.shape[0], dtype, weight.device)
        if agree([norm(rows)], [original(rows)]):
            return norm
    return None


def _as_feed_forward(original: nn.Module) -> FeedForwardOnDevice | None:
    """None also where its activation is neither SiLU nor GELU by tanh."""
    parts: Any = original
    weight: Tensor = parts.gate_proj.weight
    rows = random_rows(weight.shape[1], weight.dtype, weight.device)
    points = torch.linspace(-_GATES_MAX, _GATES_MAX, 97, device=weight.device)
    given = parts.act_fn(points)
    for tanh, known in ((False, silu(points)), (True, gelu(points, approximate="tanh"))):
        if torch.allclose(given, known, rtol=1e-5, atol=1e-5):
            feed_forward = FeedForwardOnDevice(original, tanh=tanh)
            return feed_forward if agree([feed_forward(rows)], [original(rows)]) else None
    return None


def _as_layer(original: nn.Module) -> LayerOnDevice | None:
    whole: Any = original
    attention, feed_forward = whole.self_attn, whole.mlp
    same_rows = [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [feed_forward.gate_proj, feed_forward.up_proj],
    ]
    added = [attention.o_proj, feed_forward.down_proj]
    linears = [*same_rows[0], *same_rows[1], *added]
    tanh = GELU.get(attention.config.hidden_act)
    # A bias after attention would be a launch of its own.
    if tanh is None or any(type(each) is not nn.Linear for each in linears):
        return None
    if any(each.bias is not None for each in [*same_rows[1], *added]):
        return None
    norms = _as_norm(whole.input_layernorm), _as_norm(whole.post_attention_layernorm)
    if norms[0] is None or norms[1] is None:
        return None
    of_heads = head_norms(attention)
    head_dim: int = attention.head_dim
    projections, gate_and_up = _joined(same_rows[0]), _joined(same_rows[1])
    if (memory := device_memory(projections[0].device)) is not None:
        memory.let_go()  # what the weights lay in before: no place for the next layer's
    parts = _Parts(
        head_dim=head_dim,
        kv_heads=attention.k_proj.out_features // head_dim,
        first_norm=norms[0],
        projections=projections,
        norms=None if of_heads is None else HeadNorms(*of_heads),
        output=attention.o_proj.weight,
        second_norm=norms[1],
        gate_and_up=gate_and_up[0],
        tanh=tanh,
        down=feed_forward.down_proj.weight,
    )
    return _if_alike(original, parts)


def _if_alike(original: nn.Module, parts: _Parts) -> LayerOnDevice | None:
    """The layer, where it gives what the original gives."""
    dtype, device = parts.output.dtype, parts.output.device
    rows = random_rows(parts.output.shape[0], dtype, device)
    positions = random_positions(parts.head_dim, dtype, device)
    mine, theirs = AttendsAtRandom(), AttendsAtRandom()
    expected = original(rows[None], position_embeddings=positions, paged=theirs)
    (asked,) = theirs.calls
    if asked.sinks is not None:
        return None
    layer = LayerOnDevice(original, parts, asked)
    result = layer(rows.clone()[None], position_embeddings=positions, paged=mine)
    call = _rotated(mine.calls[0])
    right = agree(
        [result, call.query, call.key, call.value],
        [expected, asked.query, asked.key, asked.value],
    )
    return layer if right else None


def _rotated(call: LayerCall) -> LayerCall:
    """The same call, with what its query and key lack."""
    rotary = call.rotary
    assert rotary is not None
    query, key = (
        rotated(heads, rotary, None if rotary.norms is None else weight)
        for heads, weight in (
            (call.query, rotary.norms and rotary.norms.query),
            (call.key, rotary.norms and rotary.norms.key),
        )
    )
    return replace(call, query=query, key=key, rotary=None)


def _joined(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Their weights one after the other, and biases; the layers' own become views of these."""
    counts = [each.out_features for each in layers]
    weight = torch.cat([each.weight for each in layers])
    for each, part in zip(layers, weight.split(counts), strict=True):
        each.weight = nn.Parameter(part, requires_grad=False)
    biases: list[Tensor | None] = [each.bias for each in layers]
    if all(each is None for each in biases):
        return weight, None
    bias = torch.cat([
        weight.new_zeros(count) if each is None else each
        for each, count in zip(biases, counts, strict=True)
    ])  # fmt: skip
    for each, part in zip(layers, bias.split(counts), strict=True):
        each.bias = nn.Parameter(part, requires_grad=False)
    return weight, bias
