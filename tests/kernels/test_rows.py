"""Norms, rotary embedding and gates as machine code: against plain arithmetic in float64, of all
sizes that models have, in tensors wider than they are, and where a machine has no program."""

from collections.abc import Callable, Generator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chatserve_kernels import rows as operations
from chatserve_kernels.cpu import native
from chatserve_kernels.rows import Gate, Norm, Rotation, gate_for, norm_for, rotation_for
from tests.kernels.chains import new_chain

DTYPES = [torch.float32, torch.bfloat16]
IDS = ["fp32", "bf16"]
SEED = 31
COUNTS = (1, 5, 300)  # of rows; the last is more than one thread's
EPSILON = 1e-5
NAN = float("nan")


def normal(*shape: int, seed: int = SEED, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(result: Tensor, expected: Tensor, *, reach: float) -> None:
    """Of what float32 gives at `reach` of each number, and bfloat16 rounds once more; where the
    expected is not finite the result is not either."""
    relative = reach + (2**-8 if result.dtype == torch.bfloat16 else 0)
    torch.testing.assert_close(result.double(), expected, rtol=relative, atol=reach, equal_nan=True)


# Norms


def norm(columns: int, dtype: torch.dtype, epsilon: float = EPSILON) -> tuple[Norm, Tensor]:
    weight = normal(columns, seed=columns)
    compiled = norm_for(weight, epsilon, dtype)
    assert compiled is not None
    return compiled, weight.double()


def normed(rows: Tensor, weight: Tensor, epsilon: float = EPSILON) -> Tensor:
    wide = rows.double()
    return wide / (wide.square().mean(dim=-1, keepdim=True) + epsilon).sqrt() * weight


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("columns", [16, 48, 896, 1024])
@pytest.mark.parametrize("count", COUNTS)
def test_norms_equal_plain_arithmetic(
    count: int, columns: int, dtype: torch.dtype, threads: int
) -> None:
    """Of rows of any size: some where epsilon counts, some where it does not."""
    compiled, weight = norm(columns, dtype)
    rows = normal(count, columns) * torch.logspace(-4, 4, count)[:, None]
    rows = rows.to(dtype)
    expected, result, chain = normed(rows, weight), torch.empty_like(rows), new_chain()
    assert_close(compiled.run(rows), expected, reach=3e-6)
    compiled.add(chain, rows, result)
    chain.run()
    assert torch.equal(result, compiled.run(rows))


def test_few_rows_wake_no_threads(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    compiled, _ = norm(1024, torch.float32)
    parallel, calls = native._parallel(), list[int]()

    def counted(*arguments: int) -> None:
        calls.append(arguments[2])
        parallel(*arguments)

    monkeypatch.setattr(native, "_parallel", lambda: counted)
    compiled.run(normal(32, 1024))
    assert calls == []
    compiled.run(normal(33, 1024))
    assert calls == [2]


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.5])
def test_each_norm_has_its_epsilon(epsilon: float) -> None:
    compiled, weight = norm(64, torch.float32, epsilon)
    for size in (1e-4, 1e-3, 1.0):
        rows = normal(3, 64) * size
        assert_close(compiled.run(rows), normed(rows, weight, epsilon), reach=1e-6)


def test_a_row_of_zeros_stays_zeros() -> None:
    assert not norm(64, torch.float32)[0].run(torch.zeros(2, 64)).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_norms_of_rows_in_wider_tensors(dtype: torch.dtype) -> None:
    compiled, weight = norm(48, dtype)
    wide, around, chain = normal(5, 90, dtype=dtype), normal(7, 80, dtype=dtype), new_chain()
    rows, before = wide[:, 3:51], around.clone()
    assert compiled.run(rows).is_contiguous()
    assert_close(compiled.run(rows), normed(rows, weight), reach=3e-6)
    result = around[1:-1, 16:64]
    compiled.add(chain, rows, result)
    chain.run()
    assert torch.equal(result, compiled.run(rows))
    result.copy_(before[1:-1, 16:64])
    assert torch.equal(around, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_what_is_not_finite_shows_in_its_row_alone(value: float, dtype: torch.dtype) -> None:
    compiled, _ = norm(48, dtype)
    rows = normal(5, 48, dtype=dtype)
    before = compiled.run(rows)
    rows[2, 40] = value
    result = compiled.run(rows)
    assert result[2, 40].isnan()
    assert torch.equal(result[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


ROWS = torch.zeros(3, 48)


@pytest.mark.parametrize(
    ("rows", "result"),
    [
        *((torch.zeros(3, 32), None), (ROWS.bfloat16(), None), (torch.zeros(48), None)),
        *((torch.zeros(48, 3).T, None), (ROWS[None], None), (ROWS, torch.zeros(3, 32))),
        *((ROWS, ROWS[:2]), (ROWS, torch.zeros(48, 3).T), (ROWS, ROWS.half())),
    ],
    ids=lambda each: "as rows" if each is None else f"{tuple(each.shape)} {each.dtype}",
)
def test_rows_that_a_norm_does_not_fit_are_refused(rows: Tensor, result: Tensor | None) -> None:
    compiled, _ = norm(48, torch.float32)
    with pytest.raises(ValueError, match=r"(rows|result) is"):
        compiled.add(new_chain(), rows, torch.empty_like(rows) if result is None else result)
    if result is None:
        with pytest.raises(ValueError, match="rows is"):
            compiled.run(rows)


@pytest.mark.parametrize(
    "weight", [torch.ones(48).bfloat16(), torch.ones(96)[::2]], ids=["bf16", "strided"]
)
def test_weights_of_norms_are_float32(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="weight is"):
        norm_for(weight, EPSILON, torch.float32)
    for weights in ((weight, torch.ones(48)), (torch.ones(48), weight)):
        with pytest.raises(ValueError, match="norm is"):
            rotation_for(48, (*weights, EPSILON), torch.float32)


# Rotary embedding

HEADS, KV_HEADS = 6, 2


def rotation(head_dim: int, norms: bool, dtype: torch.dtype) -> tuple[Rotation, list[Tensor]]:
    """And the weights of query and key."""
    weights = [normal(head_dim, seed=seed) for seed in (1, 2)] if norms else []
    compiled = rotation_for(head_dim, (weights[0], weights[1], EPSILON) if norms else None, dtype)
    assert compiled is not None
    return compiled, weights


def turned(heads: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None) -> Tensor:
    """heads: [rows, any, head_dim]"""
    wide = heads.double() if weight is None else normed(heads, weight.double())
    first, second = wide.chunk(2, dim=-1)
    other = torch.cat((-second, first), dim=-1)
    return wide * cos.double()[:, None] + other * sin.double()[:, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("head_dim", [8, 16, 24, 64, 128])
@pytest.mark.parametrize("count", COUNTS)
def test_rotation_equals_plain_arithmetic(
    count: int, head_dim: int, norms: bool, dtype: torch.dtype, threads: int
) -> None:
    """In place, in what joined layers gave: values and what is to spare stay as they are."""
    compiled, weights = rotation(head_dim, norms, dtype)
    wide = normal(count, (HEADS + 2 * KV_HEADS) * head_dim + 24, dtype=dtype)
    before, chain = wide.clone(), new_chain()
    # No two halves alike, and rows of a wider tensor.
    cos, sin = normal(count, 3 * head_dim, seed=3, dtype=dtype).split((head_dim, 2 * head_dim), 1)
    sin = sin[:, :head_dim]
    parts = {0: slice(8, 8 + HEADS * head_dim)}
    parts[1] = slice(parts[0].stop, parts[0].stop + KV_HEADS * head_dim)
    query, key = (wide[:, part].unflatten(1, (-1, head_dim)) for part in parts.values())
    compiled.add(chain, query, key, cos, sin)
    chain.run()
    for index, part in parts.items():
        heads = before[:, part].unflatten(1, (-1, head_dim))
        expected = turned(heads, cos, sin, weights[index] if norms else None)
        assert_close(wide[:, part], expected.flatten(1), reach=1e-5)
        wide[:, part] = before[:, part]
    assert torch.equal(wide, before)


def test_heads_of_other_strides() -> None:
    """As transformers hands them over."""
    compiled, chain = rotation(16, False, torch.float32)[0], new_chain()
    query, key = (normal(heads, 5, 16).transpose(0, 1) for heads in (HEADS, KV_HEADS))
    cos, sin = normal(2, 5, 16, seed=4)
    expected = [turned(each, cos, sin, None) for each in (query, key)]
    compiled.add(chain, query, key, cos, sin)
    chain.run()
    for result, each in zip((query, key), expected, strict=True):
        assert_close(result, each, reach=1e-5)


@pytest.mark.parametrize("norms", [False, True])
def test_nan_shows_in_its_head_alone(norms: bool) -> None:
    compiled, chain = rotation(64, norms, torch.float32)[0], new_chain()
    query, key, (cos, sin) = normal(3, HEADS, 64), normal(3, KV_HEADS, 64), normal(2, 3, 64)
    query[1, 2, 5] = NAN
    compiled.add(chain, query, key, cos, sin)
    chain.run()
    assert query[1, 2, [5, 37]].isnan().all()
    assert query[1, 2].isnan().sum() == (64 if norms else 2)
    query[1, 2] = 0
    assert query.isfinite().all()
    assert key.isfinite().all()


@pytest.mark.parametrize("place", range(4))
def test_heads_that_do_not_fit_are_refused(place: int) -> None:
    compiled, _ = rotation(16, False, torch.float32)
    right = torch.zeros(3, 4, 16), torch.zeros(3, 2, 16), torch.zeros(3, 16), torch.zeros(3, 16)
    name, fits = ("query", "key", "cos", "sin")[place], right[place]
    for wrong in (fits[..., :8], fits[:2], fits.bfloat16(), fits.transpose(0, -1), fits[None]):
        given = [*right[:place], wrong, *right[place + 1 :]]
        with pytest.raises(ValueError, match=r"is \("):
            compiled.add(new_chain(), *given)
    with pytest.raises(ValueError, match=name):
        compiled.add(new_chain(), *right[:place], fits.double(), *right[place + 1 :])


# Gates

ACTIVATIONS: dict[bool, Callable[[Tensor], Tensor]] = {
    False: F.silu,
    True: lambda gate: F.gelu(gate, approximate="tanh"),
}


def gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    return ACTIVATIONS[gelu](gate.double()) * up.double()


def gate_of(columns: int, dtype: torch.dtype, gelu: bool) -> Gate:
    compiled = gate_for(columns, dtype, gelu=gelu)
    assert compiled is not None
    return compiled


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("columns", [16, 48, 528, 3072])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_gates_equal_plain_arithmetic(
    columns: int, count: int, gelu: bool, dtype: torch.dtype, threads: int
) -> None:
    """Of halves of joined layers; what lies beside the result is not touched."""
    chain = new_chain()
    both = 3 * normal(count, 2 * columns + 64, dtype=dtype)
    gate, up = both[:, 8 : 8 + columns], both[:, 24 + columns : 24 + 2 * columns]
    around = normal(count + 2, columns + 32, dtype=dtype)
    before, result = around.clone(), around[1:-1, 16 : 16 + columns]
    gate_of(columns, dtype, gelu).add(chain, gate, up, result)
    chain.run()
    # Where the gate is far below 0 what is left of it shows every error of the exponent.
    expected = gated(gate, up, gelu)
    relative = 4e-6 + (2**-8 if dtype == torch.bfloat16 else 0)
    torch.testing.assert_close(result.double(), expected, rtol=relative, atol=2e-10)
    result.copy_(before[1:-1, 16 : 16 + columns])
    assert torch.equal(around, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("gelu", [False, True])
def test_gates_of_any_size(gelu: bool, dtype: torch.dtype) -> None:
    gate = torch.tensor([0.0, -0.0, 1e-8, 1e-3, 0.5, 8.0, 12.0, 90.0, 100.0, 1e4, 1e10])
    gate = torch.cat((gate, -gate)).repeat(8).to(dtype)[None]
    up, result, chain = normal(*gate.shape, dtype=dtype), torch.empty_like(gate), new_chain()
    gate_of(gate.shape[1], dtype, gelu).add(chain, gate, up, result)
    chain.run()
    assert_close(result, gated(gate, up, gelu), reach=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("gelu", [False, True])
def test_nan_shows_in_its_place_alone(gelu: bool, dtype: torch.dtype) -> None:
    gate, up = normal(2, 3, 48, dtype=dtype)
    gate[1, 7] = up[2, 20] = NAN
    result, chain = torch.empty(3, 48, dtype=dtype), new_chain()
    gate_of(48, dtype, gelu).add(chain, gate, up, result)
    chain.run()
    assert result.isnan().nonzero().tolist() == [[1, 7], [2, 20]]


@pytest.mark.parametrize("place", range(3))
def test_halves_that_do_not_fit_are_refused(place: int) -> None:
    fits = torch.zeros(3, 48)
    compiled = gate_of(48, torch.float32, False)
    wrongs = (fits[:, :40], fits[:2], fits.bfloat16(), torch.zeros(48, 3).T, fits[:, :32])
    for wrong in (*wrongs, fits[:, ::3], fits[:, 0]):
        given = [fits] * 3
        given[place] = wrong
        with pytest.raises(ValueError, match=r"is \(|multiple|unpack"):
            compiled.add(new_chain(), *given)


def test_columns_to_spare_are_refused() -> None:
    chain, half = new_chain(), torch.zeros(3, 40)
    with pytest.raises(ValueError, match="multiple of 16"):
        gate_of(48, torch.float32, False).add(chain, half, half, half)


# Where there is none


def every_kind(columns: int = 32, dtype: torch.dtype = torch.float32) -> list[object]:
    """One of each, or None."""
    weight = torch.ones(columns)
    return [
        norm_for(weight, EPSILON, dtype),
        rotation_for(columns, None, dtype),
        rotation_for(columns, (weight, weight, EPSILON), dtype),
        gate_for(columns, dtype, gelu=False),
        gate_for(columns, dtype, gelu=True),
    ]


@pytest.mark.parametrize(("columns", "dtype"), [(20, torch.float32), (32, torch.float16)], ids=str)
def test_other_sizes_and_types_have_none(columns: int, dtype: torch.dtype) -> None:
    assert every_kind(columns, dtype) == [None] * 5


@pytest.fixture
def afresh() -> Generator[None]:
    """Nothing is known yet of what was compiled."""
    caches = operations._norm, operations._rotation, operations._gate
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


@pytest.mark.usefixtures("afresh", "two_threads")
@pytest.mark.parametrize("fault", ["refused", "no llvm", "no program", "no threads"])
def test_where_there_is_no_program(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "refused":
        for name in ("norm_text", "rotate_text", "gate_text"):
            monkeypatch.setattr(operations.code, name, lambda **_: "no program")
    elif fault == "no llvm":
        monkeypatch.setattr(native, "llvm", None)
    elif fault == "no program":
        monkeypatch.setattr(operations, "code", None)
    else:
        monkeypatch.setattr(native, "_parallel", lambda: None)
    assert every_kind() == [None] * 5
