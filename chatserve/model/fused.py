"""Norms and whole layers of a decoder in fewer, larger operations on a CPU.

May not know: requests, page ownership. Nothing here is needed: a model is right without it.

Theory: transformers writes a layer as some sixty operations of torch, and with one row, or a small
model, reaching them costs more than computing. A layer of a known class (`_LAYERS`) becomes a dozen
programs in a chain (`cpu/chain.py`), all layers of a model in one: what they give is there when the
last of them has run it. Norms of other models become one operation each. Either is taken only where
it gives what it gave before, for a few rows. Rows do not show what depends on a position in another
way than through the rotary embedding, so layers are taken of classes that are known; what their
attention asks for besides (scale, window, soft cap) is what it asked for in the trial.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from chatserve.errors import ModelRefused
from chatserve.model.attention import ChainedPaged, LayerCall, Paged, check_asked
from chatserve.model.blocks import BlockLinear, JoinedBlocks
from chatserve_kernels.cpu.native import Chain, new_chain
from chatserve_kernels.rows import Gate, Norm, Rotation, gate_for, norm_for, rotation_for

_LAYERS = frozenset(
    {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
)
# transformers' names of activations.
_GELU = {"silu": False, "gelu_pytorch_tanh": True}
# Of a trial's rows: what a part does to large numbers only must show as well.
_SIZES = (1.0, 1.0, 30.0)
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}

_log = logging.getLogger(__name__)


class FusedNorm(nn.Module):
    """RMSNorm."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, rows: Tensor) -> Tensor:
        """[..., columns] → the same."""
        return self.norm.run(rows.reshape(-1, rows.shape[-1])).view(rows.shape)


@dataclass(frozen=True, slots=True, eq=False)
class _Parts:
    """Of a layer: x += output(attention(first norm(x))), x += down(gate(second norm(x)))."""

    head_dim: int
    first_norm: Norm
    projections: JoinedBlocks  # query, key, value
    rotation: Rotation
    output: JoinedBlocks
    second_norm: Norm
    gate_and_up: JoinedBlocks
    gate: Gate
    down: JoinedBlocks


class FusedLayer(nn.Module):
    """A decoder layer in a chain; a call without pages goes to the original.

    asked: what its attention asks for. last: whether this layer runs the chain.
    """

    def __init__(self, original: nn.Module, parts: _Parts, asked: LayerCall, last: bool) -> None:
        super().__init__()
        self._name, self._parts, self._last = type(original).__name__, parts, last
        self._layer, self._scale = asked.layer, asked.scale
        self._window, self._soft_cap = asked.window, asked.soft_cap
        self.original: nn.Module | None = original

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        paged: Paged | None = None,
        **others: Any,
    ) -> Tensor:
        """hidden_states: [1, rows, hidden] → the same tensor, in which the result will be. Raises
        ModelRefused as `paged_attention_forward` does."""
        chain = getattr(paged, "chain", None)
        if not isinstance(chain, Chain):
            assert self.original is not None, "a model that serves is called with pages alone"
            return self.original(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                paged=paged,
                **others,
            )
        check_asked(self._name, attention_mask, others)
        self._add(cast(ChainedPaged, paged), chain, hidden_states[0], position_embeddings)
        if self._last:
            chain.run()
        return hidden_states

    def _add(
        self, paged: ChainedPaged, chain: Chain, x: Tensor, positions: tuple[Tensor, Tensor]
    ) -> None:
        """x: [rows, hidden]"""
        parts, rows, room = self._parts, x.shape[0], paged.room
        normed = room("normed", rows, x.shape[1])
        parts.first_norm.add(chain, x, normed)
        projected = room("projected", rows, parts.projections.width)
        query, key, value = (
            each.unflatten(1, (-1, parts.head_dim))
            for each in parts.projections.add(chain, normed, projected)
        )
        cos, sin = positions
        parts.rotation.add(chain, query, key, cos[0], sin[0])
        call = LayerCall(
            layer=self._layer,
            query=query,
            key=key,
            value=value,
            scale=self._scale,
            window=self._window,
            soft_cap=self._soft_cap,
            sinks=None,
        )
        mixed = room("mixed", rows, query.shape[1] * parts.head_dim)
        paged.attend_later(call, mixed.unflatten(1, (-1, parts.head_dim)))
        parts.output.add(chain, mixed, x, added=True)
        parts.second_norm.add(chain, x, normed)
        both = room("gate and up", rows, parts.gate_and_up.width)
        gate, up = parts.gate_and_up.add(chain, normed, both)
        gated = room("gated", rows, gate.shape[1])
        parts.gate.add(chain, gate, up, gated)
        parts.down.add(chain, gated, x, added=True)


@dataclass(frozen=True, slots=True)
class Fusion:
    """What was fused: where, and in place of what."""

    places: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)

    def undo(self) -> None:
        """Every part as it was."""
        for parent, name, part in self.places:
            setattr(parent, name, part)
        self.places.clear()

    def settle(self) -> None:
        """Let the originals go: nobody calls the model without pages any more."""
        for parent, name, _ in self.places:
            fused = getattr(parent, name)
            if isinstance(fused, FusedLayer):
                fused.original = None
        self.places.clear()


def fuse(model: nn.Module) -> Fusion:
    """Replace the parts of a model on a CPU that gain by it. The model's attention is ours
    (`attention.py`), and its linear layers are packed before."""
    fusion = Fusion()
    _fuse_children(model, fusion)
    return fusion


def _fuse_children(parent: nn.Module, fusion: Fusion) -> None:
    children = list(parent.named_children())
    fused: Sequence[nn.Module | None] = [None] * len(children)
    if isinstance(parent, nn.ModuleList):
        fused = _fused_layers([child for _, child in children]) or fused
    for (name, child), layer in zip(children, fused, strict=True):
        better = layer
        if better is None and type(child).__name__.endswith("RMSNorm"):
            norm = _tried(child, _as_norm)
            better = None if norm is None else FusedNorm(norm)
        if better is None:
            _fuse_children(child, fusion)
            continue
        setattr(parent, name, better)
        fusion.places.append((parent, name, child))


def _tried(part: nn.Module, make: Any) -> Any:
    """What `make` makes of a part; None where it cannot, with a line in the log."""
    try:
        with torch.inference_mode():
            return make(part)
    except (RuntimeError, ValueError, TypeError, AttributeError, ModelRefused) as error:
        _log.info("%s is left as it is: %s", type(part).__name__, error)
        return None


def _fused_layers(layers: Sequence[nn.Module]) -> list[FusedLayer] | None:
    """All of a model's, or None: a layer between them would read what is not there yet."""
    fused: list[FusedLayer] = []
    for layer in layers:
        if type(layer).__name__ not in _LAYERS:
            return None
        last = len(fused) == len(layers) - 1
        made: FusedLayer | None = _tried(layer, partial(_as_layer, last=last))
        if made is None:
            return None
        fused.append(made)
    return fused


def _as_norm(original: nn.Module) -> Norm | None:
    """With the weight as it is, or 1 above it, as some families have it."""
    for weight, epsilon, dtype in _weights(original):
        norm = norm_for(weight, epsilon, dtype)
        if norm is None:
            return None
        rows = _random_rows(weight.shape[0], dtype)
        if _agree([norm.run(rows)], [original(rows)]):
            return norm
    return None


def _weights(norm: nn.Module) -> list[tuple[Tensor, float, torch.dtype]]:
    """What an RMSNorm multiplies with, perhaps: float32 [columns], its epsilon, its type."""
    parts: Any = norm
    given: Tensor = parts.weight
    epsilon = getattr(norm, "variance_epsilon", None)
    epsilon = float(parts.eps if epsilon is None else epsilon)
    weight = given.detach().float()
    return [(weight + more, epsilon, given.dtype) for more in (0.0, 1.0)]


def _as_layer(original: nn.Module, *, last: bool) -> FusedLayer | None:
    whole: Any = original
    attention, feed_forward = whole.self_attn, whole.mlp
    dtype: torch.dtype = whole.input_layernorm.weight.dtype
    head_dim: int = attention.head_dim
    linears = [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [feed_forward.gate_proj, feed_forward.up_proj],
        [feed_forward.down_proj],
    ]
    if not all(isinstance(each, BlockLinear) for group in linears for each in group):
        return None
    projections, output, gate_and_up, down = map(JoinedBlocks, linears)
    # They write into rows that are as wide as what they are added to.
    if {output.width, down.width} != {projections.in_features}:
        return None
    rotation = rotation_for(head_dim, _head_norms(attention), dtype)
    gelu = _GELU.get(attention.config.hidden_act)
    gate = None if gelu is None else gate_for(down.in_features, dtype, gelu=gelu)
    norms = _as_norm(whole.input_layernorm), _as_norm(whole.post_attention_layernorm)
    if rotation is None or gate is None or norms[0] is None or norms[1] is None:
        return None
    parts = _Parts(
        head_dim, norms[0], projections, rotation, output, norms[1], gate_and_up, gate, down
    )
    rows = _random_rows(projections.in_features, dtype)
    angles = _random_rows(head_dim // 2, torch.float32).repeat(1, 2)
    positions = angles.cos().to(dtype)[None], angles.sin().to(dtype)[None]
    expected_calls = _Recorder(None, dtype)
    expected = original(rows[None].clone(), position_embeddings=positions, paged=expected_calls)
    (asked,) = expected_calls.calls
    chain = new_chain()
    if asked.sinks is not None or chain is None:
        return None
    fused = FusedLayer(original, parts, asked, last)
    calls = _Recorder(chain, dtype)
    result = fused(rows[None].clone(), position_embeddings=positions, paged=calls)
    chain.run()
    (call,) = calls.calls
    right = _agree(
        [result, call.query, call.key, call.value],
        [expected, asked.query, asked.key, asked.value],
    )
    return fused if right else None


def _head_norms(attention: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """The weights of the norms of query and key, where there are any, and their epsilon."""
    parts: Any = attention
    if getattr(attention, "q_norm", None) is None:
        return None
    query, key = _as_norm_of_heads(parts.q_norm), _as_norm_of_heads(parts.k_norm)
    if query[1] != key[1]:
        raise ValueError("norms of query and key have different epsilons")
    return query[0], key[0], query[1]


def _as_norm_of_heads(norm: nn.Module) -> tuple[Tensor, float]:
    weight, epsilon, _ = _weights(norm)[0]
    return weight, epsilon


class _Recorder:
    """Stands in for pages: attention is one set of random numbers. chain: None for a layer that is
    to be computed at once."""

    def __init__(self, chain: Chain | None, dtype: torch.dtype) -> None:
        self.chain, self._dtype = chain, dtype
        self.calls: list[LayerCall] = []

    def attend(self, call: LayerCall) -> Tensor:
        """[rows, heads, head_dim]"""
        self.calls.append(call)
        _, heads, head_dim = call.query.shape
        return _random_rows(heads * head_dim, call.query.dtype).unflatten(1, (-1, head_dim))

    def attend_later(self, call: LayerCall, result: Tensor) -> None:
        """Into the result, at once."""
        assert self.chain is not None
        self.chain.run()
        result.copy_(self.attend(call))

    def room(self, name: str, rows: int, columns: int) -> Tensor:
        """[rows, columns]"""
        return torch.empty(rows, columns, dtype=self._dtype)


def _random_rows(columns: int, dtype: torch.dtype) -> Tensor:
    """The same ones each time: [trial rows, columns]."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(len(_SIZES), columns, generator=generator)
    return (rows * torch.tensor(_SIZES)[:, None]).to(dtype)


def _agree(results: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether each row of each tensor is as it should be."""
    for result, wanted in zip(results, expected, strict=True):
        mine, theirs = (each.float().reshape(len(_SIZES), -1) for each in (result, wanted))
        differences = (mine - theirs).norm(dim=1) / theirs.norm(dim=1).clamp_min(1e-6)
        if not bool((differences <= _TOLERANCE[result.dtype]).all()):  # not: NaN must fail too
            return False
    return True
