"""Memory that is read from end to end again and again: in huge pages, where the system has them.

Theory: with pages of 4 KiB a processor that reads gigabytes spends a seventh of its time on finding
out where they are (docs/log.md). Linux gives pages of 2 MiB to who asks, for the parts of a range
that are whole ones, when they are first written.
"""

import ctypes
import math
import mmap
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

HUGE_BYTES = 2 << 20


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on a CPU, in huge pages where it is large enough and there are any."""
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE_BYTES or (advise := _madvise()) is None:
        return torch.empty(shape, dtype=dtype)
    memory = torch.empty(size + HUGE_BYTES, dtype=torch.uint8)
    before = -memory.data_ptr() % HUGE_BYTES
    # Advice: where it is not taken the memory is what it was.
    advise(memory.data_ptr() + before, size // HUGE_BYTES * HUGE_BYTES, mmap.MADV_HUGEPAGE)
    return memory[before : before + size].view(dtype).view(shape)


@cache
def _madvise() -> Any:
    """The C library's function; None where the system has no such pages."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
