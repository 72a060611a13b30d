"""The programs compiled, and called with tensors.

Theory: LLVM compiles a program for this very processor in a quarter of a second, once for each
model's sizes; the machine code lives as long as the process. Before attention is used it must give
what plain arithmetic gives on a small trial; a machine where it does not goes on with torch, and
says so. Threads: a program is handed to GNU OpenMP's `GOMP_parallel`, in the very library that
torch has loaded, so that torch's threads run it and no others wake. Where there is no such library
the programs serve one thread only.
"""

import ctypes
import logging
import struct
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chatserve_kernels.batch import AttentionBatch
from chatserve_kernels.cpu.sizes import Sizes
from chatserve_kernels.cpu.trial import agrees
from chatserve_kernels.runs import Runs

try:
    from llvmlite import binding as llvm

    from chatserve_kernels.cpu import chain, programs
except ImportError:  # LLVM's package is not for every machine
    llvm: Any = None
    chain: Any = None
    programs: Any = None

WORD = 8  # bytes of a field
SIZES_STEP = 8  # head_dim and page_size are multiples of it
DTYPES = (torch.float32, torch.bfloat16)

_log = logging.getLogger(__name__)
_compiling = threading.Lock()
_engines: list[Any] = []  # machine code is theirs
_left_to_torch = threading.Event()


@contextmanager
def left_to_torch() -> Generator[None]:
    """Inside, no thread uses these programs: for comparisons."""
    _left_to_torch.set()
    try:
        yield
    finally:
        _left_to_torch.clear()


class Function:
    """One compiled function of an array of int64. places: of its fields."""

    def __init__(self, address: int, fields: Sequence[str]) -> None:
        self.places: Mapping[str, int] = {name: place for place, name in enumerate(fields)}
        self.address = address
        self._alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)

    def arguments(self, values: Mapping[str, int]) -> Any:
        """An array with these fields; the others are 0."""
        array = (ctypes.c_int64 * len(self.places))()
        for name, value in values.items():
            array[self.places[name]] = value
        return array

    def call(self, arguments: Any, counter: str, tasks: int) -> None:
        """Run it on as many threads as torch uses, or as there are tasks. counter: the field that
        threads take their tasks from."""
        arguments[self.places[counter]] = 0
        self.run(ctypes.addressof(arguments), tasks)

    def run(self, place: int, tasks: int) -> None:
        """The same with fields at an address, their counter 0."""
        if tasks > 1 and (threads := min(torch.get_num_threads(), tasks)) > 1:
            parallel = _parallel()
            if parallel is not None:
                parallel(self.address, place, threads, 0)
                return
        self._alone(place)


class Chain:
    """Programs to be run one after the other on the same threads (`chain.py`). What is added must
    not be changed until they have run; the chain holds on to it."""

    def __init__(self, function: Function) -> None:
        self._function = function
        self._programs: list[int] = []
        self._kept: list[Any] = []

    def add(self, function: Function, arguments: Any, counter: str, tasks: int, *kept: Any) -> None:
        """counter: as for `Function.call`, its field 0, as the one of tasks that are done; an array
        goes into a chain once for each function. kept: tensors whose addresses are in it."""
        place = ctypes.addressof(arguments)
        done = place + WORD * function.places[counter.replace("next", "done")]
        self._programs += (function.address, place, done, tasks)
        self._kept.append((arguments, kept))

    def recorded(self) -> "Recording":
        """What is in it, taken out, for any number of runs."""
        recording = Recording(self._programs, self._kept)
        self._programs, self._kept = [], []
        return recording

    def repeat(self, recording: "Recording") -> None:
        """Add it, once in each run."""
        self._programs += recording.afresh()
        self._kept.append(recording)

    def run(self) -> None:
        """All of them; then the chain is empty."""
        if not self._programs:
            return
        programs = (ctypes.c_int64 * len(self._programs))(*self._programs)
        arguments = self._function.arguments(
            {
                "programs": ctypes.addressof(programs),
                "count": len(programs) // chain.PROGRAM_COLUMNS,
                "yield": _sched_yield(),
            }
        )
        self._function.run(ctypes.addressof(arguments), torch.get_num_threads())
        self._programs.clear()
        self._kept.clear()


class Recording:
    """Programs of a chain whose fields lie together, to be made afresh in one go."""

    def __init__(self, programs: Sequence[int], kept: Sequence[Any]) -> None:
        arrays = {ctypes.addressof(arguments): arguments for arguments, _ in kept}
        self._before = b"".join(map(bytes, arrays.values()))
        self._fields: Any = ctypes.create_string_buffer(self._before, len(self._before))
        self._kept = [others for _, others in kept]
        place, moved = ctypes.addressof(self._fields), dict[int, int]()
        for address, arguments in arrays.items():
            moved[address] = place
            place += ctypes.sizeof(arguments)
        self._programs: list[int] = []
        for first in range(0, len(programs), chain.PROGRAM_COLUMNS):
            function, fields, done, tasks = programs[first : first + chain.PROGRAM_COLUMNS]
            there = moved[fields]
            self._programs += (function, there, there + done - fields, tasks)

    def afresh(self) -> Sequence[int]:
        """The programs, their fields as they were when they were recorded."""
        ctypes.memmove(self._fields, self._before, len(self._before))
        return self._programs


def new_chain() -> Chain | None:
    """None where there is no machine code."""
    function = _chain() if _wanted() else None
    return None if function is None else Chain(function)


def copied(arguments: Any) -> Any:
    """An array with the same fields: for a call of its own."""
    return type(arguments).from_buffer_copy(arguments)


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """Attention for one model's sizes: of decode rows, and where `sizes.matrices` of slices."""

    sizes: Sizes
    attend: Function
    join: Function

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
        arguments = copied(self.prepared(runs, kv_heads))
        given = None if sinks is None else sinks.float().contiguous()
        places = self.attend.places
        for name, value in (
            ("query", query.data_ptr()),
            ("query_row", query.stride(0) * item),
            ("query_head", query.stride(1) * item),
            ("result", result.data_ptr()),
            ("pages", kv.data_ptr()),
            ("page_bytes", kv.stride(0) * item),
            ("scale", bits(scale)),
            ("soft_cap", bits(soft_cap or 0.0)),
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
        and kv.dtype in DTYPES
        and head_dim % SIZES_STEP == page_size % SIZES_STEP == 0
        and query.stride(2) == 1
        and _wanted()
    )
    if not served:
        return None
    group = query.shape[1] // kv_heads
    bfloat16 = kv.dtype == torch.bfloat16
    options = soft_cap is not None, sinks is not None
    return _attention(head_dim, group, page_size, bfloat16, *options, has_pair_dots())


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


def append_for(key: Tensor, value: Tensor, kv: Tensor) -> Function | None:
    """Compiled for these tensors; None where torch has to do it."""
    page_size, head_dim = kv.shape[2], kv.shape[4]
    if key.device.type != "cpu" or key.stride(2) != 1 or value.stride(2) != 1 or not _wanted():
        return None
    return _append(head_dim * kv.element_size(), page_size)


def _append_arguments(
    function: Function, key: Tensor, value: Tensor, kv: Tensor, batch: AttentionBatch
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
        append: Function,
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
        self._arguments = copied(attention.prepared(runs, kv_heads))
        places = attention.attend.places
        for name, number in (
            ("query_row", query.stride(0) * item),
            ("query_head", query.stride(1) * item),
            ("page_bytes", kv.stride(0) * item),
            ("soft_cap", bits(soft_cap or 0.0)),
        ):
            self._arguments[places[name]] = number
        self._attends, self._joins = len(runs.sequences) * kv_heads, len(runs.rows) * kv_heads
        names = ("query", "result", "pages", "scale")
        self._attend_places = tuple(places[name] for name in names)
        names = ("key", "value", "pages")
        self._append_places = tuple(append.places[name] for name in names)

    def add(
        self,
        chain: Chain,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv: Tensor,
        result: Tensor,
        *,
        scale: float,
    ) -> None:
        """One layer's. result: contiguous, of the query's shape."""
        pages = kv.data_ptr()
        arguments = copied(self._append_arguments)
        key_place, value_place, pages_place = self._append_places
        arguments[key_place], arguments[value_place] = key.data_ptr(), value.data_ptr()
        arguments[pages_place] = pages
        chain.add(self._append, arguments, "append_next", self._append_tasks, key, value, self)
        arguments = copied(self._arguments)
        query_place, result_place, pages_place, scale_place = self._attend_places
        arguments[query_place], arguments[result_place] = query.data_ptr(), result.data_ptr()
        arguments[pages_place], arguments[scale_place] = pages, bits(scale)
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
    pair_dots: bool,
) -> Attention | None:
    if programs is None:
        return None
    sizes = Sizes(head_dim, group, page_size, bfloat16, soft_cap, sinks, pair_dots)
    addresses = _compiled(programs.attention_text(sizes), ("attend", "join"))
    if addresses is None:
        return None
    attention = Attention(sizes, *(Function(each, programs.ATTEND_FIELDS) for each in addresses))
    if not agrees(attention.run, sizes):
        _log.warning("attention as machine code is wrong on this machine; torch does it")
        return None
    return attention


@cache
def _append(row_bytes: int, page_size: int) -> Function | None:
    if programs is None:
        return None
    addresses = _compiled(programs.append_text(row_bytes, page_size), ("append",))
    return None if addresses is None else Function(addresses[0], programs.APPEND_FIELDS)


@cache
def _chain() -> Function | None:
    if chain is None or _sched_yield() == 0:
        return None
    addresses = _compiled(chain.chain_text(), ("chain",))
    return None if addresses is None else Function(addresses[0], chain.FIELDS)


@cache
def _sched_yield() -> int:
    """The address of the C library's function; 0 where it has none."""
    try:
        function = ctypes.CDLL(None).sched_yield
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def functions_of(
    text: str, fields: Sequence[str], names: tuple[str, ...]
) -> tuple[Function, ...] | None:
    """A module's functions; None where LLVM fails, or is absent, or torch's threads are not to be
    had. fields: of all of them, in order."""
    if llvm is None or not _wanted():
        return None
    addresses = _compiled(text, names)
    return None if addresses is None else tuple(Function(each, fields) for each in addresses)


def wide_registers() -> bool:
    """Whether there are 32 registers of 512 bits."""
    return llvm is not None and bool(llvm.get_host_cpu_features().get("avx512bw"))


def _compiled(text: str, names: tuple[str, ...]) -> tuple[int, ...] | None:
    """The addresses of a module's functions; None, with a warning, where LLVM fails."""
    with _compiling:
        try:
            llvm.initialize_native_target()
            llvm.initialize_native_asmprinter()
            module = llvm.parse_assembly(text)
            module.verify()
            # No passes: the programs are written as they should run, and nothing got faster.
            machine = llvm.Target.from_default_triple().create_target_machine(
                cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
            )
            engine = llvm.create_mcjit_compiler(module, machine)
            engine.finalize_object()
        except (RuntimeError, OSError) as error:
            _log.warning("a program is left to torch: LLVM says %s", error)
            return None
        _engines.append(engine)
        return tuple(engine.get_function_address(name) for name in names)


@cache
def has_pair_dots() -> bool:
    """Whether the processor multiplies pairs of bfloat16."""
    return llvm is not None and bool(llvm.get_host_cpu_features().get("avx512bf16"))


@cache
def has_tiles() -> bool:
    """Whether it multiplies matrices of bfloat16 by itself (AMX)."""
    return llvm is not None and bool(llvm.get_host_cpu_features().get("amx-bf16"))


def _wanted() -> bool:
    """Whether the programs may run, and on all of torch's threads."""
    if _left_to_torch.is_set():
        return False
    return torch.get_num_threads() == 1 or _parallel() is not None


@cache
def _parallel() -> Any:
    """GOMP_parallel(function, data, threads, flags) of the library that torch's threads belong to;
    None where it is not to be found."""
    beside = sorted(Path(torch.__file__).with_name("lib").glob("libgomp*.so*"))
    for name in (*map(str, beside), "libgomp.so.1"):
        try:
            function = ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        function.restype = None
        return function
    return None


def bits(number: float) -> int:
    """Of a float32, as an integer."""
    return int.from_bytes(struct.pack("<f", number), "little")
