"""Populate: the memory of pages is there before a step or a read has to wait for it.

Memory that nobody has touched is brought in by the kernel page by page, in the middle of whatever
touches it first: five to six times the time of a copy there, more where a virtual machine's host
has to find it as well (docs/log.md). Pools are used from their first page on, so a thread stays
some way ahead of the highest page in use, and what a server never uses is never resident.
`MADV_POPULATE_WRITE` (Linux 5.14) makes memory present and writable and changes no byte of it, so
it needs no agreement with those who use the pages; `MADV_HUGEPAGE` makes that cheaper. Where the
kernel has neither, nothing is done.
"""

import ctypes
import logging
import mmap
import os
import threading

import numpy as np
import numpy.typing as npt

AHEAD_TOKENS = 16_384  # some long chats
AHEAD_BYTES_MIN, AHEAD_BYTES_MAX = 32 << 20, 2 << 30
PIECE_BYTES = 4 << 20  # the memory map is locked for a piece: a few milliseconds
_MADV_POPULATE_WRITE = 23  # of <linux/mman.h>; the mmap module does not name it
_MADV_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", 14)

_log = logging.getLogger(__name__)


class PopulatedAhead:
    """Stays ahead in a contiguous array of pages, uint8 [pages, page_bytes], of page_size tokens
    each; from its construction on. For any thread."""

    def __init__(self, pages: npt.NDArray[np.uint8], *, page_size: int) -> None:
        self._pages = pages
        page_bytes = pages.shape[1]
        ahead = AHEAD_TOKENS // page_size * page_bytes
        ahead = min(max(ahead, AHEAD_BYTES_MIN), AHEAD_BYTES_MAX)
        self._ahead = max(2, ahead // page_bytes)
        self._lock = threading.Lock()
        self._begun = 0  # pages; those before are populated or being so
        self.thread: threading.Thread | None = None  # the latest one
        first, last = _whole_pages(pages)
        _advise(first, last - first, _MADV_HUGEPAGE)
        self.use(0)

    def use(self, page: int) -> None:
        """Somebody is about to touch this page."""
        if page + self._ahead // 2 < self._begun or self._begun == len(self._pages):
            return
        with self._lock:
            first, last = self._begun, min(page + self._ahead, len(self._pages))
            if first >= last:
                return
            self._begun = last
            self.thread = threading.Thread(
                target=_populate,
                args=(self._pages[first:last], self.thread),
                name="chatserve-populate",
                daemon=True,
            )
            self.thread.start()


def _populate(memory: npt.NDArray[np.uint8], before: threading.Thread | None) -> None:
    """After what was begun before: its pages are needed sooner."""
    if before is not None:
        before.join()
    first, last = _whole_pages(memory)
    for piece in range(first, last, PIECE_BYTES):
        if not _advise(piece, min(PIECE_BYTES, last - piece), _MADV_POPULATE_WRITE):
            return


def _whole_pages(memory: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """The kernel's, where they begin and end: what shares one with others is theirs as well."""
    begin = memory.ctypes.data
    end = begin + memory.nbytes
    return -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE


def _advise(begin: int, size: int, advice: int) -> bool:
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if size <= 0 or not madvise(begin, size, advice):
        return True
    _log.debug("advice %d on memory is refused: %s", advice, os.strerror(ctypes.get_errno()))
    return False
