"""Attention and KV append compiled for a model's sizes, and called with tensors.

Theory: before attention is used it must give what plain arithmetic gives on a small trial; a
machine where it does not goes on with torch, and says so.
"""

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from chatserve_kernels.batch import AttentionBatch
from chatserve_kernels.cpu import native
from chatserve_kernels.cpu.sizes import Sizes
from chatserve_kernels.runs import Runs
from chatserve_kernels.trial import Trial, agrees

try:
    from chatserve_kernels.cpu import programs
except ImportError:  # LLVM's package is not for every machine
    programs: Any = None

SIZES_STEP = 8  # head_dim and page_size are multiples of it
TRIAL_QUERIES = 7

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """Attention for one model's sizes: of decode rows, and where `sizes.matrices` of slices."""

    sizes: Sizes
    attend: native.Function
    join: native.Function

    def run(
        self,
        query: Tensor,
        kv: Tensor,
        batch: AttentionBatch,
        result: Tensor,
        *,
        scale: float,
        window: int | None,
        soft_cap: float | None,
        sinks: Tensor | None,
    ) -> None:
        """Into the rows of `result`, contiguous, that are served; the rest as `paged_attention`
        has checked it. Raises ValueError for pages that are not there."""
        _check_pages(kv, batch)
        runs = batch.runs(window, slices=self.sizes.matrices)
        kv_heads, item = kv.shape[3], kv.element_size()
        arguments = native.copied(self.prepared(runs, kv_heads))
        given = None if sinks is None else sinks.float().contiguous()
        places = self.attend.places
        for name, value in (
            ("query", query.data_ptr()),
            ("query_row", query.stride(0) * item),
            ("query_head", query.stride(1) * item),
            ("result", result.data_ptr()),
            ("pages", kv.data_ptr()),
            ("page_bytes", kv.stride(0) * item),
            ("scale", native.bits(scale)),
            ("soft_cap", native.bits(soft_cap or 0.0)),
            ("sinks", 0 if given is None else given.data_ptr()),
        ):
            arguments[places[name]] = value
        self.attend.call(arguments, "attend_next", len(runs.sequences) * kv_heads)
        self.join.call(arguments, "join_next", len(runs.rows) * kv_heads)

    def prepared(self, runs: Runs, kv_heads: int) -> Any:
        """What all layers of a step with as many kv heads have in common; to be copied."""
        known = runs.prepared.get((self, kv_heads))
        if known is not None:
            return known[0]
        parts = int(runs.first_slots[-1]) * kv_heads
        elements = parts * self.sizes.group_records * self.sizes.record_elements
        records = torch.empty(elements, dtype=torch.float32)
        arguments = self.attend.arguments(
            {
                "attend_tasks": len(runs.sequences) * kv_heads,
                "join_tasks": len(runs.rows) * kv_heads,
                "kv_heads": kv_heads,
                "tables": runs.tables.ctypes.data,
                "table_entries": runs.tables.shape[1],
                "run_sequences": runs.sequences.ctypes.data,
                "run_starts": runs.starts.ctypes.data,
                "run_ends": runs.ends.ctypes.data,
                "run_matrices": runs.matrices.ctypes.data,
                "run_first_members": runs.first_members.ctypes.data,
                "members": runs.members.ctypes.data,
                "member_starts": runs.member_starts.ctypes.data,
                "member_ends": runs.member_ends.ctypes.data,
                "slots": runs.slots.ctypes.data,
                "rows": runs.rows.ctypes.data,
                "first_slots": runs.first_slots.ctypes.data,
                "records": records.data_ptr(),
            }
        )
        runs.prepared[self, kv_heads] = arguments, records
        return arguments


def attention_for(
    query: Tensor, kv: Tensor, *, soft_cap: float | None, sinks: Tensor | None
) -> Attention | None:
    """Compiled for these tensors, `ops.paged_attention`'s own; None where torch has to do it."""
    page_size, kv_heads, head_dim = kv.shape[2:]
    served = (
        query.device.type == "cpu"
        and kv.dtype in native.DTYPES
        and head_dim % SIZES_STEP == page_size % SIZES_STEP == 0
        and query.stride(2) == 1
        and native.wanted()
    )
    if not served:
        return None
    group = query.shape[1] // kv_heads
    bfloat16 = kv.dtype == torch.bfloat16
    options = soft_cap is not None, sinks is not None
    machine = native.wide_registers(), native.has_pair_dots()
    return _attention(head_dim, group, page_size, bfloat16, *options, *machine)


def append(key: Tensor, value: Tensor, kv: Tensor, batch: AttentionBatch) -> bool:
    """`ops.append_kv`, its arguments checked; whether it could be done here. Raises ValueError for
    places that are not there."""
    function = append_for(key, value, kv)
    if function is None:
        return False
    _check_pages(kv, batch)
    arguments, tasks = _append_arguments(function, key, value, kv, batch)
    function.call(arguments, "append_next", tasks)
    return True


def append_for(key: Tensor, value: Tensor, kv: Tensor) -> native.Function | None:
    """Compiled for these tensors; None where torch has to do it."""
    page_size, head_dim = kv.shape[2], kv.shape[4]
    if (
        key.device.type != "cpu"
        or key.stride(2) != 1
        or value.stride(2) != 1
        or not native.wanted()
    ):
        return None
    return _append(head_dim * kv.element_size(), page_size)


def _append_arguments(
    function: native.Function, key: Tensor, value: Tensor, kv: Tensor, batch: AttentionBatch
) -> tuple[Any, int]:
    """And how many tasks these are."""
    rows, pages, offsets = batch.write_arrays
    tasks, item = -(-len(rows) // programs.COPIES_A_TASK), kv.element_size()
    arguments = function.arguments(
        {
            "append_tasks": tasks,
            "writes": len(rows),
            "rows": rows.ctypes.data,
            "write_pages": pages.ctypes.data,
            "write_offsets": offsets.ctypes.data,
            "kv_heads": kv.shape[3],
            "key": key.data_ptr(),
            "key_row": key.stride(0) * item,
            "key_head": key.stride(1) * item,
            "value": value.data_ptr(),
            "value_row": value.stride(0) * item,
            "value_head": value.stride(1) * item,
            "pages": kv.data_ptr(),
            "page_bytes": kv.stride(0) * item,
        }
    )
    return arguments, tasks


class AttentionInChain:
    """Append and attention of one batch in a chain, prepared for layers whose tensors have these
    shapes and strides. Raises ValueError for pages that are not there."""

    def __init__(
        self,
        attention: Attention,
        append: native.Function,
        batch: AttentionBatch,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv: Tensor,
        *,
        window: int | None,
        soft_cap: float | None,
    ) -> None:
        _check_pages(kv, batch)
        runs = batch.runs(window, slices=attention.sizes.matrices)
        kv_heads, item = kv.shape[3], kv.element_size()
        self._attention, self._append, self._kept = attention, append, (batch, runs)
        self._append_arguments, self._append_tasks = _append_arguments(
            append, key, value, kv, batch
        )
        self._arguments = native.copied(attention.prepared(runs, kv_heads))
        places = attention.attend.places
        for name, number in (
            ("query_row", query.stride(0) * item),
            ("query_head", query.stride(1) * item),
            ("page_bytes", kv.stride(0) * item),
            ("soft_cap", native.bits(soft_cap or 0.0)),
        ):
            self._arguments[places[name]] = number
        self._attends, self._joins = len(runs.sequences) * kv_heads, len(runs.rows) * kv_heads
        names = ("query", "result", "pages", "scale")
        self._attend_places = tuple(places[name] for name in names)
        names = ("key", "value", "pages")
        self._append_places = tuple(append.places[name] for name in names)

    def add(
        self,
        chain: native.Chain,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv: Tensor,
        result: Tensor,
        *,
        scale: float,
    ) -> None:
        """One layer's. Raises ValueError for a result that is not contiguous, of the query's shape
        and type."""
        if result.shape != query.shape or result.dtype != query.dtype or not result.is_contiguous():
            raise ValueError("the result must be contiguous and as the query is")
        pages = kv.data_ptr()
        arguments = native.copied(self._append_arguments)
        key_place, value_place, pages_place = self._append_places
        arguments[key_place], arguments[value_place] = key.data_ptr(), value.data_ptr()
        arguments[pages_place] = pages
        chain.add(self._append, arguments, "append_next", self._append_tasks, key, value, self)
        arguments = native.copied(self._arguments)
        query_place, result_place, pages_place, scale_place = self._attend_places
        arguments[query_place], arguments[result_place] = query.data_ptr(), result.data_ptr()
        arguments[pages_place], arguments[scale_place] = pages, native.bits(scale)
        attention = self._attention
        chain.add(attention.attend, arguments, "attend_next", self._attends, query, result, kv)
        chain.add(attention.join, arguments, "join_next", self._joins)


def _check_pages(kv: Tensor, batch: AttentionBatch) -> None:
    if batch.pages_named > kv.shape[0]:
        raise ValueError(f"a page of the batch is not among the {kv.shape[0]} there are")


@cache
def _attention(
    head_dim: int,
    group: int,
    page_size: int,
    bfloat16: bool,
    soft_cap: bool,
    sinks: bool,
    wide: bool,
    pair_dots: bool,
) -> Attention | None:
    if programs is None:
        return None
    sizes = Sizes(head_dim, group, page_size, bfloat16, soft_cap, sinks, wide, pair_dots)
    addresses = native.compiled(programs.attention_text(sizes), ("attend", "join"))
    if addresses is None:
        return None
    attention = Attention(
        sizes, *(native.Function(each, programs.ATTEND_FIELDS) for each in addresses)
    )
    trial = Trial(
        head_dim=head_dim,
        group=group,
        page_size=page_size,
        dtype=torch.bfloat16 if bfloat16 else torch.float32,
        soft_cap=soft_cap,
        sinks=sinks,
        queries=TRIAL_QUERIES if sizes.matrices else 0,
        device=torch.device("cpu"),
    )
    if not agrees(attention.run, trial):
        _log.warning("attention as machine code is wrong on this machine; torch does it")
        return None
    return attention


@cache
def _append(row_bytes: int, page_size: int) -> native.Function | None:
    if programs is None:
        return None
    addresses = native.compiled(programs.append_text(row_bytes, page_size), ("append",))
    return None if addresses is None else native.Function(addresses[0], programs.APPEND_FIELDS)
