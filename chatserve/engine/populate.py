"""Populate: the beginning of a pool's memory is there before a step has to wait for it.

Memory that nobody has touched is brought in by the kernel page by page, in the middle of whatever
touches it first: five to six times the time of a copy there (docs/log.md). Pools are used from
their first page on, so their beginning is populated by a thread while the rest of the server
starts. `MADV_POPULATE_WRITE` (Linux 5.14) makes memory present and writable and changes no byte of
it, so it needs no agreement with those who use the pages; where there is none, nothing is done.
"""

import ctypes
import logging
import mmap
import os
import threading

import numpy as np
import numpy.typing as npt

POPULATE_BYTES = 128 << 20  # of a pool: a tenth of a second, and some long chats
PIECE_BYTES = 4 << 20  # the memory map is locked for a piece: a few milliseconds
_MADV_POPULATE_WRITE = 23  # of <linux/mman.h>; the mmap module does not name it

_log = logging.getLogger(__name__)


def populate(memory: npt.NDArray[np.uint8]) -> threading.Thread:
    """Begin to populate the first bytes of a contiguous array, which lives until that is done. The
    thread that does it, for who wants to wait."""
    thread = threading.Thread(
        target=_populate, args=(memory,), name="chatserve-populate", daemon=True
    )
    thread.start()
    return thread


def _populate(memory: npt.NDArray[np.uint8]) -> None:
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    begin = memory.ctypes.data
    end = begin + min(memory.nbytes, POPULATE_BYTES)
    # Whole pages of the kernel's alone: what shares one with others is theirs as well.
    first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    for piece in range(first, last, PIECE_BYTES):
        if madvise(piece, min(PIECE_BYTES, last - piece), _MADV_POPULATE_WRITE):
            _log.debug("memory is not populated: %s", os.strerror(ctypes.get_errno()))
            return
