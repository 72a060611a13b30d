"""What a step of the measurement works with: the device, a stopwatch, the limits found so far."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Written between two runs: several times what any cache of a device holds, and long enough that
# the host has the next run's launches queued before it begins.
FLUSH_BYTES = 512 << 20
RUNS_MIN, RUNS_MAX = 7, 60
RUNS_SECONDS = 0.25

GIGA, TERA = 1e9, 1e12


class NotMeasured(Exception):
    """What a step cannot measure here, and why; no failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure. value None: not measured, and note says why. share: of what `beside` names.
    failed: a wrong result, or an error."""

    name: str
    value: float | None = None
    unit: str = ""
    share: float | None = None
    beside: str = ""
    note: str = ""
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Timing:
    """Medians, in seconds. device: from the first kernel's start to the last one's end; host: until
    all was launched."""

    device: float
    host: float

    @property
    def words(self) -> str:
        """How long the host took, where a report has room for a remark."""
        return f"host {1e6 * self.host:.0f} us"


@dataclass(slots=True)
class Bench:
    """quick: tiny shapes, to see that everything runs. limits: by name, bytes or operations a
    second, as the part `limits` found them."""

    device: torch.device
    quick: bool
    limits: dict[str, float] = field(default_factory=dict[str, float])
    _flush: Tensor | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether there are a device's clock and page-locked memory."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait until the device has done everything."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Wait as `synchronize` does, and give back what nobody holds."""
        gc.collect()
        self.synchronize()
        if self.on_gpu:
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def time(self, work: Callable[[], object]) -> Timing:
        """Of one run of `work`, with nothing of it left in the device's caches."""
        work()
        self.synchronize()
        began = time.perf_counter()
        work()
        self.synchronize()
        once = time.perf_counter() - began
        runs = 2 if self.quick else int(RUNS_SECONDS / max(once, 1e-6))
        runs = min(RUNS_MAX, runs) if self.quick else max(RUNS_MIN, min(RUNS_MAX, runs))
        return self._on_device(work, runs) if self.on_gpu else _on_host(work, runs)

    @torch.inference_mode()
    def host_time(self, work: Callable[[], object]) -> float:
        """Median seconds until the host has launched it, with nothing queued before it."""
        work()
        taken: list[float] = []
        for _ in range(2 if self.quick else 20):
            self.synchronize()
            began = time.perf_counter()
            work()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    def _on_device(self, work: Callable[[], object], runs: int) -> Timing:
        if self._flush is None:
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        hosts: list[float] = []
        for _ in range(runs):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            began = time.perf_counter()
            work()
            hosts.append(time.perf_counter() - began)
            end.record()
            events.append((start, end))
        self.synchronize()
        device = [start.elapsed_time(end) / 1e3 for start, end in events]
        return Timing(statistics.median(device), statistics.median(hosts))

    def bytes_row(self, name: str, timing: Timing, moved: float, note: str = "") -> Row:
        """Bytes a second beside the measured copy bandwidth."""
        return self.rate_row(name, moved / timing.device, "copy", note=joined(note, timing.words))

    def rate_row(self, name: str, rate: float, limit: str, *, note: str = "") -> Row:
        """limit: its name; 'matrix' is of operations, the others of bytes."""
        matrix = limit == "matrix"
        known = self.limits.get(limit)
        return Row(
            name=name,
            value=rate / (TERA if matrix else GIGA),
            unit="TFLOP/s" if matrix else "GB/s",
            share=None if known is None else rate / known,
            beside=limit,
            note=note,
        )

    def room(self) -> int:
        """Bytes of the device that are free."""
        if self.on_gpu:
            return int(torch.cuda.mem_get_info(self.device)[0])
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Step:
    """Some figures that are measured together. seconds: what it may take, with compiling."""

    name: str
    run: Callable[[Bench], Iterable[Row]]
    seconds: float = 45.0


@dataclass(frozen=True, slots=True)
class Part:
    """Steps in a share of the time. workers: processes at once, where nothing is timed. listed:
    whether the table has all rows, or only how many there were and those that failed."""

    name: str
    seconds: float
    steps: Callable[[bool], Sequence[Step]]
    workers: int = 1
    listed: bool = True


def joined(*words: str) -> str:
    """Those that say anything."""
    return "; ".join(word for word in words if word)


def _on_host(work: Callable[[], object], runs: int) -> Timing:
    taken: list[float] = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    middle = statistics.median(taken)
    return Timing(middle, middle)
