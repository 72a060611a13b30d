"""Checksums of pages in memory: what a page of the device had is what comes back to it.

The weighted sum of a page's 64-bit words, modulo 2^64, as a signed number. The weights are odd and
each of its own (Weyl's sequence, mixed as in SplitMix64; Steele et al., OOPSLA'14), so one word
that differs always gives another sum; words in other places do, but for a chance of about 1 in
2^63. It guards against memory that fails and against our own faults, not against intent: nobody
else writes to this memory. The device computes the same sum (`chatserve_kernels.page_checksums`).
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

WORD_BYTES = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)


@lru_cache(maxsize=4)
def checksum_weights(page_bytes: int) -> npt.NDArray[np.uint64]:
    """Weights for pages of so many bytes, uint64 [page_bytes / 8]. Raises ValueError where that is
    no whole number of words."""
    if page_bytes % WORD_BYTES:
        raise ValueError(f"a page of {page_bytes} bytes is not of whole words")
    word = np.arange(1, page_bytes // WORD_BYTES + 1, dtype=np.uint64) * _GOLDEN
    return ((word ^ (word >> np.uint64(30))) * _MIX) | np.uint64(1)


def checksum(page: memoryview) -> int:
    """A page's sum, from -2^63. For any thread."""
    words = np.frombuffer(page, dtype=np.uint64)
    return int((words * checksum_weights(page.nbytes)).sum().astype(np.int64))
