"""Attention's time: decode rows and slices of a Llama 3 of 8 B parameters in bf16, beside what must
be read or multiplied, and beside torch's attention on contiguous K and V."""

import random
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.bench import Bench, Row, Step, Timing, joined
from benchmarks.gpu.checks import TORCH, by_attention
from benchmarks.gpu.paging import Common, Heads, batch_of, page_tables
from chatserve.model.layout import KVLayout, LayerShape
from chatserve_kernels import AttentionBatch, fp8, ops

PAGE_SIZE = 16
PAGE_SIZES = (8, 16, 32, 64, 128, 256)
ROWS, CONTEXT = 32, 4096
LONG = 32_768
SHARING, SHARED, OWN = 64, 2048, 256
SLICES = ((2048, 2048), (2048, 8192), (8192, 8192))
# Pages hold several layers, which take turns, as a step's layers do.
LAYERS = 4
BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)


@dataclass(frozen=True, slots=True)
class Asked:
    """Sequences as (queries, context), in pages that lie anywhere, or one after the other, of bf16
    or of fp8."""

    slices: Sequence[tuple[int, int]]
    page_size: int = PAGE_SIZE
    common: Sequence[Common] = ()
    shares: bool = True
    in_order: bool = False
    rounded: bool = False


class Layer(NamedTuple):
    """Of the pages of one layer. scales: of fp8."""

    kv: Tensor
    scales: Tensor | None


def steps(quick: bool) -> Sequence[Step]:
    """The page sizes come last: each has to be compiled."""
    del quick
    return [
        Step("decode attention", _decode),
        Step("decode attention, fp8", _decode_rounded),
        Step("one long context", _long),
        Step("shared prefix", _shared),
        Step("attention of slices", _slices),
        Step("tiles of a step", _tiles),
        *(Step(f"pages of {size}", partial(_page_size, size)) for size in PAGE_SIZES),
    ]


def _decode(bench: Bench) -> Iterable[Row]:
    rows, context = _decode_sizes(bench)
    slices = [(1, context)] * rows
    name = f"decode attention {rows} x {context}, page {PAGE_SIZE}"
    paged = yield from _paged(bench, name, Asked(slices))
    ordered = yield from _paged(bench, f"{name}, pages in order", Asked(slices, in_order=True))
    yield from _contiguous(bench, rows, 1, context, {"pages": paged, "pages in order": ordered})


def _decode_rounded(bench: Bench) -> Iterable[Row]:
    """Pages of half the bytes, beside plain ones."""
    rows, context = _decode_sizes(bench)
    slices = [(1, context)] * rows
    name = f"decode attention {rows} x {context}, page {PAGE_SIZE}"
    rounded = yield from _paged(bench, f"{name}, fp8", Asked(slices, rounded=True))
    plain = yield from _paged(bench, f"{name}, beside fp8", Asked(slices))
    times = plain.device / rounded.device
    yield Row(name=f"{name}: fp8, times as fast as bf16", value=times, unit="times")


def _long(bench: Bench) -> Iterable[Row]:
    context = 300 if bench.quick else LONG
    name = f"decode attention 1 x {context}, page {PAGE_SIZE}"
    paged = yield from _paged(bench, name, Asked([(1, context)]))
    yield from _contiguous(bench, 1, 1, context, {"pages": paged})


def _page_size(size: int, bench: Bench) -> Iterable[Row]:
    rows, context = _decode_sizes(bench)
    name = f"decode attention {rows} x {context}, page {size}, sweep"
    yield from _paged(bench, name, Asked([(1, context)] * rows, page_size=size))


def _shared(bench: Bench) -> Iterable[Row]:
    """A prefix of all rows: read once; in the same pages, row by row; in pages of each row."""
    rows, shared, own = (6, 64, 20) if bench.quick else (SHARING, SHARED, OWN)
    slices = [(1, shared + own)] * rows
    common = [Common(row, 0, shared) for row in range(1, rows)]
    name = f"{rows} rows, {shared} of {shared + own} tokens in common"
    once = yield from _paged(bench, f"{name}, read once", Asked(slices, common=common))
    asked = Asked(slices, common=common, shares=False)
    apart = yield from _paged(bench, f"{name}, row by row", asked)
    each = yield from _paged(bench, f"{name}, pages of each", Asked(slices))
    for words, other in (("row by row", apart), ("pages of each", each)):
        times = other.device / once.device
        yield Row(name=f"{name}: times as fast as {words}", value=times, unit="times")


def _slices(bench: Bench) -> Iterable[Row]:
    """Prompts, as a share of the matrix rate."""
    for queries, context in ((20, 40),) if bench.quick else SLICES:
        heads = _heads(bench)
        work, by, _ = _work(bench, Asked([(queries, context)]))
        timing = bench.time(work)
        seen = queries * (context - queries) + queries * (queries + 1) // 2
        operations = 4 * heads.heads * heads.head_dim * seen
        name = f"attention of {queries} queries at {context}"
        note = joined(by, timing.words)
        yield bench.rate_row(name, operations / timing.device, "matrix", note=note)
        if queries == context:
            yield from _contiguous(bench, 1, queries, context, {"pages": timing})


def _tiles(bench: Bench) -> Iterable[Row]:
    """What the host does once a step before attention begins."""
    rows, context = (4, 60) if bench.quick else (64, 2048)
    common = [Common(row, 0, context // 2) for row in range(1, rows)]
    slices = [(1, context)] * rows
    for words, shared in (("nothing in common", ()), ("half in common", common)):
        tables, pages = page_tables([context] * rows, PAGE_SIZE, common=shared)
        heads = _heads(bench)
        query, (layer,) = _tensors(bench, heads, rows, pages, PAGE_SIZE, layers=1)

        batch = batch_of(tables, slices, PAGE_SIZE, bench.device)
        alone = partial(_attend, query, layer, batch, heads)
        new = partial(batch_of, tables, slices, PAGE_SIZE, bench.device)
        first = bench.host_time(_Attending(query, layer, heads, new))
        again = bench.host_time(alone)
        name = f"host, batch and tiles of {rows} x {context}, {words}"
        yield Row(name=name, value=1e6 * (first - again), unit="us")
        yield Row(name=f"host, attention of a layer, {words}", value=1e6 * again, unit="us")


@dataclass(frozen=True, slots=True)
class _Attending:
    """Attention of a batch that is new each time."""

    query: Tensor
    layer: Layer
    heads: Heads
    new: Callable[[], AttentionBatch]

    def __call__(self) -> Tensor:
        return _attend(self.query, self.layer, self.new(), self.heads)


def _paged(bench: Bench, name: str, asked: Asked) -> Generator[Row, None, Timing]:
    """A row of its bandwidth; returns its timing."""
    work, by, moved = _work(bench, asked)
    timing = bench.time(work)
    note = joined(by, f"{1e6 * timing.device:.0f} us")
    yield bench.bytes_row(name, timing, moved, note)
    return timing


def _work(bench: Bench, asked: Asked) -> tuple[Callable[[], Tensor], str, int]:
    """What is timed; a word where torch does it; bytes that must be read and written, of pages that
    are seen to be shared once."""
    heads = _heads(bench)
    contexts = [context for _, context in asked.slices]
    dice = None if asked.in_order else random.Random(1)
    tables, pages = page_tables(contexts, asked.page_size, common=asked.common, dice=dice)
    batch = batch_of(tables, asked.slices, asked.page_size, bench.device, shares=asked.shares)
    query, layers = _tensors(
        bench, heads, batch.rows, pages, asked.page_size, layers=LAYERS, rounded=asked.rounded
    )
    turns = cycle(layers)
    by = by_attention(query, layers[0].kv, soft_cap=None, sinks=None)
    saved = sum(each.tokens for each in asked.common) if asked.shares else 0
    read, scales = layers[0]
    position_bytes = heads.position_elements * read.element_size()
    if scales is not None:
        position_bytes += 2 * heads.kv_heads * scales.element_size()
    moved = (sum(contexts) - saved) * position_bytes + 2 * query.nbytes
    word = "left to torch" if by == TORCH else ""
    return (lambda: _attend(query, next(turns), batch, heads)), word, moved


def _attend(query: Tensor, layer: Layer, batch: AttentionBatch, heads: Heads) -> Tensor:
    scale = heads.head_dim**-0.5
    return ops.paged_attention(query, layer.kv, batch, scale=scale, scales=layer.scales)


def _tensors(
    bench: Bench,
    heads: Heads,
    rows: int,
    pages: int,
    page_size: int,
    *,
    layers: int,
    rounded: bool = False,
) -> tuple[Tensor, list[Layer]]:
    dtype = fp8.FP8 if rounded else torch.bfloat16
    shape = LayerShape(heads.kv_heads, heads.head_dim)
    layout = KVLayout(page_size, dtype, (shape,) * layers)
    pool = layout.allocate(pages, bench.device)
    made: list[Layer] = []
    for layer in range(layers):
        kv, scales = layout.layer_view(pool, layer), layout.layer_scales(pool, layer)
        numbers = torch.randn(kv.shape, dtype=torch.bfloat16, device=bench.device)
        if scales is None:
            kv.copy_(numbers)
        else:
            kv.view(torch.uint8).copy_((100 * numbers).to(dtype).view(torch.uint8))
            scales.fill_(0.01)
        made.append(Layer(kv, scales))
    query = torch.randn(rows, heads.heads, heads.head_dim, device=bench.device)
    return query.to(torch.bfloat16), made


def _contiguous(
    bench: Bench, rows: int, queries: int, context: int, paged: dict[str, Timing]
) -> Iterable[Row]:
    """The fastest of torch's attentions on contiguous K and V, and how much longer pages take."""
    heads = _heads(bench)
    group = heads.heads // heads.kv_heads
    shape = (2, rows, heads.kv_heads, context, heads.head_dim)
    key, value = torch.empty(shape, dtype=torch.bfloat16, device=bench.device).normal_()
    query = torch.randn(rows, heads.heads, queries, heads.head_dim, device=bench.device)
    query = query.to(torch.bfloat16)
    # A decode row's heads of one kv head as if they were queries, so that keys are read once.
    folded = query.view(rows, heads.kv_heads, group * queries, heads.head_dim)
    best: tuple[float, str] | None = None
    for backend in BACKENDS if bench.on_gpu else (SDPBackend.MATH,):
        for word, given in (("grouped", query), ("folded", folded)):
            if word == "folded" and queries > 1:
                continue
            work = partial(
                F.scaled_dot_product_attention, given, key, value, is_causal=queries > 1,
                enable_gqa=word == "grouped",
            )  # fmt: skip
            with suppress(RuntimeError), sdpa_kernel(backend):
                seconds = bench.time(work).device
                label = f"{backend.name}, {word}"
                best = min(best, (seconds, label)) if best else (seconds, label)
    name = f"contiguous, {rows} x {queries} at {context}, torch's fastest"
    if best is None:
        yield Row(name=name, note="not measured: no attention of torch takes these tensors")
        return
    yield Row(name=name, value=1e6 * best[0], unit="us", note=best[1])
    for words, timing in paged.items():
        over = timing.device / best[0] - 1
        yield Row(name=f"{name}: {words} take longer by", value=100 * over, unit="%")


def _decode_sizes(bench: Bench) -> tuple[int, int]:
    return (3, 100) if bench.quick else (ROWS, CONTEXT)


def _heads(bench: Bench) -> Heads:
    return Heads(4, 2, 32) if bench.quick else Heads()
