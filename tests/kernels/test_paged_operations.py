"""Every backend of the paged operations against the slow reference, on random batches."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from chatserve_kernels import AttentionBatch, append_kv, copy_pages, ops, paged_attention, reference
from chatserve_kernels.cpu import native

NAN = float("nan")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Backend:
    """One implementation of the three doors."""

    paged_attention: Callable[..., Tensor]
    append_kv: Callable[..., None]
    copy_pages: Callable[..., None]


def in_torch(door: Callable[..., Any]) -> Callable[..., Any]:
    """The door as on a machine without LLVM."""

    def call(*arguments: Any, **options: Any) -> Any:
        with native.left_to_torch():
            return door(*arguments, **options)

    return call


BACKENDS = {
    "torch": Backend(in_torch(paged_attention), in_torch(append_kv), copy_pages),
    "machine code": Backend(paged_attention, append_kv, copy_pages),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of one trial; slices are (queries, context) pairs."""

    page_size: int
    heads: int
    kv_heads: int
    slices: tuple[tuple[int, int], ...]
    head_dim: int = 8
    options: tuple[tuple[str, Any], ...] = ()


MIXED = ((1, 1), (5, 5), (1, 23), (7, 30), (1, 9), (2, 17), (1, 40))
SHAPES = [
    Shape(8, 2, 2, MIXED),
    Shape(16, 4, 2, MIXED),
    Shape(16, 6, 1, MIXED),
    Shape(64, 4, 4, MIXED),
    Shape(32, 2, 1, ((1, 33), (1, 32), (1, 31), (1, 64))),
    Shape(16, 2, 1, ((33, 33),)),
    Shape(8, 4, 2, MIXED, options=(("window", 6),)),
    Shape(16, 4, 2, MIXED, options=(("window", 1),)),
    Shape(16, 4, 2, MIXED, options=(("window", 100),)),
    Shape(16, 4, 2, MIXED, options=(("soft_cap", 2.0),)),
    Shape(16, 4, 2, MIXED, options=(("sinks", True),)),
    Shape(8, 4, 1, MIXED, options=(("window", 11), ("soft_cap", 1.5), ("sinks", True))),
]


def random_batch(shape: Shape, generator: random.Random) -> tuple[AttentionBatch, int]:
    """Pages handed out in random order, one spare; every new position is written."""
    pages_needed = [-(-context // shape.page_size) for _, context in shape.slices]
    pages = sum(pages_needed) + 1
    free = list(range(pages))
    generator.shuffle(free)
    tables = torch.zeros((len(shape.slices), max(pages_needed)), dtype=torch.int64)
    starts, write_pages, write_offsets = [0], [], []
    for sequence, (queries, context) in enumerate(shape.slices):
        mine = [free.pop() for _ in range(pages_needed[sequence])]
        tables[sequence, : len(mine)] = torch.tensor(mine)
        starts.append(starts[-1] + queries)
        for position in range(context - queries, context):
            write_pages.append(mine[position // shape.page_size])
            write_offsets.append(position % shape.page_size)
    batch = AttentionBatch(
        query_starts=tuple(starts),
        context_lengths=tuple(context for _, context in shape.slices),
        page_tables=tables if generator.random() < 0.5 else tables.int(),
        write_pages=torch.tensor(write_pages),
        write_offsets=torch.tensor(write_offsets),
        write_rows=None,
        page_size=shape.page_size,
    )
    return batch, pages


def filled_pages(shape: Shape, batch: AttentionBatch, pages: int, dtype: torch.dtype) -> Tensor:
    """A strided view into a wider pool: NaN everywhere but at positions that a sequence has."""
    inner = 2 * shape.page_size * shape.kv_heads * shape.head_dim
    pool = torch.full((pages, inner + 24), NAN, dtype=dtype)
    kv = pool[:, 8 : 8 + inner].view(pages, 2, shape.page_size, shape.kv_heads, shape.head_dim)
    for sequence, context in enumerate(batch.context_lengths):
        for position in range(context):
            page = int(batch.page_tables[sequence, position // shape.page_size])
            part = kv[page, :, position % shape.page_size]
            part.copy_(torch.randn(part.shape))
    return kv


def options_of(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    options: dict[str, Any] = {"scale": shape.head_dim**-0.5, **dict(shape.options)}
    if options.get("sinks"):
        options["sinks"] = torch.randn(shape.heads).to(dtype)
    return options


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_attention_equals_the_reference(backend: Backend, dtype: torch.dtype, index: int) -> None:
    shape, seed = SHAPES[index], 1000 + index
    print(f"seed {seed}, {shape}")
    torch.manual_seed(seed)
    batch, pages = random_batch(shape, random.Random(seed))
    kv = filled_pages(shape, batch, pages, dtype)
    # As transformers hands it over: heads first in memory.
    query = torch.randn(shape.heads, batch.rows, shape.head_dim).to(dtype).transpose(0, 1)
    options = options_of(shape, dtype)
    expected = reference.paged_attention(query, kv, batch, **options)
    result = backend.paged_attention(query, kv, batch, **options)
    assert result.shape == query.shape
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
@pytest.mark.parametrize("suppressed", [False, True])
def test_append_equals_the_reference(backend: Backend, suppressed: bool) -> None:
    seed = 7
    print(f"seed {seed}")
    torch.manual_seed(seed)
    shape = Shape(8, 4, 2, MIXED)
    batch, pages = random_batch(shape, random.Random(seed))
    rows = torch.arange(batch.rows)
    if suppressed:
        rows = rows[torch.rand(batch.rows) < 0.6]
        batch = AttentionBatch(
            query_starts=batch.query_starts,
            context_lengths=batch.context_lengths,
            page_tables=batch.page_tables,
            write_pages=batch.write_pages[rows],
            write_offsets=batch.write_offsets[rows],
            write_rows=rows,
            page_size=batch.page_size,
        )
    kv = filled_pages(shape, batch, pages, torch.float32)
    other = kv.clone()
    key, value = torch.randn(2, shape.kv_heads, batch.rows, shape.head_dim).transpose(1, 2)
    reference.append_kv(key, value, other, batch)
    backend.append_kv(key, value, kv, batch)
    torch.testing.assert_close(kv, other, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
def test_page_copies_read_before_they_write(backend: Backend) -> None:
    pool = torch.randn(6, 10)
    other = pool.clone()
    sources, destinations = torch.tensor([0, 1, 4]), torch.tensor([1, 2, 0])
    reference.copy_pages(other, sources, destinations)
    backend.copy_pages(pool, sources, destinations)
    assert torch.equal(pool, other)
    backend.copy_pages(pool, sources[:0], destinations[:0])
    assert torch.equal(pool, other)


@pytest.mark.parametrize("options", [(), (("soft_cap", 2.0), ("sinks", True))])
def test_long_slices_are_computed_in_runs(
    monkeypatch: pytest.MonkeyPatch, options: tuple[tuple[str, Any], ...]
) -> None:
    monkeypatch.setattr(ops, "SCORE_ELEMENTS_MAX", (4 if options else 1) * 33 * 5)
    shape = Shape(16, 4, 2, ((33, 33), (1, 20)), options=options)
    torch.manual_seed(5)
    batch, pages = random_batch(shape, random.Random(5))
    kv = filled_pages(shape, batch, pages, torch.float32)
    query = torch.randn(batch.rows, shape.heads, shape.head_dim)
    arguments = options_of(shape, torch.float32)
    expected = reference.paged_attention(query, kv, batch, **arguments)
    torch.testing.assert_close(paged_attention(query, kv, batch, **arguments), expected)


def test_page_offsets_beyond_int32_are_reached() -> None:
    # 3 pages of 2^30 + 64 elements, never touched but where the rows go.
    inner = 2 * 8 * 1 * 4
    pool = torch.empty((3, (1 << 30) + inner), dtype=torch.bfloat16)
    kv = pool[:, 1 << 30 :].view(3, 2, 8, 1, 4)
    batch = AttentionBatch(
        query_starts=(0, 2),
        context_lengths=(2,),
        page_tables=torch.tensor([[2]]),
        write_pages=torch.tensor([2, 2]),
        write_offsets=torch.tensor([0, 1]),
        write_rows=None,
        page_size=8,
    )
    rows = torch.ones((2, 1, 4), dtype=torch.bfloat16)
    append_kv(rows, rows * 3, kv, batch)
    assert torch.equal(paged_attention(rows, kv, batch, scale=1.0), rows * 3)


def small_batch(**changes: Any) -> AttentionBatch:
    fields: dict[str, Any] = {
        "query_starts": (0, 2),
        "context_lengths": (2,),
        "page_tables": torch.zeros((1, 1), dtype=torch.int64),
        "write_pages": torch.zeros(2, dtype=torch.int64),
        "write_offsets": torch.arange(2),
        "write_rows": None,
        "page_size": 8,
    }
    return AttentionBatch(**(fields | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"query_starts": (0, 1, 2)},
        {"query_starts": (1, 2)},
        {"query_starts": (0, 0)},
        {"context_lengths": (1,)},
        {"context_lengths": (9,)},
        {"page_tables": torch.zeros((2, 1), dtype=torch.int64)},
        {"page_tables": torch.zeros((1, 1))},
        {"write_pages": torch.zeros(1, dtype=torch.int64)},
        {"write_rows": torch.zeros(1, dtype=torch.int64)},
    ],
)
def test_a_batch_that_contradicts_itself_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|must begin|queries"):
        small_batch(**changes)


def test_the_doors_check_shapes_types_and_strides() -> None:
    batch = small_batch()
    kv = torch.zeros((1, 2, 8, 2, 4))
    query = torch.zeros((2, 4, 4))
    for wrong_query in (query[:1], query[:, :3], query[..., :2], query.bfloat16()):
        with pytest.raises(ValueError, match=r"query|heads"):
            paged_attention(wrong_query, kv, batch, scale=1.0)
    for wrong_kv in (kv[:, :, :4], kv.transpose(2, 3), kv.transpose(3, 4), kv[:, :1]):
        with pytest.raises(ValueError, match=r"kv is|contiguous"):
            paged_attention(query, wrong_kv, batch, scale=1.0)
    for option in ({"window": 0}, {"soft_cap": 0.0}, {"sinks": torch.zeros(3)}):
        with pytest.raises(ValueError, match=r"window|soft cap|sinks"):
            paged_attention(query, kv, batch, scale=1.0, **option)
    rows = torch.zeros((2, 2, 4))
    for key, value in ((rows[:1], rows), (rows, rows[:, :1]), (rows.bfloat16(), rows)):
        with pytest.raises(ValueError, match="key"):
            append_kv(key, value, kv, batch)
    with pytest.raises(ValueError, match="contiguous"):
        copy_pages(torch.zeros((2, 4)).T, torch.zeros(1).long(), torch.zeros(1).long())
    with pytest.raises(ValueError, match="copies"):
        copy_pages(torch.zeros((2, 4)), torch.zeros(1).long(), torch.zeros(2).long())
