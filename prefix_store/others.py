"""What lies in slabs that nobody has opened: whether a name was kept there, and no more.

For whoever is asked why he finds nothing: the pages may be another model's. The first 8 bytes of
each name are kept, sorted; names are hashes, so one that was never kept is taken for one that was
once in 2^64 / names. As the slab's last checkpoint had them: hints, and never pages.
"""

import struct
from array import array
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable

from prefix_store.files import read_bytes
from prefix_store.layout import (
    SLAB_MAGIC,
    UNIT,
    SlotLayout,
    file_header_version,
    shape_of,
    slab_id_of,
    slab_stem,
)
from prefix_store.names import PageName
from prefix_store.recovery import Place, saved_at, slab_header
from prefix_store.table import Table
from prefix_store.values import PageShape

OTHERS_MOST = 8  # slabs, those used last
_HINT_BYTES = 8


class OtherPages:
    """The names of one slab, of pages of this shape. Any thread."""

    def __init__(
        self, shape: PageShape, names: Iterable[PageName], is_there: Callable[[], bool]
    ) -> None:
        """is_there: whether the slab still lies in the folder, and nobody has opened it."""
        self.shape = shape
        self._is_there = is_there
        self._hints = array("Q", sorted(map(_hint, names)))

    def forget(self, names: Collection[PageName]) -> None:
        """These are not there any more: they were dropped."""
        gone = {_hint(name) for name in names if name in self}
        if gone:
            # Another array in its place, and at once: somebody may be looking into this one.
            self._hints = array("Q", [hint for hint in self._hints if hint not in gone])

    def __contains__(self, name: PageName) -> bool:
        hint, hints = _hint(name), self._hints
        place = bisect_left(hints, hint)
        return place < len(hints) and hints[place] == hint and self._is_there()


def read_others(place: Place) -> tuple[OtherPages, ...]:
    """Of the slabs of a folder that are not opened, those used last. Reads their tables; one that
    cannot be read, or was written under another secret, is left out."""
    saved = ((saved_at(place, stem), stem) for stem in place.room.idle)
    newest = sorted(((when, stem) for when, stem in saved if when is not None), reverse=True)
    found = (_read(place, stem) for _, stem in newest[:OTHERS_MOST])
    return tuple(pages for pages in found if pages is not None)


def identity(place: Place, stem: str) -> tuple[PageShape, bytes, int] | None:
    """Shape, slab id and length in bytes of a slab that is not opened; None where its header is
    damaged, or was written under another secret. Raises OSError."""
    files = place.files
    descriptor = files.open(place.path(stem, ".slab"), create=False, writable=False)
    try:
        raw, length = read_bytes(files, descriptor, UNIT, 0), files.size(descriptor)
    finally:
        files.close(descriptor)
    try:
        if file_header_version(raw)[0] != SLAB_MAGIC:
            return None
        shape, slab_id = shape_of(raw), slab_id_of(raw)
    except (ValueError, struct.error):
        return None
    if raw != slab_header(place.keys, shape, slab_id) or slab_stem(shape) != stem:
        return None
    return shape, slab_id, length


def _read(place: Place, stem: str) -> OtherPages | None:
    try:
        found = identity(place, stem)
        if found is None:
            return None
        shape, slab_id, length = found
        table = Table(place.files, place.path(stem, ".table"), place.keys, shape, slab_id)
        try:
            _, records, _ = table.load(SlotLayout(shape).slots_in(length), repair=False)
        finally:
            table.close()
    except (OSError, ValueError, struct.error):
        return None
    names = (record.name for record in records if record is not None)
    return OtherPages(shape, names, lambda: stem in place.room.idle)


def _hint(name: PageName) -> int:
    return int.from_bytes(name[:_HINT_BYTES], "little")
