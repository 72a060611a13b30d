"""Linear layers as machine code: against plain arithmetic in float64, at odd sizes, on several
threads, beside one another, in and out of chains, and where a machine has no program for them."""

import logging
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from torch import Tensor

from chatserve_kernels import int8, linear
from chatserve_kernels.cpu import native
from chatserve_kernels.linear import (
    JoinedWeights,
    LinearProduct,
    LinearWeights,
    compiled_product,
    in_blocks,
    product_for,
)
from tests.kernels.chains import new_chain

DTYPES = [torch.float32, torch.bfloat16]
IDS = ["fp32", "bf16"]
SEED = 29
# out_features, in_features
SIZES = [(64, 128), (1, 2), (65, 1), (70, 205), (192, 384), (300, 130)]
COUNTS = (1, 2, 3, 4, 5, 7, 16, 33)  # of rows


@pytest.fixture
def afresh() -> Generator[None]:
    """Nothing is known yet of what was compiled."""
    compiled_product.cache_clear()
    yield
    compiled_product.cache_clear()


def product(dtype: torch.dtype = torch.float32) -> LinearProduct:
    """There is one of float32 on every machine that tests run on."""
    compiled = product_for(dtype)
    if dtype == torch.bfloat16 and compiled is None:
        pytest.skip("this processor multiplies no pairs of bfloat16, or oneDNN is faster on it")
    assert compiled is not None
    return compiled


def normal(*shape: int, seed: int = SEED, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(
    outputs: int, inputs: int, dtype: torch.dtype, seed: int = SEED, *, bias: bool = True
) -> tuple[LinearWeights, Tensor, Tensor]:
    """In blocks, and its weight and bias as they were."""
    weight = normal(outputs, inputs, seed=seed, dtype=dtype)
    added = normal(outputs, seed=seed + 1, dtype=dtype) if bias else None
    return in_blocks(weight, added), weight, torch.zeros(outputs) if added is None else added


def assert_right(result: Tensor, rows: Tensor, weight: Tensor, added: Tensor) -> None:
    """result = rows · weightᵀ + added; added: of any shape that goes with it."""
    expected = rows.double() @ weight.double().T + added.double()
    sizes = rows.double().abs() @ weight.double().abs().T + added.double().abs()
    # Each addition rounds by 2^-24 of a sum at most; bfloat16 rounds the result once more.
    allowed = (rows.shape[1] + 4) * 2**-24 * sizes
    if result.dtype == torch.bfloat16:
        allowed += 2**-8 * expected.abs()
    assert result.shape == expected.shape
    assert ((result.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_equals_plain_arithmetic(
    size: tuple[int, int], bias: bool, dtype: torch.dtype, threads: int
) -> None:
    outputs, inputs = size
    if dtype == torch.bfloat16:
        inputs += inputs % 2
    compiled = product(dtype)
    weights, weight, added = layer(outputs, inputs, dtype, bias=bias)
    joined = JoinedWeights([weights])
    for count in COUNTS:
        rows = normal(count, inputs, seed=count, dtype=dtype)
        result = compiled.run(rows, joined)
        assert result.dtype == dtype
        assert result.shape == (count, -(-outputs // 64) * 64)
        assert_right(result[:, joined.columns[0]], rows, weight, added)
        assert not result[:, outputs:].any(), "outputs to spare are 0"


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_a_row_is_the_same_in_any_company_on_any_threads(dtype: torch.dtype) -> None:
    """So pages hold the same, however prompts were cut."""
    compiled = product(dtype)
    joined = JoinedWeights([layer(130, 400, dtype)[0]])
    rows = normal(37, 400, dtype=dtype)
    before = torch.get_num_threads()
    alone = torch.cat([compiled.run(row[None], joined) for row in rows])
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(compiled.run(rows, joined), alone)
            for first, last in ((5, 12), (0, 6), (33, 37), (8, 9), (1, 3)):
                assert torch.equal(compiled.run(rows[first:last], joined), alone[first:last])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_joined_layers_lie_side_by_side(dtype: torch.dtype, threads: int) -> None:
    compiled = product(dtype)
    layers = [layer(size, 94, dtype, seed=size) for size in (70, 64, 1, 129)]
    joined = JoinedWeights([weights for weights, _, _ in layers])
    whole_blocks = slice(0, 70), slice(128, 192), slice(192, 193), slice(256, 385)
    assert (joined.columns, joined.width) == (whole_blocks, 448)
    rows = normal(5, 94, dtype=dtype)
    result = compiled.run(rows, joined)
    assert result.shape == (5, joined.width)
    for (weights, weight, bias), columns in zip(layers, joined.columns, strict=True):
        assert_right(result[:, columns], rows, weight, bias)
        alone = JoinedWeights([weights])
        assert torch.equal(result[:, columns], compiled.run(rows, alone)[:, alone.columns[0]])


def test_int8_layers_are_joined_as_well() -> None:
    """Each with its own scales and bias."""
    compiled = int8.product_for(torch.float32)
    assert compiled is not None
    parts = [int8.quantized(normal(size, 300, seed=size), normal(size)) for size in (70, 64, 129)]
    joined = JoinedWeights(parts)
    rows, chain = normal(3, 300), new_chain()
    result = torch.empty(3, joined.width)
    compiled.add(chain, rows, joined, result)
    chain.run()
    assert torch.equal(result, compiled.run(rows, joined))
    for part, columns in zip(parts, joined.columns, strict=True):
        alone = JoinedWeights([part])
        assert torch.equal(result[:, columns], compiled.run(rows, alone)[:, alone.columns[0]])


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("count", COUNTS)
def test_results_are_added_to_what_is_there(count: int, dtype: torch.dtype, threads: int) -> None:
    compiled, chain = product(dtype), new_chain()
    weights, weight, bias = layer(128, 96, dtype)
    joined, rows = JoinedWeights([weights]), normal(count, 96, dtype=dtype)
    there = normal(count, 128, seed=3, dtype=dtype)
    result, plain = there.clone(), there.clone()
    compiled.add(chain, rows, joined, result, added=True)
    compiled.add(chain, rows, joined, plain)
    chain.run()
    assert_right(result, rows, weight, bias.double() + there.double())
    assert torch.equal(plain, compiled.run(rows, joined)), "a call that adds is one call"


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=[*IDS, "int8"])
@pytest.mark.parametrize("count", [1, 7])
def test_rows_and_results_in_wider_tensors(count: int, dtype: torch.dtype) -> None:
    """What lies beside them is neither used nor touched."""
    weight, chain = normal(70, 96), new_chain()
    if dtype == torch.int8:
        compiled, joined = int8.product_for(torch.float32), int8.quantized(weight, None)
        assert compiled is not None
        joined, dtype = JoinedWeights([joined]), torch.float32
    else:
        compiled, joined = product(dtype), JoinedWeights([in_blocks(weight.to(dtype), None)])
    wide = torch.full((count, 200), float("nan"), dtype=dtype)
    rows = wide[:, 50:146]
    rows.copy_(normal(count, 96))
    expected = compiled.run(rows.clone(), joined)
    assert expected.isfinite().all()
    assert torch.equal(compiled.run(rows, joined), expected)
    around = normal(count + 2, 300, dtype=dtype)
    before, result = around.clone(), around[1:-1, 32 : 32 + joined.width]
    compiled.add(chain, rows, joined, result)
    chain.run()
    assert torch.equal(result, expected)
    result.copy_(before[1:-1, 32 : 32 + joined.width])
    assert torch.equal(around, before)


def test_rows_of_other_strides() -> None:
    rows, joined = normal(5, 128), JoinedWeights([layer(70, 64, torch.float32)[0]])
    expected = product().run(rows[:, ::2].contiguous(), joined)
    assert torch.equal(product().run(rows[:, ::2], joined), expected)
    assert torch.equal(product().run(expected[:, :64].T.contiguous().T, joined),
                       product().run(expected[:, :64], joined))  # fmt: skip
    assert product().run(rows[:0, :64], joined).shape == (0, 128)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_weights_of_other_strides(dtype: torch.dtype) -> None:
    """Also a bias of a type of its own."""
    weight, bias = normal(94, 70, dtype=dtype).T, normal(70).half()
    joined, rows = JoinedWeights([in_blocks(weight, bias)]), normal(3, 94, dtype=dtype)
    assert_right(product(dtype).run(rows, joined)[:, :70], rows, weight, bias)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 93])
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_what_is_not_finite_shows_in_its_row_alone(
    value: float, column: int, dtype: torch.dtype
) -> None:
    compiled, joined = product(dtype), JoinedWeights([layer(64, 94, dtype)[0]])
    for count in (5, 8):
        rows = normal(count, 94, dtype=dtype)
        before = compiled.run(rows, joined)
        rows[2, column] = value
        result = compiled.run(rows, joined)
        assert not result[2].isfinite().any()
        others = [row for row in range(count) if row != 2]
        assert torch.equal(result[others], before[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_narrow_registers_give_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    joined, rows = JoinedWeights([layer(130, 400, dtype)[0]]), normal(7, 400, dtype=dtype)
    expected = product(dtype).run(rows, joined)
    request.getfixturevalue("afresh")
    wide = native.wide_registers()
    monkeypatch.setattr(native, "wide_registers", lambda: not wide)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    result = product(dtype).run(rows, joined)
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


ROWS, RESULT = torch.zeros(3, 64), torch.zeros(3, 128)


@pytest.mark.parametrize(
    ("rows", "result"),
    [
        *((torch.zeros(3, 63), RESULT), (torch.zeros(3, 66), RESULT), (torch.zeros(64), RESULT)),
        *((ROWS.bfloat16(), RESULT), (ROWS.int(), RESULT), (torch.zeros(3, 128)[:, ::2], RESULT)),
        *((ROWS[None], RESULT), (ROWS, RESULT[:, :70]), (ROWS, RESULT[:2]), (ROWS, RESULT.half())),
        *((ROWS, RESULT[None]), (ROWS, torch.zeros(128, 3).T), (ROWS, RESULT.to("meta"))),
    ],
    ids=lambda each: f"{tuple(each.shape)} {each.dtype}",
)
def test_what_does_not_fit_is_refused(rows: Tensor, result: Tensor) -> None:
    """Machine code would read and write beside them."""
    joined = JoinedWeights([layer(70, 64, torch.float32)[0]])
    wrong = "rows" if result is RESULT else "result"
    with pytest.raises(ValueError, match=f"{wrong} is"):
        product().add(new_chain(), rows, joined, result)
    if wrong == "rows" and rows.stride(-1) == 1:
        with pytest.raises(ValueError, match="rows is"):
            product().run(rows, joined)


def test_weights_of_another_type_are_refused() -> None:
    others = JoinedWeights([int8.quantized(normal(70, 64), None)])
    with pytest.raises(ValueError, match="another type"):
        product().run(ROWS, others)
    compiled = int8.product_for(torch.float32)
    assert compiled is not None
    with pytest.raises(ValueError, match="another type"):
        compiled.run(ROWS, JoinedWeights([layer(70, 64, torch.float32)[0]]))


def test_layers_that_do_not_go_together_are_not_joined() -> None:
    first, other = (layer(70, inputs, torch.float32)[0] for inputs in (64, 66))
    for parts in ((first, other), (first, int8.quantized(normal(70, 64), None)), ()):
        with pytest.raises(ValueError, match="joined"):
            JoinedWeights(parts)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(3, 63).bfloat16(), torch.zeros(3, 64).half(), torch.zeros(3, 64).double()],
    ids=lambda weight: f"{tuple(weight.shape)} {weight.dtype}",
)
def test_weights_that_have_no_blocks_are_refused(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="weights are"):
        in_blocks(weight, None)


def altered(text: Callable[..., str], old: str, new: str) -> Callable[..., str]:
    """A text with something wrong in it."""

    def call(**options: Any) -> str:
        right = text(**options)
        assert old in right
        return right.replace(old, new)

    return call


WRONG = {
    "the bias is subtracted": ("fadd <16 x float>", "fsub <16 x float>"),
    "nothing is stored": ("store <16 x float>", "; store <16 x float>"),
}


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize(
    "fault", [*WRONG, "refused", "no llvm", "no program", "no threads", "left to torch"]
)
def test_where_there_is_no_program(
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    two_threads: None,
) -> None:
    if fault in WRONG:
        text = altered(linear.code.float32_text, *WRONG[fault])
        monkeypatch.setattr(linear.code, "float32_text", text)
    elif fault == "refused":
        monkeypatch.setattr(linear.code, "float32_text", lambda **_: "no program")
    elif fault == "no llvm":
        monkeypatch.setattr(native, "llvm", None)
    elif fault == "no program":
        monkeypatch.setattr(linear, "code", None)
    elif fault == "no threads":
        monkeypatch.setattr(native, "_parallel", lambda: None)
    with caplog.at_level(logging.WARNING):
        if fault == "left to torch":
            with native.left_to_torch():
                assert product_for(torch.float32) is None
        else:
            assert product_for(torch.float32) is None
    said = {"refused": "left to torch"} | dict.fromkeys(WRONG, "wrong on this machine")
    assert said.get(fault, "") in caplog.text


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize(("dots", "tiles"), [(False, False), (True, True)])
def test_processors_without_a_program_for_bfloat16(
    dots: bool, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no instruction for it, or a better one."""
    monkeypatch.setattr(native, "has_pair_dots", lambda: dots)
    monkeypatch.setattr(native, "has_tiles", lambda: tiles)
    assert product_for(torch.bfloat16) is None
    assert product_for(torch.float32) is not None


def test_other_types_have_none() -> None:
    assert product_for(torch.float16) is None
