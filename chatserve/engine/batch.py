"""From a StepPlan to the inputs of one forward pass.

One of the three modules of this floor that import torch. It decides nothing: rows are the plan's
slices laid end to end, and every order's logits are those of its slice's last row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from chatserve.engine.plan import SampleOrder, Slice, StepPlan
from chatserve.model.sampling import SampleRow, Samples
from chatserve.model.step import LateTokens, StepInputs
from chatserve_kernels.packing import sent


@dataclass(frozen=True, slots=True, eq=False)
class StepBatch:
    """rows: a way to choose a token for each row of logits. copies: int64 [2, C], source and target
    pages, on the device, or None."""

    inputs: StepInputs
    rows: tuple[SampleRow, ...]
    copies: torch.Tensor | None


def build_batch(
    plan: StepPlan, before: Samples | None, *, known: bool, page_size: int, device: torch.device
) -> StepBatch:
    """The plan's inputs, and its copies on `device`.

    before: what the step before sampled, by output row; None only where nothing asks for it. known:
    whether the host has it. Where it has not, pending tokens stay on the device, unless a penalty
    has to count one of them: then this waits.
    """
    last_tokens = None
    if before is not None and (known or _counts_pending(plan)):
        last_tokens = before.ids
    starts = np.zeros(len(plan.slices) + 1, dtype=np.int64)
    np.cumsum([item.end - item.start for item in plan.slices], out=starts[1:])
    total = int(starts[-1])
    tokens = np.empty(total, dtype=np.int64)
    positions = np.empty(total, dtype=np.int64)
    pages = np.empty(total, dtype=np.int64)
    written = np.ones(total, dtype=np.bool_)
    tables = np.zeros(
        (len(plan.slices), max(len(item.pages) for item in plan.slices) // 4), dtype=np.int32
    )
    logit_rows: list[int] = []
    rows: list[SampleRow] = []
    late: list[tuple[int, int]] = []
    for index, item in enumerate(plan.slices):
        first, last = int(starts[index]), int(starts[index + 1])
        table = np.frombuffer(item.pages, dtype=np.int32)
        tables[index, : len(table)] = table
        tokens[first : first + len(item.tokens)] = item.tokens
        if item.pending is not None:
            if last_tokens is None:
                late.append((last - 1, item.pending))
            tokens[last - 1] = 0 if last_tokens is None else last_tokens[item.pending]
        positions[first:last] = np.arange(item.start, item.end)
        pages[first:last] = table[positions[first:last] // page_size]
        written[first:last] = item.write
        for order in item.orders:
            logit_rows.append(last - 1)
            rows.append(_sample_row(order, item, last_tokens))
    return StepBatch(
        inputs=StepInputs(
            tokens=tokens,
            positions=positions,
            starts=tuple(starts.tolist()),
            lengths=tuple(item.end for item in plan.slices),
            tables=tables,
            pages=pages,
            written=written,
            logit_rows=np.asarray(logit_rows, dtype=np.int64),
            page_size=page_size,
            late=_late(late, before),
        ),
        rows=tuple(rows),
        copies=_copies(plan, device),
    )


def _counts_pending(plan: StepPlan) -> bool:
    """Whether what a token is chosen from depends on one that is pending."""
    pending = (item for item in plan.slices if item.pending is not None)
    return any(order.sampling.needs_history for item in pending for order in item.orders)


def _late(pairs: Sequence[tuple[int, int]], before: Samples | None) -> LateTokens | None:
    """pairs: a row of the step, and a row of those sampled."""
    if not pairs:
        return None
    assert before is not None, "a step before this one sampled what is pending"
    rows, sources = np.asarray(pairs, dtype=np.int64).T
    return LateTokens(rows, sources, before.tokens)


def _sample_row(order: SampleOrder, item: Slice, last_tokens: Sequence[int] | None) -> SampleRow:
    sampling = order.sampling
    history = order.history
    if sampling.needs_history and item.pending is not None:
        assert last_tokens is not None, "what is counted is known"
        history = (*history, last_tokens[item.pending])
    return SampleRow(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=sampling.logit_bias,
        banned=order.banned,
        seed=sampling.seed,
        sample=order.sample,
        position=order.position,
        history=history,
        prompt_length=order.prompt_tokens,
        top_logprobs=sampling.top_logprobs,
    )


def _copies(plan: StepPlan, device: torch.device) -> torch.Tensor | None:
    if not plan.copies:
        return None
    pairs = [[copy.source for copy in plan.copies], [copy.target for copy in plan.copies]]
    return sent([np.asarray(pairs, dtype=np.int64)], device)[0]
