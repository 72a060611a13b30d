"""Sampling: exact supports, right frequencies, and tokens that depend on their own row only."""

import math
import random
from collections import Counter
from collections.abc import Generator
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from chatserve.model import SampleRow, sample
from chatserve.model.sampling import uniform
from chatserve_kernels.cpu import native
from chatserve_kernels.sampling import choose_tokens
from tests.kernels.choosing import choices
from tests.model.late import counted

VOCABULARY = 12


@pytest.fixture(params=["machine code", "torch"])
def both_ways(request: pytest.FixtureRequest) -> Generator[None]:
    """Also as where nothing is compiled."""
    if request.param == "torch":
        with native.left_to_torch():
            yield
    else:
        yield


pytestmark = pytest.mark.usefixtures("both_ways")


def fixed_logits(seed: int = 0, rows: int = 1, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def draws(logits: Tensor, row: SampleRow, count: int) -> Counter[int]:
    """Tokens of one row of logits at `count` positions."""
    rows = [replace(row, position=position) for position in range(count)]
    return Counter(sample(logits.expand(count, -1), rows).tokens.tolist())


def expected_probabilities(logits: Tensor, row: SampleRow) -> dict[int, float]:
    """Slowly: temperature, min_p, top_k, top_p on a plain list."""
    weights = [math.exp(value / row.temperature) for value in logits[0].tolist()]
    best = max(weights)
    pairs = [(w, i) for i, w in enumerate(weights) if w >= row.min_p * best]
    pairs.sort(key=lambda pair: (-pair[0], pair[1]))
    if row.top_k:
        pairs = pairs[: row.top_k]
    total = sum(w for w, _ in pairs)
    kept: list[tuple[float, int]] = []
    for weight, token in pairs:
        if kept and sum(w for w, _ in kept) >= row.top_p * total:
            break
        kept.append((weight, token))
    total = sum(w for w, _ in kept)
    return {token: weight / total for weight, token in kept}


@pytest.mark.parametrize(
    "row",
    [
        SampleRow(),
        SampleRow(temperature=0.5),
        SampleRow(temperature=2.0, top_k=5),
        SampleRow(top_p=0.8),
        SampleRow(top_p=0.01),
        SampleRow(min_p=0.1),
        SampleRow(min_p=1.0),
        SampleRow(temperature=1.5, top_k=7, top_p=0.7, min_p=0.05),
        SampleRow(top_k=1),
        SampleRow(top_k=1000, top_p=1.0),
    ],
)
def test_frequencies_and_support_are_those_of_the_filtered_distribution(row: SampleRow) -> None:
    count = 20_000
    logits = fixed_logits(3)
    expected = expected_probabilities(logits, row)
    seen = draws(logits, row, count)
    assert set(seen) <= set(expected)
    for token, probability in expected.items():
        deviation = math.sqrt(count * probability * (1 - probability)) + 1e-9
        assert abs(seen[token] - count * probability) < 4.5 * deviation + 1


# Whole powers of two, so that every sum and every share of the whole is exact.
EXACT_WEIGHTS = {
    "halves": [0.5, 0.125, 0.125, 0.25],
    "even": [0.25] * 4,
    "many": [2.0**-5] * 8 + [2.0**-2, 2.0**-1],
    "shuffled": [2.0**-4, 2.0**-1, 2.0**-4, 2.0**-3, 2.0**-2],
    "not normalized": [1.0, 4.0, 2.0, 1.0],
}
EDGES = (0.0, 2**-52, 1e-9, 1e-3, 0.01, 0.019)


def slowly_kept(weights: list[float], top_p: float, top_k: int) -> set[int]:
    """The fewest best tokens that reach top_p, in whole fractions."""
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    order = order[: top_k or len(order)]
    total = sum(Fraction(weights[token]) for token in order)
    kept: set[int] = set()
    for token in order:
        kept.add(token)
        if sum(Fraction(weights[each]) for each in kept) >= Fraction(top_p) * total:
            break
    return kept


@pytest.mark.parametrize("kind", EXACT_WEIGHTS)
def test_top_p_at_a_partial_sum_and_just_beside_it(kind: str) -> None:
    """Reaching it is enough; the least bit more takes one token more."""
    weights = EXACT_WEIGHTS[kind]
    rows: list[SampleRow] = []
    for top_k in range(len(weights)):
        best = sorted(weights, reverse=True)[: top_k or len(weights)]
        if math.frexp(sum(best))[0] != 0.5:
            continue  # what stays is no power of two: shares of it would be rounded
        for count in range(1, len(best) + 1):
            share = sum(best[:count]) / sum(best)
            for step in EDGES:
                rows += [
                    SampleRow(top_p=share * (1 + sign * step), top_k=top_k)
                    for sign in (-1, 1)
                    if share * (1 + sign * step) <= 1
                ]
    # Every token that stays has a part of the noise this long; its weight is a power of two.
    steps = 2 * round(sum(weights) / min(weights))
    noises = [(step + 0.5) / steps for step in range(steps)]
    given = choices(
        len(rows) * steps,
        temperature=1 / math.log(2),
        top_p=np.repeat([row.top_p for row in rows], steps),
        top_k=np.repeat([float(row.top_k) for row in rows], steps),
        noise=np.tile(noises, len(rows)),
    )
    logits = torch.tensor([weights]).log2().expand(len(rows) * steps, -1)
    tokens = choose_tokens(logits, given).tokens.view(len(rows), steps)
    sizes: set[int] = set()
    for row, got in zip(rows, tokens.tolist(), strict=True):
        expected = slowly_kept(weights, row.top_p, row.top_k)
        assert set(got) == expected, row
        sizes.add(len(expected))
    assert sizes >= set(range(1, len(weights))), "the rows were to end at every token"


@pytest.mark.parametrize("count", [4, 8, 16])
def test_top_p_of_equal_logits_is_a_count(count: int) -> None:
    """Through the door: equal logits have equal weights, whatever exp() rounds."""
    logits = torch.full((1, count), 1.7)
    for kept in range(1, count):
        for top_p, expected in (
            (kept / count, kept),
            (kept / count + 1e-9, kept + 1),
            ((kept - 1 + 0.005) / count, kept),
        ):
            seen = draws(logits, SampleRow(top_p=top_p, seed=kept), 60 * count)
            assert set(seen) == set(range(expected)), (top_p, expected)


def test_noise_is_uniform_and_depends_on_each_of_its_three_parts() -> None:
    values = [uniform(seed, s, p) for seed in range(20) for s in range(10) for p in range(100)]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 1 for value in values)
    bins = Counter(int(value * 16) for value in values)
    assert all(abs(bins[i] - 1250) < 4.5 * math.sqrt(1250) for i in range(16))
    # Written down once: stored seeds must give the same replies for ever.
    assert uniform(1234, 2, 56) == pytest.approx(PINNED, abs=0)
    uniform(-1, 0, 0)
    uniform(1 << 70, 0, 0)


PINNED = 0.6004406024481043


def random_row(generator: random.Random, vocabulary: int) -> SampleRow:
    line = [generator.randrange(vocabulary) for _ in range(generator.randrange(1, 30))]
    return SampleRow(
        temperature=generator.choice((0.0, 0.3, 1.0, 1.7)),
        top_k=generator.choice((0, 0, 1, 5, 40)),
        top_p=generator.choice((1.0, 1.0, 0.9, 0.3)),
        min_p=generator.choice((0.0, 0.0, 0.1)),
        repetition_penalty=generator.choice((1.0, 1.0, 1.3)),
        presence_penalty=generator.choice((0.0, 0.0, 0.7)),
        frequency_penalty=generator.choice((0.0, 0.0, -0.4)),
        logit_bias=generator.choice(((), ((3, 5.0), (4, -100.0)))),
        banned=generator.choice(((), (1, 2))),
        seed=generator.randrange(1 << 63),
        sample=generator.randrange(4),
        position=generator.randrange(1000),
        top_logprobs=generator.choice((None, 0, 3)),
        **counted(line, generator.randrange(len(line))),
    )


def test_a_token_does_not_depend_on_its_batch_mates() -> None:
    seed = 17
    print(f"seed {seed}")
    generator = random.Random(seed)
    logits = fixed_logits(seed, rows=64, vocabulary=97)
    rows = [random_row(generator, 97) for _ in range(64)]
    together = sample(logits, rows)
    for i, row in enumerate(rows):
        alone = sample(logits[i : i + 1], [row])
        assert alone.tokens[0] == together.tokens[i]
        assert alone.logprobs[0] == together.logprobs[i]
    order = generator.sample(range(64), 64)
    shuffled = sample(logits[order], [rows[i] for i in order])
    assert shuffled.tokens.tolist() == together.tokens[order].tolist()


def naive_penalties(logits: list[float], row: SampleRow) -> list[float]:
    result = list(logits)
    generated = dict(zip(row.ids.tolist(), row.generated.tolist(), strict=True))
    for token, bias in row.logit_bias:
        result[token] += bias
    for token in range(len(result)):
        if token in generated:
            if result[token] > 0:
                result[token] /= row.repetition_penalty
            else:
                result[token] *= row.repetition_penalty
        if count := generated.get(token, 0):
            result[token] -= row.presence_penalty + row.frequency_penalty * count
        if token in row.banned:
            result[token] = -math.inf
    return result


def test_penalties_equal_a_naive_version() -> None:
    seed = 23
    print(f"seed {seed}")
    generator = random.Random(seed)
    logits = fixed_logits(seed, rows=200)
    rows = [replace(random_row(generator, VOCABULARY), temperature=0.0) for _ in range(200)]
    original = logits.clone()
    tokens = sample(logits, rows).tokens.tolist()
    assert torch.equal(logits, original)
    for i, row in enumerate(rows):
        wanted = naive_penalties(logits[i].tolist(), row)
        assert wanted[tokens[i]] >= max(wanted) - 1e-5


def test_greedy_takes_the_best_and_a_tiny_temperature_agrees() -> None:
    logits = fixed_logits(5, rows=8, vocabulary=50)
    best = logits.argmax(dim=-1)
    for temperature in (0.0, 1e-30, 1e-5):
        rows = [SampleRow(temperature=temperature, position=i) for i in range(8)]
        assert torch.equal(sample(logits, rows).tokens, best)


def test_of_equal_logits_top_k_keeps_the_smaller_ids() -> None:
    seen = draws(torch.zeros(1, 6), SampleRow(top_k=2), 200)
    assert set(seen) == {0, 1}


def test_a_row_that_is_not_finite_leaves_the_others_alone() -> None:
    logits = fixed_logits(6, rows=6)
    rows = [SampleRow(top_p=0.9, top_logprobs=2, position=i) for i in range(6)]
    rows[5] = replace(rows[5], banned=(4,))
    clean = sample(logits, rows)
    broken = logits.clone()
    broken[0, 3] = math.nan
    broken[2, 1] = math.inf
    broken[3] = -math.inf
    broken[5] = math.nan
    result = sample(broken, rows)
    assert result.finite == [False, True, False, False, True, False]
    assert result.tokens[[0, 2, 3, 5]].tolist() == [0, 0, 0, 0]
    for i in (1, 4):
        assert result.tokens[i] == clean.tokens[i]
        assert result.logprobs[i] == clean.logprobs[i]
    assert [lp is None for lp in result.logprobs] == [True, False, True, True, False, True]
    greedy = sample(broken, [SampleRow(temperature=0.0)] * 6)
    assert greedy.finite == result.finite


def test_minus_infinity_is_a_choice_of_the_model() -> None:
    logits = torch.full((1, 5), -math.inf)
    logits[0, 3] = 1.0
    result = sample(logits, [SampleRow(position=9)])
    assert (result.tokens.tolist(), result.finite) == ([3], [True])
    assert sample(logits, [SampleRow(banned=(3,))]).finite == [False]


def test_banned_ids_never_come() -> None:
    logits = fixed_logits(8)
    best = int(logits.argmax())
    row = SampleRow(banned=(best, 10_000, -1))
    assert best not in draws(logits, row, 500)
    assert best not in draws(logits, replace(row, temperature=0.0), 3)


def test_a_ban_is_stronger_than_any_wish() -> None:
    """A stop id inside min_tokens does not come, however much the request wants it."""
    logits = fixed_logits(8)
    row = SampleRow(
        temperature=0.0, logit_bias=((5, 100.0),), presence_penalty=-2.0, **counted((5,) * 9)
    )
    assert set(draws(logits, row, 3)) == {5}
    assert 5 not in draws(logits, replace(row, banned=(5,)), 3)
    assert 5 not in draws(logits, replace(row, banned=(5,), temperature=2.0), 500)


def test_ids_outside_the_vocabulary_are_passed_over() -> None:
    row = SampleRow(
        presence_penalty=1.0,
        repetition_penalty=1.1,
        logit_bias=((999, 5.0),),
        banned=(-1, 1 << 40),
        **counted((3, 999)),
    )
    assert sample(fixed_logits(), [row]).finite == [True]


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = fixed_logits(9, rows=3)
    rows = [
        SampleRow(temperature=0.3, top_k=2, logit_bias=((0, 50.0),), top_logprobs=4),
        SampleRow(temperature=0.0, top_logprobs=0),
        SampleRow(temperature=0.0),
    ]
    result = sample(logits, rows)
    everything = torch.log_softmax(logits, dim=-1)
    first, second, third = result.logprobs
    assert first is not None
    assert second is not None
    assert third is None
    assert int(result.tokens[0]) == 0
    assert first.chosen == pytest.approx(float(everything[0, 0]))
    best = everything[0].sort(descending=True)
    assert [token for token, _ in first.top] == best.indices[:4].tolist()
    assert [value for _, value in first.top] == pytest.approx(best.values[:4].tolist())
    assert second.top == ()
    assert second.chosen == pytest.approx(float(everything[1].max()))


def test_the_door_checks_shapes() -> None:
    for logits in (torch.zeros(2, 4), torch.zeros(4), torch.zeros(1, 4).double()):
        with pytest.raises(ValueError, match="logits must be"):
            sample(logits, [SampleRow()])
    assert sample(torch.zeros(0, 4), []).finite == []


FILTERS = [
    *(
        {"top_p": 0.9},
        {"top_p": 0.3},
        {"top_p": 0.999999999999},
        {"top_p": 1e-9},
        {"top_k": 40},
        {"top_k": 1900},
    ),
    *(
        {"min_p": 0.05},
        {"min_p": 1e-12},
        {"top_k": 50, "top_p": 0.95},
        {"min_p": 0.01, "top_p": 0.9},
    ),
    *({"top_k": 5000}, {"min_p": 1e-12, "top_k": 100, "top_p": 0.99}, {}),
]


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 20.0])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_machine_code_and_torch_give_the_same_tokens(
    filters: dict[str, float], temperature: float
) -> None:
    """Whether few stay or many, of steep, common and flat rows."""
    seed = 31
    print(f"seed {seed}")
    torch.manual_seed(seed)
    logits = torch.randn(60, 2000) * torch.tensor([0.01, 1.0, 6.0]).repeat(20)[:, None]
    logits[:, 7], logits[10:20, :900], logits[20:30] = -60.0, float("-inf"), logits[20:30].round()
    rows = [
        SampleRow(temperature=temperature, seed=number, **filters)  # pyright: ignore[reportArgumentType]
        for number in range(60)
    ]
    with native.left_to_torch():
        expected = sample(logits, rows).tokens
    assert torch.equal(sample(logits, rows).tokens, expected)


NOISES = (0.0, 1e-12, 5e-11, 0.5, 1 - 5e-11, 1 - 2**-53)
TOTAL = 1 + 1e-8 + 9_999e-10


@pytest.mark.parametrize(
    ("filters", "tokens"),
    [
        ({"top_p": (1 - 1e-10) / TOTAL}, {17}),
        # The best alone would be enough of what is near.
        ({"top_p": (1 + 1e-10) / TOTAL}, {5_000, 17}),
        ({"top_k": 3}, {0, 17, 5_000}),
        ({"top_k": 9_999}, {0, 17, 9_998}),
        ({"min_p": 1e-9}, {17, 5_000}),
        ({"min_p": 1e-12}, {0, 17, 10_000}),
        ({"min_p": 1e-12, "top_k": 3}, {0, 17, 5_000}),
    ],
    ids=str,
)
def test_what_is_far_from_the_best_counts(filters: dict[str, float], tokens: set[int]) -> None:
    """Ten thousand tokens that weigh next to nothing weigh something together."""
    logits = torch.full((1, 10_001), math.log(1e-10))
    logits[0, 17], logits[0, 5_000] = 0.0, math.log(1e-8)
    given = choices(len(NOISES), noise=NOISES, **filters)
    assert set(choose_tokens(logits.expand(len(NOISES), -1), given).tokens.tolist()) == tokens


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-320])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 2}, {"min_p": 0.1}], ids=str)
def test_a_temperature_next_to_nothing_takes_the_best_without_a_warning(
    filters: dict[str, float], temperature: float
) -> None:
    logits = fixed_logits(5, rows=2, vocabulary=50)
    rows = [SampleRow(temperature=temperature, seed=seed, **filters) for seed in (1, 2)]  # pyright: ignore[reportArgumentType]
    assert torch.equal(sample(logits, rows).tokens, logits.argmax(dim=-1))
