"""From a StepPlan to the inputs of one forward pass.

One of the three modules of this floor that import torch. It decides nothing: rows are the plan's
slices laid end to end, and every order's logits are those of its slice's last row.
"""

from dataclasses import dataclass

import numpy as np
import torch

from chatserve.engine.plan import SampleOrder, Slice, StepPlan
from chatserve.model.sampling import SampleRow
from chatserve.model.step import StepInputs


@dataclass(frozen=True, slots=True, eq=False)
class StepBatch:
    """rows: a way to choose a token for each row of logits. copies: int64 [2, C], source and target
    pages, on the device, or None."""

    inputs: StepInputs
    rows: tuple[SampleRow, ...]
    copies: torch.Tensor | None


def build_batch(
    plan: StepPlan, last_tokens: tuple[int, ...], *, page_size: int, device: torch.device
) -> StepBatch:
    """The plan's inputs, and its copies on `device`. last_tokens: what the step before sampled, by
    output row."""
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
    for index, item in enumerate(plan.slices):
        first, last = int(starts[index]), int(starts[index + 1])
        table = np.frombuffer(item.pages, dtype=np.int32)
        tables[index, : len(table)] = table
        tokens[first : first + len(item.tokens)] = item.tokens
        if item.pending is not None:
            tokens[last - 1] = last_tokens[item.pending]
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
        ),
        rows=tuple(rows),
        copies=_copies(plan, device),
    )


def _sample_row(order: SampleOrder, item: Slice, last_tokens: tuple[int, ...]) -> SampleRow:
    sampling = order.sampling
    history = order.history
    if sampling.needs_history and item.pending is not None:
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
    return torch.tensor(pairs, dtype=torch.int64, device=device)
