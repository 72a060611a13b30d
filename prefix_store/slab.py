"""A slab: the pages of one model in one file, written and read by name.

Any thread may call any method, several at a time. Reads and writes run side by side; the order of
locks and what a checkpoint is are in `slots.py`, the format in README.md.

A put announces its names first (tickets), so that a drop finds what is on its way: a page not yet
written is not written any more, one being written is awaited and wiped.
"""

import logging
import math
import time
from collections.abc import Callable, Collection, Sequence

from prefix_store.errors import StoreError
from prefix_store.index import Entry
from prefix_store.layout import SLOT_HEADER_BYTES, unpack_slot_header
from prefix_store.names import PageName
from prefix_store.proof import Witness
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
    check_name,
)

SHRINK_PART = 16  # of the slots are given back to a disk that is full
log = logging.getLogger(__name__)


class _Ticket:
    """A name that a put is about to write. cancelled: a drop was faster."""

    __slots__ = ("cancelled", "writing")

    def __init__(self) -> None:
        self.cancelled = False
        self.writing = False


class Slab:
    """See the module. Made by `PageStore.slab`."""

    def __init__(
        self, slots: Slots, sealer: Sealer, keys: StoreKeys, clock: Callable[[], float]
    ) -> None:
        self.shape: PageShape = sealer.shape
        self._slots = slots
        self._sealer = sealer
        self._keys = keys
        self._clock = clock
        self._index = slots.index
        self._lock = slots.lock
        self._tickets: dict[PageName, _Ticket] = {}
        self._closed = False

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
                    self._use(entry, now)

    def get(self, reads: Sequence[PageRead]) -> list[bool]:
        """Read pages into their buffers. False is a miss: the page is absent, torn, stale, forged,
        has other token ids, or the disk refused; its buffer may hold garbage. A page that turns out
        bad leaves the index. ValueError for a buffer or token ids of the wrong size."""
        for read in reads:
            if memoryview(read.into).nbytes != self.shape.page_bytes:
                raise ValueError(f"a page has {self.shape.page_bytes} bytes")
            self._check_tokens(read.tokens)
        return [self._read(read) for read in reads]

    def _read(self, read: PageRead) -> bool:
        counters = self._slots.counters
        began = time.perf_counter()
        with self._lock:
            entry = None if self._closed else self._index.entries.get(read.name)
            if entry is None:
                counters.missed_absent += 1
                return False
            entry.pins += 1
            slot = entry.slot
        error: OSError | None = None
        found: bool | None = False
        try:
            found = self._open_slot(entry, slot, read)
        except OSError as caught:
            error = caught
        now = self._clock()
        with self._lock:
            entry.pins -= 1
            if found:
                self._use(entry, now)
                counters.hits += 1
                counters.read_bytes += self.shape.page_bytes
                counters.read_seconds += time.perf_counter() - began
                return True
            if self._index.entries.get(read.name) is not entry or entry.slot != slot:
                counters.missed_absent += 1  # dropped or moved under our hands
                return False
            if error is not None:
                counters.missed_io += 1
                self._slots.forsake(entry)
            elif found is None:
                counters.missed_tokens += 1
            else:
                counters.missed_authentication += 1
                self._slots.forsake(entry)
        if error is not None:
            self._slots.fault(error, "reading a page")
        return False

    def _open_slot(self, entry: Entry, slot: int, read: PageRead) -> bool | None:
        buffer = self._slots.file.buffer()
        if not self._slots.file.read(slot, buffer, self._sealer.layout.sealed_bytes):
            return False
        header = unpack_slot_header(self.shape, self._sealer.slab_id, buffer)
        # The name asked for, and the very write that the index knows: an older one is stale.
        if header is None or header.name != read.name or header.nonce != entry.nonce:
            return False
        return self._sealer.page(header, buffer, read.tokens, read.into)

    def _use(self, entry: Entry, now: float) -> None:
        entry.last_use = now
        entry.uses += 1
        self._slots.used.add(entry.slot)

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
        tickets, held = self._announce(writes)
        results: list[bool] = []
        try:
            for write in writes:
                ticket = tickets.pop(write.name, None)
                if ticket is None:
                    results.append(self._touch_one(write.name))
                    continue
                try:
                    results.append(self._write(ticket, write))
                finally:
                    self._withdraw([write.name])
        finally:
            self._withdraw(list(tickets))
            with self._lock:
                for entry in held:
                    entry.pins -= 1
        return results

    def _announce(self, writes: Sequence[PageWrite]) -> tuple[dict[PageName, _Ticket], list[Entry]]:
        """Tickets for the names to write, and pins on the pages that are there already: they must
        not make room for the others."""
        mine: dict[PageName, _Ticket] = {}
        held: list[Entry] = []
        with self._lock:
            for write in writes:
                entry = self._index.entries.get(write.name)
                if entry is not None:
                    entry.pins += 1
                    held.append(entry)
                elif write.name not in self._tickets and not self._closed:
                    mine[write.name] = self._tickets[write.name] = _Ticket()
        return mine, held

    def _withdraw(self, names: Sequence[PageName]) -> None:
        with self._lock:
            for name in names:
                del self._tickets[name]
            self._lock.notify_all()

    def _touch_one(self, name: PageName) -> bool:
        with self._lock:
            entry = self._index.entries.get(name)
            if entry is None or self._closed:
                self._slots.counters.refused += 1
                return False
            self._use(entry, self._clock())
            self._slots.counters.touched += 1
            return True

    def _write(self, ticket: _Ticket, write: PageWrite) -> bool:
        parent = None
        if write.parent is not None:
            # The page before this one may be a leaf and first in line: it must not make room.
            with self._lock:
                parent = self._index.entries.get(write.parent)
                if parent is not None:
                    parent.pins += 1
        try:
            return self._write_slot(ticket, write)
        finally:
            if parent is not None:
                with self._lock:
                    parent.pins -= 1

    def _write_slot(self, ticket: _Ticket, write: PageWrite) -> bool:
        slots = self._slots
        began = time.perf_counter()
        with slots.order:
            with self._lock:
                if ticket.cancelled:
                    slots.counters.refused += 1
                    return False
                ticket.writing = True
            slot = slots.take()
            slots.write += 1
            number = slots.write
        if slot is None:
            with self._lock:
                slots.counters.refused += 1
            return False
        generation = slots.file.generation
        link = self._keys.link(write.parent)
        buffer = slots.file.buffer()
        nonce = self._sealer.seal(write, link, number, buffer)
        error: OSError | None = None
        try:
            slots.file.write(slot, buffer)
        except OSError as caught:
            error = caught
        now = self._clock()
        with self._lock:
            if error is not None or ticket.cancelled or slots.file.generation != generation:
                slots.spoil(slot, Former(write.name, nonce))
                slots.counters.refused += 1
                stored = False
            else:
                entry = Entry(
                    name=write.name,
                    link=link,
                    own=self._keys.link(write.name),
                    slot=slot,
                    position=write.position,
                    nonce=nonce,
                    write=number,
                    last_use=now,
                )
                slots.settle(entry)
                slots.counters.writes += 1
                slots.counters.write_bytes += self.shape.page_bytes
                slots.counters.write_seconds += time.perf_counter() - began
                stored = True
        if error is not None:
            slots.fault(error, "writing a page")
        return stored

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
            if self._closed:
                raise StoreError("the page store is closed")
            count = 0
            for name in wanted:
                ticket = self._tickets.get(name)
                if ticket is not None:
                    ticket.cancelled = True
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
        return any(
            ticket.writing for name, ticket in self._tickets.items() if name in names
        ) or any(
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
            if self._closed:
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
        slots = self._slots
        with slots.order:
            if self._closed or slots.degraded is not None:
                return 0
            with self._lock:
                before = -math.inf if max_age_seconds is None else self._clock() - max_age_seconds
                expired = [victim.entry for victim in self._index.expired(before)]
                for entry in expired:
                    self._index.remove(entry)
                    slots.counters.evicted_age += 1
                    slots.spoil(entry.slot, Former(entry.name, entry.nonce))
            slots.checkpoint(uses=True)
            return len(expired)

    def give_back(self, bytes_: int) -> None:
        """Shrink the files by about so many bytes for another slab, unless this one is busy."""
        slots = self._slots
        # Whoever asks may hold the order of another slab, whose owner may be asking us.
        if slots.order.acquire(blocking=False):
            try:
                if not self._closed and slots.degraded is None:
                    slots.guard("shrinking", lambda: shrink(slots, slots.slots_for(bytes_)))
            finally:
                slots.order.release()

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
            if self._closed:
                return
            self._closed = True
            for ticket in self._tickets.values():
                ticket.cancelled = True
            self._lock.wait_for(lambda: not self._tickets)
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
