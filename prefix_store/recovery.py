"""Opening a slab: from its table where that is whole, from the slots' headers where it is not.

    1. header page of the slab: not ours, another version, another secret -> formatted anew
    2. tombstones: missing or not this slab's -> formatted anew (a page dropped before may not
       come back)
    3. table: a record for each slot; a damaged block -> headers of its slots
    4. window (slots written since the last checkpoint): each is read and decrypted
    5. what is not whole, dropped before, or there twice -> wiped
    6. a checkpoint, if any of 3 to 5 found work

Nothing found here is trusted when a page is read: it is a hint where to look.
"""

import gc
import logging
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from prefix_store.counters import Counters
from prefix_store.files import Files, read_bytes, write_all
from prefix_store.gone import Gone
from prefix_store.index import Entry, Index
from prefix_store.layout import (
    FILE_HEADER_BYTES,
    FORMAT_VERSION,
    GONE_OFFSET,
    SLAB_ID_BYTES,
    SLAB_MAGIC,
    SLOT_HEADER_BYTES,
    SLOTS_OFFSET,
    UNIT,
    Record,
    SlotHeader,
    SlotLayout,
    file_header_version,
    pack_file_header,
    shape_of,
    slab_id_of,
    slab_stem,
    unpack_slot_header,
)
from prefix_store.room import Room
from prefix_store.sealing import Sealer, StoreKeys
from prefix_store.slab_file import SlabFile
from prefix_store.slots import GONE_STEP, Former, Slots
from prefix_store.table import State, Table
from prefix_store.values import PageShape

log = logging.getLogger(__name__)
ENDINGS = (".slab", ".table", ".gone")
# Tombstones may take this part of the capacity; then the slab is formatted anew when next opened.
GONE_PART = 8


MINIMUM_BYTES = SLOTS_OFFSET + Table.bytes_for(0) + GONE_OFFSET + GONE_STEP


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where slabs live, and what they share."""

    folder: Path
    files: Files
    keys: StoreKeys
    room: Room
    clock: Callable[[], float]
    random: Callable[[int], bytes]

    def path(self, stem: str, ending: str) -> Path:
        """One of a slab's files."""
        return self.folder / (stem + ending)

    def free_bytes(self) -> int:
        """What the file system still has."""
        return self.files.free_bytes(self.folder)


def open_slots(place: Place, shape: PageShape) -> tuple[Slots, Sealer]:
    """The slab of a shape, made where there is none that can be used. Raises OSError."""
    stem = slab_stem(shape)
    path = place.path(stem, ".slab")
    slab_id, trouble = _read_header(place, path, shape)
    if slab_id is not None:
        gone = Gone(place.files, place.path(stem, ".gone"), place.keys, shape, slab_id)
        trouble = _load_gone(gone, place.room.capacity_bytes)
        if trouble is None:
            try:
                return _load(place, shape, slab_id, gone)
            except OSError:
                gone.close()
                raise
        gone.close()
    if trouble is not None:
        log.warning("The page store begins %s anew: %s", path.name, trouble)
    return _format(place, shape)


def _read_header(place: Place, path: Path, shape: PageShape) -> tuple[bytes | None, str | None]:
    """The slab's id, or None and why the slab cannot be used (None: there is none)."""
    try:
        descriptor = place.files.open(path, create=False, writable=False)
    except FileNotFoundError:
        return None, None
    try:
        raw = read_bytes(place.files, descriptor, UNIT, 0)
    finally:
        place.files.close(descriptor)
    magic, version = file_header_version(raw)
    if magic != SLAB_MAGIC:
        return None, "it is not a slab"
    if version != FORMAT_VERSION:
        return None, f"its format is version {version}, not {FORMAT_VERSION}"
    if raw != slab_header(place.keys, shape, slab_id_of(raw)):
        return None, "its header is damaged, or written under another secret"
    return slab_id_of(raw), None


def slab_header(keys: StoreKeys, shape: PageShape, slab_id: bytes) -> bytes:
    """The header page of a slab file."""
    fields = pack_file_header(SLAB_MAGIC, shape, slab_id)
    assert len(fields) == FILE_HEADER_BYTES
    return (fields + keys.code(b"slab header", fields)).ljust(UNIT, b"\0")


def _load_gone(gone: Gone, capacity_bytes: int) -> str | None:
    try:
        ours = gone.load()
    except FileNotFoundError:
        return "its tombstones are missing"
    if not ours:
        return "its tombstones are damaged"
    if gone.file_bytes > max(4 * UNIT, capacity_bytes // GONE_PART):
        return "it has too many tombstones"
    return None


def _format(place: Place, shape: PageShape) -> tuple[Slots, Sealer]:
    """A new, empty slab. Its slab file comes last: without it there is no slab."""
    stem, files = slab_stem(shape), place.files
    remove_slab(place, stem)
    slab_id = place.random(SLAB_ID_BYTES)
    gone = Gone(files, place.path(stem, ".gone"), place.keys, shape, slab_id)
    table = Table(files, place.path(stem, ".table"), place.keys, shape, slab_id)
    try:
        gone.create()
        table.create()
        files.sync_folder(place.folder)
        descriptor = files.open(place.path(stem, ".slab"), create=True)
        try:
            header = slab_header(place.keys, shape, slab_id)
            write_all(files, descriptor, header.ljust(SLOTS_OFFSET, b"\0"), 0)
            files.sync(descriptor)
        finally:
            files.close(descriptor)
        files.sync_folder(place.folder)
        return _slots(place, shape, slab_id, gone, table, Counters())
    except OSError:
        gone.close()
        table.close()
        raise


def remove_slab(place: Place, stem: str) -> None:
    """Remove a slab's files, the slab first: what is left after a crash is no slab."""
    there = set(place.files.list_folder(place.folder))
    gone = [ending for ending in ENDINGS if stem + ending in there]
    for ending in gone:
        place.files.unlink(place.path(stem, ending))
    if gone:
        place.files.sync_folder(place.folder)


def remove_rest(place: Place, stem: str) -> None:
    """Remove what is left of a slab that somebody else has taken away, be it nothing."""
    with suppress(FileNotFoundError):
        remove_slab(place, stem)


def saved_at(place: Place, stem: str) -> float | None:
    """When a slab that is not opened was last in use (its last checkpoint); None where that cannot
    be read."""
    try:
        descriptor = place.files.open(place.path(stem, ".slab"), create=False, writable=False)
        try:
            raw = read_bytes(place.files, descriptor, UNIT, 0)
        finally:
            place.files.close(descriptor)
        shape = shape_of(raw)
        table = Table(place.files, place.path(stem, ".table"), place.keys, shape, slab_id_of(raw))
        return table.saved_at()
    except (OSError, ValueError, struct.error):
        return None


def _slots(
    place: Place, shape: PageShape, slab_id: bytes, gone: Gone, table: Table, counters: Counters
) -> tuple[Slots, Sealer]:
    stem = slab_stem(shape)
    sealer = Sealer(place.keys, shape, slab_id)
    slots = Slots(
        stem=stem,
        file=SlabFile(place.files, place.path(stem, ".slab"), SlotLayout(shape)),
        table=table,
        gone=gone,
        index=Index(place.keys.link),
        room=place.room,
        counters=counters,
        clock=place.clock,
        free_bytes=place.free_bytes,
    )
    return slots, sealer


def _load(place: Place, shape: PageShape, slab_id: bytes, gone: Gone) -> tuple[Slots, Sealer]:
    stem = slab_stem(shape)
    table = Table(place.files, place.path(stem, ".table"), place.keys, shape, slab_id)
    slots, sealer = _slots(place, shape, slab_id, gone, table, Counters())
    try:
        slots.high = slots.file.slots()
        state, records, lost = table.load(slots.high)
        slots.counters = Counters.from_mapping(state.counters)
        if slots.table.is_longer(slots.high):
            slots.table.truncate(slots.high)
        if any(records[slots.high :]):
            lost.append(slots.high - 1)  # the slab was cut: its last block is written again
        del records[slots.high :]
        _Loading(place, slots, sealer, state, records, lost).run()
    except OSError:
        slots.file.retire()
        table.close()
        raise
    return slots, sealer


class _Loading:
    """One slab on its way into memory."""

    def __init__(
        self,
        place: Place,
        slots: Slots,
        sealer: Sealer,
        state: State,
        records: list[Record | None],
        lost: list[int],
    ) -> None:
        self._place = place
        self._slots = slots
        self._sealer = sealer
        self._state = state
        self._records = records
        self._lost = lost

    def run(self) -> None:
        slots = self._slots
        now = self._place.clock()
        for slot in self._lost:
            self._look(slot, now)
        window = sorted({slot for slot in self._state.window if slot < slots.high})
        for slot in window:
            self._verify(slot, now)
        self._take_in(now)
        slots.write = max(
            [self._state.write, *(entry.write for entry in slots.index.entries.values())]
        )
        if slots.unclean or window or self._lost:
            slots.dirty.update(window, self._lost)
            with slots.order:
                slots.checkpoint()

    def _look(self, slot: int, now: float) -> None:
        """A slot whose record is lost: what its header says."""
        header = self._header(slot, SLOT_HEADER_BYTES)
        self._records[slot] = header and _record(header, now)
        if header is None:
            self._slots.unclean[slot] = []

    def _verify(self, slot: int, now: float) -> None:
        """A slot that may have been written when the process died."""
        record = self._records[slot]
        header = self._header(slot, self._sealer.layout.sealed_bytes)
        whole = header is not None and self._is_whole(header)
        found = _record(header, now) if header is not None and whole else None
        if record is not None and found is not None and record.nonce == found.nonce:
            return
        self._records[slot] = found
        former: list[Former] = []
        if record is not None:
            former.append(Former(record.name, record.nonce))
        if header is not None and not whole:
            former.append(Former(header.name, header.nonce))
        if found is None and header is None and record is None and self._is_empty():
            self._slots.unclean.pop(slot, None)
        elif found is None:
            self._slots.unclean.setdefault(slot, []).extend(former)
        else:
            self._slots.unclean.pop(slot, None)
            self._slots.former.setdefault(slot, []).extend(former)
            self._slots.taken.add(slot)

    def _header(self, slot: int, length: int) -> SlotHeader | None:
        buffer = self._slots.file.buffer()
        buffer[:length] = bytes(length)
        if not self._slots.file.read(slot, buffer, length):
            return None
        return unpack_slot_header(self._sealer.shape, self._sealer.slab_id, buffer)

    def _is_empty(self) -> bool:
        """Whether there are only zeros in this thread's buffer, as far as it was read."""
        sealed = self._sealer.layout.sealed_bytes
        return bytes(self._slots.file.buffer()[:sealed]) == bytes(sealed)

    def _is_whole(self, header: SlotHeader) -> bool:
        """Whether the slot in this thread's buffer opens."""
        slot = self._sealer.layout.parts(self._slots.file.buffer())
        tokens = self._sealer.tokens(header, slot)
        if tokens is None:
            return False
        page = bytearray(self._sealer.shape.page_bytes)
        return self._sealer.page(header, slot, tokens, page) is True

    def _take_in(self, now: float) -> None:
        # Hundreds of thousands of objects, none of them garbage: looking for some would take longer
        # than making them.
        collects = gc.isenabled()
        gc.disable()
        try:
            self._build(now)
        finally:
            if collects:
                gc.enable()

    def _build(self, now: float) -> None:
        slots, link = self._slots, self._place.keys.link
        best: dict[bytes, int] = {}
        for slot, record in enumerate(self._records):
            if record is None:
                if slot not in slots.unclean:
                    slots.free.add(slot)
                continue
            other = best.get(record.name)
            if record.nonce in slots.gone:
                # A drop that had not come to its end, or an old copy put back.
                slots.unclean[slot] = [Former(record.name, record.nonce)]
            elif other is None:
                best[record.name] = slot
            else:
                held = self._records[other]
                assert held is not None
                loser = slot if held.write >= record.write else other
                best[record.name] = other if loser == slot else slot
                slots.unclean[loser] = [Former(record.name, None)]
        for name, slot in best.items():
            record = self._records[slot]
            assert record is not None
            slots.index.add(
                Entry(
                    name=name,
                    link=record.link,
                    own=link(name),
                    slot=slot,
                    position=record.position,
                    nonce=record.nonce,
                    write=record.write,
                    last_use=min(record.last_use, now),
                    uses=record.uses,
                )
            )


def _record(header: SlotHeader, now: float) -> Record:
    return Record(header.name, header.link, header.nonce, header.position, header.write, now, 0)
