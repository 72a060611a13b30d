"""Several arrays to a device in one copy, and tensors from there while the host goes on.

On a CPU there is nothing to copy. For a device of its own they are put side by side in page-locked
memory, from which one copy brings all of them while the host goes on: each copy costs some
microseconds, and from other memory the host would wait for it.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

ALIGNMENT = 16  # of each, in bytes: what a program of a GPU reads at once


def laid_out(sizes: Iterable[int]) -> list[int]:
    """Where pieces of these bytes begin, one after the other, and their end."""
    rounded = (-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
    return list(itertools.accumulate(rounded, initial=0))


def piece(buffer: Tensor, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A view of uint8 [any]: contiguous `shape` from a byte on."""
    count = int(np.prod(shape)) * dtype.itemsize
    return buffer[start : start + count].view(dtype).view(shape)


def staging(size: int, device: torch.device) -> Tensor:
    """uint8 [size] in the host's memory, for one copy to a device. Page-locked where that has
    memory of its own; torch uses it again when the copy has been done."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


def put(host: Array, start: int, array: Array) -> None:
    """An array's bytes into uint8 [any], from a byte on."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    host[start : start + len(data)] = data


def sent(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """Contiguous arrays as tensors of a device: on a CPU they are the same memory."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return sent_together(arrays, device)


class Fetched:
    """Tensors on their way to the host."""

    def __init__(self, tensors: Sequence[Tensor], there: torch.cuda.Event | None) -> None:
        """there: when they are; None where they were there from the beginning."""
        self._tensors = tuple(tensors)
        self._there = there

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors, in the host's memory. Raises what has happened to the device meanwhile."""
        if self._there is not None:
            self._there.synchronize()
            self._there = None
        return self._tensors


def fetched(tensors: Sequence[Tensor], device: torch.device) -> Fetched:
    """Copies of a device's tensors, to page-locked memory, when all that it was told before has
    been done; without tensors, that moment alone. On a CPU they are the same memory."""
    if device.type != "cuda":
        return Fetched(tensors, None)
    copies = [
        torch.empty(each.shape, dtype=each.dtype, pin_memory=True).copy_(each, non_blocking=True)
        for each in tensors
    ]
    there = torch.cuda.Event()
    there.record(torch.cuda.current_stream(device))
    return Fetched(copies, there)


def sent_together(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """The same by one copy, on any device."""
    starts = laid_out(array.nbytes for array in arrays)
    stage = staging(starts[-1], device)
    host = stage.numpy()
    for start, array in zip(starts, arrays, strict=False):
        put(host, start, array)
    there = stage.to(device, non_blocking=True)
    dtypes = (torch.from_numpy(np.empty(0, array.dtype)).dtype for array in arrays)
    return [
        piece(there, start, array.shape, dtype)
        for start, array, dtype in zip(starts, arrays, dtypes, strict=False)
    ]
