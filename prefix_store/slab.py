"""A slab: the pages of one model in one file, written and read by name.

Any thread may call any method, several at a time. Reads (`reading.py`) and writes (`writing.py`)
run side by side; the order of locks and what a checkpoint is are in `slots.py`, the format in
README.md.
"""

import logging
import math
from collections.abc import Callable, Collection, Sequence
from random import Random

from prefix_store.errors import StoreError
from prefix_store.layout import SLOT_HEADER_BYTES
from prefix_store.names import PageName
from prefix_store.proof import Witness
from prefix_store.reading import Reading
from prefix_store.sealing import Sealer, StoreKeys
from prefix_store.shrinking import shrink
from prefix_store.slots import Former, Slots
from prefix_store.values import (
    Evictions,
    Misses,
    PageRead,
    PageShape,
    PageWrite,
    SlabStatistics,
    Verdict,
    check_name,
)
from prefix_store.writing import Writing

SHRINK_PART = 16  # of the slots are given back to a disk that is full
GC_PAGES = 1024  # are removed at a time: some 10 ms of the lock that look-ups wait for
log = logging.getLogger(__name__)


class Slab:
    """See the module. Made by `PageStore.slab`."""

    def __init__(
        self, slots: Slots, sealer: Sealer, keys: StoreKeys, clock: Callable[[], float]
    ) -> None:
        self.shape: PageShape = sealer.shape
        self._slots = slots
        self._sealer = sealer
        self._clock = clock
        self._index = slots.index
        self._lock = slots.lock
        self._reading = Reading(slots, sealer, clock)
        self._writing = Writing(slots, sealer, keys, clock)

    # Looking and reading.

    def find(self, names: Sequence[PageName]) -> int:
        """How many of the first names the index knows without a gap. No I/O: a hint."""
        with self._lock:
            return self._index.run(names)

    def contains(self, name: PageName) -> bool:
        """Whether the index knows a name. A hint, as `find`."""
        return name in self._index.entries

    def touch(self, names: Collection[PageName]) -> None:
        """Count a use of these pages now; unknown names are passed over."""
        now = self._clock()
        with self._lock:
            for name in names:
                entry = self._index.entries.get(name)
                if entry is not None:
                    self._slots.note_use(entry, now)

    def get(self, reads: Sequence[PageRead]) -> list[bool]:
        """Read pages into their buffers. False is a miss: the page is absent, torn, stale, forged,
        has other token ids, or the disk refused; its buffer may hold garbage. A page that turns out
        bad leaves the index. ValueError for a buffer or token ids of the wrong size."""
        for read in reads:
            if memoryview(read.into).nbytes != self.shape.page_bytes:
                raise ValueError(f"a page has {self.shape.page_bytes} bytes")
            self._check_tokens(read.tokens)
        return self._reading.get(reads)

    def sample(self, count: int, random: Random) -> list[PageName]:
        """Names of so many pages, drawn without repetition, or of all where there are fewer. Takes
        time that grows with all pages: milliseconds for a hundred thousand."""
        with self._lock:
            names = list(self._index.entries)
        return random.sample(names, min(count, len(names)))

    def verify(
        self, names: Sequence[PageName], into: Sequence[bytearray | memoryview]
    ) -> list[Verdict]:
        """Read pages as `get` does, whatever their token ids, to see whether they are what was
        sealed: what is not is dropped. No use is counted. into: where their bytes go, page_bytes
        each; only a RIGHT page's are its own. ValueError for a buffer of the wrong size."""
        if len(into) != len(names):
            raise ValueError("a buffer for each page")
        for buffer in into:
            if memoryview(buffer).nbytes != self.shape.page_bytes:
                raise ValueError(f"a page has {self.shape.page_bytes} bytes")
        return self._reading.verify(names, into)

    # Writing.

    def put(self, writes: Sequence[PageWrite]) -> list[bool]:
        """Keep pages. False: not stored (no room within the cap, the disk refused or is degraded,
        dropped meanwhile, or just being written by another put). A name that is there already is
        touched, not rewritten. ValueError for a name, ids or page of the wrong size."""
        for write in writes:
            check_name(write.name)
            if memoryview(write.page).nbytes != self.shape.page_bytes:
                raise ValueError(f"a page has {self.shape.page_bytes} bytes")
            self._check_tokens(write.tokens)
        return self._writing.put(writes)

    # Forgetting.

    def drop(self, names: Collection[PageName]) -> int:
        """Forget pages; how many there were. When it returns, no part of them is in the folder any
        more, and that survives kill -9 and power loss: tombstones, then the slots overwritten, then
        the table without them, each synced. Also drops what a put in flight is about to write.

        Raises StoreError where the disk refuses: the pages are out of reach then, and the rest
        is done by the next `drop`, `gc` or `probe` that succeeds.
        """
        wanted = set(names)
        slots = self._slots
        with self._lock:
            if self._slots.closed:
                raise StoreError("the page store is closed")
            count = 0
            for name in wanted:
                self._writing.cancel(name)
                entry = self._index.entries.get(name)
                if entry is not None:
                    self._index.remove(entry)
                    slots.gone.remember([entry.nonce])
                    slots.spoil(entry.slot, Former(name, entry.nonce))
                    slots.counters.evicted_forgotten += 1
                    count += 1
            self._lock.wait_for(lambda: not self._in_flight(wanted))
        with slots.order:
            try:
                self._finish_drop(wanted)
            except OSError as error:
                slots.fault(error, "forgetting pages")
                raise StoreError(
                    f"pages were dropped but could not be overwritten: {error}"
                ) from error
        return count

    def _in_flight(self, names: set[PageName]) -> bool:
        """Whether a thread is just writing one of these pages, or over one of them."""
        return self._writing.in_flight(names) or any(
            former.name in names
            for slot in self._slots.busy
            for former in self._slots.former.get(slot, ())
        )

    def _finish_drop(self, names: set[PageName]) -> None:
        slots = self._slots
        with self._lock:
            covered = [
                slot
                for slot, formers in slots.former.items()
                if any(former.name in names for former in formers)
            ]
            slots.gone.remember(
                former.nonce
                for formers in (*slots.unclean.values(), *slots.former.values())
                for former in formers
                if former.name in names and former.nonce is not None
            )
        if not slots.claim_tombstones():
            shrink(slots, 1)
            slots.claim_tombstones()
        slots.gone.save()
        slots.clean()
        if covered:
            slots.file.sync()
            slots.save_records(covered)

    def witnesses(self, names: Collection[PageName]) -> list[Witness]:
        """What to look for in the folder after these pages were dropped (`proof.py`); call it
        before. Nothing for pages that are not here. Raises OSError where a slot cannot be read."""
        found: list[Witness] = []
        for name in names:
            with self._lock:
                entry = self._index.entries.get(name)
                if entry is None:
                    continue
                entry.pins += 1
            try:
                buffer = self._slots.file.buffer()
                sealed = self._sealer.layout.sealed_bytes
                if self._slots.file.read(entry.slot, buffer, sealed):
                    found.append(Witness.of_slot(name, buffer[SLOT_HEADER_BYTES:sealed]))
            finally:
                with self._lock:
                    entry.pins -= 1
        return found

    # Keeping house.

    def probe(self) -> bool:
        """While degraded: try a small write, a sync and a read on new descriptors, and finish what
        was left undone. True: the slab writes again (or never stopped)."""
        slots = self._slots
        with slots.order:
            if self._slots.closed:
                return False
            if slots.degraded is None:
                return True
            return slots.guard("a probe", self._probe)

    def _probe(self) -> bool:
        slots = self._slots
        slots.file.refresh()
        slots.file.try_scratch()
        slots.gone.save()
        if slots.full:
            # Slots that could not be written are beyond the file's end: cutting them gives nothing.
            beyond = max(0, slots.high - slots.file.slots())
            shrink(slots, beyond + max(1, slots.high // SHRINK_PART))
        else:
            slots.settle_all()
        with self._lock:
            slots.degraded = None
        log.info("The page store writes again.")
        return True

    def gc(self, max_age_seconds: float | None) -> int:
        """Remove pages unused for longer (never one that a younger page continues), overwritten
        as in `drop`; finish what was left undone; save when pages were used. How many were removed.
        Nothing while degraded."""
        slots, removed = self._slots, 0
        before = -math.inf if max_age_seconds is None else self._clock() - max_age_seconds
        while True:
            # By parts, between which others have their turn: reads never wait for the disk, writes
            # for no more than this.
            with slots.order:
                if slots.closed or slots.degraded is not None:
                    return removed
                with self._lock:
                    expired = [each.entry for each in self._index.expired(before, GC_PAGES)]
                    for entry in expired:
                        self._index.remove(entry)
                        slots.counters.evicted_age += 1
                        slots.spoil(entry.slot, Former(entry.name, entry.nonce))
                removed += len(expired)
                if len(expired) < GC_PAGES:
                    slots.checkpoint(uses=True)
                    return removed
                slots.guard("removing old pages", slots.clean)

    def give_back(self, bytes_: int) -> None:
        """Shrink the files by about so many bytes for another slab, unless this one is busy."""
        slots = self._slots
        # Whoever asks may hold the order of another slab, whose owner may be asking us.
        if slots.order.acquire(blocking=False):
            try:
                if not self._slots.closed and slots.degraded is None:
                    slots.guard("shrinking", lambda: self._give_back(bytes_))
            finally:
                slots.order.release()

    def _give_back(self, bytes_: int) -> bool:
        """First what was claimed for slots that are not there yet, then slots. Raises OSError."""
        missing = bytes_ - self._slots.release()
        return missing <= 0 or shrink(self._slots, self._slots.slots_for(missing))

    def statistics(self) -> SlabStatistics:
        """What was counted, and what is there now."""
        slots = self._slots
        with self._lock:
            c = slots.counters
            return SlabStatistics(
                shape=self.shape,
                pages=len(self._index),
                bytes=slots.file_bytes,
                slot_bytes=self._sealer.layout.slot_bytes,
                orphans=len(self._index.orphans),
                hits=c.hits,
                misses=Misses(
                    absent=c.missed_absent,
                    authentication=c.missed_authentication,
                    tokens=c.missed_tokens,
                    io=c.missed_io,
                ),
                writes=c.writes,
                touched=c.touched,
                refused=c.refused,
                evictions=Evictions(
                    space=c.evicted_space,
                    age=c.evicted_age,
                    orphan=c.evicted_orphan,
                    forgotten=c.evicted_forgotten,
                    bad=c.evicted_bad,
                ),
                io_errors=c.io_errors,
                tombstones=len(slots.gone),
                read_seconds=c.read_seconds,
                read_bytes=c.read_bytes,
                write_seconds=c.write_seconds,
                write_bytes=c.write_bytes,
                degraded=slots.degraded,
            )

    def close(self) -> None:
        """Write the last checkpoint and close the files. Idempotent; later reads are misses."""
        with self._lock:
            if self._slots.closed:
                return
            self._slots.closed = True
            tickets = self._writing.tickets
            for name in tickets:
                self._writing.cancel(name)
            self._lock.wait_for(lambda: not tickets)
        slots = self._slots
        with slots.order:
            if slots.degraded is None:
                slots.checkpoint(uses=True, ahead=False)
            slots.file.retire()
            slots.table.close()
            slots.gone.close()

    def _check_tokens(self, tokens: bytes) -> None:
        if len(tokens) != self.shape.token_bytes:
            raise ValueError(f"a page has {self.shape.page_tokens} token ids of 4 bytes")
