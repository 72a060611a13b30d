"""Tokens by Triton, as the engine chooses them on a CPU: on a GPU, else in Triton's interpreter."""

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from chatserve.model import SampleRow, Samples, sample
from chatserve.model.sampling import adjustments_of
from chatserve.model.step import LateTokens
from chatserve_kernels import gpu, reference
from chatserve_kernels import sampling as door
from chatserve_kernels.gpu import sampling as module
from chatserve_kernels.gpu import weighing
from chatserve_kernels.sampling import Adjustments, Choices, Chosen, choose_tokens
from tests.kernels.choosing import choices
from tests.model.late import FEWEST, VOCABULARY, counted, rows_with_late_tokens
from tests.model.test_sampling import random_row
from tests.seeds import drawn_seed

DEVICE = torch.device("cpu" if gpu.interpreted() else "cuda")
NAN, INFINITY = float("nan"), float("inf")
ELSEWHERE = 257  # what integers hold that nobody has written: no token, but in memory
SEED = 53
GATHER_SIZES = 8  # the argument that says how many are left


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written yet is NaN, or no token."""
    empty = torch.empty

    def filled(*arguments: Any, **options: Any) -> Tensor:
        result = empty(*arguments, **options)
        return result.fill_(NAN if result.is_floating_point() else ELSEWHERE)

    monkeypatch.setattr(torch, "empty", filled)


@pytest.fixture(autouse=True)
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of some parts, parts of some chunks, few bins."""
    for name, value in {"PART": 128, "CHUNK": 64, "BINS": 8, "ADJUSTMENTS_EACH": 16}.items():
        monkeypatch.setattr(module, name, value)


def on_device(logits: Tensor) -> Tensor:
    """Between NaN, so far that even a token of ELSEWHERE is in memory."""
    rows, vocabulary = logits.shape
    wide = torch.full((rows + 2, 16 + vocabulary + 24), NAN)
    wide[1:-1, 16 : 16 + vocabulary] = logits
    return wide.to(DEVICE)[1:-1, 16 : 16 + vocabulary]


def on_cpu(logits: Tensor, rows: Sequence[SampleRow]) -> Samples:
    """As the engine does without a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "serves", lambda device_type: False)
        return sample(logits, rows)


def assert_same(logits: Tensor, rows: Sequence[SampleRow]) -> None:
    expected, given = on_cpu(logits, rows), on_device(logits)
    before = given.clone()
    result = sample(given, rows)
    assert result.finite == expected.finite
    assert result.tokens.dtype == torch.int64
    for i, row in enumerate(rows):
        assert int(result.tokens[i]) == int(expected.tokens[i]), (i, row)
        mine, theirs = result.logprobs[i], expected.logprobs[i]
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert mine.chosen == pytest.approx(theirs.chosen, abs=1e-5)
            assert [value for _, value in mine.top] == pytest.approx(
                [value for _, value in theirs.top], abs=1e-5
            )
            best = [logits[i, token].item() for token, _ in mine.top]
            assert best == [logits[i, token].item() for token, _ in theirs.top]
    torch.testing.assert_close(given, before, atol=0, rtol=0, equal_nan=True)


FILTERS: list[dict[str, Any]] = [
    *({"top_p": 0.9}, {"top_p": 0.3}, {"top_p": 0.9999999}, {"top_p": 1e-9}),
    *({"top_k": 40}, {"top_k": 190}, {"top_k": 1}, {"top_k": 5000}),
    *({"min_p": 0.05}, {"min_p": 1e-12}, {"min_p": 1.0}),
    *({"top_k": 50, "top_p": 0.95}, {"min_p": 0.01, "top_p": 0.9}, {"top_k": 150, "top_p": 0.5}),
    *({"min_p": 1e-12, "top_k": 100, "top_p": 0.99}, {"min_p": 0.2, "top_k": 100}, {}),
]


def test_each_filter_gives_the_tokens_of_a_cpu() -> None:
    """Of steep, common and flat rows, some with equal logits, some with few that come at all."""
    print(f"seed {SEED}")
    torch.manual_seed(SEED)
    count = len(FILTERS)
    logits = torch.randn(count, 128) * torch.tensor([1.0, 6.0, 0.1])[torch.arange(count) % 3, None]
    logits[:, 7] = -60.0
    logits[::4] = logits[::4].round()
    logits[2::5, :90] = -INFINITY
    rows = [
        SampleRow(temperature=(0.7, 20.0, 0.05, 1.0)[i % 4], seed=i, **filters)
        for i, filters in enumerate(FILTERS)
    ]
    assert_same(logits, rows)


@pytest.mark.parametrize("vocabulary", [1, 64, 300])
def test_rows_of_all_kinds_together(vocabulary: int) -> None:
    """Of vocabularies that end with a part, with a chunk, and inside one."""
    print(f"seed {SEED + vocabulary}")
    torch.manual_seed(SEED + vocabulary)
    numbers = random.Random(SEED + vocabulary)
    logits = 2 * torch.randn(9, vocabulary)
    rows = [random_row(numbers, max(5, vocabulary)) for _ in range(9)]
    rows[3] = replace(rows[3], **counted((0, 0, vocabulary, -1, 0), 1))
    rows[4] = SampleRow(seed=vocabulary)
    assert_same(logits, rows)


def test_a_token_does_not_depend_on_its_batch_mates() -> None:
    print(f"seed {SEED}")
    torch.manual_seed(SEED)
    numbers = random.Random(SEED)
    logits = on_device(2 * torch.randn(6, 150))
    rows = [random_row(numbers, 150) for _ in range(6)]
    together = sample(logits, rows)
    order = numbers.sample(range(6), 6)
    shuffled = sample(logits[order], [rows[i] for i in order])
    assert shuffled.tokens.tolist() == together.tokens[order].tolist()
    for i in (0, 5):
        alone = sample(logits[i : i + 1], [rows[i]])
        assert alone.tokens[0] == together.tokens[i]
        assert alone.logprobs[0] == together.logprobs[i]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_rows_that_are_not_finite_leave_the_others_alone() -> None:
    print(f"seed {SEED}")
    torch.manual_seed(SEED)
    logits = torch.randn(12, 150)
    for row, (token, value) in enumerate([(3, NAN), (140, INFINITY), (70, NAN), (0, -INFINITY)]):
        logits[row, token] = value
    logits[4] = -INFINITY
    logits[5, 100] = NAN
    logits[6, :-1] = logits[7, :-1] = -INFINITY
    rows = [SampleRow(position=i, top_logprobs=2, top_p=(0.9, 1.0)[i % 2]) for i in range(12)]
    rows[5] = replace(rows[5], banned=(100,))  # what a ban hides is seen all the same
    rows[7] = replace(rows[7], banned=(149,))
    rows[8] = replace(rows[8], logit_bias=((4, 3e38), (5, 1.0)))
    rows[10] = replace(rows[10], logit_bias=((4, 3e38), (5, 1.0)), banned=(4,))
    logits[8, 4] = logits[10, 4] = 3e38
    rows[10] = replace(rows[10], top_logprobs=None)  # all of them are the same number to a CPU
    logits[9, 2] = NAN
    rows[9] = replace(rows[9], temperature=0.0)
    assert_same(logits, rows)
    assert sample(on_device(logits), rows).finite == [
        *(False, False, False, True, False, False),
        *(True, False, False, False, True, True),
    ]


def test_penalties_are_to_the_bit_those_of_a_cpu() -> None:
    print(f"seed {SEED}")
    torch.manual_seed(SEED)
    numbers = random.Random(SEED)
    logits = 3 * torch.randn(20, 97)
    rows = [
        replace(
            random_row(numbers, 120),
            repetition_penalty=numbers.choice((1.0, 1.1, 1.37)),
            presence_penalty=numbers.choice((0.0, 0.7, -0.3)),
            frequency_penalty=numbers.choice((0.0, 0.1, 0.43)),
            logit_bias=((3, 5.3), (119, 1.0), (96, -0.7)),
            banned=(1, 100, -3),
        )
        for _ in range(20)
    ]
    logits[:, 3] = torch.linspace(-6, 6, 20)
    given = adjustments_of(rows, 97)
    assert given is not None
    expected = reference.adjusted_logits(logits, given)
    assert torch.equal(module._adjusted(on_device(logits), given).cpu(), expected)
    assert torch.equal(door._adjusted(logits, given), expected)
    assert adjustments_of([SampleRow()], 97) is None


def test_a_late_token_counts_to_the_bit_as_a_known_one() -> None:
    """On the device, without the host."""
    known = rows_with_late_tokens(drawn_seed())
    logits, late = on_device(known.logits), known.late(DEVICE)
    given = adjustments_of(known.without, VOCABULARY, late)
    plain = adjustments_of(known.rows, VOCABULARY)
    assert given is not None
    assert plain is not None
    expected = reference.adjusted_logits(known.logits, plain)
    assert torch.equal(module._adjusted(logits, given).cpu(), expected)
    result = sample(logits, known.without, late).tokens
    assert torch.equal(result, sample(logits, known.rows).tokens)
    assert (sample(logits, known.without).tokens != result).sum() >= FEWEST


@pytest.mark.parametrize("token", [-1, VOCABULARY, 1 << 40])
def test_a_late_token_outside_the_vocabulary_is_passed_over(token: int) -> None:
    known = rows_with_late_tokens(drawn_seed())
    late = replace(known, chosen=torch.full_like(known.chosen, token)).late(DEVICE)
    logits = on_device(known.logits)
    given = adjustments_of(known.without, VOCABULARY, late)
    assert given is not None
    expected = module._adjusted(logits, replace(given, late=None))
    assert torch.equal(module._adjusted(logits, given), expected)


def test_a_late_token_is_all_that_there_is_to_count() -> None:
    """Nothing was generated before it, and no id is named."""
    row = SampleRow(temperature=0.0, presence_penalty=5.0, **counted((1, 2), 2))
    late = LateTokens(np.asarray([1]), np.asarray([1]), torch.tensor([0, 3], device=DEVICE))
    logits = on_device(torch.tensor([[0.0, 1.0, 2.0, 4.0]]).repeat(2, 1))
    assert sample(logits, [row, row], late).tokens.tolist() == [3, 2]


@pytest.mark.parametrize("token", [5, 7])
def test_a_late_token_is_looked_for_in_its_own_row_alone(token: int) -> None:
    """Those around it have said it often, or are biased."""
    row = SampleRow(frequency_penalty=0.5, **counted((2,)))
    beside = replace(row, logit_bias=((7, 3.0),), **counted((5, 5, 5)))
    late = LateTokens(np.asarray([1]), np.asarray([0]), torch.tensor([token], device=DEVICE))
    given = adjustments_of([beside, row, beside], 10, late)
    plain = adjustments_of([beside, replace(row, **counted((2, token))), beside], 10)
    assert given is not None
    assert plain is not None
    logits = torch.ones(3, 10)
    expected = reference.adjusted_logits(logits, plain)
    assert expected[1, token] == 0.5
    assert torch.equal(module._adjusted(on_device(logits), given).cpu(), expected)
    assert torch.equal(reference.adjusted_logits(logits, given), expected)


def chosen(logits: Tensor, given: Choices) -> list[int]:
    result = choose_tokens(on_device(logits), given)
    assert result.finite.all()
    tokens: list[int] = result.tokens.tolist()
    assert tokens == [reference.choose_token(each, given, i) for i, each in enumerate(logits)]
    return tokens


LAST_NOISE = 1 - 2.0**-53


def test_the_noise_falls_on_borders_exactly() -> None:
    """Equal logits weigh 1: every sum is exact. A border belongs to the token behind it."""
    noises = [(k + step) / 256 for k in (0, 1, 64, 128, 255) for step in (0, -(2**-30))]
    noises = [*noises[:1], *noises[2:], LAST_NOISE]
    logits = torch.full((len(noises), 256), 1.7)
    expected = [int(noise * 256) for noise in noises]
    assert chosen(logits, choices(len(noises), noise=noises)) == expected
    some = [noise for noise in noises if 63 < noise * 256 < 65]
    tokens = chosen(logits[: len(some)], choices(len(some), noise=some, top_p=LAST_NOISE))
    assert tokens == [int(noise * 256) for noise in some]


def test_of_equal_logits_the_smaller_ids_stay() -> None:
    """As many as top_k says, as top_p reaches exactly, and one more for the least bit more."""
    count = 96
    shares = [k / count + step for k in (64, 95) for step in (0.0, 1e-9)]
    logits = torch.full((4, count), -0.3)
    tokens = chosen(logits, choices(4, top_p=shares, noise=LAST_NOISE))
    assert tokens == [63, 64, 94, 95]
    most = [1.0, 64.0, 65.0, 1e6]
    assert chosen(logits, choices(4, top_k=most, noise=LAST_NOISE)) == [0, 63, 64, 95]
    both = choices(2, top_k=[65.0, 64.0], top_p=0.5, noise=LAST_NOISE)
    assert chosen(logits[:2], both) == [32, 31]


def test_better_ones_stay_before_equal_ones() -> None:
    """The equal ones at the edge, on both sides of better ones and over parts."""
    logits = torch.zeros(9, 150)
    logits[:, [5, 70, 148]] = 2.0
    logits[:, 80:90] = -3.0
    most = [2.0, 4.0, 6.0, 70.0, 145.0, 0.0, 0.0, 70.0, 70.0]
    shares = [1.0, 1.0, 1.0, 1.0, 1.0, 0.11, 0.9, 0.7, 0.9]
    noise = [LAST_NOISE, LAST_NOISE, 0.9, 0.6, 0.8, LAST_NOISE, 0.99, LAST_NOISE, 0.3]
    chosen(logits, choices(9, top_k=most, top_p=shares, noise=noise))


def test_a_share_that_is_met_exactly_is_reached() -> None:
    """By the best alone; the least bit more takes the next one. One always stays."""
    logits = torch.full((3, 100), -INFINITY)
    logits[:, 70], logits[:, 80] = 0.0, -3.0
    share = 1 / (1 + math.exp(-3))
    assert share * (1 + math.exp(-3)) == 1
    given = choices(3, top_p=[share, share + 1e-9, 0.0], noise=LAST_NOISE)
    assert chosen(logits, given) == [70, 80, 70]


def test_logits_of_one_weight_are_equal() -> None:
    """So small that the best one's weight does not tell them apart: the smaller id stays."""
    logits = torch.tensor([[1e-20, 3e-20, -2e-20, 5.0, 0.0, -0.0, 4e-20]])
    assert chosen(logits, choices(1, top_k=2.0, noise=0.0)) == [0]
    assert chosen(logits, choices(1, top_k=3.0, noise=LAST_NOISE)) == [3]
    assert chosen(logits[:, 1:], choices(1, top_p=0.995, noise=0.0)) == [0]


def test_the_most_noise_falls_on_the_last_token() -> None:
    """Also where two ways to add the same numbers differ; and never on one of the next row."""
    print(f"seed {SEED}")
    torch.manual_seed(SEED)
    logits = torch.randn(12, 140)
    logits[:, 136:] = -INFINITY
    given = choices(12, top_k=[100.0] * 2 + [0.0] * 10, noise=LAST_NOISE)
    assert chosen(logits, given)[2:] == [135] * 10
    result = choose_tokens(logits.to(DEVICE), given)
    assert result.tokens[2:].tolist() == [135] * 10


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_what_weighs_nothing_never_comes(top_p: float) -> None:
    """Not where the noise is least, nor where it is most."""
    logits = torch.full((2, 140), -2000.0)
    logits[:, [40, 41, 70]] = torch.tensor([0.0, 1.0, 0.5])
    assert chosen(logits, choices(2, noise=[0.0, LAST_NOISE], top_p=top_p)) == [40, 70]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_greedy_takes_the_best_and_a_tiny_temperature_agrees() -> None:
    """Of equal ones, also of the two zeros, the smallest id."""
    logits = torch.full((6, 300), -0.1)
    for row, ids in enumerate([(299,), (63, 64), (64, 63), (0, 70, 140), (127, 256), (130, 131)]):
        logits[row, list(ids)] = torch.tensor([-0.0, 0.0, -0.0][: len(ids)])
    expected = [299, 63, 63, 0, 127, 130]
    assert chosen(logits, choices(6, temperature=0.0, noise=0.7, top_k=3.0)) == expected
    given = choices(6, temperature=[1e-5, 1e-30, 1e-310] * 2, top_p=[1.0, 1.0, 1.0, 0.1, 0.1, 0.1])
    assert chosen(logits, given) == expected


def test_few_tokens_are_left_to_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each half as heavy as the one before it, those that may stay and a few at most."""
    launched, sizes = gpu.launched, list[Tensor]()

    def noted(kernel: Any, grid: tuple[int, ...]) -> Any:
        def launch(*given: Any, **options: Any) -> None:
            launched(kernel, grid)(*given, **options)
            if kernel is weighing.gather:
                sizes.append(given[GATHER_SIZES])

        return launch

    monkeypatch.setattr(module.gpu, "launched", noted)
    logits = -0.6931 * torch.arange(150.0).flip(0).repeat(3, 1)
    chosen(logits, choices(3, top_k=[3.0, 0.0, 2.0], top_p=[1.0, 0.9, 0.9], noise=0.7))
    (counts,) = sizes
    assert counts.tolist() == [3, 4, 2]


def test_logprobs_are_of_the_raw_distribution() -> None:
    print(f"seed {SEED}")
    torch.manual_seed(SEED)
    logits = 4 * torch.randn(4, 150) + torch.tensor([0.0, 60.0, -80.0, 0.0])[:, None]
    logits[2, :64] = -INFINITY  # a whole part
    rows = [
        SampleRow(temperature=0.3, logit_bias=((149, 90.0),), top_logprobs=4),
        SampleRow(temperature=0.0, top_logprobs=0),
        SampleRow(temperature=9.0, top_logprobs=1),
        SampleRow(),
    ]
    result = sample(on_device(logits), rows)
    right = logits.double().log_softmax(dim=-1)
    assert int(result.tokens[0]) == 149
    assert result.logprobs[3] is None
    for i, count in enumerate((4, 0, 1)):
        given = result.logprobs[i]
        assert given is not None
        assert given.chosen == pytest.approx(float(right[i, result.tokens[i]]), abs=2e-6, rel=2e-7)
        best = right[i].sort(descending=True)
        assert [token for token, _ in given.top] == best.indices[:count].tolist()
        assert [value for _, value in given.top] == pytest.approx(
            best.values[:count].tolist(), abs=2e-6, rel=2e-7
        )


def test_a_row_in_memory_of_another_order() -> None:
    logits = torch.zeros(3, 70)
    logits[:, 66] = torch.tensor([2.0, 3.0, 4.0])
    turned = logits.T.contiguous().T.to(DEVICE)
    result = choose_tokens(turned, choices(3, temperature=0.0))
    assert result.tokens.tolist() == [66, 66, 66]
    assert sample(logits[:0].to(DEVICE), []).finite == []


@pytest.mark.parametrize("wrong", ["tokens", "finite", "logprobs", None])
def test_what_fails_its_trial_is_left_to_torch(
    wrong: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original, asked = module.choose_tokens, list[int]()

    def counted(logits: Tensor, given: Choices) -> Chosen:
        asked.append(len(logits))
        result = original(logits, given)
        if wrong is not None:
            part: Tensor = getattr(result, wrong)
            part[-1] = part[-1] == 0
        return result

    monkeypatch.setattr(gpu, "interpreted", lambda: False)
    monkeypatch.setattr(module, "choose_tokens", counted)
    module._trusted.cache_clear()
    logits = torch.randn(2, 150, device=DEVICE)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            sample(logits, [SampleRow(), SampleRow(temperature=0.0)])
    module._trusted.cache_clear()
    right = wrong is None
    assert asked == ([5, 2, 2] if right else [5]), "one trial, then the rows themselves"
    assert ["are wrong" in record.getMessage() for record in caplog.records] == [True] * (not right)


def adjustments(**changes: Any) -> Adjustments:
    columns = {"rows": np.zeros(2, int), "ids": np.arange(2)}
    columns |= {name: np.zeros(2, np.float32) for name in ("bias", "repetition", "subtracted")}
    return Adjustments(**(columns | changes))


@pytest.mark.parametrize(
    "changes",
    [
        *({"rows": np.asarray([0, 3])}, {"rows": np.asarray([-1, 0])}, {"rows": np.zeros(3, int)}),
        *({"ids": np.asarray([0, 40])}, {"ids": np.asarray([-1, 0])}, {"ids": np.zeros((2, 1))}),
        *({name: np.zeros(1, np.float32)} for name in ("bias", "repetition", "subtracted")),
    ],
    ids=str,
)
def test_the_door_refuses_adjustments_that_do_not_fit(changes: dict[str, Any]) -> None:
    given = replace(choices(3), adjustments=adjustments(**changes))
    with pytest.raises(ValueError, match="adjustments must be"):
        choose_tokens(torch.zeros(3, 40), given)


def test_the_door_refuses_logits_and_columns_that_do_not_fit() -> None:
    for logits in (
        *(torch.zeros(40), torch.zeros(3, 40).double(), torch.zeros(1, 3, 40)),
        *(torch.zeros(3, 0), torch.zeros(0, 40)),
    ):
        with pytest.raises(ValueError, match="logits are"):
            choose_tokens(logits, choices(3))
    for name in ("temperature", "min_p", "top_k", "top_p", "noise", "logarithms"):
        given = replace(choices(3), **{name: np.zeros(2)})
        with pytest.raises(ValueError, match=f"{name} must be"):
            choose_tokens(torch.zeros(3, 40), given)
