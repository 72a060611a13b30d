"""Attention and append in tensors of fixed sizes: on a GPU, else in Triton's interpreter."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from chatserve_kernels import AttentionBatch, append_kv, fp8, paged_attention
from chatserve_kernels.fixed import (
    DecodeRows,
    FixedSizes,
    FixedStep,
    Spread,
    decode_records,
    spread_of,
)
from chatserve_kernels.gpu.tiles import TileKind, TileShape
from tests.kernels.test_gpu_attention import (
    BOUNDS,
    DEVICE,
    HALF,
    Case,
    built,
    error,
    expected,
    poisoned,
    programs_at_a_time,
)

__all__ = ["poisoned"]  # of each test here too

LONG = ((1, 140), (1, 129), (1, 30), (1, 1), (1, 190))
COMMON = ((1, 0, 128), (4, 0, 128))
CASES = {
    "whole": Case(16, 4, 2, 64, LONG),
    "parted": Case(16, 4, 2, 64, LONG),
    "shared": Case(16, 4, 2, 64, LONG, common=COMMON),
    "halves": Case(8, 8, 1, 64, LONG, HALF, common=COMMON),
    "sinks and a cap": Case(16, 4, 2, 64, LONG, common=COMMON, sinks=True, soft_cap=2.0),
    "window": Case(16, 4, 2, 64, LONG, common=COMMON, window=90, sinks=True),
    "fp8": Case(16, 4, 2, 64, LONG, common=COMMON, fp8=True),
}


def rows_of(batch: AttentionBatch) -> DecodeRows:
    count = len(batch.context_lengths)
    nothing = np.zeros(count, dtype=np.int64)
    return DecodeRows(
        tokens=nothing,
        positions=nothing,
        write_pages=nothing - 1,
        write_offsets=nothing,
        lengths=batch.context_lengths,
        tables=batch.page_tables.cpu().numpy().astype(np.int32),
    )


def filled(
    batch: AttentionBatch, kinds: tuple[TileKind, ...], rows: int, spread: Spread | None = None
) -> FixedStep:
    """In memory that held something else."""
    given = rows_of(batch)
    records = decode_records(given, kinds, page_size=batch.page_size)
    buffer = torch.full((1 << 18,), 7, dtype=torch.uint8, device=DEVICE)
    sizes = FixedSizes(rows, spread_of(records) if spread is None else spread)
    step = FixedStep(buffer, sizes, kinds, page_size=batch.page_size)
    assert step.fill(given, records)
    return step


@pytest.mark.parametrize("rows", [5, 8])
@pytest.mark.parametrize("name", CASES)
def test_rows_in_fixed_sizes_get_what_they_get_by_themselves(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    if name != "whole":
        programs_at_a_time(monkeypatch, count=16, piece=64)
    query, kv, batch, options = built(case, 500 + list(CASES).index(name))
    by_itself = paged_attention(query, kv, batch, **options)
    step = filled(batch, batch.kinds, rows)
    spread = {"whole": Spread.WHOLE, "parted": Spread.PARTED}
    assert step.sizes.spread is spread.get(name, Spread.SHARED)
    more = query.new_full((rows - 5, *query.shape[1:]), float("nan"))
    result = paged_attention(torch.cat((query, more)), kv, step.batch, **options)
    assert error(result[:5], expected(query, kv, batch, options)) < BOUNDS[case.dtype]
    assert error(result[:5], by_itself.cpu().double()) < BOUNDS[case.dtype]
    assert bool((result[5:] == 0).all()), "rows that are nobody's are not left as they were"


def test_room_for_more_than_there_is_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows are one tile each, where there are slots, joins and lines for many."""
    programs_at_a_time(monkeypatch, count=6, piece=256)
    query, kv, batch, options = built(replace(CASES["whole"], sinks=True), 520)
    by_itself = paged_attention(query, kv, batch, **options)
    for spread in (Spread.PARTED, Spread.SHARED):
        step = filled(batch, batch.kinds, 5, spread)
        assert bool((step.batch.tiles(*batch.kinds[0]).joins == 0).all())
        result = paged_attention(query, kv, step.batch, **options)
        assert error(result, by_itself.cpu().double()) < 1e-6


@pytest.mark.parametrize("rounded", [False, True], ids=["plain", "fp8"])
def test_rows_without_a_page_are_not_written(rounded: bool) -> None:
    _, kv, batch, options = built(Case(16, 4, 2, 64, LONG, fp8=rounded), 530)
    # The page before the first one is there, so that who writes to it is seen.
    kv, scales = kv[1:], options["scales"][1:] if rounded else None
    step = filled(batch, (TileKind(None, TileShape(2, 2, 64, 4)),), 8)
    pool = torch.empty(0, dtype=torch.uint8, device=DEVICE).set_(kv.untyped_storage())
    before = pool.clone()
    rows = torch.randn((2, 8, 2, 64), device=DEVICE)
    append_kv(rows[0], rows[1], kv, step.batch, scales)
    assert torch.equal(pool, before)
    step.batch.write_pages[2], step.batch.write_offsets[2] = 3, 5
    append_kv(rows[0], rows[1], kv, step.batch, scales)
    after = pool.clone()
    pool.copy_(before)
    if scales is None:
        kv[3, :, 5] = rows[:, 2]
    else:
        for part in (0, 1):
            places = step.batch.write_pages[2:3], step.batch.write_offsets[2:3]
            fp8.write(rows[part, 2:3], kv[:, part], scales[:, part], *places)
    assert torch.equal(pool, after)
    assert not torch.equal(pool, before)
