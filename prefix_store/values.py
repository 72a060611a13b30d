"""What crosses the page store's door: frozen values, and buffers that belong to the caller."""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from prefix_store.names import NAME_BYTES, PageName

FINGERPRINT_BYTES = 32
LARGEST_PAGE_BYTES = 1 << 30  # AES-GCM encrypts up to 2^36 bytes a message; a page is far smaller
LARGEST_PAGE_TOKENS = 1 << 16

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class PageShape:
    """What a slab holds: pages of one model and one size.

    fingerprint: 32 bytes that stand for everything which changes a page's bytes. page_bytes: size
    of a page. page_tokens: token ids of a page. ValueError for a size out of range.
    """

    fingerprint: bytes
    page_bytes: int
    page_tokens: int

    def __post_init__(self) -> None:
        if len(self.fingerprint) != FINGERPRINT_BYTES:
            raise ValueError(f"a fingerprint has {FINGERPRINT_BYTES} bytes")
        if not 1 <= self.page_bytes <= LARGEST_PAGE_BYTES:
            raise ValueError(f"a page has 1 to {LARGEST_PAGE_BYTES} bytes")
        if not 1 <= self.page_tokens <= LARGEST_PAGE_TOKENS:
            raise ValueError(f"a page has 1 to {LARGEST_PAGE_TOKENS} token ids")

    @property
    def token_bytes(self) -> int:
        """Size of a page's token ids as int32."""
        return 4 * self.page_tokens


@dataclass(frozen=True, slots=True)
class PageWrite:
    """A page to keep.

    parent: the page before it in its sequence, None for the first. position: its index in the
    sequence, from 0. tokens: its ids as int32, 4 * page_tokens bytes. page: a contiguous buffer of
    page_bytes bytes, read during `put` only.
    """

    name: PageName
    parent: PageName | None
    position: int
    tokens: bytes
    page: Buffer


@dataclass(frozen=True, slots=True)
class PageRead:
    """A page wanted: its name, the token ids that it must have, and where its bytes go.

    into: a writable contiguous buffer of page_bytes bytes. After a miss it may hold garbage.
    """

    name: PageName
    tokens: bytes
    into: bytearray | memoryview


class Verdict(Enum):
    """What came of checking a page. RIGHT: it is what was sealed. WRONG: it is not (torn, stale,
    moved, forged). UNREADABLE: the disk refused. ABSENT: nothing of this name is here any more."""

    RIGHT = "right"
    WRONG = "wrong"
    UNREADABLE = "unreadable"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Misses:
    """Why pages asked for by `get` were not there.

    absent: the index did not know the name. authentication: torn, stale, moved, forged. tokens:
    the page has other token ids. io: the disk refused.
    """

    absent: int = 0
    authentication: int = 0
    tokens: int = 0
    io: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evictions:
    """Why pages left: for room (space), unread for too long (age), without a parent (orphan),
    dropped by name (forgotten), found bad when read (bad)."""

    space: int = 0
    age: int = 0
    orphan: int = 0
    forgotten: int = 0
    bad: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SlabStatistics:
    """One slab. Counts go on over restarts (a crash loses those since the last checkpoint);
    `pages`, `bytes` and `orphans` are counted anew when the slab is opened.

    bytes: size of the slab's files. slot_bytes: what one page takes. touched: writes of a name that
    was there already. read_seconds and read_bytes: of hits, decryption included, summed over
    threads; write_seconds and write_bytes: of stored pages, likewise, syncs not included.
    degraded: why writing has stopped, or None. tombstones: dropped writes that are remembered.
    """

    shape: PageShape
    pages: int
    bytes: int
    slot_bytes: int
    orphans: int
    hits: int
    misses: Misses
    writes: int
    touched: int
    refused: int
    evictions: Evictions
    io_errors: int
    tombstones: int
    read_seconds: float
    read_bytes: int
    write_seconds: float
    write_bytes: int
    degraded: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStatistics:
    """The whole folder. bytes: all of its files that are the store's, those of slabs that are
    not opened included. unopened: how many such slabs there are; reclaimed: how many were removed
    for room or age since the store was opened. degraded: why nothing is written now, or None."""

    folder: Path
    capacity_bytes: int
    bytes: int
    unopened: int
    reclaimed: int
    slabs: tuple[SlabStatistics, ...] = field(default=())
    degraded: str | None = None


def check_name(name: PageName) -> None:
    """ValueError unless `name` has the length of a page name."""
    if len(name) != NAME_BYTES:
        raise ValueError(f"a page name has {NAME_BYTES} bytes")
