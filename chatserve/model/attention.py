"""Our attention function inside transformers' models: pages instead of a cache object.

May not know: scheduling, page ownership, single model families.

Theory: transformers looks an attention function up by name and hands it, for each layer, the
projected query, key and value and whatever keyword arguments the model's forward was given.
A step's metadata travels as one such keyword, `paged`, so nothing is global and two models may run
in two threads. For a name without a mask function transformers builds no mask. Hence a model that
changes attention in another way (a bias in the mask, a keyword that we do not know) must not get
by: anything unknown that is not None is refused, and the probe compares the outcome at load.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from chatserve.errors import ModelRefused
from chatserve.model.layout import KVLayout
from chatserve_kernels import (
    AttentionBatch,
    Rotary,
    append_kv,
    attention_in_chain,
    paged_attention,
    rotate_append,
)
from chatserve_kernels.cpu.attention import AttentionInChain
from chatserve_kernels.cpu.native import Chain, new_chain

ATTENTION_NAME = "chatserve_paged"

# Keywords that models pass along and that change nothing here: positions are already in the query
# and key, the rest asks for what we never return. The value shown, or None, is all that we accept.
_WITHOUT_EFFECT = frozenset({"position_ids", "cache_position", "position_embeddings"})
_ONLY_AT = {
    "dropout": 0.0,
    "use_cache": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "is_causal": True,
}


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class LayerCall:
    """One layer's attention, as the model asks for it.

    query [rows, heads, head_dim], key and value [rows, kv_heads, head_dim], any strides. rotary:
    what query and key still lack; the query may be changed then.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    window: int | None
    soft_cap: float | None
    sinks: Tensor | None
    rotary: Rotary | None = None


class Paged(Protocol):
    """What the `paged` keyword carries."""

    def attend(self, call: LayerCall) -> Tensor:
        """[rows, heads, head_dim]"""
        ...


class ChainedPaged(Protocol):
    """The same for layers whose programs are gathered in a chain, and run later."""

    @property
    def chain(self) -> Chain | None:
        """None where a layer has to be computed at once."""
        ...

    def attend_later(self, call: LayerCall, result: Tensor) -> None:
        """Into the result, contiguous [rows, heads, head_dim], when the chain has run."""
        ...


class PagedStep:
    """One forward pass over pages: appends each layer's K and V, then attends. computing: called
    before attention, or the programs of a chain, are run.

    Rows after the batch's are padding (`padded_rows`): they attend to nothing.
    """

    def __init__(
        self,
        batch: AttentionBatch,
        pool: Tensor,
        layout: KVLayout,
        computing: Callable[[], None] | None = None,
    ) -> None:
        self._batch, self._pool, self._layout = batch, pool, layout
        self._computing = computing
        self.chain = new_chain(computing) if pool.device.type == "cpu" else None
        # By what layers have to have in common.
        self._in_chain: dict[tuple[Any, ...], AttentionInChain | None] = {}

    def attend(self, call: LayerCall) -> Tensor:
        """[rows, heads, head_dim]; writes the rows that the batch names."""
        if self._computing is not None:
            self._computing()
        kv = self._layout.layer_view(self._pool, call.layer)
        scales = self._layout.layer_scales(self._pool, call.layer)
        rows = self._batch.rows
        query, key, value = call.query[:rows], call.key[:rows], call.value[:rows]
        if (rotary := call.rotary) is None:
            append_kv(key, value, kv, self._batch, scales)
        else:
            rotary = replace(rotary, cos=rotary.cos[:rows], sin=rotary.sin[:rows])
            rotate_append(query, key, value, kv, self._batch, rotary, scales)
        mixed = paged_attention(
            query,
            kv,
            self._batch,
            scale=call.scale,
            window=call.window,
            soft_cap=call.soft_cap,
            sinks=call.sinks,
            scales=scales,
        )
        padding = call.query.shape[0] - rows
        return mixed if padding == 0 else torch.nn.functional.pad(mixed, (0, 0, 0, 0, 0, padding))

    def attend_later(self, call: LayerCall, result: Tensor) -> None:
        """As `ChainedPaged` says."""
        assert self.chain is not None
        query, key, value, kept = call.query, call.key, call.value, result
        if (rows := self._batch.rows) < len(result):
            query, key, value, kept = query[:rows], key[:rows], value[:rows], result[:rows]
            result[rows:].zero_()
        kv = self._layout.layer_view(self._pool, call.layer)
        common = (
            *(query.shape, query.stride(), key.shape, key.stride(), value.stride()),
            *(kv.shape, call.window, call.soft_cap),
        )
        if common in self._in_chain:
            attention = self._in_chain[common]
        else:
            scales = self._layout.layer_scales(self._pool, call.layer)
            attention = attention_in_chain(
                *(query, key, value, kv, self._batch),
                window=call.window,
                soft_cap=call.soft_cap,
                scales=scales,
            )
            self._in_chain[common] = attention
        if attention is not None:
            attention.add(self.chain, query, key, value, kv, kept, scale=call.scale)
        else:
            self.chain.run()
            result.copy_(self.attend(call))


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    paged: Paged | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls: query [1, heads, rows, head_dim], key and value
    [1, kv_heads, rows, head_dim] → ([1, rows, heads, head_dim], None).

    Raises ModelRefused for a call that it does not understand, which the probe meets first.
    """
    name = type(module).__name__
    if paged is None:
        raise ModelRefused(f"{name} does not hand keyword arguments on to its attention")
    check_asked(name, attention_mask, others)
    if getattr(module, "is_causal", True) is not True:
        raise ModelRefused(f"{name} is not causal")
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise ModelRefused(f"{name} does not know its layer")
    mixed = paged.attend(
        LayerCall(
            layer=layer,
            query=query[0].transpose(0, 1),
            key=key[0].transpose(0, 1),
            value=value[0].transpose(0, 1),
            scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            window=sliding_window,
            soft_cap=softcap,
            sinks=s_aux,
        )
    )
    return mixed[None], None


def check_asked(name: str, attention_mask: Tensor | None, others: Mapping[str, Any]) -> None:
    """Raises ModelRefused where the layer `name` asks for something that we do not do."""
    if attention_mask is not None:
        raise ModelRefused(f"{name} brings an attention mask of its own")
    for keyword, given in others.items():
        if given is None or keyword in _WITHOUT_EFFECT:
            continue
        if keyword not in _ONLY_AT or given != _ONLY_AT[keyword]:
            raise ModelRefused(f"{name} asks its attention for '{keyword}', which is not supported")


def padded_rows(rows: int) -> int:
    """The next of a few batch sizes: 1, 2, 4, then about eight to a doubling.

    oneDNN makes, and keeps, a kernel for each number of rows that it meets, in bfloat16 of about
    0.65 MiB for each shape of weights, however small: hundreds of sizes cost hundreds of MiB and
    milliseconds at each first time. The 58 sizes up to 2,048 of a model with five shapes are
    190 MiB, when all have come. From 32 rows on padding costs at most an eighth; below, a row
    costs next to nothing beside reading the weights.
    """
    if rows <= 4:
        return 4 if rows == 3 else rows
    step = max(4, 1 << max(0, (rows - 1).bit_length() - 4))
    return -(-rows // step) * step


AttentionInterface.register(ATTENTION_NAME, paged_attention_forward)


def run_paged(
    model: Callable[..., Any],
    tokens: Tensor,
    positions: Tensor,
    *,
    paged: Paged,
    logit_rows: Tensor,
) -> Tensor:
    """Logits [len(logit_rows), vocabulary] in float32 of a flattened batch. model: one of
    transformers', or what is called like one.

    tokens, positions: int64 [rows]; logit_rows: int64 [any], rows of which logits are wanted.
    The model's attention implementation must be ATTENTION_NAME.
    """
    with torch.inference_mode():
        output = model(
            input_ids=tokens[None],
            position_ids=positions[None],
            attention_mask=None,
            use_cache=False,
            logits_to_keep=logit_rows,
            paged=paged,
        )
    logits: Tensor = output.logits
    return logits[0].float()
