"""Every operation against float64, or to the bit where nothing is rounded. Fresh random inputs for
each case, unwritten results full of NaN."""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu import exact, grid_attention, grid_sampling
from benchmarks.gpu.bench import Bench, Row, Step
from benchmarks.gpu.checks import (
    BOUNDS,
    TORCH,
    by_gate,
    by_norm,
    by_pages,
    by_rotation,
    by_rounding,
    case_seed,
    checked,
    poisoned,
)
from benchmarks.gpu.paging import NAN, batch_of, page_tables
from chatserve.model.layout import KVLayout, LayerShape
from chatserve_kernels import AttentionBatch, HeadNorms, Rotary, fp8, ops, rotate_append
from chatserve_kernels.gpu.pages import COPIES_MAX

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
APPENDS = ((8, 128, 16), (2, 80, 8), (1, 256, 256), (4, 64, 64))  # kv heads, head_dim, page_size
# kv heads, query heads of each, head_dim, page_size, norms of heads
ROTATIONS = (
    (8, 4, 128, 16, False),
    (2, 7, 64, 8, False),
    (8, 4, 128, 64, True),
    (1, 3, 80, 8, True),
)
COPIES = (1, 5, 32, 33)
PAGE_WORDS = (16, 1000, 8192, 262_144, 262_147)
NORM_COLUMNS = (64, 80, 128, 1000, 2048, 4096, 5120, 8192, 16_384)
GATE_COLUMNS = (64, 1000, 1024, 8192, 14_336)
EPSILON = 1e-5


def steps(quick: bool) -> Sequence[Step]:
    """A step for each operation and size."""
    few = slice(2 if quick else None)
    made = list(grid_attention.steps(quick))
    made += [
        Step(
            f"append {kv_heads} x {head_dim}, page {size}",
            partial(_append, kv_heads, head_dim, size),
        )
        for kv_heads, head_dim, size in (APPENDS[1:2] if quick else APPENDS)
    ]
    made += [
        Step(
            f"append {kv_heads} x {head_dim} to fp8, page {size}",
            partial(_append_rounded, kv_heads, head_dim, size),
        )
        for kv_heads, head_dim, size in (APPENDS[1:2] if quick else APPENDS)
    ]
    made += [
        Step(
            f"rotation of {each[0]} x {each[1]} x {each[2]}{', norms' if each[4] else ''}",
            partial(_rotate, *each),
        )
        for each in (ROTATIONS[-1:] if quick else ROTATIONS)
    ]
    made += [Step(f"copies, {count}", partial(_copies, count)) for count in COPIES]
    made += [
        Step(f"checksums of {words} words", partial(_checksums, words)) for words in PAGE_WORDS[few]
    ]
    made += [Step(f"norm of {each}", partial(_norm, each)) for each in NORM_COLUMNS[few]]
    made += [Step(f"gate of {each}", partial(_gate, each)) for each in GATE_COLUMNS[few]]
    return [*made, *grid_sampling.steps(quick)]


def _append(kv_heads: int, head_dim: int, size: int, bench: Bench) -> Iterable[Row]:
    for dtype in DTYPES:
        for some in (False, True):
            name = f"append {kv_heads} x {head_dim}, page {size}, {_word(dtype)}"
            name += ", some rows" if some else ""
            seed = case_seed(name)
            batch, pages = _writing(bench, seed, size, some=some)
            shape = (2, kv_heads, batch.rows, head_dim + 3)
            rows = torch.randn(shape, generator=_numbers(bench, seed), device=bench.device)
            key, value = rows.to(dtype)[..., :head_dim].transpose(1, 2)
            inner = 2 * size * kv_heads * head_dim
            pool = torch.full((pages, inner + 8), NAN, dtype=dtype, device=bench.device)
            right = pool.clone()
            ops.append_kv(key, value, _layer(pool, size, kv_heads, head_dim), batch)
            layer = _layer(right, size, kv_heads, head_dim)
            given = slice(None) if batch.write_rows is None else batch.write_rows
            layer[batch.write_pages, 0, batch.write_offsets] = key[given]
            layer[batch.write_pages, 1, batch.write_offsets] = value[given]
            yield _same(name, pool, right, seed, by_pages(bench.device))


def _append_rounded(kv_heads: int, head_dim: int, size: int, bench: Bench) -> Iterable[Row]:
    """Against torch's conversion on a CPU. One channel is large, as biases make some."""
    layout = KVLayout(size, fp8.FP8, (LayerShape(1, 64), LayerShape(kv_heads, head_dim)))
    for dtype in DTYPES:
        name = f"append {kv_heads} x {head_dim}, page {size}, {_word(dtype)} to fp8"
        seed = case_seed(name)
        batch, pages = _writing(bench, seed, size, some=True)
        shape = (2, batch.rows, kv_heads, head_dim)
        rows = torch.randn(shape, generator=_numbers(bench, seed), device=bench.device)
        rows[..., head_dim // 2] *= 300
        key, value = rows.to(dtype)
        pool = layout.allocate(pages, bench.device, fill=NAN)
        kv, scales = layout.layer_view(pool, 1), layout.layer_scales(pool, 1)
        ops.append_kv(key, value, kv, batch, scales)
        right = layout.allocate(pages, "cpu", fill=NAN)
        expected, scale = layout.layer_view(right, 1), layout.layer_scales(right, 1)
        assert batch.write_rows is not None
        assert scale is not None
        for part, given in enumerate((key, value)):
            places = batch.write_pages.cpu(), batch.write_offsets.cpu()
            fp8.write(given[batch.write_rows].cpu(), expected[:, part], scale[:, part], *places)
        yield _same(name, pool.cpu(), right, seed, by_rounding(bench.device))


def _rotate(
    kv_heads: int, group: int, head_dim: int, size: int, normed: bool, bench: Bench
) -> Iterable[Row]:
    """Query, key and value lie side by side, as one product gives them; every row is kept, or every
    other one."""
    for dtype in DTYPES:
        for some in (False, True):
            name = f"rotation of {kv_heads} x {group} x {head_dim}, page {size}, {_word(dtype)}"
            name += (", norms" if normed else "") + (", some rows" if some else "")
            seed = case_seed(name)
            numbers = _numbers(bench, seed)
            batch, pages = _writing(bench, seed, size, some=some)
            counts = kv_heads * group, kv_heads, kv_heads
            shape = (batch.rows, sum(counts), head_dim)
            drawn = torch.randn(shape, generator=numbers, device=bench.device)
            angles = torch.rand((batch.rows, head_dim), generator=numbers, device=bench.device)
            angles *= 6.3
            weights = torch.randn((2, head_dim), generator=numbers, device=bench.device)
            norms = HeadNorms(weights[0], weights[1], EPSILON) if normed else None
            rotary = Rotary(angles.cos().to(dtype), angles.sin().to(dtype), norms)
            query, key, value = drawn.to(dtype).split(counts, dim=1)
            inner = 2 * size * kv_heads * head_dim
            pool = torch.full((pages, inner + 8), NAN, dtype=dtype, device=bench.device)
            layer = _layer(pool, size, kv_heads, head_dim)
            by = by_rotation(query, key, value, layer, rotary)
            right = [
                exact.rotated(each, rotary.cos, rotary.sin, weight, EPSILON)
                for each, weight in zip(
                    (query, key), weights if normed else (None,) * 2, strict=True
                )
            ]
            kept = value.clone()
            rotate_append(query, key, value, layer, batch, rotary)
            given = slice(None) if batch.write_rows is None else batch.write_rows
            places = batch.write_pages, batch.write_offsets
            error = max(
                exact.error(query, right[0]),
                exact.error(layer[:, 0][places], right[1][given]),
                exact.error(layer[:, 1][places], kept[given]),
                key=lambda each: (math.isnan(each), each),
            )
            layer[:, 0][places], layer[:, 1][places] = NAN, NAN
            if not bool(pool.isnan().all()):
                error = NAN  # somebody else's place was written to
            yield checked(name, error, BOUNDS[dtype], seed=seed, by=by)


def _writing(bench: Bench, seed: int, size: int, *, some: bool) -> tuple[AttentionBatch, int]:
    """Rows of several slices, or every other one of them, and how many pages they go to."""
    slices = ((1, 40), (30, 300), (1, 1), (7, 7))
    dice = random.Random(seed)
    tables, pages = page_tables([each for _, each in slices], size, dice=dice)
    batch = batch_of(tables, slices, size, bench.device)
    if not some:
        return batch, pages + 1
    kept = torch.arange(0, batch.rows, 2, device=bench.device)
    batch = replace(
        batch,
        write_rows=kept,
        write_pages=batch.write_pages[kept],
        write_offsets=batch.write_offsets[kept],
    )
    return batch, pages + 1


def _layer(pool: Tensor, size: int, kv_heads: int, head_dim: int) -> Tensor:
    inner = 2 * size * kv_heads * head_dim
    return pool[:, 8 : 8 + inner].view(-1, 2, size, kv_heads, head_dim)


def _copies(count: int, bench: Bench) -> Iterable[Row]:
    """In a ring, so that a page is read that another copy writes; then to other places."""
    for elements in (64, 4100) if bench.quick else (64, 4100, 1 << 20):
        for ring in (True, False):
            name = f"copies, {count} of {elements}, {'ring' if ring else 'apart'}"
            seed = case_seed(name)
            pool = _bits(bench, seed, (2 * count + 1, elements // 4))
            pages = torch.randperm(2 * count + 1, generator=torch.Generator().manual_seed(seed))
            sources = pages[:count].to(bench.device)
            targets = sources.roll(1) if ring else pages[count : 2 * count].to(bench.device)
            right = pool.clone()
            right[targets] = pool[sources]
            by = by_pages(bench.device)
            ops.copy_pages(pool.view(torch.bfloat16), sources, targets)
            yield _same(name, pool, right, seed, by if count <= COPIES_MAX else f"{by}, or torch")


def _checksums(words: int, bench: Bench) -> Iterable[Row]:
    name = f"checksums of {words} words"
    seed = case_seed(name)
    pool, weights = _bits(bench, seed, (9, words)), _bits(bench, seed + 1, (words,))
    asked = torch.tensor([8, 0, 0, 3, 5], device=bench.device)
    with poisoned():
        sums = ops.page_checksums(pool.view(torch.bfloat16), asked, weights)
    unsigned = pool[asked].cpu().numpy().view(np.uint64) * weights.cpu().numpy().view(np.uint64)
    right = torch.from_numpy(unsigned.sum(axis=1, dtype=np.uint64).view(np.int64))
    yield _same(name, sums.cpu(), right, seed, by_pages(bench.device))


def _norm(columns: int, bench: Bench) -> Iterable[Row]:
    for dtype in DTYPES:
        name = f"norm of {columns}, {_word(dtype)}"
        seed = case_seed(name)
        numbers = _numbers(bench, seed)
        drawn = torch.randn((37, columns + 16), generator=numbers, device=bench.device)
        drawn[1] *= 100
        rows = drawn.to(dtype)[:, :columns]
        weight = torch.randn(columns, generator=numbers, device=bench.device)
        with poisoned():
            result = ops.rms_norm(rows, weight, EPSILON)
        error = exact.error(result, exact.rms_norm(rows, weight, EPSILON))
        yield checked(name, error, BOUNDS[dtype], seed=seed, by=by_norm(rows))


def _gate(columns: int, bench: Bench) -> Iterable[Row]:
    for dtype in DTYPES:
        for gelu in (False, True):
            name = f"gate of {columns}, {_word(dtype)}, {'GELU' if gelu else 'SiLU'}"
            seed = case_seed(name)
            numbers = _numbers(bench, seed)
            drawn = torch.randn((37, 2 * columns), generator=numbers, device=bench.device)
            drawn[1] *= 10
            gates, ups = drawn.to(dtype).split(columns, dim=1)
            with poisoned():
                result = ops.gated(gates, ups, gelu=gelu)
            error = exact.error(result, exact.gated(gates, ups, gelu=gelu))
            by = by_gate(gates, gelu=gelu)
            yield checked(name, error, BOUNDS[dtype], seed=seed, by=by)


def _same(name: str, result: Tensor, right: Tensor, seed: int, by: str) -> Row:
    """To the bit: the error is the share of bytes that differ."""
    differ = result.contiguous().view(torch.uint8) != right.contiguous().view(torch.uint8)
    row = checked(name, float(differ.float().mean()), 0.0, seed=seed, by=by)
    assert by == TORCH or row.failed == bool(differ.any())
    return row


def _bits(bench: Bench, seed: int, shape: tuple[int, ...]) -> Tensor:
    """Random int64."""
    numbers = _numbers(bench, seed)
    ends = -(1 << 63), (1 << 63) - 1
    return torch.randint(*ends, shape, generator=numbers, device=bench.device)


def _numbers(bench: Bench, seed: int) -> torch.Generator:
    return torch.Generator(bench.device).manual_seed(seed)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
