"""Norms and gates by Triton: on a GPU, else in Triton's interpreter."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from chatserve_kernels import gated, gpu, ops, reference, rms_norm
from chatserve_kernels.gpu import rows as module

DEVICE = torch.device("cpu" if gpu.interpreted() else "cuda")
NAN = float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IDS = ["fp32", "fp16", "bf16"]
# Of the norm of what float64 gives: results are rounded to these types.
BOUNDS = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 6e-3}
SEED = 41


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written yet is NaN."""
    empty = torch.empty

    def filled(*arguments: Any, **options: Any) -> Tensor:
        result = empty(*arguments, **options)
        return result.fill_(NAN) if result.is_floating_point() else result

    monkeypatch.setattr(torch, "empty", filled)


@pytest.fixture
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs hold little, so that some end in the middle of a row, or of the rows."""
    monkeypatch.setattr(module, "NORM_ELEMENTS", 64)
    monkeypatch.setattr(module, "GATE_ELEMENTS", 32)


def inside(rows: int, columns: int, dtype: torch.dtype, *, size: float = 1.0) -> Tensor:
    """Rows in a wider tensor that is NaN around them."""
    wide = torch.full((rows + 2, columns + 24), NAN, dtype=dtype)
    part = wide[1:-1, 8 : 8 + columns]
    part.copy_(size * torch.randn(rows, columns))
    there = wide.to(DEVICE)
    return there[1:-1, 8 : 8 + columns]


def error(result: Tensor, right: Tensor) -> float:
    """The largest of any row."""
    difference = (result.cpu().double() - right).norm(dim=1) / right.norm(dim=1)
    return float(difference.nan_to_num(nan=float("inf")).max())


@pytest.mark.usefixtures("few_at_a_time")
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(("count", "columns"), [(1, 64), (9, 20), (3, 100), (5, 1)])
def test_norms_equal_the_reference(count: int, columns: int, dtype: torch.dtype) -> None:
    print(f"seed {SEED + columns}")
    torch.manual_seed(SEED + columns)
    rows = inside(count, columns, dtype)
    rows *= torch.logspace(-2, 2, count, device=DEVICE)[:, None].to(dtype)
    weight = (torch.randn(columns, 2, device=DEVICE) + 1)[:, 0]
    before = rows.clone()
    result = rms_norm(rows, weight, 1e-2)
    right = reference.rms_norm(rows.cpu().double(), weight.cpu(), 1e-2)
    assert (result.dtype, result.is_contiguous()) == (dtype, True)
    assert error(result, right) < BOUNDS[dtype]
    assert torch.equal(rows, before)


@pytest.mark.usefixtures("few_at_a_time")
def test_a_row_that_is_not_finite_leaves_the_others_alone() -> None:
    print(f"seed {SEED}")
    torch.manual_seed(SEED)
    rows, weight = inside(4, 20, torch.float32), torch.randn(20, device=DEVICE)
    clean = rms_norm(rows, weight, 1e-5)
    rows[2, 3] = NAN
    result = rms_norm(rows, weight, 1e-5)
    assert result[2].isnan().all()
    assert torch.equal(result[[0, 1, 3]], clean[[0, 1, 3]])
    assert not rms_norm(torch.zeros(2, 20, device=DEVICE), weight, 1e-5).any()


@pytest.mark.usefixtures("few_at_a_time")
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(("count", "columns"), [(1, 32), (3, 70), (2, 5)])
@pytest.mark.parametrize("gelu", [False, True], ids=["silu", "gelu"])
def test_gates_equal_the_reference(
    count: int, columns: int, gelu: bool, dtype: torch.dtype
) -> None:
    print(f"seed {SEED + columns}")
    torch.manual_seed(SEED + columns)
    gates = inside(count, columns, dtype, size=4.0)
    # Halves of one row, as a joined projection gives them, and every other element.
    ups = torch.randn(count, columns, 2, device=DEVICE).to(dtype)[..., 1]
    right = reference.gated(gates.cpu().double(), ups.cpu().double(), gelu=gelu)
    result = gated(gates, ups, gelu=gelu)
    assert (result.dtype, result.is_contiguous()) == (dtype, True)
    assert error(result, right) < BOUNDS[dtype]


@pytest.mark.parametrize("gelu", [False, True], ids=["silu", "gelu"])
def test_gates_of_large_numbers_stay_in_range(gelu: bool) -> None:
    gates = torch.tensor([[-1e4, -200.0, -90.0, 0.0, 90.0, 1e4]], device=DEVICE)
    result = gated(gates, torch.ones_like(gates), gelu=gelu)
    assert result.tolist() == [[0.0, 0.0, pytest.approx(0.0, abs=1e-35), 0.0, 90.0, 1e4]]


def test_nothing_gives_nothing() -> None:
    for shape in ((0, 8), (3, 0)):
        nothing = torch.zeros(shape, device=DEVICE)
        assert gated(nothing, nothing, gelu=True).shape == shape
    weight = torch.ones(8, device=DEVICE)
    assert rms_norm(torch.zeros(0, 8, device=DEVICE), weight, 1e-5).shape == (0, 8)


def test_torch_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no kernel serves, also rows that are too long for one."""
    print(f"seed {SEED}")
    torch.manual_seed(SEED)
    rows, ups = torch.randn(2, 3, 24, device=DEVICE)
    weight = torch.randn(24, device=DEVICE)
    results = [rms_norm(rows, weight, 1e-5)]
    results += [gated(rows, ups, gelu=gelu) for gelu in (False, True)]
    monkeypatch.setattr(module, "NORM_ELEMENTS_MAX", 23)
    others = [rms_norm(rows, weight, 1e-5)]
    assert not module.serves_norm(rows)
    assert not module.serves_norm(rows.double())
    monkeypatch.setattr(ops.gpu, "serves", lambda device_type: False)
    others += [gated(rows, ups, gelu=gelu) for gelu in (False, True)]
    for mine, theirs in zip(results, others, strict=True):
        assert error(mine, theirs.cpu().double()) < BOUNDS[torch.float32]


WRONG: list[dict[str, Any]] = [
    {"rows": torch.zeros(3)},
    {"weight": torch.zeros(7)},
    {"weight": torch.zeros(8).double()},
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda each: next(iter(each)))
def test_the_door_of_norms_refuses(wrong: dict[str, Any]) -> None:
    given: dict[str, Any] = {"rows": torch.zeros(3, 8), "weight": torch.zeros(8)} | wrong
    with pytest.raises(ValueError, match="weight is"):
        rms_norm(given["rows"], given["weight"], 1e-5)


def test_the_door_of_gates_refuses() -> None:
    gates = torch.zeros(3, 8)
    for left, right in ((gates[0], gates[0]), (gates, gates[:2]), (gates, gates.half())):
        with pytest.raises(ValueError, match=r"(gates|ups) are"):
            gated(left, right, gelu=False)


TRIALS: dict[str, Callable[[], set[bool]]] = {
    "rms_norm": lambda: {module.serves_norm(torch.zeros(1, 40, device=DEVICE))},
    "gated": lambda: {
        module.serves_gate(torch.zeros(1, 5, device=DEVICE), gelu=gelu) for gelu in (False, True)
    },
}


@pytest.mark.usefixtures("few_at_a_time")
@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
@pytest.mark.parametrize("name", TRIALS)
def test_what_fails_its_trial_is_left_to_torch(
    name: str,
    right: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    original = getattr(module, name)

    def wrong(*arguments: Any, **options: Any) -> Tensor:
        result = original(*arguments, **options)
        result[-1, -1] += 1
        return result

    monkeypatch.setattr(gpu, "interpreted", lambda: False)
    if not right:
        monkeypatch.setattr(module, name, wrong)
    caches = module._norm_trusted, module._gate_trusted
    for each in caches:
        each.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert TRIALS[name]() == {right}
    for each in caches:
        each.cache_clear()
    assert {"are wrong" in record.getMessage() for record in caplog.records} == {True} - {right}
