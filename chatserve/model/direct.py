"""A step through a model of chained layers without transformers' forward.

May not know: requests, page ownership. Nothing here is needed: a model is right without it.

Theory: around their layers the classes of `_MODELS` do the same: an embedding, cosines and sines of
the rotary embedding, a norm, the output layer. transformers takes long to get from one to the next
(decorators, masks, outputs), for a small model longer than all of its arithmetic. The trial at load
goes this way too, so what it gives has been compared with what the model gives by itself.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from chatserve.model.attention import ChainedPaged, check_asked
from chatserve.model.blocks import BlockLinear, JoinedBlocks
from chatserve.model.fused import FusedLayer, FusedNorm

_MODELS = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)
_POSITIONS = (0, 1, 7, 1000, 1023, 4095, 100_000)  # where angles are compared


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a model returns. logits: [1, rows wanted, vocabulary]."""

    logits: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DirectPass:
    """Called as a model of transformers is, with pages that have a chain."""

    name: str
    embeddings: nn.Embedding
    rotary: nn.Module
    frequencies: Tensor | None  # float32 [head_dim / 2], where the rotary embedding is plain
    scaling: float
    layers: tuple[FusedLayer, ...]
    norm: FusedNorm
    output: nn.Module
    output_blocks: JoinedBlocks | None

    def __call__(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        logits_to_keep: Tensor,
        paged: ChainedPaged,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> Outcome:
        """input_ids, position_ids: int64 [1, rows]; logits_to_keep: int64, some of the rows. Raises
        ModelRefused for what it does not know."""
        check_asked(self.name, attention_mask, others)
        chain = paged.chain
        assert chain is not None, "there was one when the layers were put into it"
        hidden = embedding(input_ids[0], self.embeddings.weight)
        frame = self.layers[0].begin(hidden, self._positions(hidden, position_ids[0]))
        for layer in self.layers:
            layer.add(chain, paged)
        rows = hidden.shape[0]
        if self.output_blocks is not None and _are_all(logits_to_keep, rows):
            self.norm.norm.add(chain, frame.x, frame.normed)
            result = hidden.new_empty(rows, self.output_blocks.width)
            (logits,) = self.output_blocks.add(chain, frame.normed, result)
            chain.run()
        else:
            chain.run()
            logits = self.output(self.norm(frame.x[logits_to_keep]))
        self.layers[-1].end()
        return Outcome(logits[None])

    def _positions(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin: [rows, head_dim], or its half, which is the same twice."""
        if self.frequencies is None:
            cos, sin = self.rotary(hidden[None], positions[None])
            return cos[0], sin[0]
        return _angles(positions, self.frequencies, self.scaling)


def direct_pass(model: nn.Module) -> DirectPass | None:
    """None for a model of another class, or whose layers are not in a chain."""
    name = type(model).__name__
    if name not in _MODELS:
        return None
    parts: Any = model
    inner, output = parts.model, parts.lm_head
    layers = tuple(inner.layers)
    if not layers or not all(isinstance(each, FusedLayer) for each in layers):
        return None
    if not isinstance(inner.norm, FusedNorm) or type(inner.embed_tokens) is not nn.Embedding:
        return None
    if len(layers) != parts.config.num_hidden_layers:
        return None
    with torch.inference_mode():
        frequencies, scaling = _plain_rotary(inner.rotary_emb, inner.embed_tokens.weight.dtype)
    return DirectPass(
        name=name,
        embeddings=inner.embed_tokens,
        rotary=inner.rotary_emb,
        frequencies=frequencies,
        scaling=scaling,
        layers=layers,
        norm=inner.norm,
        output=output,
        output_blocks=JoinedBlocks([output]) if isinstance(output, BlockLinear) else None,
    )


def _plain_rotary(rotary: nn.Module, dtype: torch.dtype) -> tuple[Tensor | None, float]:
    """The frequencies, where cosines and sines are to the bit what they give, and by how much those
    are scaled."""
    frequencies = getattr(rotary, "inv_freq", None)
    scaling = getattr(rotary, "attention_scaling", None)
    if not isinstance(frequencies, Tensor) or not isinstance(scaling, int | float):
        return None, 1.0
    if frequencies.dtype != torch.float32:
        return None, 1.0
    positions = torch.tensor(_POSITIONS)
    try:
        given = rotary(torch.empty(1, len(_POSITIONS), 1, dtype=dtype), positions[None])
    except (RuntimeError, ValueError, TypeError):  # it is asked in another way, or not like this
        return None, 1.0
    for mine, theirs in zip(_angles(positions, frequencies, float(scaling)), given, strict=True):
        if not torch.equal(mine.to(dtype).repeat(1, 2), theirs[0]):
            return None, 1.0
    return frequencies, float(scaling)


def _angles(positions: Tensor, frequencies: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [rows, head_dim / 2], of positions, int64 [rows]."""
    angles = positions.float()[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if scaling == 1.0 else (cos * scaling, sin * scaling)


def _are_all(wanted: Tensor, rows: int) -> bool:
    """Whether int64 [any] names each of the rows once, in their order."""
    return wanted.shape[0] == rows and torch.equal(wanted, torch.arange(rows))
