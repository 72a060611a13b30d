"""The slab file: slots read, written, wiped and synced through descriptors that can be replaced.

After a sync that failed, nobody knows which writes reached the disk, and another sync of the same
descriptor may claim that all did. So that descriptor is never used again: `refresh` opens others.
"""

import os
import threading
from contextlib import suppress
from mmap import mmap
from pathlib import Path

from prefix_store.files import Files, read_all, write_all
from prefix_store.layout import SCRATCH_OFFSET, SlotLayout, SlotParts

RUN_BYTES = 512 << 10  # small enough to stay near the core between the disk and the cipher
_SCRATCH_BYTES = 512
_ZEROS = bytes(1 << 20)


class _Descriptor:
    """A descriptor that closes when it is retired and its last user is done."""

    def __init__(self, files: Files, number: int) -> None:
        self.number = number
        self._files = files
        self._users = 1  # the owner
        self._lock = threading.Lock()

    def __enter__(self) -> int:
        with self._lock:
            self._users += 1
        return self.number

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            # Whatever a close says, the descriptor is gone, and no promise hangs on it.
            with suppress(OSError):
                self._files.close(self.number)


class SlotRun:
    """Memory of some slots that follow each other, page-aligned: one or more, up to RUN_BYTES."""

    def __init__(self, layout: SlotLayout) -> None:
        size = layout.slot_bytes
        self.count = max(1, RUN_BYTES // size)
        self._bytes = size
        self._whole = memoryview(mmap(-1, self.count * size))
        self.slots: tuple[SlotParts, ...] = tuple(
            layout.parts(self.part(place, place + 1)) for place in range(self.count)
        )

    def part(self, first: int, last: int) -> memoryview:
        """The slots from the place `first` on, before `last`."""
        return self._whole[first * self._bytes : last * self._bytes]


class _Buffers(threading.local):
    """One thread's memory. Two runs, because what was read may leave anything behind a slot's
    sealed bytes, and what is written must have zeros there."""

    def __init__(self, layout: SlotLayout) -> None:
        self.slot = memoryview(mmap(-1, layout.slot_bytes))
        self.reading = SlotRun(layout)
        self.writing = SlotRun(layout)


class SlabFile:
    """One slab file. Reads and writes of slots in any thread; the rest by one thread at a time."""

    def __init__(
        self, files: Files, path: Path, layout: SlotLayout, *, writable: bool = True
    ) -> None:
        """Opens the file, which must be there. Raises OSError."""
        self._files = files
        self._path = path
        self.layout = layout
        self._buffers = _Buffers(layout)
        self.generation = 0  # grows when a descriptor for writing is retired
        self._writing: _Descriptor | None = None
        self._reading: _Descriptor | None = None
        if writable:
            self.refresh()
        else:
            number = files.open(path, create=False, writable=False)
            self._reading = _Descriptor(files, number)

    @property
    def run_slots(self) -> int:
        """How many slots are read or written at once at the most."""
        return max(1, RUN_BYTES // self.layout.slot_bytes)

    def buffer(self) -> memoryview:
        """This thread's buffer of one slot, page-aligned; zeros after the sealed bytes."""
        return self._buffers.slot

    def reading_run(self) -> SlotRun:
        """This thread's memory for what is read; anything may lie behind the sealed bytes."""
        return self._buffers.reading

    def writing_run(self) -> SlotRun:
        """This thread's memory for what is written; zeros after the sealed bytes."""
        return self._buffers.writing

    def read(self, slot: int, buffer: memoryview, length: int) -> bool:
        """The first `length` bytes of a slot; False where the file ends before. Raises OSError."""
        with self._entered(self._reading) as descriptor:
            wanted = buffer[:length]
            return read_all(self._files, descriptor, wanted, self.layout.offset(slot)) == length

    def read_run(self, first: int, buffer: memoryview) -> int:
        """Slots from `first` on; how many bytes, fewer where the file ends. Raises OSError."""
        with self._entered(self._reading) as descriptor:
            return read_all(self._files, descriptor, buffer, self.layout.offset(first))

    def write(self, slot: int, buffer: memoryview) -> None:
        """One or more whole slots, the first at `slot`, in one positional write. Raises OSError."""
        with self._entered(self._writing) as descriptor:
            write_all(self._files, descriptor, buffer, self.layout.offset(slot))

    def wipe(self, slot: int) -> None:
        """Overwrite a whole slot with zeros; what lies beyond the file's end needs none."""
        with self._entered(self._writing) as descriptor:
            offset = self.layout.offset(slot)
            end = min(offset + self.layout.slot_bytes, self._files.size(descriptor))
            while offset < end:
                piece = _ZEROS[: end - offset]
                write_all(self._files, descriptor, piece, offset)
                offset += len(piece)

    def slots(self) -> int:
        """How many slots the file reaches into. Raises OSError."""
        with self._entered(self._reading) as descriptor:
            return self.layout.slots_in(self._files.size(descriptor))

    def sync(self) -> None:
        """All writes that have returned are on the disk. Raises OSError; then the descriptor is
        out of use, and nothing can be written until `refresh`."""
        held = self._writing
        with self._entered(held) as descriptor:
            try:
                self._files.sync(descriptor)
            except OSError:
                self._retire_writing()
                raise

    def truncate(self, slots: int) -> None:
        """Cut the file after so many slots. Raises OSError."""
        with self._entered(self._writing) as descriptor:
            self._files.truncate(descriptor, self.layout.offset(slots))

    def refresh(self) -> None:
        """Go on with new descriptors. Raises OSError, and then the file stays as it was."""
        writing = _Descriptor(self._files, self._files.open(self._path, create=False))
        try:
            number = self._files.open(self._path, create=False, writable=False)
        except OSError:
            writing.leave()
            raise
        self.retire()
        self._writing = writing
        self._reading = _Descriptor(self._files, number)

    @property
    def writable(self) -> bool:
        """False after a sync that failed, until `refresh`."""
        return self._writing is not None

    def try_scratch(self) -> None:
        """Write, sync and read back what nobody needs. Raises OSError."""
        wanted = os.urandom(_SCRATCH_BYTES)
        found = memoryview(bytearray(_SCRATCH_BYTES))
        with self._entered(self._writing) as descriptor:
            write_all(self._files, descriptor, wanted, SCRATCH_OFFSET)
        self.sync()
        with self._entered(self._reading) as descriptor:
            read_all(self._files, descriptor, found, SCRATCH_OFFSET)
        if bytes(found) != wanted:
            raise OSError("the disk does not give back what was written")

    def retire(self) -> None:
        """Stop using the descriptors; they close when their last user is done."""
        self._retire_writing()
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.leave()

    def _retire_writing(self) -> None:
        self.generation += 1
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.leave()

    def _entered(self, descriptor: _Descriptor | None) -> _Descriptor:
        if descriptor is None:
            raise OSError("the slab file is out of use")
        return descriptor
