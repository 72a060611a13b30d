"""Norms and whole layers of a decoder in fewer, larger operations on a CPU.

May not know: requests, page ownership. Nothing here is needed: a model is right without it.
`fusion.py` says what is taken; `on_device.py` is for a GPU.

Theory: transformers writes a layer as some sixty operations of torch, and with one row, or a small
model, reaching them costs more than computing. A layer of a known class becomes a dozen programs in
a chain (`cpu/chain.py`), all layers of a model in one: what they give is there when the last of
them has run it. Norms of other models become one operation each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from chatserve.model.attention import ChainedPaged, LayerCall, Paged, check_asked
from chatserve.model.blocks import BlockLinear, JoinedBlocks
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
from chatserve.model.on_device import fuse_on_device
from chatserve_kernels import gpu
from chatserve_kernels.cpu.native import Chain, Recording, new_chain
from chatserve_kernels.rows import Gate, Norm, Rotation, gate_for, norm_for, rotation_for

# Writing a layer's programs down takes a tenth of a millisecond; with many rows that is nothing.
_KEPT_ROWS_MAX, _KEPT_FRAMES_MAX = 64, 6


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


@dataclass(slots=True, eq=False)
class Frame:
    """What layers compute in, for so many rows; in it what a layer does by itself, recorded when it
    is first done: before its attention, that, and behind it."""

    x: Tensor
    cos: Tensor
    sin: Tensor
    normed: Tensor
    projected: Tensor
    mixed: Tensor
    gate_and_up: Tensor
    gated: Tensor
    layers: dict[int, tuple[Recording, LayerCall, Recording]] = field(default_factory=dict)


class Frames:
    """The frames of a model's layers, which are alike. Those of a few rows are kept."""

    def __init__(self) -> None:
        self._kept: dict[int, Frame] = {}
        self._frame: Frame | None = None

    def begin(self, parts: _Parts, hidden: Tensor, positions: tuple[Tensor, Tensor]) -> Frame:
        """A step. hidden: [rows, hidden], positions: cos and sin [rows, head_dim], or half of the
        columns, which come twice."""
        rows = hidden.shape[0]
        frame = self._kept.get(rows)
        if frame is None:
            new = hidden.new_empty
            frame = Frame(
                x=new(hidden.shape),
                cos=new(rows, parts.head_dim),
                sin=new(rows, parts.head_dim),
                normed=new(hidden.shape),
                projected=new(rows, parts.projections.width),
                mixed=new(rows, parts.output.in_features),
                gate_and_up=new(rows, parts.gate_and_up.width),
                gated=new(rows, parts.down.in_features),
            )
            if rows <= _KEPT_ROWS_MAX:
                while len(self._kept) >= _KEPT_FRAMES_MAX:
                    del self._kept[next(iter(self._kept))]
                self._kept[rows] = frame
        frame.x.copy_(hidden)
        for room, given in zip((frame.cos, frame.sin), positions, strict=True):
            room.view(rows, -1, given.shape[1]).copy_(given[:, None])
        self._frame = frame
        return frame

    @property
    def frame(self) -> Frame:
        """The step's."""
        assert self._frame is not None, "the first layer begins"
        return self._frame

    def end(self) -> None:
        """Let a large one go."""
        self._frame = None


class FusedLayer(ReplacedLayer):
    """A decoder layer in a chain.

    asked: what its attention asks for. frames: of all layers. last: whether it runs the chain.
    """

    def __init__(
        self,
        original: nn.Module,
        parts: _Parts,
        asked: LayerCall,
        frames: Frames,
        *,
        first: bool,
        last: bool,
    ) -> None:
        super().__init__(original)
        self._parts = parts
        self._frames, self._first, self._last = frames, first, last
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
        """hidden_states: [1, rows, hidden] → [1, rows, hidden], where the result will be when the
        last layer has run the chain. Raises ModelRefused as `paged_attention_forward` does."""
        chain = getattr(paged, "chain", None)
        if not isinstance(chain, Chain):
            return self.without_pages(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                paged=paged,
                **others,
            )
        check_asked(self.name, attention_mask, others)
        if self._first:
            cos, sin = position_embeddings
            self.begin(hidden_states[0], (cos[0], sin[0]))
        frame = self.add(chain, cast(ChainedPaged, paged))
        if self._last:
            chain.run()
            self.end()
        return frame.x[None]

    def begin(self, hidden: Tensor, positions: tuple[Tensor, Tensor]) -> Frame:
        """What the layers of a step compute in; as `Frames.begin`."""
        return self._frames.begin(self._parts, hidden, positions)

    def add(self, chain: Chain, paged: ChainedPaged) -> Frame:
        """This layer's programs, behind those of the layers before it."""
        frame = self._frames.frame
        recorded = frame.layers.get(self._layer)
        if recorded is None:
            recorded = frame.layers[self._layer] = self._record(frame)
        before, call, behind = recorded
        chain.repeat(before)
        paged.attend_later(call, frame.mixed.view(call.query.shape))
        chain.repeat(behind)
        return frame

    def end(self) -> None:
        """The chain has run."""
        self._frames.end()

    @property
    def shape(self) -> tuple[int, ...]:
        """Layers with the same one go into one frame."""
        parts = self._parts
        widths = (parts.projections.width, parts.gate_and_up.width)
        return parts.head_dim, parts.output.in_features, parts.down.in_features, *widths

    def _record(self, frame: Frame) -> tuple[Recording, LayerCall, Recording]:
        chain, parts = new_chain(), self._parts
        assert chain is not None, "there was one when the layer was fused"
        parts.first_norm.add(chain, frame.x, frame.normed)
        query, key, value = (
            each.unflatten(1, (-1, parts.head_dim))
            for each in parts.projections.add(chain, frame.normed, frame.projected)
        )
        parts.rotation.add(chain, query, key, frame.cos, frame.sin)
        before = chain.recorded()
        parts.output.add(chain, frame.mixed, frame.x, added=True)
        parts.second_norm.add(chain, frame.x, frame.normed)
        gate, up = parts.gate_and_up.add(chain, frame.normed, frame.gate_and_up)
        parts.gate.add(chain, gate, up, frame.gated)
        parts.down.add(chain, frame.gated, frame.x, added=True)
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
        return before, call, chain.recorded()


def fuse(model: nn.Module) -> Fusion:
    """Replace the parts of a model that gain by it. The model's attention is ours
    (`attention.py`), and on a CPU its linear layers are packed before."""
    fusion = Fusion()
    device = next(model.parameters()).device
    (fuse_on_device if gpu.serves(device.type) else _fuse_children)(model, fusion)
    return fusion


def _fuse_children(parent: nn.Module, fusion: Fusion) -> None:
    children = list(parent.named_children())
    fused: Sequence[nn.Module | None] = [None] * len(children)
    if isinstance(parent, nn.ModuleList):
        fused = _fused_layers([child for _, child in children]) or fused
    for (name, child), layer in zip(children, fused, strict=True):
        better = layer
        if better is None and type(child).__name__.endswith("RMSNorm"):
            norm = tried(child, _as_norm)
            better = None if norm is None else FusedNorm(norm)
        if better is None:
            _fuse_children(child, fusion)
        else:
            fusion.put(parent, name, better)


def _fused_layers(layers: Sequence[nn.Module]) -> list[FusedLayer] | None:
    """All of a model's, or None: a layer between them would read what is not there yet."""
    fused: list[FusedLayer] = []
    frames, shapes = Frames(), set[tuple[int, ...]]()
    for layer in layers:
        if type(layer).__name__ not in LAYERS:
            return None
        ends = {"first": not fused, "last": len(fused) == len(layers) - 1}
        made: FusedLayer | None = tried(layer, partial(_as_layer, frames=frames, ends=ends))
        if made is None:
            return None
        fused.append(made)
        shapes.add(made.shape)
    return fused if len(shapes) == 1 else None


def _as_norm(original: nn.Module) -> Norm | None:
    """With the weight as it is, or 1 above it, as some families have it."""
    for weight, epsilon, dtype in norm_weights(original):
        norm = norm_for(weight, epsilon, dtype)
        if norm is None:
            return None
        rows = random_rows(weight.shape[0], dtype)
        if agree([norm.run(rows)], [original(rows)]):
            return norm
    return None


def _as_layer(original: nn.Module, *, frames: Frames, ends: dict[str, bool]) -> FusedLayer | None:
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
    rotation = rotation_for(head_dim, head_norms(attention), dtype)
    gelu = GELU.get(attention.config.hidden_act)
    gate = None if gelu is None else gate_for(down.in_features, dtype, gelu=gelu)
    norms = _as_norm(whole.input_layernorm), _as_norm(whole.post_attention_layernorm)
    if rotation is None or gate is None or norms[0] is None or norms[1] is None:
        return None
    parts = _Parts(
        head_dim, norms[0], projections, rotation, output, norms[1], gate_and_up, gate, down
    )
    rows = random_rows(projections.in_features, dtype)
    positions = random_positions(head_dim, dtype)
    expected_calls = AttendsAtRandom()
    expected = original(rows[None], position_embeddings=positions, paged=expected_calls)
    (asked,) = expected_calls.calls
    chain = new_chain()
    if asked.sinks is not None or chain is None:
        return None
    alone = FusedLayer(original, parts, asked, Frames(), first=True, last=True)
    calls = _AttendsLater(chain)
    result = alone(rows[None], position_embeddings=positions, paged=calls)
    (call,) = calls.calls
    right = agree(
        [result, call.query, call.key, call.value],
        [expected, asked.query, asked.key, asked.value],
    )
    return FusedLayer(original, parts, asked, frames, **ends) if right else None


class _AttendsLater(AttendsAtRandom):
    """Of layers in a chain."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.chain = chain

    def attend_later(self, call: LayerCall, result: Tensor) -> None:
        """Into the result, at once."""
        self.chain.run()
        result.copy_(self.attend(call))
