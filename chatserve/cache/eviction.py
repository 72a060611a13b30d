"""Eviction policies: which page nobody owns goes first.

A policy gives an evictable page one number when it becomes evictable; the smallest goes first. It
sees what happened to that page and nothing else, so any tier can ask it: whoever keeps pages in an
`EvictionOrder` (`eviction_order.py`) evicts in O(log pages) and never looks at all of them.

    FirstInFirstOut    when the page was named
    LeastRecentlyUsed  when it was last given back
    Patience           last given back, plus seconds for each doubling of its uses, minus seconds
                       for each doubling of the new text that it ends

Why Patience. Of the blocks of a chat service 76 % are never used again, and which ones can be told:
a page that was used twice is used again nearly twice as often (42 % against 23 %), and the end of a
long new text less than that of a short one. The logarithm of a page's rate of reuse is about linear
in the logarithms of both, and falls about linearly with its age over the minutes that matter; so
age and evidence add up to one number that never has to be computed again. Single-use pages go early
(what S3-FIFO does with a queue of their own), pages of lively chats wait for their owner to finish
typing. The constants are seconds of people, not of machines: they were chosen on the first half
hour of a real service's hour (`benchmarks/eviction.py --fit`) and scored on the second; docs/log.md
has the tables.

Uses are counted beyond a page's life (`UseMemory`): what comes back after it was evicted is
not new. With a small cache that is a third of the gain.
"""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from math import log2
from types import MappingProxyType
from typing import NamedTuple, Protocol

from prefix_store.names import PageName

TAG_BITS = 24
USES_BITS = 8
USES_MAX = (1 << USES_BITS) - 1


class PageUse(NamedTuple):
    """What is known of a page that nobody owns.

    sealed, used: ticks of the index's counter, when the page was named and last given back.
    seconds: the clock at that last use. uses: how many requests had it, the one that computed it
    included, former lives included; 0 for a page computed ahead that no request has had.
    run: tokens of the text that came new together, up to the page's end.
    """

    sealed: int
    used: int
    seconds: float
    uses: int
    run: int


class EvictionPolicy(Protocol):
    """An order of eviction. Stateless, so that several tiers may share one."""

    def place(self, use: PageUse, /) -> float:
        """A number: of two evictable pages the one with the smaller goes first. Where they are
        equal, the one given back first: the end of a chain before its beginning."""
        ...


@dataclass(frozen=True, slots=True)
class FirstInFirstOut:
    """In the order of naming; as everywhere, parents outlive children."""

    def place(self, use: PageUse, /) -> float:
        """The tick of its naming."""
        return use.sealed


@dataclass(frozen=True, slots=True)
class LeastRecentlyUsed:
    """In the order of the last use."""

    def place(self, use: PageUse, /) -> float:
        """The tick of its last use."""
        return use.used


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """The last use, later for what was used often, earlier for what is deep in new text.

    use_seconds: for each doubling of the uses. run_seconds: for each doubling of the run beyond
    run_tokens, the blocks that it was fitted with; short texts are all alike.
    """

    use_seconds: float = 150.0
    run_seconds: float = 60.0
    run_tokens: int = 512

    def place(self, use: PageUse, /) -> float:
        """Seconds of the clock."""
        place = use.seconds
        if use.uses > 1:
            place += self.use_seconds * log2(use.uses)
        if use.run > self.run_tokens:
            place -= self.run_seconds * log2(use.run / self.run_tokens)
        return place


POLICIES: Mapping[str, EvictionPolicy] = MappingProxyType(
    {"fifo": FirstInFirstOut(), "lru": LeastRecentlyUsed(), "patience": Patience()}
)
DEFAULT_POLICY: EvictionPolicy = POLICIES["patience"]


class UseMemory:
    """How often pages were used that are gone: a table of fixed size, indexed by name.

        slot = the name's first bits:  | tag, 24 bits | uses, 8 bits |   (0: nothing)

    Names are hashes, so they spread by themselves. A newcomer takes the slot of what was there,
    which forgets what has been gone for long. Two pages with equal slot and tag are one in 2^24 per
    slot, and cost a place in the order of eviction, nothing else. Nothing of a page's text is in
    it. 4 bytes a slot.
    """

    def __init__(self, slots: int) -> None:
        """slots: two for each page of the cache at the least; 0: none."""
        assert slots >= 0, "a table has no negative size"
        self._slots = array("I", bytes(array("I").itemsize * slots))

    def remember(self, name: PageName, uses: int) -> None:
        """The page goes; it was used so often (counted up to 255)."""
        if self._slots:
            slot, tag = self._find(name)
            self._slots[slot] = tag << USES_BITS | min(uses, USES_MAX)

    def recall(self, name: PageName) -> int:
        """How often a page was used before it went; 0 where that is not known."""
        if not self._slots:
            return 0
        slot, tag = self._find(name)
        value = self._slots[slot]
        return value & USES_MAX if value >> USES_BITS == tag else 0

    def _find(self, name: PageName) -> tuple[int, int]:
        number = int.from_bytes(name[:8], "little")
        tag = number >> (64 - TAG_BITS)
        return (number & ((1 << (64 - TAG_BITS)) - 1)) % len(self._slots), tag
