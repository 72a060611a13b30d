"""PageTable: the pages of one sequence, in order of position.

    position p lives in pages[p // page_size], at offset p % page_size

The first `sealed` pages are named; after them there is at most one that is being written, or a few
that are reserved for the step in flight. Only the block manager changes a table.
"""

from array import array
from dataclasses import dataclass, field

from chatserve.cache.page_pool import PageId
from chatserve.cache.prefix_index import NOWHERE, Namespace
from prefix_store.names import PageName


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy a page's bytes on the device, before anything in the step writes."""

    source: PageId
    target: PageId


@dataclass(slots=True)
class PageTable:
    """Page ids (int32), and the names of the sealed ones. space: whose they are."""

    pages: "array[int]" = field(default_factory=lambda: array("i"))
    names: list[PageName] = field(default_factory=list[PageName])
    space: Namespace = NOWHERE

    def twin(self) -> "PageTable":
        """Another one with the same pages."""
        return PageTable(self.pages[:], self.names[:], self.space)

    def __len__(self) -> int:
        return len(self.pages)

    @property
    def sealed(self) -> int:
        """How many pages, from the first, have names."""
        return len(self.names)

    @property
    def last_name(self) -> PageName | None:
        """The name of the last sealed page: the parent of the next one."""
        return self.names[-1] if self.names else None

    def snapshot(self) -> bytes:
        """The page ids as native int32 bytes: a frozen value that may cross to another thread."""
        return self.pages.tobytes()
