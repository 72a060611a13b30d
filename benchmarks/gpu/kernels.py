"""Each kernel as a share of its limit: what it must read and write by the copy bandwidth, or what
it must multiply by the matrix rate. `attention_times.py` has attention's."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu import attention_times
from benchmarks.gpu.bench import Bench, NotMeasured, Row, Step
from benchmarks.gpu.checks import (
    OTHER,
    TRITON,
    by_choice,
    by_gate,
    by_norm,
    by_pages,
    by_rotation,
)
from benchmarks.gpu.limits import random_bytes
from benchmarks.gpu.paging import Heads, batch_of, layer_views, page_tables
from chatserve_kernels import AttentionBatch, Rotary, gpu, ops, rotate_append, sampling
from chatserve_kernels.sampling import Choices

PAGE_SIZE = 16
LAYERS = 32
HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 14_336, 128_256
EPSILON = 1e-5


def steps(quick: bool) -> Sequence[Step]:
    """Attention, then the others."""
    return [
        *attention_times.steps(quick),
        Step("append", _append),
        Step("rotation", _rotation),
        Step("copies", _copies),
        Step("checksums", _checksums),
        Step("norm", _norm),
        Step("gate", _gate),
        Step("sampling", _sampling),
    ]


def _append(bench: Bench) -> Iterable[Row]:
    """A decode step's rows, and a long slice's: one layer of pages that hold all layers."""
    heads = Heads(4, 2, 32) if bench.quick else Heads()
    for rows in (4, 33) if bench.quick else (64, 8192):
        slices = [(1, 100 + row) for row in range(rows)] if rows <= 64 else [(rows, rows)]
        tables, pages = page_tables([context for _, context in slices], PAGE_SIZE)
        batch = batch_of(tables, slices, PAGE_SIZE, bench.device)
        elements = PAGE_SIZE * heads.position_elements * 4
        pool = torch.empty(pages, elements, dtype=torch.bfloat16, device=bench.device)
        views = cycle(layer_views(pool, heads, PAGE_SIZE, 4))
        shape = (2, heads.kv_heads, rows, heads.head_dim)
        key, value = _normal(bench, *shape).transpose(1, 2)
        timing = bench.time(lambda: ops.append_kv(key, value, next(views), batch))  # noqa: B023
        moved = 2 * (key.nbytes + value.nbytes)
        note = _by(by_pages(bench.device))
        yield bench.bytes_row(f"append of {rows} rows", timing, moved, note)


def _rotation(bench: Bench) -> Iterable[Row]:
    """The same rows of a joined product, rotated and kept."""
    heads = Heads(4, 2, 32) if bench.quick else Heads()
    counts = heads.heads, heads.kv_heads, heads.kv_heads
    for rows in (4, 33) if bench.quick else (64, 8192):
        slices = [(1, 100 + row) for row in range(rows)] if rows <= 64 else [(rows, rows)]
        tables, pages = page_tables([context for _, context in slices], PAGE_SIZE)
        batch = batch_of(tables, slices, PAGE_SIZE, bench.device)
        elements = PAGE_SIZE * heads.position_elements * 4
        pool = torch.empty(pages, elements, dtype=torch.bfloat16, device=bench.device)
        views = cycle(layer_views(pool, heads, PAGE_SIZE, 4))
        angles = _normal(bench, 2, rows, heads.head_dim)
        rotary = Rotary(angles[0].clamp(-1, 1), angles[1].clamp(-1, 1))
        query, key, value = _normal(bench, rows, sum(counts), heads.head_dim).split(counts, dim=1)

        given = query, key, value

        def work(
            given: tuple[Tensor, Tensor, Tensor] = given,
            views: Iterator[Tensor] = views,
            batch: AttentionBatch = batch,
            rotary: Rotary = rotary,
        ) -> None:
            rotate_append(*given, next(views), batch, rotary)

        moved = 2 * (query.nbytes + key.nbytes + value.nbytes) + 2 * angles[0].nbytes
        note = _by(by_rotation(query, key, value, next(views), rotary))
        yield bench.bytes_row(f"rotation of {rows} rows", bench.time(work), moved, note)


def _copies(bench: Bench) -> Iterable[Row]:
    pool = _pool(bench)
    for count in (1, 32):
        places = torch.randperm(pool.shape[0], device=bench.device)[: 2 * count]
        sources, targets = places.split(count)
        timing = bench.time(partial(ops.copy_pages, pool, sources, targets))
        moved = 2 * count * pool.shape[1] * pool.element_size()
        note = _by(by_pages(bench.device))
        yield bench.bytes_row(f"copies of {count} pages", timing, moved, note)


def _checksums(bench: Bench) -> Iterable[Row]:
    pool = _pool(bench)
    words = pool.shape[1] * pool.element_size() // 8
    weights = random_bytes(8 * words, bench.device).view(torch.int64)
    for count in (1, 32) if bench.quick else (32, 256):
        pages = torch.randperm(pool.shape[0], device=bench.device)[:count]
        timing = bench.time(partial(ops.page_checksums, pool, pages, weights))
        note = _by(by_pages(bench.device))
        yield bench.bytes_row(f"checksums of {count} pages", timing, 8 * count * words, note)


def _norm(bench: Bench) -> Iterable[Row]:
    columns = 128 if bench.quick else HIDDEN
    weight = torch.randn(columns, device=bench.device)
    for count in (4, 16) if bench.quick else (64, 8192):
        given = _inputs(bench, (count, columns))

        def work(given: Iterator[Tensor] = given) -> object:
            return ops.rms_norm(next(given), weight, EPSILON)

        moved = 2 * count * columns * 2
        note = _by(by_norm(next(given)))
        yield bench.bytes_row(f"norm of {count} x {columns}", bench.time(work), moved, note)


def _gate(bench: Bench) -> Iterable[Row]:
    columns = 128 if bench.quick else INTERMEDIATE
    for count in (4, 16) if bench.quick else (64, 8192):
        given = _inputs(bench, (2, count, columns))

        def work(given: Iterator[Tensor] = given) -> object:
            gates, ups = next(given)
            return ops.gated(gates, ups, gelu=False)

        note = _by(by_gate(next(given)[0], gelu=False))
        moved = 3 * count * columns * 2
        yield bench.bytes_row(f"gate of {count} x {columns}", bench.time(work), moved, note)


def _sampling(bench: Bench) -> Iterable[Row]:
    """64 rows of a vocabulary, beside reading the logits once."""
    if not gpu.serves(bench.device.type):
        raise NotMeasured("there is no kernel for a CPU")
    rows, vocabulary = (4, 300) if bench.quick else (64, VOCABULARY)
    logits = 3 * torch.randn(rows, vocabulary, device=bench.device)
    kinds = {
        "best": _choices(rows, temperature=0.0),
        "all": _choices(rows),
        "top_p 0.95": _choices(rows, top_p=0.95),
        "top_k 40, top_p 0.95, logprobs": _choices(rows, top_k=40, top_p=0.95, logarithms=1.0),
    }
    for words, choices in kinds.items():
        if by_choice(logits) != TRITON:
            yield Row(name=f"tokens, {words}", note="left to torch", failed=True)
            continue
        timing = bench.time(partial(sampling.choose_tokens, logits, choices))
        name = f"tokens of {rows} x {vocabulary}, {words}"
        yield bench.bytes_row(name, timing, logits.nbytes, f"{1e6 * timing.device:.0f} us")
    plain = bench.time(lambda: torch.multinomial(torch.softmax(logits, dim=-1), 1))
    name = f"tokens of {rows} x {vocabulary}, torch's softmax and multinomial"
    yield bench.bytes_row(name, plain, logits.nbytes, f"{1e6 * plain.device:.0f} us")


def _choices(rows: int, **given: float) -> Choices:
    kept = {"temperature": 1.0, "min_p": 0.0, "top_k": 0.0, "top_p": 1.0, "logarithms": 0.0} | given
    columns: dict[str, Any] = {name: np.full(rows, value) for name, value in kept.items()}
    return Choices(noise=np.linspace(0.01, 0.99, rows), **columns)


def _pool(bench: Bench) -> Tensor:
    """Pages of all layers, 2 MiB each: [pages, elements]."""
    page_bytes = 4096 if bench.quick else LAYERS * PAGE_SIZE * Heads().position_elements * 2
    pages = 70 if bench.quick else 600
    return random_bytes(pages * page_bytes, bench.device).view(torch.bfloat16).view(pages, -1)


def _inputs(bench: Bench, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Some tensors in turn."""
    return cycle([_normal(bench, *shape) for _ in range(2)])


def _normal(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(shape, device=bench.device).to(torch.bfloat16)


def _by(who: str) -> str:
    """Nothing, where it is what is to be measured."""
    return "" if who in (TRITON, OTHER) else "left to torch"
