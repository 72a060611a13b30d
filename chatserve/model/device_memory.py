"""How much of a device's memory is taken, and by what; and which device is a thread's.

May not know: pages, steps. Torch keeps what it took from the device and hands it out again: what is
*reserved* is taken from the device, whether or not a tensor lies in it.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor


class DeviceMemory(Protocol):
    """In bytes. One thread at a time."""

    def total(self) -> int:
        """Of the device."""
        ...

    def free(self) -> int:
        """What nobody has taken, in this process or another."""
        ...

    def reserved(self) -> int:
        """What torch has taken in this process."""
        ...

    def begin_peak(self) -> None:
        """`peak` counts from here on."""
        ...

    def peak(self) -> int:
        """The most that torch had reserved at a time."""
        ...

    def let_go(self) -> None:
        """Give back what torch keeps and no tensor lies in."""
        ...


class CudaMemory:
    """Of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def total(self) -> int:
        """As in DeviceMemory; likewise below."""
        return int(torch.cuda.mem_get_info(self._device)[1])

    def free(self) -> int:
        return int(torch.cuda.mem_get_info(self._device)[0])

    def reserved(self) -> int:
        return int(torch.cuda.memory_reserved(self._device))

    def begin_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return int(torch.cuda.max_memory_reserved(self._device))

    def let_go(self) -> None:
        # What a kernel still uses cannot be given back.
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


def device_memory(device: torch.device) -> DeviceMemory | None:
    """None for a device whose memory is the process's own."""
    return CudaMemory(device) if device.type == "cuda" else None


def as_current(device: torch.device) -> AbstractContextManager[None]:
    """Make a device its thread's own, as long as it is open: Triton launches on that, wherever the
    tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def lock_pages(memory: Tensor) -> None:
    """Page-lock a CPU tensor's memory where it lies, for copies that nobody waits for. Torch's own
    page-locked memory is rounded up to a power of two. Raises RuntimeError where it cannot be."""
    runtime: Any = torch.cuda.cudart()
    torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))


def unlock_pages(memory: Tensor) -> None:
    """Before memory of `lock_pages` goes back to the system. Raises RuntimeError."""
    runtime: Any = torch.cuda.cudart()
    torch.cuda.check_error(runtime.cudaHostUnregister(memory.data_ptr()))
