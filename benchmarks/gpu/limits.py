"""What the device can do at the most: measured, since datasheets promise other numbers."""

from collections.abc import Iterable, Sequence
from functools import partial

import torch

from benchmarks.gpu.bench import Bench, Row, Step

# Of a copy on the device, of one to or from the host, and the sides of the matrices.
COPY_BYTES, COPY_BYTES_QUICK = 2 << 30, 8 << 20
PINNED_BYTES, PINNED_BYTES_QUICK = 1 << 30, 4 << 20
SIDE, SIDE_QUICK = 8192, 256


def steps(quick: bool) -> Sequence[Step]:
    """The limits, the first of all parts."""
    del quick
    return (
        Step("copy bandwidth", _copy),
        Step("matrix rate", _matrix),
        Step("pinned copies", _pinned),
    )


def random_bytes(count: int, device: torch.device | str) -> torch.Tensor:
    """int32 [count / 4]: zeros may move faster than anything a model has."""
    return torch.randint(-(1 << 31), (1 << 31) - 1, (count // 4,), dtype=torch.int32, device=device)


def _copy(bench: Bench) -> Iterable[Row]:
    count = COPY_BYTES_QUICK if bench.quick else COPY_BYTES
    source = random_bytes(count, bench.device)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / bench.time(lambda: target.copy_(source)).device
    bench.limits["copy"] = rate
    yield bench.rate_row("device copy, read and written", rate, "copy")


def _matrix(bench: Bench) -> Iterable[Row]:
    side = SIDE_QUICK if bench.quick else SIDE
    a, b = torch.randn((2, side, side), device=bench.device).to(torch.bfloat16)
    rate = 2 * side**3 / bench.time(lambda: torch.matmul(a, b)).device
    bench.limits["matrix"] = rate
    yield bench.rate_row(f"product of bf16 matrices of {side} x {side}", rate, "matrix")


def _pinned(bench: Bench) -> Iterable[Row]:
    count = PINNED_BYTES_QUICK if bench.quick else PINNED_BYTES
    host = random_bytes(count, "cpu")
    if bench.on_gpu:
        host = host.pin_memory()
    there = random_bytes(count, bench.device)
    for name, target, source in (("up", there, host), ("down", host, there)):
        timing = bench.time(partial(target.copy_, source, non_blocking=True))
        bench.limits[name] = host.nbytes / timing.device
        words = "host to device" if name == "up" else "device to host"
        yield bench.rate_row(f"page-locked memory, {words}", bench.limits[name], name)
