"""Programs compiled, and run on torch's threads, one at a time or in chains.

Theory: LLVM compiles a program for this very processor in a quarter of a second at most, once for
each model's sizes; the machine code lives as long as the process. A program is handed to GNU
OpenMP's `GOMP_parallel`, in the very library that torch has loaded, so that torch's threads run it
and no others wake. Where there is no such library the programs serve one thread only.
"""

import ctypes
import logging
import struct
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

try:
    from llvmlite import binding as llvm

    from chatserve_kernels.cpu import chain
except ImportError:  # LLVM's package is not for every machine
    llvm: Any = None
    chain: Any = None

WORD = 8  # bytes of a field
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

    def __init__(self, function: Function, runs: Callable[[], None] | None = None) -> None:
        self._function, self._runs = function, runs
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
        if self._runs is not None:
            self._runs()
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


def new_chain(runs: Callable[[], None] | None = None) -> Chain | None:
    """None where there is no machine code. runs: called before the programs are run."""
    function = _chain() if wanted() else None
    return None if function is None else Chain(function, runs)


def copied(arguments: Any) -> Any:
    """An array with the same fields: for a call of its own."""
    return type(arguments).from_buffer_copy(arguments)


@cache
def _chain() -> Function | None:
    if chain is None or _sched_yield() == 0:
        return None
    addresses = compiled(chain.chain_text(), ("chain",))
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
    """A module's functions; None where LLVM fails, or is absent. fields: of all, in order."""
    addresses = None if llvm is None else compiled(text, names)
    return None if addresses is None else tuple(Function(each, fields) for each in addresses)


@cache
def wide_registers() -> bool:
    """Whether there are 32 registers of 512 bits."""
    return llvm is not None and bool(llvm.get_host_cpu_features().get("avx512bw"))


def compiled(text: str, names: tuple[str, ...]) -> tuple[int, ...] | None:
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


def wanted() -> bool:
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
