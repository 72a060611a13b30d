"""From a StepPlan to the inputs of one forward pass.

One of the three modules of this floor that import torch. It decides nothing: rows are the plan's
slices laid end to end, and every order's logits are those of its slice's last row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from chatserve.engine.plan import SampleOrder, StepPlan
from chatserve.engine.token_counts import TokenCounts
from chatserve.model.sampling import SampleRow, Samples
from chatserve.model.step import LateTokens, StepInputs
from chatserve_kernels.packing import sent


@dataclass(frozen=True, slots=True, eq=False)
class StepBatch:
    """rows: a way to choose a token for each row of logits; counted: late tokens that penalties of
    some of them count. copies: int64 [2, C], source and target pages, on the device, or None."""

    inputs: StepInputs
    rows: tuple[SampleRow, ...]
    counted: LateTokens | None
    copies: torch.Tensor | None


def build_batch(
    plan: StepPlan, before: Samples | None, *, known: bool, page_size: int, device: torch.device
) -> StepBatch:
    """The plan's inputs, and its copies on `device`.

    before: what the step before sampled, by output row; None only where nothing asks for it. known:
    whether the host has it. Where it has not, pending tokens stay on the device.
    """
    last_tokens = before.ids if before is not None and known else None
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
    counted: list[tuple[int, int]] = []
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
            counts = order.counts
            if order.sampling.counts_tokens and item.pending is not None:
                if last_tokens is None:
                    counted.append((len(rows), item.pending))
                else:
                    counts = counts.with_one(last_tokens[item.pending])
            logit_rows.append(last - 1)
            rows.append(_sample_row(order, counts))
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
        counted=_late(counted, before),
        copies=_copies(plan, device),
    )


def _late(pairs: Sequence[tuple[int, int]], before: Samples | None) -> LateTokens | None:
    """pairs: a row of the step, or of its logits, and a row of those sampled."""
    if not pairs:
        return None
    assert before is not None, "a step before this one sampled what is pending"
    rows, sources = np.asarray(pairs, dtype=np.int64).T
    return LateTokens(rows, sources, before.tokens)


def _sample_row(order: SampleOrder, counts: TokenCounts) -> SampleRow:
    sampling = order.sampling
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
        ids=counts.ids,
        generated=counts.generated,
        top_logprobs=sampling.top_logprobs,
    )


def _copies(plan: StepPlan, device: torch.device) -> torch.Tensor | None:
    if not plan.copies:
        return None
    pairs = [[copy.source for copy in plan.copies], [copy.target for copy in plan.copies]]
    return sent([np.asarray(pairs, dtype=np.int64)], device)[0]
