"""Linear layers of int8 weights, as machine code: against plain arithmetic in float64, at odd
sizes, on several threads, and where a machine has no program for them."""

import logging
from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import Tensor

from chatserve_kernels import int8
from chatserve_kernels.cpu import native
from chatserve_kernels.int8 import compiled_product, dequantized, product_for, quantized
from chatserve_kernels.linear import JoinedWeights, LinearProduct, LinearWeights

DTYPES = [torch.float32, torch.bfloat16]
SEED = 23
# out_features, in_features
SIZES = [(64, 128), (1, 2), (65, 1), (70, 205), (192, 384), (300, 129)]


@pytest.fixture
def afresh() -> Generator[None]:
    """Nothing is known yet of what was compiled."""
    compiled_product.cache_clear()
    yield
    compiled_product.cache_clear()


def product(dtype: torch.dtype = torch.float32) -> LinearProduct:
    """There is one on every machine that tests run on."""
    compiled = product_for(dtype)
    assert compiled is not None
    return compiled


def multiplied(rows: Tensor, weights: LinearWeights) -> Tensor:
    """By the product for these rows; without what whole blocks have to spare."""
    joined = JoinedWeights([weights])
    return product(rows.dtype).run(rows, joined)[:, joined.columns[0]]


def normal(*shape: int, seed: int = SEED) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exactly(rows: Tensor, weights: LinearWeights) -> Tensor:
    """In float64, of the weights that these stand for."""
    bias = weights.bias[: weights.out_features].double()
    return rows.double() @ dequantized(weights).double().T + bias


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_equals_plain_arithmetic(
    size: tuple[int, int], bias: bool, dtype: torch.dtype, threads: int
) -> None:
    weights = quantized(normal(*size), normal(size[0]) if bias else None)
    for count in (1, 2, 3, 7, 16, 17):
        rows = normal(count, size[1], seed=count).to(dtype)
        expected = exactly(rows, weights)
        result = multiplied(rows, weights)
        assert result.shape == (count, size[0])
        assert result.dtype == dtype
        # Each input is within 2^-16 of its group's largest; bfloat16 rounds the result once more.
        groups = torch.nn.functional.pad(rows.double().abs(), (0, -size[1] % 128)).unflatten(
            1, (-1, 128)
        )
        reach = groups.amax(dim=2) * 2**-16
        sizes = dequantized(weights).double().abs()
        sizes = torch.nn.functional.pad(sizes, (0, -size[1] % 128)).unflatten(1, (-1, 128))
        allowed = reach @ sizes.sum(dim=2).T + 1e-5 * expected.abs()
        allowed += 2**-8 * expected.abs() if dtype == torch.bfloat16 else 1e-6
        assert ((result.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_a_row_is_the_same_in_any_company_on_any_threads(dtype: torch.dtype) -> None:
    """So pages hold the same, however prompts were cut."""
    weights, rows = quantized(normal(130, 400), normal(130)), normal(37, 400).to(dtype)
    before = torch.get_num_threads()
    alone = torch.cat([multiplied(row[None], weights) for row in rows])
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(multiplied(rows, weights), alone)
            assert torch.equal(multiplied(rows[5:12], weights), alone[5:12])
    finally:
        torch.set_num_threads(before)


def test_narrow_registers_give_the_same(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    weights, rows = quantized(normal(130, 400), None), normal(7, 400)
    expected = multiplied(rows, weights)
    request.getfixturevalue("afresh")
    wide = native.wide_registers()
    monkeypatch.setattr(native, "wide_registers", lambda: not wide)
    assert torch.equal(multiplied(rows, weights), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 200, 204])  # the last ones are behind whole vectors
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_what_is_not_finite_shows_in_its_row_alone(
    value: float, column: int, dtype: torch.dtype
) -> None:
    weights, rows = quantized(normal(70, 205), normal(70)), normal(5, 205).to(dtype)
    before = multiplied(rows, weights)
    rows[2, column] = value
    result = multiplied(rows, weights)
    assert result[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(result[others], before[others])


@pytest.mark.parametrize("large", [1e3, 1e4, 1e6])
def test_a_large_input_costs_its_own_group_alone(large: float) -> None:
    """Large models have such ones in a few tokens (massive activations, arXiv 2402.17762)."""
    weight = normal(64, 512)
    weight[:, 130] = 0  # what it is multiplied with does not hide what becomes of the others
    weights, row = quantized(weight, None), 0.1 * normal(1, 512, seed=7)
    row[0, 130] = large
    result = multiplied(row, weights).double()
    others = row.clone()
    others[:, 128:256] = 0
    # What its group has is lost where the step is larger, but no more.
    allowed = (large * 2**-16) * dequantized(weights)[:, 128:256].double().abs().sum(dim=1)
    assert ((result - exactly(row, weights)).abs() <= allowed + 1e-4).all()
    beside = exactly(others, weights)
    assert (multiplied(others, weights) - beside).norm() / beside.norm() < 1e-4
    assert (
        allowed.min() < 0.3 * large / 2**16 * dequantized(weights).double().abs().sum(dim=1).max()
    )


@pytest.mark.parametrize("factor", [1e-42, 1e-32, 1e-20, 1e20, 1e36])
def test_rows_of_any_size(factor: float) -> None:
    weights, rows = quantized(normal(70, 205), None), normal(3, 205)
    result = multiplied(rows * factor, weights).double()
    expected = exactly(rows * factor, weights)
    # Of a row below 1e-33 less and less is left.
    torch.testing.assert_close(result, expected, rtol=0, atol=3e-3 * factor + 1e-39)


def test_rows_and_weights_of_zeros() -> None:
    weight, bias = normal(70, 205), normal(70)
    weight[3] = 0
    weight[5, :128] = 0
    weights = quantized(weight, bias)
    rows = torch.stack((torch.zeros(205), normal(205)))
    result = multiplied(rows, weights)
    assert torch.equal(result[0], bias)
    assert torch.equal(result[:, 3], bias[3].expand(2))
    assert result.isfinite().all()
    torch.testing.assert_close(result.double(), exactly(rows, weights), atol=2e-3, rtol=0)


def test_the_largest_integers_do_not_overflow() -> None:
    """All of one sign and size, over many groups."""
    weights = quantized(torch.full((64, 4096), -2.0), None)
    result = multiplied(torch.full((1, 4096), 3.0), weights)
    torch.testing.assert_close(result, torch.full((1, 64), -6.0 * 4096), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_within_half_a_step_of_each_group(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "_ROUNDED_AT_ONCE", 130 * 333)  # two blocks
    weight = normal(300, 333).to(dtype)
    difference = (dequantized(quantized(weight, None)) - weight.float()).abs()
    steps = [part.float().abs().amax(dim=1, keepdim=True) / 127 for part in weight.split(128, 1)]
    for part, step in zip(difference.split(128, 1), steps, strict=True):
        assert (part <= 0.5001 * step).all()


def test_the_weights_are_half_of_bfloat16s() -> None:
    weights = quantized(normal(512, 1024), None)
    assert weights.nbytes <= 1.04 * 512 * 1024


def test_rows_of_other_strides() -> None:
    weights, rows = quantized(normal(70, 64), None), normal(5, 128)
    expected = multiplied(rows[:, ::2].contiguous(), weights)
    assert torch.equal(multiplied(rows[:, ::2], weights), expected)
    assert torch.equal(multiplied(rows[:, :64], weights), multiplied(rows[:, :64].clone(), weights))
    assert multiplied(rows[:0, :64], weights).shape == (0, 70)


@pytest.mark.parametrize(
    "rows",
    [torch.zeros(3, 63), torch.zeros(64), torch.zeros(3, 64).bfloat16(), torch.zeros(3, 64).int()],
    ids=lambda rows: f"{tuple(rows.shape)} {rows.dtype}",
)
def test_rows_that_do_not_fit_are_refused(rows: Tensor) -> None:
    """Machine code would read beside them."""
    with pytest.raises(ValueError, match="rows is"):
        product().run(rows, JoinedWeights([quantized(normal(70, 64), None)]))


WRONG = {
    "weights without signs": ("sext <32 x i8>", "zext <32 x i8>"),
    "a finite number for NaN": (f"i32 {0x7FC00000} to float", f"i32 {0x3F800000} to float"),
}


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("fault", [*WRONG, "refused", "no llvm", "no program", "no threads"])
def test_where_there_is_no_program(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text = int8.code.int8_text

    def wrong(**options: Any) -> str:
        old, new = WRONG[fault]
        right = text(**options)
        assert old in right
        return right.replace(old, new)

    before = torch.get_num_threads()
    if fault in WRONG:
        monkeypatch.setattr(int8.code, "int8_text", wrong)
    elif fault == "refused":
        monkeypatch.setattr(int8.code, "int8_text", lambda **_: "no program")
    elif fault == "no llvm":
        monkeypatch.setattr(native, "llvm", None)
    elif fault == "no program":
        monkeypatch.setattr(int8, "code", None)
    else:
        monkeypatch.setattr(native, "_parallel", lambda: None)
        torch.set_num_threads(2)
    try:
        with caplog.at_level(logging.WARNING):
            assert product_for(torch.float32) is None
    finally:
        torch.set_num_threads(before)
    said = {"refused": "left to torch"} | dict.fromkeys(WRONG, "wrong on this machine")
    assert said.get(fault, "") in caplog.text


def test_other_types_have_none() -> None:
    assert product_for(torch.float16) is None
