"""Misses: where a prompt left what was found of it, and why that was not found.

Within the asker's own namespace only: a page of another tenant, or under another `cache_salt`, is
neither compared nor remembered for him. A hint for people who wonder why their prompts are computed
anew (a date in the system prompt, a history that was edited); no decision hangs on it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from chatserve.cache.page_table import PageTable
from chatserve.cache.prefix_index import TOKEN_BYTES, PrefixIndex
from prefix_store.names import PageName


class MissReason(Enum):
    """Why pages after the last one that was found had to be computed."""

    NEW = "new"  # never seen, as far as this process remembers
    EVICTED = "evicted"  # was there, and went
    QUICKER = "quicker"  # a tier below has it, and computing it was quicker
    OTHER_MODEL = "other_model"  # kept on disk by other weights, another type or page size


@dataclass(frozen=True, slots=True)
class Miss:
    """position: of the first token that differs from all that is resident after what was found; at
    least where the first missing page begins."""

    position: int
    reason: MissReason

    def as_mapping(self) -> dict[str, object]:
        """As it is told to clients."""
        return {"position": self.position, "reason": self.reason.value}


class Misses:
    """Looks at the index of one block manager."""

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index

    def explain(
        self,
        table: PageTable,
        names: Sequence[PageName],
        page: bytes,
        *,
        is_below: bool,
        is_others: Callable[[int], bool],
    ) -> Miss:
        """Why the page after those of the table was not found. names: of the prompt's whole pages.
        page: that page's token ids, int32 bytes. is_below: a tier below the device has it.
        is_others: whether another model has the page with the token at this position."""
        found = table.sealed
        reason = MissReason.NEW
        if is_below:
            reason = MissReason.QUICKER
        elif self._index.was_here(names[found]):
            reason = MissReason.EVICTED
        elif is_others(len(page) // TOKEN_BYTES * found):
            reason = MissReason.OTHER_MODEL
        same = self._index.likeness(table.last_name, table.space, page)
        return Miss(len(page) // TOKEN_BYTES * found + same, reason)
