"""Tokens that kernels choose, against plain loops in float64."""

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import torch

from benchmarks.gpu.bench import Bench, Row, Step
from benchmarks.gpu.checks import by_choice, case_seed, checked, poisoned
from chatserve_kernels import reference, sampling
from chatserve_kernels.sampling import Adjustments, Choices, LateCounts

VOCABULARIES = (700, 32_000, 128_256, 151_936)
VOCABULARIES_QUICK = (300,)
ROWS, ROWS_QUICK = 24, 6
LOGPROB_BOUND = 1e-4  # their difference; float32 sums over a vocabulary


def steps(quick: bool) -> Sequence[Step]:
    """A step for each vocabulary."""
    return [
        Step(f"tokens of {each}", partial(_tokens, each))
        for each in (VOCABULARIES_QUICK if quick else VOCABULARIES)
    ]


def _choices(rows: int, vocabulary: int, seed: int, device: torch.device) -> Choices:
    """Rows of all kinds: the best token, all tokens, each filter alone and all of them, penalties
    and bans, some of tokens that only the device knows."""
    dice = np.random.default_rng(seed)

    def drawn(values: Sequence[float]) -> np.ndarray:
        return dice.choice(np.asarray(values, dtype=np.float64), rows)

    row = np.repeat(np.arange(0, rows, 3), 40)
    count = len(row)
    ids = np.concatenate([dice.permutation(vocabulary)[:40] for _ in range(0, rows, 3)])
    banned = dice.random(count) < 0.2
    late = np.arange(0, rows, 2)
    chosen = [dice.choice(ids[row == each]) if each % 6 == 0 else 1 for each in range(rows)]
    return Choices(
        temperature=drawn([0.0, 0.5, 0.8, 1.0, 1.3]),
        min_p=drawn([0.0, 0.0, 0.02, 0.2]),
        top_k=drawn([0, 0, 1, 20, 200]),
        top_p=drawn([1.0, 1.0, 0.5, 0.9, 0.99]),
        noise=dice.random(rows),
        logarithms=np.ones(rows),
        adjustments=Adjustments(
            rows=row,
            ids=ids,
            bias=dice.normal(0, 2, count).astype(np.float32),
            repetition=dice.uniform(1.0, 1.4, count).astype(np.float32),
            subtracted=np.where(banned, np.inf, dice.uniform(0, 1, count)).astype(np.float32),
            late=LateCounts(
                rows=late,
                sources=late,
                chosen=torch.tensor(chosen).to(device),
                counts=dice.integers(0, 9, count).astype(np.int32),
                repetition=dice.uniform(0.9, 1.4, len(late)).astype(np.float32),
                presence=dice.uniform(-1, 2, len(late)).astype(np.float32),
                frequency=dice.uniform(-1, 2, len(late)).astype(np.float32),
            ),
        ),
    )


def _tokens(vocabulary: int, bench: Bench) -> Iterable[Row]:
    rows = ROWS_QUICK if bench.quick else ROWS
    for kind in ("smooth", "equal ones"):
        name = f"tokens of {vocabulary}, {kind}"
        seed = case_seed(name)
        numbers = torch.Generator().manual_seed(seed)
        logits = 3 * torch.randn((rows, vocabulary + 8), generator=numbers)[:, :vocabulary]
        if kind == "equal ones":
            logits = (4 * logits).round() / 4
        choices = _choices(rows, vocabulary, seed, bench.device)
        given = logits.to(bench.device)
        by = by_choice(given)
        with poisoned():
            chosen = sampling.choose_tokens(given, choices)
        assert choices.adjustments is not None
        adjusted = reference.adjusted_logits(logits, choices.adjustments)
        right = [reference.choose_token(adjusted[row], choices, row) for row in range(rows)]
        wrong = sum(mine != its for mine, its in zip(chosen.tokens.tolist(), right, strict=True))
        wrong = rows if not bool(chosen.finite.all()) else wrong
        yield checked(name, wrong / rows, 0.0, seed=seed, by=by)
        exact = logits.double().log_softmax(dim=-1)[torch.arange(rows), torch.tensor(right)]
        difference = float((chosen.logprobs.cpu().double() - exact).abs().max())
        yield checked(f"{name}, logprobs", difference, LOGPROB_BOUND, seed=seed, by=by)
