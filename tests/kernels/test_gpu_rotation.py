"""Rotary embedding on the way into pages, by Triton: on a GPU, else in Triton's interpreter."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from chatserve_kernels import AttentionBatch, HeadNorms, Rotary, gpu, reference, rotate_append
from chatserve_kernels import rotation as door
from chatserve_kernels.gpu import rotation as module
from tests.kernels.attended import in_fp8, same_numbers

DEVICE = torch.device("cpu" if gpu.interpreted() else "cuda")
NAN = float("nan")
BOUNDS = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 6e-3}
PAGE_SIZE, PAGES, ROWS = 8, 5, 6
EPSILON = 0.3


class Case:
    """Rows of a joined projection inside a wider tensor that is NaN around them, and pages that are
    NaN where nobody writes."""

    def __init__(
        self,
        kv_heads: int,
        group: int,
        head_dim: int,
        dtype: torch.dtype,
        *,
        normed: bool,
        kept: list[int] | None = None,
    ) -> None:
        seed = 1000 * kv_heads + 100 * group + head_dim
        print(f"seed {seed}")
        torch.manual_seed(seed)
        self.counts = kv_heads * group, kv_heads, kv_heads
        width = sum(self.counts) * head_dim
        self.wide = torch.full((ROWS + 2, width + 48), NAN, dtype=dtype, device=DEVICE)
        joined = self.wide[1:-1, 16 : 16 + width]
        joined.copy_(torch.randn(ROWS, width) * torch.logspace(-1, 1, ROWS)[:, None])
        self.heads = joined.unflatten(1, (-1, head_dim))
        self.before = self.heads.cpu().double()
        # Angles whose second half is another one than the first: not what models have.
        angles = 3 * torch.randn(ROWS, head_dim, device=DEVICE)
        turns = torch.full((2, ROWS, head_dim + 8), NAN, dtype=dtype, device=DEVICE)
        turns[..., :head_dim] = torch.stack((angles.cos(), angles.sin())).to(dtype)
        cos, sin = turns[..., :head_dim]
        weights = torch.randn(2, head_dim, device=DEVICE) + 1
        norms = HeadNorms(weights[0], weights[1], EPSILON) if normed else None
        self.rotary = Rotary(cos, sin.contiguous() if normed else sin, norms)
        self.kv = torch.full((PAGES, 2, PAGE_SIZE, kv_heads, head_dim), NAN, device=DEVICE)
        self.kv = self.kv.to(dtype)
        count = ROWS if kept is None else len(kept)
        places = torch.randperm(PAGES * PAGE_SIZE)[:count]
        self.batch = AttentionBatch(
            query_starts=(0, ROWS),
            context_lengths=(ROWS,),
            page_tables=torch.tensor([[4, 0, 3]], device=DEVICE),
            write_pages=(places // PAGE_SIZE).to(DEVICE),
            write_offsets=(places % PAGE_SIZE).to(DEVICE),
            write_rows=None if kept is None else torch.tensor(kept, device=DEVICE).long(),
            page_size=PAGE_SIZE,
        )

    def split(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        query, key, value = self.heads.split(self.counts, dim=1)
        return query, key, value

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same in float64, query and key rotated."""
        query, key, value = self.before.split(self.counts, dim=1)
        cos, sin, norms = self.rotary.cos.cpu(), self.rotary.sin.cpu(), self.rotary.norms
        weights = (None, None) if norms is None else (norms.query.cpu(), norms.key.cpu())
        query = reference.rotated(query, cos, sin, weights[0], EPSILON)
        return query, reference.rotated(key, cos, sin, weights[1], EPSILON), value


def error(result: Tensor, right: Tensor) -> float:
    """The largest of any row."""
    flat = right.flatten(1)
    difference = (result.cpu().double().flatten(1) - flat).norm(dim=1) / flat.norm(dim=1)
    return float(difference.nan_to_num(nan=float("inf")).max())


@pytest.fixture
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own way is not there to help."""

    def nobody(*arguments: Any, **options: Any) -> Tensor:
        raise AssertionError("torch was asked")

    monkeypatch.setattr(door, "rotated", nobody)


@pytest.mark.usefixtures("by_kernel")
@pytest.mark.parametrize("dtype", BOUNDS, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "normed", "kept"),
    [
        (2, 4, 64, False, None),
        (1, 3, 80, True, None),  # neither is a power of two
        (3, 1, 16, True, [0, 2, 5]),
        (2, 2, 6, False, []),
    ],
)
def test_rows_are_normed_rotated_and_kept(
    kv_heads: int,
    group: int,
    head_dim: int,
    normed: bool,
    kept: list[int] | None,
    dtype: torch.dtype,
) -> None:
    case = Case(kv_heads, group, head_dim, dtype, normed=normed, kept=kept)
    wanted_query, wanted_key, wanted_value = case.expected()
    query, key, value = case.split()
    around = int(case.wide.isnan().sum())
    rotate_append(query, key, value, case.kv, case.batch, case.rotary)
    assert error(query, wanted_query) < BOUNDS[dtype]
    rows = torch.arange(ROWS) if kept is None else torch.tensor(kept, dtype=torch.int64)
    places = case.batch.write_pages, case.batch.write_offsets
    assert not len(rows) or error(case.kv[:, 0][places], wanted_key[rows]) < BOUNDS[dtype]
    assert torch.equal(case.kv[:, 1][places].cpu().double(), wanted_value[rows])
    written = ~case.kv.isnan()
    assert int(written.sum()) == 2 * len(rows) * kv_heads * head_dim
    assert torch.equal(case.split()[2].cpu().double(), wanted_value)
    assert int(case.wide.isnan().sum()) == around


@pytest.mark.usefixtures("by_kernel")
@pytest.mark.parametrize(("group", "head_dim"), [(4, 64), (3, 12)])
def test_pages_of_fp8_get_what_append_would_write(group: int, head_dim: int) -> None:
    """To the bit: in float32 the key of both is the same."""
    case = Case(2, group, head_dim, torch.float32, normed=True)
    query, key, value = case.split()
    value[1, 0, 3], value[1, 1, -1], value[2, 1] = float("inf"), NAN, 0.0
    plain = torch.zeros_like(case.kv)
    rotate_append(query.clone(), key, value, plain, case.batch, case.rotary)
    rows = plain[case.batch.write_pages, :, case.batch.write_offsets]
    nothing = torch.full(case.kv.shape, NAN)
    given, expected = in_fp8(nothing, DEVICE), in_fp8(nothing, DEVICE)
    reference.append_kv(rows[:, 0], rows[:, 1], expected[0], case.batch, expected[1])
    rotate_append(query, key, value, given[0], case.batch, case.rotary, given[1])
    assert same_numbers(given, expected)
    assert error(query, case.expected()[0]) < BOUNDS[torch.float32]


@pytest.mark.usefixtures("by_kernel")
@pytest.mark.parametrize("rounded", [False, True], ids=["plain", "fp8"])
def test_a_row_of_no_page_is_rotated_and_written_nowhere(rounded: bool) -> None:
    case = Case(2, 2, 16, torch.float32, normed=False)
    case.batch.write_pages[2] = -1
    query, key, value = case.split()
    wanted = case.expected()[0]
    nothing = torch.full(case.kv.shape, NAN)
    kv, scales = in_fp8(nothing, DEVICE) if rounded else (case.kv, None)
    before = kv.clone()
    rotate_append(query, key, value, kv, case.batch, case.rotary, scales)
    assert error(query, wanted) < BOUNDS[torch.float32]
    changed = (kv.view(torch.uint8) != before.view(torch.uint8)).flatten(3).any(dim=3)
    pages, offsets = (
        each[case.batch.write_pages >= 0]
        for each in (case.batch.write_pages, case.batch.write_offsets)
    )
    expected = torch.zeros_like(changed)
    expected[pages, :, offsets] = True
    assert torch.equal(changed, expected)


def test_torch_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no kernel serves, and for strides and heads that none takes."""
    ours, theirs = (Case(2, 3, 32, torch.float32, normed=True, kept=[1, 4]) for _ in range(2))
    rotate_append(*ours.split(), ours.kv, ours.batch, ours.rotary)
    query, key, value = theirs.split()
    assert module.serves(query, key, value, theirs.kv, theirs.rotary)
    apart = torch.stack((query, query), dim=-1)[..., 0]
    assert not module.serves(apart, key, value, theirs.kv, theirs.rotary)
    for name in ("cos", "sin"):
        right = getattr(theirs.rotary, name)
        every_other = torch.stack((right, right), dim=-1)[..., 0]
        turned = replace(theirs.rotary, **{name: every_other})
        assert not module.serves(query, key, value, theirs.kv, turned)
    with monkeypatch.context() as patch:
        patch.setattr(module, "HALVES_MAX", 63)
        assert not module.serves(query, key, value, theirs.kv, theirs.rotary)
    rotate_append(apart, key, value, theirs.kv, theirs.batch, theirs.rotary)
    assert error(apart, ours.split()[0].cpu().double()) < BOUNDS[torch.float32]
    torch.testing.assert_close(theirs.kv, ours.kv, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_nothing_gives_nothing() -> None:
    nothing = torch.zeros(0, 2, 16, device=DEVICE)
    places = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    batch = AttentionBatch(
        query_starts=(0,),
        context_lengths=(),
        page_tables=torch.zeros(0, 1, dtype=torch.int32, device=DEVICE),
        write_pages=places,
        write_offsets=places,
        write_rows=None,
        page_size=PAGE_SIZE,
    )
    kv = torch.zeros(1, 2, PAGE_SIZE, 2, 16, device=DEVICE)
    rotary = Rotary(nothing[:, 0], nothing[:, 0])
    rotate_append(nothing, nothing, nothing, kv, batch, rotary)
    assert not kv.any()


WRONG: dict[str, Any] = {
    "rows": lambda given: {"query": given["query"][:2]},
    "heads": lambda given: {"query": given["query"][:, :3]},
    "head_dim": lambda given: {"query": given["query"][..., :8]},
    "dtype": lambda given: {"query": given["query"].half()},
    "cos": lambda given: {"rotary": replace(given["rotary"], cos=given["rotary"].cos[:, :8])},
    "sin": lambda given: {"rotary": replace(given["rotary"], sin=given["rotary"].sin.double())},
    "the query's norm": lambda given: {
        "rotary": replace(given["rotary"], norms=HeadNorms(torch.ones(8), torch.ones(16), 0.1))
    },
    "the key's norm": lambda given: {
        "rotary": replace(
            given["rotary"], norms=HeadNorms(torch.ones(16), torch.ones(16).half(), 0.1)
        )
    },
    "value": lambda given: {"value": given["value"][:, :1]},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_door_refuses(wrong: str) -> None:
    case = Case(2, 2, 16, torch.float32, normed=False)
    query, key, value = case.split()
    given: dict[str, Any] = {
        "query": query,
        "key": key,
        "value": value,
        "kv": case.kv,
        "batch": case.batch,
        "rotary": case.rotary,
    }
    word = wrong if wrong in ("cos", "sin", "value") or " " in wrong else "query|heads"
    with pytest.raises(ValueError, match=word):
        rotate_append(**(given | WRONG[wrong](given)))


def test_heads_without_halves_are_refused() -> None:
    case = Case(1, 2, 7, torch.float32, normed=False)
    with pytest.raises(ValueError, match="no halves"):
        rotate_append(*case.split(), case.kv, case.batch, case.rotary)


@pytest.mark.parametrize("wrong", [None, "query", "key", "value", "scale", "padding"])
@pytest.mark.parametrize("rounded", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("normed", [False, True], ids=["plain heads", "normed heads"])
def test_what_fails_its_trial_is_left_to_torch(
    wrong: str | None,
    rounded: bool,
    normed: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if wrong == "scale" and not rounded:
        pytest.skip("plain pages have none")
    case = Case(2, 3, 16, torch.float32, normed=normed)
    query, key, value = case.split()
    kv, _ = in_fp8(case.kv, DEVICE) if rounded else (case.kv, None)
    right = module.rotate_append

    def spoilt(query: Tensor, *others: Any) -> None:
        right(query, *others)
        kv, batch, scales = others[2], others[3], others[5]
        page, offset = int(batch.write_pages[0]), int(batch.write_offsets[0])
        if wrong == "query":
            query[2, 1] *= 1.01
        elif wrong in ("key", "value"):
            part = int(wrong == "value")
            kv[page, part, offset, 1] = (-kv[page, part, offset, 1].float()).to(kv.dtype)
        elif wrong == "scale":
            scales[page, 1, 1, offset] *= 1.001
        elif wrong == "padding":
            kv[-1, :, 0] = torch.ones_like(kv[-1, :, 0].float()).to(kv.dtype)

    monkeypatch.setattr(gpu, "interpreted", lambda: False)
    monkeypatch.setattr(module, "rotate_append", spoilt)
    module._trusted.cache_clear()
    with caplog.at_level(logging.WARNING):
        served = module.serves(query, key, value, kv, case.rotary)
    module._trusted.cache_clear()
    assert served == (wrong is None)
    told = ["embeddings are wrong" in record.getMessage() for record in caplog.records]
    assert told == [True] * (wrong is not None)
