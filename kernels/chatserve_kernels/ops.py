"""The checked doors of the paged operations, and the plain torch bodies behind them.

May not know: chatserve, models, requests. A door checks shapes, dtypes and strides and raises
ValueError; a body trusts its door.

Theory: pages are read where they lie, by machine code on a CPU (`cpu/`) and by Triton on a GPU
(`gpu/`). Slices where pages have uncommon sizes, and everything where neither can be had or has
failed its trial, are torch's. K and V are then
gathered from their pages, because plain torch cannot read through a table. A slice gathers exactly
the positions its queries may see. Decode rows of like length are gathered together, padded to whole
pages; what lies in the padding may be anything, NaN included, so it is overwritten with zeros
before it meets an arithmetic operation (0 * NaN is NaN). Positions inside a context have all been
written, also those before a window. Query heads that share a kv head are never given copies of it:
for a slice they are an expanded (stride 0) dimension, for a decode row they take the place of the
query positions. Pages of fp8 (`fp8.py`), which no machine code reads, become the query's type when
they are gathered, float32 beside float16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from chatserve_kernels import fp8, gpu
from chatserve_kernels.batch import AttentionBatch, DecodeGroup
from chatserve_kernels.cpu import attention

# Explicit scores are [heads, queries, context], a mask [queries, context], both float32 somewhere
# on their way; at most this many elements at a time (64 MiB), so that a long slice over a long
# context does not need gigabytes.
SCORE_ELEMENTS_MAX = 1 << 24

WORD_BYTES = 8  # of a checksum
CHECKSUM_BYTES_MAX = 16 << 20  # gathered at a time


def paged_attention(
    query: Tensor,
    kv: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """Causal attention of each query over the pages of its sequence.

    query: [rows, heads, head_dim], any strides; rows = batch.query_starts[-1].
    kv: [pages, 2, page_size, kv_heads, head_dim], the query's dtype; one page's K and V must be
        contiguous, pages may be apart by any stride. kv_heads divides heads.
    scales: float32 [pages, 2, kv_heads, page_size] where kv is fp8 (`fp8.py`), on its device, the
        query float32, float16 or bfloat16; one page's contiguous, pages apart by any stride.
    window: a query at position p sees only positions t > p - window (None: all t ≤ p).
    soft_cap: scores s become soft_cap * tanh(s / soft_cap).
    sinks: [heads], logits that join each softmax without a value.
    Returns [rows, heads, head_dim], contiguous, in the query's dtype. Raises ValueError.
    See `reference.paged_attention` for the meaning.
    """
    _check_attention(query, kv, batch, window=window, soft_cap=soft_cap, sinks=sinks, scales=scales)
    result = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if gpu.serves(query.device.type):
        from chatserve_kernels.gpu import attention as on_gpu

        if on_gpu.served(query, kv, soft_cap=soft_cap, sinks=sinks):
            on_gpu.paged_attention(
                query, kv, batch, result, scale=scale, window=window, soft_cap=soft_cap,
                sinks=sinks, scales=scales,
            )  # fmt: skip
            return result
    _check_readable(batch)
    compiled = attention.attention_for(query, kv, soft_cap=soft_cap, sinks=sinks)
    slices = () if compiled is not None and compiled.sizes.matrices else batch.slices
    for sequence in slices:
        rows = slice(batch.query_starts[sequence], batch.query_starts[sequence + 1])
        result[rows] = _attend_slice(
            query[rows], kv, batch, sequence, scale=scale, window=window, soft_cap=soft_cap,
            sinks=sinks, scales=scales,
        )  # fmt: skip
    if compiled is not None and (batch.has_decode_rows or not slices):
        compiled.run(
            query, kv, batch, result, scale=scale, window=window, soft_cap=soft_cap, sinks=sinks,
        )  # fmt: skip
        return result
    for group in batch.decode_groups:
        result[group.rows] = _attend_decode(
            query[group.rows], kv, group, scale=scale, window=window, soft_cap=soft_cap,
            sinks=sinks, scales=scales,
        )  # fmt: skip
    return result


def attention_in_chain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv: Tensor,
    batch: AttentionBatch,
    *,
    window: int | None,
    soft_cap: float | None,
    scales: Tensor | None = None,
) -> attention.AttentionInChain | None:
    """`append_kv`, then `paged_attention`, in chains: for any layer of this batch whose tensors
    have the same shapes, strides and types. None where machine code does not serve them. Raises
    ValueError."""
    check_append(key, value, kv, batch, scales)
    _check_attention(query, kv, batch, window=window, soft_cap=soft_cap, sinks=None, scales=scales)
    _check_readable(batch)
    if scales is not None:
        return None
    compiled = attention.attention_for(query, kv, soft_cap=soft_cap, sinks=None)
    append = attention.append_for(key, value, kv)
    if compiled is None or append is None or not (compiled.sizes.matrices or not batch.slices):
        return None
    return attention.AttentionInChain(
        compiled, append, batch, query, key, value, kv, window=window, soft_cap=soft_cap
    )


def append_kv(
    key: Tensor, value: Tensor, kv: Tensor, batch: AttentionBatch, scales: Tensor | None = None
) -> None:
    """Write K and V of the rows that the batch names into their pages, in place.

    key, value: [rows, kv_heads, head_dim], any strides. kv, scales: as in `paged_attention`.
    Two rows never name the same page and offset. Raises ValueError.
    """
    check_append(key, value, kv, batch, scales)
    if gpu.serves(kv.device.type):
        from chatserve_kernels.gpu import pages as on_gpu

        if scales is not None and on_gpu.rounds(kv.device):
            on_gpu.append_rounded(key, value, kv, batch, scales)
            return
        if scales is None and on_gpu.served(kv.device):
            on_gpu.append_kv(key, value, kv, batch)
            return
    _check_readable(batch)
    if scales is None and attention.append(key, value, kv, batch):
        return
    if batch.write_rows is not None:
        key, value = key[batch.write_rows], value[batch.write_rows]
    if key.shape[0] == 0:
        return
    for part, rows in enumerate((key, value)):
        if scales is None:
            kv[:, part][batch.write_pages, batch.write_offsets] = rows
        else:
            places = batch.write_pages, batch.write_offsets
            fp8.write(rows, kv[:, part], scales[:, part], *places)


def copy_pages(pool: Tensor, sources: Tensor, destinations: Tensor) -> None:
    """Copy whole pages inside the pool, all reads before any write.

    pool: [pages, page_elements], contiguous. sources, destinations: int64 [copies]; a destination
    occurs once. Raises ValueError.
    """
    if pool.ndim != 2 or not pool.is_contiguous():
        raise ValueError("the pool must be a contiguous [pages, page_elements]")
    if sources.ndim != 1 or sources.shape != destinations.shape:
        raise ValueError("sources and destinations must both be [copies]")
    if gpu.serves(pool.device.type):
        from chatserve_kernels.gpu import pages as on_gpu

        if on_gpu.served(pool.device) and on_gpu.copies_pages(pool, sources):
            on_gpu.copy_pages(pool, sources, destinations)
            return
    if sources.shape[0]:
        pool.index_copy_(0, destinations, pool.index_select(0, sources))


def page_checksums(pool: Tensor, pages: Tensor, weights: Tensor) -> Tensor:
    """A number for each page's bytes: the weighted sum of its words, modulo 2^64.

    pool: [pages, page_elements], contiguous; a page is of whole words of 8 bytes. pages: int64 [n].
    weights: int64, one for each word. Returns int64 [n]. Raises ValueError.
    """
    if pool.ndim != 2 or not pool.is_contiguous():
        raise ValueError("the pool must be a contiguous [pages, page_elements]")
    if weights.shape != (pool.shape[1] * pool.element_size() // WORD_BYTES,):
        raise ValueError("as many weights as a page has words")
    if gpu.serves(pool.device.type) and len(pages):
        from chatserve_kernels.gpu import pages as on_gpu

        if on_gpu.served(pool.device):
            return on_gpu.page_checksums(pool, pages, weights)
    words = pool.view(torch.int64)
    step = max(1, CHECKSUM_BYTES_MAX // (WORD_BYTES * len(weights)))
    parts = [words.index_select(0, part).mul_(weights).sum(dim=1) for part in pages.split(step)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=pool.device)


def rms_norm(rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x²) + epsilon) * weight of each row, in float32, rounded once.

    rows: [any, columns]. weight: float32 [columns]; 1 above the model's own where a family has it
    like that. Returns [any, columns], contiguous, in the rows' dtype. Raises ValueError.
    """
    if rows.ndim != 2 or weight.shape != rows.shape[1:] or weight.dtype != torch.float32:
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}, rows {rows.shape}")
    if gpu.serves(rows.device.type):
        from chatserve_kernels.gpu import rows as on_gpu

        if on_gpu.serves_norm(rows):
            return on_gpu.rms_norm(rows, weight, epsilon)
    wide = rows.float()
    scale = (wide.square().mean(dim=1, keepdim=True) + epsilon).rsqrt_()
    return (wide * scale * weight).to(rows.dtype).contiguous()


def gated(gates: Tensor, ups: Tensor, *, gelu: bool) -> Tensor:
    """activation(gates) * ups, in float32, rounded once. gelu: by tanh; SiLU otherwise.

    gates, ups: [rows, columns] of one dtype. Returns the same, contiguous. Raises ValueError.
    """
    if gates.ndim != 2:
        raise ValueError(f"gates are {tuple(gates.shape)}, not [rows, columns]")
    if ups.shape != gates.shape or ups.dtype != gates.dtype:
        raise ValueError(
            f"ups are {ups.dtype} {tuple(ups.shape)}, not {gates.dtype} {tuple(gates.shape)}"
        )
    if gpu.serves(gates.device.type):
        from chatserve_kernels.gpu import rows as on_gpu

        if on_gpu.serves_gate(gates, gelu=gelu):
            return on_gpu.gated(gates, ups, gelu=gelu)
    wide = gates.float()
    active = F.gelu(wide, approximate="tanh") if gelu else F.silu(wide)
    return (active * ups).to(gates.dtype).contiguous()


def _check_attention(
    query: Tensor,
    kv: Tensor,
    batch: AttentionBatch,
    *,
    window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
    scales: Tensor | None,
) -> None:
    _check_kv(kv, batch, scales)
    if query.ndim != 3 or query.shape[0] != batch.rows or query.shape[2] != kv.shape[4]:
        raise ValueError(f"query is {tuple(query.shape)}, not [{batch.rows}, heads, head_dim]")
    if query.shape[1] % kv.shape[3]:
        raise ValueError(f"{query.shape[1]} heads are no multiple of {kv.shape[3]} kv heads")
    if query.dtype not in _taken(kv):
        raise ValueError(f"query is {query.dtype}, its pages are {kv.dtype}")
    if window is not None and window < 1:
        raise ValueError("a window holds at least one position")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError("a soft cap is positive")
    if sinks is not None and sinks.shape != (query.shape[1],):
        raise ValueError("sinks must be [heads]")


def check_append(
    key: Tensor, value: Tensor, kv: Tensor, batch: AttentionBatch, scales: Tensor | None
) -> None:
    """What `append_kv` takes, else ValueError."""
    _check_kv(kv, batch, scales)
    expected = (batch.rows, kv.shape[3], kv.shape[4])
    if key.shape != expected or value.shape != expected:
        raise ValueError(f"key {tuple(key.shape)}, value {tuple(value.shape)}, not {expected}")
    if key.dtype not in _taken(kv) or value.dtype != key.dtype:
        raise ValueError(f"key is {key.dtype}, value {value.dtype}, their pages {kv.dtype}")


def _taken(kv: Tensor) -> tuple[torch.dtype, ...]:
    """The types of queries, and of rows of K and V, beside these pages."""
    return fp8.WIDE_DTYPES if kv.dtype == fp8.FP8 else (kv.dtype,)


def _check_readable(batch: AttentionBatch) -> None:
    if not batch.readable:
        raise ValueError("only kernels of a GPU read a batch of fixed sizes")


def _check_kv(kv: Tensor, batch: AttentionBatch, scales: Tensor | None) -> None:
    """kv: [pages, 2, page_size, kv_heads, head_dim], one page's K and V contiguous, pages apart,
    and scales as `fp8.check_scales` has them, else ValueError."""
    if kv.ndim != 5 or kv.shape[1] != 2 or kv.shape[2] != batch.page_size:
        raise ValueError(
            f"kv is {tuple(kv.shape)}, not [pages, 2, {batch.page_size}, kv_heads, head_dim]"
        )
    _, _, page_size, kv_heads, head_dim = kv.shape
    inner = (page_size * kv_heads * head_dim, kv_heads * head_dim, head_dim, 1)
    if kv.stride()[1:] != inner:
        raise ValueError("K and V of one page must be contiguous")
    if len(kv) > 1 and kv.stride(0) < 2 * inner[0]:
        raise ValueError("each page has K and V of its own")
    fp8.check_scales(kv, scales)


def _attend_slice(
    query: Tensor,
    kv: Tensor,
    batch: AttentionBatch,
    sequence: int,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
    scales: Tensor | None,
) -> Tensor:
    """One slice: query [q, heads, head_dim] → the same shape."""
    queries, heads, head_dim = query.shape
    kv_heads, page_size = kv.shape[3], batch.page_size
    context = batch.context_lengths[sequence]
    oldest = 0 if window is None else max(0, context - queries - window + 1)
    pages = slice(oldest // page_size, -(-context // page_size))
    table = batch.page_tables[sequence, pages]
    positions = slice(oldest - pages.start * page_size, context - pages.start * page_size)
    # [pages, page_size, kv_heads, head_dim] → [kv_heads, 1, positions, head_dim]
    key, value = (
        _gathered(kv, scales, part, table, query.dtype)[positions].transpose(0, 1)[:, None]
        for part in (0, 1)
    )
    grouped = query.view(queries, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
    grouped_sinks = None if sinks is None else sinks.view(kv_heads, -1, 1, 1)
    key_positions = torch.arange(oldest, context, device=query.device)
    query_positions = torch.arange(context - queries, context, device=query.device)
    mask = _visible(query_positions[:, None], key_positions[None], window)
    mixed = _softmax_mix(
        grouped, key, value, mask, scale=scale, soft_cap=soft_cap, sinks=grouped_sinks
    )
    return mixed.permute(2, 0, 1, 3).reshape(queries, heads, head_dim)


def _attend_decode(
    query: Tensor,
    kv: Tensor,
    group: DecodeGroup,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
    scales: Tensor | None,
) -> Tensor:
    """Many sequences with one query each: query [n, heads, head_dim] → the same shape."""
    sequences, heads, head_dim = query.shape
    kv_heads, page_size = kv.shape[3], kv.shape[2]
    last = group.lengths[:, None] - 1
    key_positions = torch.arange(group.tables.shape[1] * page_size, device=query.device)[None]
    mask = _visible(last, key_positions, window)
    table = group.tables.flatten()
    # [n * pages, page_size, kv_heads, head_dim] → [n, kv_heads, positions, head_dim]
    key, value = (
        _gathered(kv, scales, part, table, query.dtype)
        .index_fill_(0, group.padding, 0)
        .unflatten(0, (sequences, -1))
        .transpose(1, 2)
        for part in (0, 1)
    )
    grouped = query.view(sequences, kv_heads, heads // kv_heads, head_dim)
    grouped_sinks = None if sinks is None else sinks.view(1, kv_heads, -1, 1)
    mixed = _softmax_mix(
        grouped, key, value, mask[:, None, None], scale=scale, soft_cap=soft_cap,
        sinks=grouped_sinks,
    )  # fmt: skip
    return mixed.reshape(sequences, heads, head_dim)


def _gathered(
    kv: Tensor, scales: Tensor | None, part: int, table: Tensor, dtype: torch.dtype
) -> Tensor:
    """K (part 0) or V of these pages: [pages * page_size, kv_heads, head_dim], of this type; of
    float32 in place of float16 where they are fp8, whose scales go beyond what that holds."""
    if scales is None:
        return kv[:, part].index_select(0, table).flatten(0, 1)
    elements = kv.view(torch.uint8)[:, part].index_select(0, table).flatten(0, 1)
    scale = scales[:, part].index_select(0, table).transpose(1, 2).flatten(0, 1)
    wide = torch.float32 if dtype == torch.float16 else dtype
    return fp8.widened(elements.view(fp8.FP8), scale, wide)


def _visible(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Which keys each query may see: bool, of the shape that the positions, integers of any two
    shapes that broadcast ([queries, 1] and [1, keys], say), have together."""
    mask = key_positions <= query_positions
    if window is not None:
        mask &= key_positions > query_positions - window
    return mask


def _softmax_mix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """query [b, h, q, d]; key, value [b, h or 1, t, d], finite; mask bool, broadcast to
    [b, h, q, t], at least one True per query; sinks broadcast to [b, h, q, 1]. The result is of the
    query's type. Explicit weights stay float32: beside a large sink all of them may be below what
    float16 holds.
    """
    dtype, query = query.dtype, query.to(key.dtype)
    fused = soft_cap is None and sinks is None
    # Elements per query: the mask alone, or every head's scores.
    heads = 1 if fused else query.shape[0] * query.shape[1]
    run = max(1, SCORE_ELEMENTS_MAX // (heads * key.shape[2]))
    mixed: list[Tensor] = []
    for first in range(0, query.shape[2], run):
        part = query[:, :, first : first + run]
        part_mask = mask if mask.shape[-2] == 1 else mask[..., first : first + run, :]
        if fused:
            shape = (*query.shape[:2], *key.shape[2:])
            mixed.append(
                F.scaled_dot_product_attention(
                    part, key.expand(shape), value.expand(shape), attn_mask=part_mask, scale=scale
                )
            )
            continue
        scores = torch.matmul(part.float(), key.float().transpose(-1, -2)) * scale
        if soft_cap is not None:
            scores = torch.tanh(scores / soft_cap) * soft_cap
        scores = scores.masked_fill(~part_mask, float("-inf"))
        if sinks is not None:
            part_sinks = sinks if sinks.shape[-2] == 1 else sinks[..., first : first + run, :]
            sink_scores = part_sinks.float().expand(*scores.shape[:-1], 1)
            scores = torch.cat((scores, sink_scores), dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : key.shape[2]]
        mixed.append(torch.matmul(weights, value.float()))
    return (mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=2)).to(dtype)
