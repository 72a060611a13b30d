"""A tier below in memory, whose faults a test decides: what it forgets, loses, tears, refuses.

Pages are those of the simulated model: their bytes are their token ids, so whatever it is given
under a name can be checked at once.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np

from prefix_store.names import PageName
from prefix_store.values import PageRead, PageWrite, Verdict


@dataclass(slots=True)
class FakeDepot:
    """`traffic.Depot`. torn: names whose reads are misses, with garbage left in the buffer; such a
    name is forgotten thereby, as a store forgets it. refusing: nothing can be written."""

    kept: dict[PageName, PageWrite] = field(default_factory=dict[PageName, PageWrite])
    torn: set[PageName] = field(default_factory=set[PageName])
    refusing: bool = False
    raising: bool = False
    touched: list[PageName] = field(default_factory=list[PageName])
    reads: int = 0

    def find(self, names: Sequence[PageName]) -> int:
        for index, name in enumerate(names):
            if name not in self.kept:
                return index
        return len(names)

    def contains(self, name: PageName) -> bool:
        return name in self.kept

    def touch(self, names: Sequence[PageName]) -> None:
        self.touched += names

    def get(self, reads: Sequence[PageRead]) -> list[bool]:
        if self.raising:
            raise OSError("a depot that breaks its word")
        return [self._read(read) for read in reads]

    def sample(self, count: int, random: Random) -> list[PageName]:
        return random.sample(list(self.kept), min(count, len(self.kept)))

    def verify(
        self, names: Sequence[PageName], into: Sequence[bytearray | memoryview]
    ) -> list[Verdict]:
        if self.raising:
            raise OSError("a depot that breaks its word")
        return [self._verify(name, buffer) for name, buffer in zip(names, into, strict=True)]

    def _verify(self, name: PageName, into: bytearray | memoryview) -> Verdict:
        found = self.kept.get(name)
        if found is None:
            return Verdict.ABSENT
        if name in self.torn:
            del self.kept[name]
            return Verdict.WRONG
        into[:] = found.page
        return Verdict.RIGHT

    def put(self, writes: Sequence[PageWrite]) -> list[bool]:
        if self.raising:
            raise OSError("a depot that breaks its word")
        return [self._write(write) for write in writes]

    def drop(self, names: Collection[PageName]) -> int:
        found = [name for name in names if self.kept.pop(name, None) is not None]
        self.torn -= set(names)
        if self.raising or self.refusing:
            raise OSError("a disk that refuses")
        return len(found)

    def _read(self, read: PageRead) -> bool:
        self.reads += 1
        found = self.kept.get(read.name)
        if found is None or read.name in self.torn:
            self.kept.pop(read.name, None)
            read.into[:] = b"\xee" * len(read.into)
            return False
        assert found.tokens == read.tokens, "asked for other tokens under this name"
        read.into[:] = found.page
        return True

    def _write(self, write: PageWrite) -> bool:
        ids = np.frombuffer(write.page, dtype=np.int64)
        assert ids.tolist() == memoryview(write.tokens).cast("i").tolist(), "not what it is called"
        if self.refusing:
            return False
        page = bytes(write.page)
        self.kept[write.name] = PageWrite(
            write.name, write.parent, write.position, write.tokens, page
        )
        return True
