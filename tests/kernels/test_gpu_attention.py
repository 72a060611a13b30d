"""Attention by Triton against the slow reference: on a GPU, else in Triton's interpreter."""

import itertools
import logging
import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from chatserve_kernels import AttentionBatch, gpu, paged_attention, reference
from chatserve_kernels.gpu import attention
from chatserve_kernels.gpu import tiles as tiles_module
from chatserve_kernels.trial import Trial, agrees
from tests.kernels.attended import in_fp8

NAN = float("nan")
DEVICE = torch.device("cpu" if gpu.interpreted() else "cuda")
# Of the norm of what the reference gives in float64: results are rounded to these types.
BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


@dataclass(frozen=True)
class Case:
    """slices: (queries, context) pairs; common: (sequence, elder, tokens): its first pages are
    those of the elder."""

    page_size: int
    heads: int
    kv_heads: int
    head_dim: int
    slices: tuple[tuple[int, int], ...]
    dtype: torch.dtype = torch.float32
    common: tuple[tuple[int, int, int], ...] = ()
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    fp8: bool = False


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written yet is NaN."""
    empty = torch.empty

    def filled(*arguments: Any, **options: Any) -> Tensor:
        result = empty(*arguments, **options)
        return result.fill_(NAN) if result.is_floating_point() else result

    monkeypatch.setattr(torch, "empty", filled)


def built(case: Case, seed: int) -> tuple[Tensor, Tensor, AttentionBatch, dict[str, Any]]:
    """Query (heads before rows in memory), pages apart by a wider stride, NaN where no sequence
    has a position, their batch and options."""
    print(f"seed {seed}, {case}")
    torch.manual_seed(seed)
    needed = [-(-context // case.page_size) for _, context in case.slices]
    free = list(range(sum(needed) + 1))
    random.Random(seed).shuffle(free)
    tables = np.zeros((len(needed), max(needed)), dtype=np.int32)
    for sequence, count in enumerate(needed):
        tables[sequence, :count] = [free.pop() for _ in range(count)]
        for who, elder, tokens in case.common:
            if who == sequence:
                whole = tokens // case.page_size
                tables[sequence, :whole] = tables[elder, :whole]
    inner = 2 * case.page_size * case.kv_heads * case.head_dim
    pool = torch.full((sum(needed) + 1, 8 + inner + 24), NAN, dtype=case.dtype)
    kv = pool[:, 8 : 8 + inner].view(-1, 2, case.page_size, case.kv_heads, case.head_dim)
    for sequence, (_, context) in enumerate(case.slices):
        for place in range(needed[sequence]):
            used = min(case.page_size, context - place * case.page_size)
            part = kv[int(tables[sequence, place]), :, :used]
            part.copy_(torch.where(part.isnan(), torch.randn(part.shape).to(case.dtype), part))
    rows = sum(queries for queries, _ in case.slices)
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = AttentionBatch(
        query_starts=tuple(itertools.accumulate((each for each, _ in case.slices), initial=0)),
        context_lengths=tuple(context for _, context in case.slices),
        page_tables=torch.from_numpy(tables).to(DEVICE, [torch.int32, torch.int64][seed % 2]),
        write_pages=nothing,
        write_offsets=nothing,
        write_rows=nothing,
        page_size=case.page_size,
        host_tables=tables,
    )
    query = 2 * torch.randn(case.heads, rows, case.head_dim)
    options: dict[str, Any] = {
        "scale": case.head_dim**-0.5,
        "window": case.window,
        "soft_cap": case.soft_cap,
        "sinks": torch.randn(case.heads).to(case.dtype).to(DEVICE) if case.sinks else None,
    }
    query = query.to(case.dtype).transpose(0, 1).to(DEVICE)
    if case.fp8:
        kv, options["scales"] = in_fp8(kv, DEVICE)
        return query, kv, batch, options
    return query, pool_on_device(kv, pool), batch, options


def pool_on_device(kv: Tensor, pool: Tensor) -> Tensor:
    """The view of the pool, strides and all."""
    there = pool.to(DEVICE)
    return there.as_strided(kv.shape, kv.stride(), kv.storage_offset())


def expected(query: Tensor, kv: Tensor, batch: AttentionBatch, options: dict[str, Any]) -> Tensor:
    """In float64, by the reference."""
    batch = replace(batch, page_tables=batch.page_tables.cpu())
    options = {
        name: value.cpu() if isinstance(value, Tensor) else value for name, value in options.items()
    }
    return reference.paged_attention(query.cpu().double(), kv.cpu().double(), batch, **options)


def error(result: Tensor, right: Tensor) -> float:
    return float((result.cpu().double() - right).norm() / right.norm())


def programs_at_a_time(monkeypatch: pytest.MonkeyPatch, count: int, piece: int) -> None:
    """As if the device ran so many, and pieces might be as short as that; joined two by two."""
    monkeypatch.setattr(attention, "PROGRAMS_EACH", 1)
    monkeypatch.setattr(attention, "TOGETHER", 2)
    monkeypatch.setattr(attention, "multiprocessors", lambda device: count)
    monkeypatch.setattr(tiles_module, "PIECE_POSITIONS_MIN", piece)


MIXED = ((1, 1), (5, 5), (1, 23), (7, 30), (1, 9), (2, 17), (1, 66))
BORDERS = ((1, 63), (1, 64), (1, 65), (1, 128), (1, 129), (3, 66))
HALF, BRAIN = torch.float16, torch.bfloat16
CASES = {
    "one head for each": Case(8, 2, 2, 64, MIXED),
    "two for one": Case(16, 4, 2, 80, MIXED, BRAIN),
    "eight for one": Case(16, 8, 1, 64, MIXED, HALF),
    "three for one, 96": Case(16, 6, 2, 96, MIXED),
    "pages of 64": Case(64, 2, 1, 64, BORDERS, HALF),
    "pages of 256": Case(256, 2, 2, 64, ((1, 255), (1, 256), (1, 257), (2, 258)), BRAIN),
    "heads of 256": Case(8, 2, 1, 256, ((1, 17), (3, 33), (1, 16)), BRAIN),
    "wide float32": Case(8, 2, 1, 256, ((1, 17), (20, 33))),
    "alone": Case(16, 4, 1, 128, ((1, 40),), HALF),
    "a slice of several tiles": Case(16, 8, 1, 64, ((37, 70), (1, 20)), HALF),
    "window 1": Case(16, 4, 2, 64, MIXED, window=1),
    "window 6": Case(8, 4, 2, 64, MIXED, window=6),
    "window 64": Case(16, 2, 1, 64, BORDERS, window=64),
    "window 65": Case(16, 2, 1, 64, ((1, 130), (1, 66), (4, 133)), HALF, window=65),
    "window wide": Case(16, 4, 2, 64, MIXED, window=100),
    "window in a long slice": Case(16, 4, 1, 64, ((50, 120),), window=10),
    "soft cap": Case(16, 4, 2, 64, MIXED, soft_cap=2.0),
    "sinks": Case(16, 4, 2, 64, MIXED, sinks=True),
    "all of it": Case(8, 4, 1, 80, MIXED, HALF, window=11, soft_cap=1.5, sinks=True),
    "fp8": Case(16, 4, 2, 64, MIXED, fp8=True),
    "fp8, pages of 8": Case(8, 4, 4, 128, MIXED, BRAIN, fp8=True),
    "fp8, pages of 64": Case(64, 6, 2, 72, BORDERS, fp8=True, window=65),
    "fp8, all of it": Case(8, 4, 2, 80, MIXED, fp8=True, window=11, soft_cap=1.5, sinks=True),
    "fp8 and halves": Case(16, 6, 3, 64, MIXED, HALF, fp8=True),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_the_reference(name: str) -> None:
    case = CASES[name]
    query, kv, batch, options = built(case, 100 + list(CASES).index(name))
    result = paged_attention(query, kv, batch, **options)
    assert (result.shape, result.dtype) == (query.shape, case.dtype)
    assert result.is_contiguous()
    # Beside fp8 what float16 multiplies becomes bfloat16 on a GPU.
    bound = BOUNDS[BRAIN if case.fp8 and case.dtype == HALF else case.dtype]
    assert error(result, expected(query, kv, batch, options)) < bound


LONG = ((1, 140), (1, 129), (4, 130), (1, 30))
CUT = {
    "plain": Case(16, 4, 2, 64, LONG),
    "half": Case(16, 2, 1, 128, LONG, HALF),
    "sinks and a cap": Case(8, 4, 2, 64, LONG, sinks=True, soft_cap=3.0),
    "window": Case(16, 4, 2, 64, LONG, window=90, sinks=True),
    "fp8": Case(16, 4, 2, 64, LONG, fp8=True),
}


@pytest.mark.parametrize("name", CUT)
def test_pieces_joined_are_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CUT[name]
    query, kv, batch, options = built(case, 200 + list(CUT).index(name))
    whole = paged_attention(query, kv, batch, **options)
    programs_at_a_time(monkeypatch, count=64, piece=64)
    fresh = replace(batch)
    result = paged_attention(query, kv, fresh, **options)
    (tiles,) = fresh._tiles.values()
    (together,) = batch._tiles.values()
    assert (tiles.slots > 0, together.slots) == (True, 0)
    right = expected(query, kv, batch, options)
    assert error(result, right) < BOUNDS[case.dtype]
    assert error(result, whole.cpu().double()) < BOUNDS[case.dtype]


# Three begin alike for 96 tokens, two of them go on alike for 80 more; one is alone.
TREE = ((1, 190), (4, 40), (1, 181), (1, 100), (1, 70), (1, 96))
COMMON = ((2, 0, 176), (3, 0, 96), (5, 0, 96))
SHARED = {
    "tree": Case(16, 4, 2, 64, TREE, common=COMMON),
    "tree of halves": Case(16, 4, 1, 80, TREE, HALF, common=COMMON),
    "sinks and a cap": Case(16, 2, 2, 64, TREE, common=COMMON, sinks=True, soft_cap=2.0),
    "window": Case(16, 4, 2, 64, TREE, common=COMMON, window=70),
    "window of several": Case(
        *(16, 4, 2, 64, tuple((1, 150 + 10 * n) for n in range(5))),
        common=tuple((n, 0, 144) for n in range(1, 5)),
        window=100,
    ),
    "fp8": Case(16, 4, 2, 64, TREE, common=COMMON, fp8=True),
}
# Positions that are not read again. The first 96 of four, and 80 more of two; in windows, 70 and 66
# of two, read as 70, and 65 and 56 of two; 94, 84, 74, 64 and 54 of five.
SAVED = dict.fromkeys(SHARED, 3 * 96 + 80) | {"window": 66 + 56, "window of several": 276}


@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("name", SHARED)
def test_shared_pages_are_read_once(
    name: str, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = SHARED[name]
    query, kv, batch, options = built(case, 300 + list(SHARED).index(name))
    if pieces:
        programs_at_a_time(monkeypatch, count=64, piece=64)
    result = paged_attention(query, kv, batch, **options)
    assert error(result, expected(query, kv, batch, options)) < BOUNDS[case.dtype]
    (tiles,) = batch._tiles.values()
    read = sum(
        stop - start
        for sequence, start, stop, *_ in tiles.tiles.tolist()
        if case.slices[sequence][0] == 1
    )
    alone = sum(min(context, case.window or context) for count, context in case.slices if count < 2)
    assert alone - read == SAVED[name]


def test_more_rows_share_than_one_program_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "HEIGHT_MAX", 16)
    case = Case(16, 4, 1, 64, ((1, 70),) * 6, HALF, common=tuple((n, 0, 64) for n in range(1, 6)))
    query, kv, batch, options = built(case, 400)
    result = paged_attention(query, kv, batch, **options)
    assert error(result, expected(query, kv, batch, options)) < BOUNDS[HALF]
    (tiles,) = batch._tiles.values()
    spans = tiles.tiles[:, 1:5].tolist()
    assert [[*span[:2], span[3] - span[2]] for span in spans[:2]] == [[0, 64, 4], [0, 64, 2]]


def test_any_strides_of_queries() -> None:
    query, kv, batch, options = built(Case(16, 4, 2, 64, ((1, 20), (3, 9))), 401)
    right = expected(query, kv, batch, options)
    for place in (query.contiguous(), torch.stack((query, query * NAN), dim=-1)[..., 0]):
        assert torch.equal(place, query)
        assert error(paged_attention(place, kv, batch, **options), right) < BOUNDS[torch.float32]


@pytest.mark.skipif(not gpu.interpreted(), reason="takes six gigabytes of a GPU")
def test_page_offsets_beyond_int32_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    # It would copy all of the pool onto itself.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *arguments: None)
    # 3 pages, never touched but where rows are.
    inner = 2 * 8 * 1 * 16
    pool = torch.from_numpy(np.zeros((3, (1 << 30) + inner), dtype=np.float16))
    kv = pool[:, 1 << 30 :].view(3, 2, 8, 1, 16)
    kv[2, :, :2] = torch.randn(2, 2, 1, 16).half()
    batch = AttentionBatch(
        query_starts=(0, 2),
        context_lengths=(2,),
        page_tables=torch.tensor([[2]]),
        write_pages=torch.tensor([2, 2]),
        write_offsets=torch.tensor([0, 1]),
        write_rows=None,
        page_size=8,
    )
    query = torch.randn(2, 1, 16).half()
    near = replace(batch, page_tables=torch.tensor([[0]]))
    right = reference.paged_attention(query.double(), kv[2:].double(), near, scale=1.0)
    assert error(paged_attention(query, kv, batch, scale=1.0), right) < BOUNDS[HALF]


TRIAL = Trial(
    head_dim=64, group=2, page_size=16, dtype=torch.float32, soft_cap=True, sinks=True, queries=135,
    device=DEVICE,
)  # fmt: skip


@pytest.mark.parametrize("rounded", [False, True], ids=["plain", "fp8"])
def test_the_trial_tells_right_from_wrong(rounded: bool) -> None:
    trial = replace(TRIAL, rounded=rounded)
    assert agrees(attention.paged_attention, trial)

    def wrong(query: Tensor, kv: Tensor, *others: Any, **options: Any) -> None:
        if rounded:
            options["scales"] = options["scales"].flip(1)
        else:
            kv = kv.flip(3)
        attention.paged_attention(query, kv, *others, **options)

    assert not agrees(wrong, trial)


@pytest.mark.parametrize("known", [False, True])
def test_what_is_no_number_in_fp8_is_none_in_what_reads_it(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nowhere else."""
    monkeypatch.setattr(attention, "knows_fp8", lambda device: known)
    case = Case(16, 4, 2, 64, ((1, 40), (1, 33), (1, 20)))
    query, kv, batch, options = built(case, 403)
    for sequence, part, position, bad in ((0, 0, 39, NAN), (1, 1, 2, float("inf"))):
        page = int(batch.page_tables[sequence, position // 16])
        kv[page, part, position % 16, 1, 5] = bad
    kv, options["scales"] = in_fp8(kv.cpu(), DEVICE)
    result = paged_attention(query, kv, batch, **options)
    finite = result.isfinite().all(dim=2).tolist()
    assert finite == [[True, True, False, False]] * 2 + [[True] * 4]


def test_processors_without_fp8_read_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """All codes are among the pages: two heads of 72 elements, 100 positions."""
    query, kv, batch, options = built(Case(16, 2, 2, 72, ((1, 100), (5, 9)), HALF), 404)
    codes = torch.arange(kv.numel(), dtype=torch.int64, device=DEVICE) % 256
    codes[codes % 128 == 127] = 0  # not a number: the test above
    kv = codes.to(torch.uint8).view(kv.shape).view(torch.float8_e4m3fn)
    scales = torch.rand(kv.shape[0], 2, 2, 16, device=DEVICE)
    options["scales"] = scales / 448
    monkeypatch.setattr(attention, "knows_fp8", lambda device: True)
    native = paged_attention(query, kv, batch, **options)
    monkeypatch.setattr(attention, "knows_fp8", lambda device: False)
    assert torch.equal(paged_attention(query, kv, batch, **options), native)
    assert native.isfinite().all()
    assert native.abs().min() > 0


@pytest.mark.parametrize("raises", [False, True])
def test_what_fails_its_trial_is_left_to_torch(
    raises: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(query: Tensor, kv: Tensor, batch: Any, result: Tensor, **options: Any) -> None:
        if raises:
            raise RuntimeError("no C compiler")
        result.zero_()

    query, kv, batch, options = built(Case(16, 4, 2, 64, ((1, 20), (3, 9))), 402)
    monkeypatch.setattr(gpu, "interpreted", lambda: False)
    monkeypatch.setattr(attention, "paged_attention", wrong)
    attention._trusted.cache_clear()
    with caplog.at_level(logging.WARNING):
        result = paged_attention(query, kv, batch, **options)
    attention._trusted.cache_clear()
    assert error(result, expected(query, kv, batch, options)) < 1e-5
    (record,) = caplog.records
    assert ("no C compiler" if raises else "is wrong") in record.getMessage()
