"""The paged operations as Triton kernels, for tensors on a GPU.

Theory: `tiles.py` says, once for each step, what every program of an attention kernel does: a
*tile* is a stretch of one sequence's positions with the rows that read it together, which is one
shape for slices, decode rows, prefixes that rows share and long contexts cut in pieces. A row whose
positions lie in several tiles has several *parts*, each with the logarithm of its weights' sum, and
these are joined exactly. `programs.py` and `copies.py` hold the bare kernels, `attention.py` and
`pages.py` what hands them their tensors; likewise `row_programs.py` and `rows.py` for norms and
gates, `weighing.py`, `choosing.py` and `sampling.py` for the choice of tokens.

Nothing here is imported before a tensor wants it, since Triton takes its time and is not
everywhere. Where it is absent torch's way serves a GPU too.
"""

import logging
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

_log = logging.getLogger(__name__)

# Triton's own switch, which it reads when a kernel is defined: its interpreter serves tensors that
# lie in memory. It is slow, and there for tests.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@cache
def serves(device_type: str) -> bool:
    """Whether the kernels take tensors of such a device."""
    return (_INTERPRETED or device_type == "cuda") and find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return _INTERPRETED


def launched(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """A kernel for so many programs. Triton's own annotations are those of the kernel's function,
    which has no place for what a launch is told besides, such as its warps."""
    return kernel[grid]


def passes(what: str, device: torch.device, agrees: Callable[[], bool]) -> bool:
    """Whether a trial of kernels on a device, for which they are compiled, gives what it should;
    the log tells where it does not, and torch goes on. what: the operations, in the plural."""
    try:
        right = agrees()
    except Exception as error:  # a compiler, a driver: torch needs none of them
        _log.warning("%s are left to torch on %s: %s", what, device, error)
        return False
    if not right:
        _log.warning("Triton's %s are wrong on %s; torch does them", what, device)
    return right
