"""Two trials at load: what the layers hand to attention, and whether pages give the same logits.

May not know: model families. Nothing is assumed about a family that the trials do not show.

Theory: the survey runs one token and writes down each attention call, which gives the page layout
and shows layers that call twice or never, or that hide their window in a mask. The comparison runs
about 40 tokens twice: once with transformers' own eager attention, once through pages that lie out
of order in a pool full of NaN, as two slices and a decode row beside a batch mate. Whatever the
eager run does that ours does not (a bias in the mask, another scale) shows in the logits.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chatserve.errors import ModelRefused
from chatserve.model.attention import ATTENTION_NAME, LayerCall, PagedStep, run_paged
from chatserve.model.layout import KVLayout, LayerShape
from chatserve_kernels import AttentionBatch

_PROBE_TOKENS = 40
# Difference of the centred logits relative to their size, by the type the model computes in. In
# float32 rounding is a thousand times smaller. In the short types a deep model may amplify it:
# where the first number is passed, transformers' own two attentions (eager, sdpa) say how far
# rounding alone leads, and up to three times that is accepted, never more than the second number.
_TOLERANCE = {
    torch.float32: (1e-3, 1e-3),
    torch.float16: (1e-2, 0.3),
    torch.bfloat16: (5e-2, 0.3),
}
# The same between pages of fp8 and plain ones. The demonstration model, which is trained, has 0.05,
# random models of two layers 0.04 to 0.14, of twelve 0.24 and 0.33; without their scales all of
# these have 1.2 and more.
ROUNDED_DISTANCE_MAX = 0.5


class LayerSurvey:
    """Stands in for pages during one token, whose attention is its own value."""

    def __init__(self) -> None:
        self.calls: list[LayerCall] = []

    def attend(self, call: LayerCall) -> Tensor:
        """[1, heads, head_dim]"""
        self.calls.append(call)
        return call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], dim=1)


@contextmanager
def _plain_attention(model: PreTrainedModel, name: str) -> Generator[None]:
    """One of transformers' own attentions for a while, then ours again."""
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(ATTENTION_NAME)


def survey_layers(
    model: PreTrainedModel, *, windows: tuple[int | None, ...], context_length: int
) -> tuple[LayerShape, ...]:
    """The K and V shape of each layer. windows: what the config says (`expected_windows`).

    Raises ModelRefused for a model whose layers do not each call our attention once, with K and V
    alike and the window that the config promises.
    """
    survey = LayerSurvey()
    one = torch.zeros(1, dtype=torch.int64, device=model.device)
    run_paged(model, one, one, paged=survey, logit_rows=one)
    kind = model.config.model_type
    layers = [call.layer for call in survey.calls]
    if not layers:
        raise ModelRefused(
            f"'{kind}' does not use transformers' attention interface, so its KV cannot be paged"
        )
    if layers != list(range(len(windows))):
        raise ModelRefused(
            f"'{kind}' has {len(windows)} layers, but the layers {layers} called paged attention; "
            "each must do so once, in order"
        )
    for call, window in zip(survey.calls, windows, strict=True):
        if call.key.shape != call.value.shape or call.key.shape[2] != call.query.shape[2]:
            raise ModelRefused(
                f"Layer {call.layer} of '{kind}' has K {tuple(call.key.shape)} and V "
                f"{tuple(call.value.shape)}, which do not fit the page layout"
            )
        # A window that is as long as the context hides nothing.
        if min(window or context_length, context_length) != min(
            call.window or context_length, context_length
        ):
            raise ModelRefused(
                f"Layer {call.layer} of '{kind}' has the window {call.window} in its attention, "
                f"but {window} by the config"
            )
    return tuple(LayerShape(call.key.shape[1], call.key.shape[2]) for call in survey.calls)


def compare_with_eager(
    model: PreTrainedModel,
    layout: KVLayout,
    context_length: int,
    *,
    way: Callable[..., Any] | None = None,
) -> float:
    """Relative difference between the logits through pages and the model's own. way: what
    stands for the model where pages are (`direct.py`).

    Raises ModelRefused when it is over the tolerance of the type, or not finite.
    """
    tokens = _probe_tokens(model, context_length)
    expected = _run_plain(model, tokens, "eager")
    if not bool(expected.isfinite().all()):
        raise ModelRefused(f"'{model.config.model_type}' gives logits that are not finite")
    paged = _centred(_run_in_slices(way or model, layout, tokens))
    difference = _relative(paged, expected)
    tolerance, most = _TOLERANCE[layout.dtype]
    if difference > tolerance and tolerance < most:
        rounding = _relative(_run_plain(model, tokens, "sdpa"), expected)
        tolerance = min(most, max(tolerance, 3 * rounding))
    if not difference <= tolerance:  # not: NaN must fail too
        raise ModelRefused(
            f"'{model.config.model_type}' gives other logits through pages than by itself "
            f"(relative difference {difference:.2g}); it is not supported"
        )
    return difference


def compare_with_plain_pages(
    model: PreTrainedModel,
    rounded: KVLayout,
    plain: KVLayout,
    context_length: int,
    *,
    way: Callable[..., Any],
) -> float:
    """Relative difference between the logits through pages of fp8 and through plain ones, which
    have been compared with the model's own.

    Raises ModelRefused when it is over ROUNDED_DISTANCE_MAX, or not finite.
    """
    tokens = _probe_tokens(model, context_length)
    expected, logits = (
        _centred(_run_in_slices(way, layout, tokens)) for layout in (plain, rounded)
    )
    distance = _relative(logits, expected)
    if not distance <= ROUNDED_DISTANCE_MAX:
        raise ModelRefused(
            f"'{model.config.model_type}' gives other logits with --kv-dtype fp8 (relative "
            f"difference {distance:.2g}, at most {ROUNDED_DISTANCE_MAX}); try without"
        )
    return distance


def agrees_within_rounding(logits: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways through a model that computes in `dtype` give the same logits, both float32
    [any, vocabulary]. NaN is no agreement."""
    return _relative(_centred(logits), _centred(expected)) <= _TOLERANCE[dtype][0]


def _probe_tokens(model: PreTrainedModel, context_length: int) -> Tensor:
    """int64 [tokens]"""
    length = min(_PROBE_TOKENS, context_length)
    vocabulary = int(model.config.vocab_size)
    return (torch.arange(length, device=model.device) * 7919 + 13) % vocabulary


def _run_plain(model: PreTrainedModel, tokens: Tensor, attention: str) -> Tensor:
    """Centred logits, float32 [length, vocabulary], of tokens, int64 [length], by one of
    transformers' own attentions."""
    positions = torch.arange(tokens.shape[0], device=tokens.device)[None]
    with _plain_attention(model, attention), torch.inference_mode():
        output = model(input_ids=tokens[None], position_ids=positions, use_cache=False)
    logits: Tensor = output.logits
    return _centred(logits[0].float())


def _relative(logits: Tensor, expected: Tensor) -> float:
    """The norm of their difference by that of `expected`; both float32 [length, vocabulary]."""
    return float((logits - expected).norm() / expected.norm().clamp_min(1e-6))


def _run_in_slices(way: Callable[..., Any], layout: KVLayout, tokens: Tensor) -> Tensor:
    """Logits [length, vocabulary] of tokens [length], computed in three steps."""
    length, device = tokens.shape[0], tokens.device
    size = layout.page_size
    pages = -(-length // size)
    mate_page = pages
    pool = layout.allocate(pages + 1, device, fill=float("nan"))
    table = torch.arange(pages - 1, -1, -1, device=device)  # out of order
    cuts = sorted({0, length * 3 // 5, max(length - 1, 0), length})
    rows: list[Tensor] = []
    for step, (begin, end) in enumerate(pairwise(cuts)):
        positions = torch.arange(begin, end, device=device)
        # The mate, another sequence, adds one token a step in front of the slice.
        mate = torch.full((1,), step % size, device=device)
        tables = torch.zeros((2, pages), dtype=torch.int64, device=device)
        tables[0, 0], tables[1] = mate_page, table
        batch = AttentionBatch(
            query_starts=(0, 1, 1 + end - begin),
            context_lengths=(step % size + 1, end),
            page_tables=tables,
            write_pages=torch.cat((torch.full_like(mate, mate_page), table[positions // size])),
            write_offsets=torch.cat((mate, positions % size)),
            write_rows=None,
            page_size=size,
        )
        logits = run_paged(
            way,
            torch.cat((tokens[-1:], tokens[begin:end])),
            torch.cat((mate, positions)),
            paged=PagedStep(batch, pool, layout),
            logit_rows=torch.arange(1, batch.rows, device=device),
        )
        rows.append(logits)
    return torch.cat(rows)


def _centred(logits: Tensor) -> Tensor:
    """Logits [length, vocabulary], in their dtype, less the mean of each row: a constant added to
    all of a row means nothing, and would hide differences."""
    return logits - logits.mean(dim=-1, keepdim=True)
