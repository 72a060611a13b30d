"""Attention over the grid of sizes, against float64: ragged slices and decode rows together,
prefixes that rows share as a tree, NaN wherever no sequence has a position. Pages of fp8 are held
against what is read of them."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu import exact
from benchmarks.gpu.bench import Bench, Row, Step
from benchmarks.gpu.checks import BOUNDS, by_attention, case_seed, checked, poisoned
from benchmarks.gpu.paging import NAN, Common, Heads, batch_of, page_tables, written
from chatserve_kernels import AttentionBatch, fp8, ops

HEAD_DIMS = (64, 80, 96, 128, 160, 192, 256)
PAGE_SIZES = (8, 16, 32, 64, 128, 256)
# (heads, kv heads): no sharing, groups of two to sixteen, some no power of two.
HEADS = ((4, 4), (4, 2), (32, 8), (14, 2), (8, 1), (16, 1), (6, 2))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WINDOWS = (None, None, 1, 64, 300, 1024)
SOFT_CAPS = (None, None, 2.0, 30.0)
# (queries, context) of each sequence. The first is the elder of a tree: two begin with 1,024 of its
# tokens, one of them goes on with 256 more of them, and another has 512.
SLICES = (
    *((1, 1500), (1, 1100), (1, 1290), (1, 517), (1, 1), (5, 5), (37, 293), (1, 257), (1, 4001)),
    *((130, 1290), (1, 255), (1, 256), (2, 65)),
)
TREE = (Common(1, 0, 1024), Common(2, 0, 1280), Common(3, 0, 512), Common(9, 0, 1024))
SLICES_QUICK = ((1, 150), (1, 110), (1, 129), (1, 51), (1, 1), (5, 5), (9, 29), (2, 65))
TREE_QUICK = (Common(1, 0, 96), Common(2, 0, 128), Common(3, 0, 32))
LAYERS = 2  # in a page, so that those of one layer are apart


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel's sizes, and what is asked for besides."""

    heads: Heads
    page_size: int
    dtype: torch.dtype
    window: int | None
    soft_cap: float | None
    sinks: bool
    index_dtype: torch.dtype
    fp8: bool = False

    @property
    def name(self) -> str:
        """Of its step."""
        heads = self.heads
        words = [
            f"attention {heads.heads}/{heads.kv_heads} x {heads.head_dim}",
            f"page {self.page_size}",
            str(self.dtype).removeprefix("torch."),
        ]
        words += [f"window {self.window}"] if self.window else []
        words += [f"cap {self.soft_cap:g}"] if self.soft_cap else []
        words += ["sinks"] if self.sinks else []
        words += ["fp8 pages"] if self.fp8 else []
        return ", ".join(words)


def steps(quick: bool) -> Sequence[Step]:
    """A step for each case."""
    return [Step(case.name, _run(case)) for case in cases(quick)]


def cases(quick: bool) -> Sequence[Case]:
    """Each head size with each page size, the others by dice; then what Llama has, which is what
    `kernels` times, in all page sizes."""
    dice = random.Random(2)
    drawn = [
        Case(
            heads=Heads(*dice.choice(HEADS), head_dim),
            page_size=page_size,
            dtype=DTYPES[number % len(DTYPES)],
            window=dice.choice(WINDOWS),
            soft_cap=dice.choice(SOFT_CAPS),
            sinks=dice.random() < 0.3,
            index_dtype=dice.choice((torch.int32, torch.int64)),
        )
        for number, (head_dim, page_size) in enumerate(
            (head_dim, page_size) for page_size in PAGE_SIZES for head_dim in HEAD_DIMS
        )
    ]
    if quick:
        return [*drawn[:9:4], replace(drawn[2], fp8=True)]
    alike = [
        Case(Heads(), page_size, torch.bfloat16, None, None, False, torch.int32)
        for page_size in PAGE_SIZES
    ]
    # Each head size, page size and type; Llama's in pages of 16 too.
    rounded = [replace(case, fp8=True) for case in (alike[1], *drawn[::5])]
    return list({case.name: case for case in (*alike, *drawn, *rounded)}.values())


def _run(case: Case) -> Callable[[Bench], Iterable[Row]]:
    def run(bench: Bench) -> Iterable[Row]:
        seed = case_seed(case.name)
        slices, tree = (SLICES_QUICK, TREE_QUICK) if bench.quick else (SLICES, TREE)
        query, kv, batch, sinks = built(case, bench, seed, slices, tree)
        options: dict[str, Any] = {
            "scale": case.heads.head_dim**-0.5,
            "window": case.window,
            "soft_cap": case.soft_cap,
            "sinks": sinks,
        }
        scales, read = None, kv
        if case.fp8:
            kv, scale = fp8.rounded(kv)
            read = fp8.widened(kv, scale, torch.float32)
            scales = scale.transpose(2, 3).contiguous()
        with poisoned():
            result = ops.paged_attention(query, kv, batch, scales=scales, **options)
        right = exact.paged_attention(query, read, batch, **options)
        # Beside fp8 what float16 multiplies becomes bfloat16.
        short = case.fp8 and case.dtype == torch.float16
        yield checked(
            case.name,
            exact.error(result, right),
            BOUNDS[torch.bfloat16 if short else case.dtype],
            seed=seed,
            by=by_attention(query, kv, soft_cap=case.soft_cap, sinks=sinks),
        )

    return run


def built(
    case: Case,
    bench: Bench,
    seed: int,
    slices: Sequence[tuple[int, int]],
    tree: Sequence[Common],
) -> tuple[Tensor, Tensor, AttentionBatch, Tensor | None]:
    """Query (heads before rows in memory), pages, batch and sinks."""
    contexts = [context for _, context in slices]
    heads, size = case.heads, case.page_size
    tables, pages = page_tables(contexts, size, common=tree, dice=random.Random(seed))
    numbers = torch.Generator(bench.device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=numbers, device=bench.device)
        return drawn.to(case.dtype)

    inner = size * heads.position_elements
    pool = torch.full((pages, 8 + LAYERS * inner), NAN, dtype=case.dtype, device=bench.device)
    kv = pool[:, 8 + inner : 8 + 2 * inner]
    kv = kv.view(pages, 2, size, heads.kv_heads, heads.head_dim)
    places = np.zeros((pages, size), dtype=np.bool_)
    seen = written(tables, contexts, size)
    places[: len(seen)] = seen
    there = torch.from_numpy(places).to(bench.device)[:, None, :, None, None]
    kv.copy_(torch.where(there, normal(*kv.shape), torch.full_like(kv, NAN)))
    batch = batch_of(tables, slices, size, bench.device)
    batch = replace(batch, page_tables=batch.page_tables.to(case.index_dtype))
    query = 2 * normal(heads.heads, batch.rows, heads.head_dim)
    return query.transpose(0, 1), kv, batch, normal(heads.heads) if case.sinks else None
