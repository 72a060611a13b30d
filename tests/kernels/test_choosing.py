"""The choice of tokens as machine code, and by torch: against plain arithmetic, of all sizes and
filters, with rows of other kinds beside them, and in memory that held others before."""

import random
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from chatserve_kernels import reference, sampling
from chatserve_kernels.cpu import choosing, native
from chatserve_kernels.cpu import sampling as on_cpu
from chatserve_kernels.sampling import Adjustments, Choices, Chosen, choose_tokens
from tests.kernels.choosing import choices

SEED = 61
NAN, INFINITY = float("nan"), float("inf")
LAST_NOISE = 1 - 2.0**-53
# Around the ends of vectors and blocks, and blocks that top_k looks at first.
SIZES = [1, 2, 15, 16, 17, 31, 33, 255, 256, 257, 511, 513, 1024, 3000]
COLUMNS = ("temperature", "min_p", "top_k", "top_p", "noise", "logarithms")


@pytest.fixture(params=["machine code", "torch"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    if request.param == "torch":
        with native.left_to_torch():
            yield
        return
    # What a row did not write itself is no weight and no number.
    scratch = on_cpu._scratch

    def spoiled(size: int) -> torch.Tensor:
        with torch.inference_mode():  # it may be one that another test's engine began to use
            return scratch(size).fill_(NAN)

    monkeypatch.setattr(on_cpu, "_scratch", spoiled)
    monkeypatch.setattr(sampling, "_by_torch", None)
    yield


both_ways = pytest.mark.usefixtures("ways")


def mixed_choices(numbers: random.Random, count: int, vocabulary: int) -> Choices:
    """Rows of all settings side by side."""

    def column(*values: float) -> list[float]:
        return [numbers.choice(values) for _ in range(count)]

    return choices(
        count,
        temperature=column(0.0, 0.3, 0.8, 1.0, 1.7, 1e-30),
        min_p=column(0.0, 0.0, 0.05, 1e-9, 1.0),
        top_k=column(0, 0, 1, 5, 40, vocabulary - 1, vocabulary, 3 * vocabulary),
        top_p=column(1.0, 1.0, 0.9, 0.5, 1e-9, 0.999999, 0.0),
        noise=[numbers.choice((numbers.random(), 0.0, LAST_NOISE)) for _ in range(count)],
        logarithms=column(0.0, 1.0),
        adjustments=mixed_adjustments(numbers, count, vocabulary),
    )


def mixed_adjustments(numbers: random.Random, count: int, vocabulary: int) -> Adjustments:
    """Of some rows, in no order; not all of a row's logits are banned."""
    places = [(row, token) for row in range(count) for token in range(vocabulary) if row % 3]
    places = numbers.sample(places, min(len(places), 40))
    bans = [token % 2 for _, token in places]
    return Adjustments(
        rows=np.asarray([row for row, _ in places], dtype=np.int64),
        ids=np.asarray([token for _, token in places], dtype=np.int64),
        bias=np.asarray([numbers.choice((0, 5.3, -2.1)) for _ in places], dtype=np.float32),
        repetition=np.asarray([numbers.choice((1, 1.37)) for _ in places], dtype=np.float32),
        subtracted=np.where(bans, INFINITY, 0.43).astype(np.float32),
    )


def logits_of(count: int, vocabulary: int) -> Tensor:
    """Steep, common and flat rows, some with equal logits, some with few that come at all; between
    NaN."""
    wide = torch.full((count + 2, vocabulary + 8), NAN)
    logits = wide[1:-1, 4 : 4 + vocabulary]
    logits[:] = torch.randn(count, vocabulary)
    logits *= torch.tensor([1.0, 6.0, 0.1])[torch.arange(count) % 3, None]
    logits[::4] = logits[::4].round()
    logits[2::5, : vocabulary // 2] = -INFINITY
    return logits


def given_of(given: Choices, rows: list[int]) -> Choices:
    """Of some of its rows."""
    adjustments = given.adjustments
    assert adjustments is not None
    new = {row: place for place, row in enumerate(rows)}
    mine = [place for place, row in enumerate(adjustments.rows) if row in new]
    return Choices(
        **{name: getattr(given, name)[rows] for name in COLUMNS},
        adjustments=Adjustments(
            rows=np.asarray([new[row] for row in adjustments.rows[mine]], dtype=np.int64),
            ids=adjustments.ids[mine],
            bias=adjustments.bias[mine],
            repetition=adjustments.repetition[mine],
            subtracted=adjustments.subtracted[mine],
        ),
    )


def assert_right(logits: Tensor, given: Choices) -> Chosen:
    before = logits.clone()
    result = choose_tokens(logits, given)
    assert torch.equal(logits, before)
    adjusted = logits
    if given.adjustments is not None:
        adjusted = reference.adjusted_logits(logits, given.adjustments)
    finite = (adjusted > -INFINITY).any(dim=-1)
    assert torch.equal(result.finite, finite)
    for i, row in enumerate(adjusted):
        expected = reference.choose_token(row, given, i) if finite[i] else 0
        settings = {name: getattr(given, name)[i] for name in COLUMNS}
        assert int(result.tokens[i]) == expected, settings
        if given.logarithms[i] and finite[i]:
            wide = logits[i].double()
            logarithm = wide.logsumexp(dim=0)
            assert float(result.logarithms[i]) == pytest.approx(float(logarithm), abs=1e-12)
            own = float(wide[expected] - logarithm)
            assert float(result.logprobs[i]) == pytest.approx(own, rel=1e-6, abs=1e-6)
    return result


@both_ways
@pytest.mark.parametrize("vocabulary", SIZES)
def test_rows_of_all_kinds_equal_plain_arithmetic(vocabulary: int, threads: int) -> None:
    print(f"seed {SEED + vocabulary}")
    torch.manual_seed(SEED + vocabulary)
    numbers = random.Random(SEED + vocabulary)
    assert_right(logits_of(40, vocabulary), mixed_choices(numbers, 40, vocabulary))


@both_ways
@pytest.mark.parametrize("vocabulary", [17, 700])
def test_a_token_does_not_depend_on_its_batch_mates(vocabulary: int, threads: int) -> None:
    """To the bit: also its logarithm."""
    print(f"seed {SEED}")
    torch.manual_seed(SEED)
    numbers = random.Random(SEED)
    logits, given = logits_of(60, vocabulary), mixed_choices(numbers, 60, vocabulary)
    together = choose_tokens(logits, given)
    order = numbers.sample(range(60), 60)
    for rows in (order, *([row] for row in range(60))):
        apart = choose_tokens(logits[rows], given_of(given, rows))
        assert torch.equal(apart.tokens, together.tokens[rows])
        asked = [place for place, row in enumerate(rows) if given.logarithms[row]]
        mine = [rows[place] for place in asked]
        assert torch.equal(apart.logarithms[asked], together.logarithms[mine])


@both_ways
@pytest.mark.parametrize("vocabulary", [40, 300, 2000])
def test_of_equal_weights_the_smaller_ids_stay(vocabulary: int) -> None:
    """Three heavier ones, at the beginning, in the middle and at the end, and many equal ones."""
    torch.manual_seed(SEED)
    logits = torch.full((1, vocabulary), -1.5)
    logits[0, [0, vocabulary // 2, vocabulary - 1]] = 0.5
    noises = (np.arange(400) + 0.37) / 400
    for kept in (1, 2, 3, 4, 5, vocabulary // 2, vocabulary - 1, vocabulary):
        given = choices(len(noises), noise=noises, temperature=2.0, top_k=float(kept))
        tokens = set(assert_right(logits.expand(len(noises), -1), given).tokens.tolist())
        order = logits[0].argsort(descending=True, stable=True)
        assert tokens <= set(order[:kept].tolist())
        assert tokens == set(order[:kept].tolist()) or kept > 20


@both_ways
def test_weights_that_logits_do_not_tell_apart_are_equal() -> None:
    """So small that beside the best one's weight they are the same: the smaller id stays."""
    logits = torch.tensor([[1e-20, 3e-20, -2e-20, 5.0, 0.0, -0.0, 4e-20]])
    for noise in (0.0, 0.3, LAST_NOISE):
        for top_k in (1.0, 2.0, 3.0):
            assert_right(logits, choices(1, top_k=top_k, noise=noise))


@both_ways
def test_top_p_after_top_k_counts_what_top_k_left() -> None:
    """Of equal weights: half of those that stay, and the first of them."""
    noises = np.linspace(0, LAST_NOISE, 64)
    logits = torch.zeros(len(noises), 600)
    tokens = assert_right(logits, choices(len(noises), noise=noises, top_k=8.0, top_p=0.5)).tokens
    assert set(tokens.tolist()) == set(range(4))


@both_ways
@pytest.mark.parametrize("min_p", [0.3, 1e-6])
def test_fewer_than_top_k_may_be_heavy_enough(min_p: float) -> None:
    """Many vectors, so that a first look at the largest of them would do for top_k alone; but most
    of those are too light, and the lightest that stay lie behind others of their part."""
    noises = np.linspace(0, LAST_NOISE, 50)
    logits = torch.full((1, 3000), -40.0)
    logits[0, [7, 8, 9, 700, 2999, 23, 39]] = torch.linspace(0.0, -1.0, 7)
    given = choices(len(noises), noise=noises, top_k=100.0, min_p=min_p)
    tokens = assert_right(logits.expand(len(noises), -1), given).tokens
    assert set(tokens.tolist()) == {7, 8, 9, 23, 39, 700, 2999}


@both_ways
def test_weights_over_the_whole_range_of_float64() -> None:
    """Filters end far below the best one, also where most weights are nothing."""
    logits = -torch.arange(0, 1500).float()[torch.randperm(1500)]
    for temperature in (2.5, 7.0, 20.0):
        for noise in (0.0, 1e-12, 0.4, 0.999):
            rows = choices(
                8,
                temperature=temperature,
                noise=noise,
                top_k=[3, 60, 100, 700, 1499, 0, 0, 50],
                top_p=[1, 1, 1, 1, 1, 0.9999999, 0.3, 0.99999],
            )
            assert_right(logits.expand(8, -1), rows)


@both_ways
def test_noise_on_borders_of_equal_weights() -> None:
    """Every sum is exact; a border belongs to the token behind it, whatever block it is in."""
    noises = [(k + step) / 1024 for k in (0, 1, 64, 255, 256, 1023) for step in (0, 2**-30)]
    logits = torch.full((len(noises) + 1, 1024), 1.7)
    tokens = assert_right(logits, choices(len(noises) + 1, noise=[*noises, LAST_NOISE])).tokens
    assert tokens.tolist() == [*(int(noise * 1024) for noise in noises), 1023]


@both_ways
@pytest.mark.parametrize("vocabulary", [5, 16, 300, 1000])
def test_rows_that_are_not_finite_leave_the_others_alone(vocabulary: int) -> None:
    torch.manual_seed(SEED)
    logits = torch.randn(8, vocabulary)
    clean = choose_tokens(logits, choices(8, noise=0.5, top_p=0.9)).tokens.tolist()
    logits[0, -1] = logits[3, 0] = NAN
    logits[1, 1] = INFINITY
    logits[2, 2], logits[2, 3] = NAN, INFINITY
    logits[4] = -INFINITY
    logits[5, 3] = NAN  # a ban does not hide it
    places = [(5, 3), *((6, token) for token in range(vocabulary))]
    adjustments = Adjustments(
        rows=np.asarray([row for row, _ in places]),
        ids=np.asarray([token for _, token in places]),
        bias=np.zeros(len(places), np.float32),
        repetition=np.ones(len(places), np.float32),
        subtracted=np.full(len(places), INFINITY, np.float32),
    )
    for settings in ({"top_p": 0.9}, {"temperature": 0.0}, {}):
        given = choices(8, noise=0.5, adjustments=adjustments, **settings)
        result = choose_tokens(logits, given)
        assert result.finite.tolist() == [False] * 7 + [True]
        assert result.tokens[:7].tolist() == [0] * 7
    result = choose_tokens(logits, choices(8, noise=0.5, top_p=0.9))
    assert result.tokens[[6, 7]].tolist() == clean[6:]


@both_ways
def test_rows_in_memory_of_another_order() -> None:
    torch.manual_seed(SEED)
    numbers = random.Random(SEED)
    logits, given = torch.randn(20, 70), mixed_choices(numbers, 20, 70)
    expected = choose_tokens(logits, given).tokens
    for turned in (logits.T.contiguous().T, logits.repeat(1, 2)[:, :70]):
        assert torch.equal(choose_tokens(turned, given).tokens, expected)
    same = torch.randn(1, 70).expand(20, -1)
    assert torch.equal(
        choose_tokens(same, given).tokens, choose_tokens(same.contiguous(), given).tokens
    )


def test_an_exponential_is_right_to_the_last_bits() -> None:
    """Through the door: a logit's logarithm beside a best one of 0 tells its weight."""
    values = torch.linspace(0, -700, 5001)
    logits = torch.stack((torch.zeros(5001), values), dim=1)
    result = choose_tokens(logits, choices(5001, logarithms=1.0)).logarithms
    expected = torch.log(1 + torch.exp(values.double()))
    assert float((result - expected).abs().max()) < 4e-16


def test_rows_wake_threads_where_they_are_worth_it(
    monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    parallel, woken = native._parallel(), list[int]()

    def counted(function: int, data: int, threads: int, flags: int) -> None:
        woken.append(threads)
        parallel(function, data, threads, flags)

    monkeypatch.setattr(native, "_parallel", lambda: counted)
    choose_tokens(torch.randn(3, 100), choices(3))
    choose_tokens(torch.randn(1, 100_000), choices(1))
    assert woken == []
    choose_tokens(torch.randn(3, 100_000), choices(3))
    assert woken == [2]


@pytest.mark.parametrize("why", ["refused", "absent"])
def test_without_a_program_torch_chooses(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[int, ...]]()
    by_torch = sampling._by_torch

    def counted(logits: Tensor, given: Choices) -> Chosen:
        asked.append(tuple(logits.shape))
        return by_torch(logits, given)

    monkeypatch.setattr(sampling, "_by_torch", counted)
    if why == "absent":
        monkeypatch.setattr(on_cpu, "choosing", None)
    else:
        monkeypatch.setattr(on_cpu, "_function", lambda: None)
    assert_right(torch.randn(3, 50), choices(3, noise=0.3, top_k=4.0))
    assert asked == [(3, 50)]


def test_the_program_is_the_same_whatever_was_compiled_before() -> None:
    assert choosing.choose_text() == choosing.choose_text()


def adjustments(**changes: Any) -> Adjustments:
    columns = {"rows": np.zeros(2, int), "ids": np.arange(2)}
    columns |= {name: np.zeros(2, np.float32) for name in ("bias", "repetition", "subtracted")}
    return Adjustments(**(columns | changes))


@both_ways
def test_adjustments_of_no_logit_change_nothing() -> None:
    nothing = {name: array[:0] for name, array in vars_of(adjustments()).items()}
    logits, given = torch.randn(3, 50), choices(3, noise=0.3)
    expected = choose_tokens(logits, given).tokens
    given = replace(given, adjustments=Adjustments(**nothing))
    assert torch.equal(choose_tokens(logits, given).tokens, expected)


def vars_of(given: Adjustments) -> dict[str, Any]:
    names = ("rows", "ids", "bias", "repetition", "subtracted")
    return {name: getattr(given, name) for name in names}
