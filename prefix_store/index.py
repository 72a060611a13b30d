"""The index of a slab: which page is in which slot, and who goes first when room is needed.

Pure and without locks; the slab holds its lock around every call. A hint, never the truth: what a
slot holds is decided by reading it.

    entries   name -> Entry          owners    slot -> Entry
    present   link -> Entry          children  parent's link -> its entries, parent there or not
    orphans   entries whose parent is not here: nobody can reach them or what hangs below
    leaves    a heap by last use; an entry is in it at most once and is looked at again when it
              comes up, so that reading a page costs nothing here
"""

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from prefix_store.layout import NO_LINK
from prefix_store.names import PageName


class Entry:
    """One page in the slab. `pins`: reads in progress; its slot is not reused meanwhile."""

    __slots__ = (
        "heaped",
        "last_use",
        "link",
        "name",
        "nonce",
        "own",
        "pins",
        "position",
        "slot",
        "uses",
        "write",
    )

    def __init__(
        self,
        *,
        name: PageName,
        link: bytes,
        own: bytes,
        slot: int,
        position: int,
        nonce: bytes,
        write: int,
        last_use: float,
        uses: int = 0,
    ) -> None:
        self.name = name
        self.link = link
        self.own = own
        self.slot = slot
        self.position = position
        self.nonce = nonce
        self.write = write
        self.last_use = last_use
        self.uses = uses
        self.pins = 0
        self.heaped = False


@dataclass(frozen=True, slots=True)
class Victim:
    """An entry that may go, as it was when chosen. orphan: the unreachable page above it (itself
    perhaps), or None where it goes for its age."""

    entry: Entry
    last_use: float
    orphan: Entry | None


class Index:
    """See the module. An entry's children always leave before it does, unless it is dropped."""

    def __init__(self, link: Callable[[PageName | None], bytes]) -> None:
        self.entries: dict[PageName, Entry] = {}
        self.owners: dict[int, Entry] = {}
        self.orphans: dict[Entry, None] = {}
        self._link = link
        self._present: dict[bytes, Entry] = {}
        self._children: dict[bytes, dict[Entry, None]] = {}
        self._leaves: list[tuple[float, int, Entry]] = []
        self._pushed = 0

    def __len__(self) -> int:
        return len(self.entries)

    def run(self, names: Sequence[PageName]) -> int:
        """How many of the first names are all here."""
        entries = self.entries
        for count, name in enumerate(names):
            if name not in entries:
                return count
        return len(names)

    def add(self, entry: Entry) -> None:
        """Take in an entry whose name and slot are free."""
        assert entry.name not in self.entries
        assert entry.slot not in self.owners
        self.entries[entry.name] = entry
        self.owners[entry.slot] = entry
        self._present[entry.own] = entry
        if entry.link != NO_LINK:
            self._children.setdefault(entry.link, {})[entry] = None
            if entry.link not in self._present:
                self.orphans[entry] = None
        children = self._children.get(entry.own)
        if children:
            for child in children:
                self.orphans.pop(child, None)
        else:
            self._push(entry)

    def remove(self, entry: Entry) -> None:
        """Take out an entry; its children are orphans from here on."""
        del self.entries[entry.name]
        del self.owners[entry.slot]
        del self._present[entry.own]
        self.orphans.pop(entry, None)
        for child in self._children.get(entry.own, ()):
            self.orphans[child] = None
        if entry.link == NO_LINK:
            return
        siblings = self._children[entry.link]
        del siblings[entry]
        if not siblings:
            del self._children[entry.link]
            parent = self._present.get(entry.link)
            if parent is not None:
                self._push(parent)

    def is_leaf(self, entry: Entry) -> bool:
        """Whether no page here continues it."""
        return entry.own not in self._children

    def still_goes(self, victim: Victim) -> bool:
        """Whether a victim chosen before may go now: nothing has used or continued it since."""
        entry = victim.entry
        if self.entries.get(entry.name) is not entry or entry.pins or not self.is_leaf(entry):
            return False
        if victim.orphan is None:
            return entry.last_use == victim.last_use
        above = victim.orphan
        return above in self.orphans

    def victims(self, count: int) -> list[Victim]:
        """Up to `count` entries in the order in which they should go: what hangs on orphans, then
        the leaf unused for longest; a page after all that continue it. Changes nothing."""
        chosen = list(islice(self._unreachable(), max(0, count)))
        return self._continue(chosen, count, math.inf)

    def expired(self, before: float, most: int) -> list[Victim]:
        """Up to `most` entries unused since `before`, but for those that a younger one continues;
        in the order in which they should go. Changes nothing."""
        return self._continue([], most, before)

    def _continue(self, chosen: list[Victim], count: int, before: float) -> list[Victim]:
        """Add leaves to `chosen`, and what is a leaf without those."""
        taken = {victim.entry for victim in chosen}
        # Children that are chosen, by parent: a parent is next in line when all of its are.
        gone: dict[bytes, int] = {}
        line: list[tuple[float, int, Entry]] = []
        popped: list[Entry] = []
        while len(chosen) < count:
            entry = self._oldest(line, popped)
            if entry is None:
                break
            if entry.last_use >= before:
                break
            if entry in taken or entry.pins:
                continue
            chosen.append(Victim(entry, entry.last_use, None))
            taken.add(entry)
            parent = self._present.get(entry.link)
            if parent is not None:
                gone[entry.link] = gone.get(entry.link, 0) + 1
                if gone[entry.link] == len(self._children[entry.link]):
                    self._pushed += 1
                    heapq.heappush(line, (parent.last_use, self._pushed, parent))
        for entry in popped:
            self._push(entry)
        return chosen

    def _oldest(self, line: list[tuple[float, int, Entry]], popped: list[Entry]) -> Entry | None:
        """The entry unused for longest of those in line and the leaves; None when both are out."""
        leaves = self._leaves
        while leaves:
            last_use, _, entry = leaves[0]
            here = self.entries.get(entry.name) is entry
            if not here or not self.is_leaf(entry):
                heapq.heappop(leaves)
                entry.heaped = False
            elif entry.last_use != last_use:
                heapq.heappop(leaves)
                entry.heaped = False
                self._push(entry)
            else:
                break
        if line and (not leaves or line[0][0] <= leaves[0][0]):
            return heapq.heappop(line)[2]
        if not leaves:
            return None
        entry = heapq.heappop(leaves)[2]
        entry.heaped = False
        popped.append(entry)
        return entry

    def _unreachable(self) -> Iterator[Victim]:
        """Orphans and all below them, children first, the orphan unused for longest first."""
        for orphan in sorted(self.orphans, key=lambda entry: entry.last_use):
            below: list[Entry] = [orphan]
            for entry in below:  # grows while we walk: parents before children
                below.extend(self._children.get(entry.own, ()))
            kept: set[bytes] = set()  # links of pages that a pinned one continues
            for entry in reversed(below):
                if entry.pins or entry.own in kept:
                    kept.add(entry.link)
                else:
                    yield Victim(entry, entry.last_use, orphan)

    def _push(self, entry: Entry) -> None:
        if not entry.heaped:
            entry.heaped = True
            self._pushed += 1
            heapq.heappush(self._leaves, (entry.last_use, self._pushed, entry))
