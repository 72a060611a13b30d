"""What lies in slabs that nobody has opened: whether a name was kept there, and no more.

For whoever is asked why he finds nothing: the pages may be another model's. The first 8 bytes of
each name are kept, sorted; names are hashes, so one that was never kept is taken for one that was
once in 2^64 / names. As the slab's last checkpoint had them: hints, and never pages.
"""

import struct
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable

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

    def __contains__(self, name: PageName) -> bool:
        hint = _hint(name)
        place = bisect_left(self._hints, hint)
        return place < len(self._hints) and self._hints[place] == hint and self._is_there()


def read_others(place: Place) -> tuple[OtherPages, ...]:
    """Of the slabs of a folder that are not opened, those used last. Reads their tables; one that
    cannot be read, or was written under another secret, is left out."""
    saved = ((saved_at(place, stem), stem) for stem in place.room.idle)
    newest = sorted(((when, stem) for when, stem in saved if when is not None), reverse=True)
    found = (_read(place, stem) for _, stem in newest[:OTHERS_MOST])
    return tuple(pages for pages in found if pages is not None)


def _read(place: Place, stem: str) -> OtherPages | None:
    files = place.files
    try:
        descriptor = files.open(place.path(stem, ".slab"), create=False, writable=False)
        try:
            raw, length = read_bytes(files, descriptor, UNIT, 0), files.size(descriptor)
        finally:
            files.close(descriptor)
        if file_header_version(raw)[0] != SLAB_MAGIC:
            return None
        shape, slab_id = shape_of(raw), slab_id_of(raw)
        if raw != slab_header(place.keys, shape, slab_id) or slab_stem(shape) != stem:
            return None
        table = Table(files, place.path(stem, ".table"), place.keys, shape, slab_id)
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
