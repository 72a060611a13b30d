"""The slots of a slab: which may be written next, what must be wiped, and the checkpoints.

Theory of operation. Pages are written without a sync; a torn or lost write is a miss when it is
read. What must never be in doubt is where the ciphertext of a page may lie, since forgetting a page
means overwriting it. So slots are only written while they stand in the *window*, a list that is on
the disk before the first of them is written. After a crash the slots of the last window are read
and decrypted, and those that are not whole are wiped; all others are as the table says.

When the window is used up, a checkpoint is made: unclean slots are wiped, the slab is synced, the
table's changed blocks are written and synced, and the next window is chosen and synced:

    take -> write -> settle        (many threads)       take … take -> checkpoint -> take …

    free      slots with nothing in them             window   slots that may be taken, in order
    busy      slots that are being written           unclean  slots to wipe before they are used
    former    pages overwritten since the last checkpoint: still on the disk for all we know
    taken     slots written since the last checkpoint
    dirty     slots whose record on the disk is out of date

Locks: `order` (one thread at a time takes slots, checkpoints, wipes, shrinks) is taken before
`lock` (the index and the sets above, held for microseconds, never while the disk works).
"""

import errno
import heapq
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import islice

from prefix_store.counters import Counters
from prefix_store.gone import Gone
from prefix_store.index import Entry, Index, Victim
from prefix_store.layout import GONE_RECORD_BYTES, SLOTS_OFFSET, Record
from prefix_store.room import Room
from prefix_store.slab_file import SlabFile
from prefix_store.table import LARGEST_WINDOW, State, Table

WINDOW_BYTES = 128 << 20  # read again after a crash: well under a second
VICTIMS_MOST = 2048  # are chosen at a time: some 10 ms of the lock that look-ups wait for
GONE_STEP = 64 * GONE_RECORD_BYTES  # room for tombstones is claimed ahead in such steps
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Former:
    """A page whose ciphertext may still be in a slot that is no longer its own."""

    name: bytes
    nonce: bytes | None


class Slots:
    """See the module. Made by `recovery.open_slots`; used by one Slab."""

    def __init__(
        self,
        *,
        stem: str,
        file: SlabFile,
        table: Table,
        gone: Gone,
        index: Index,
        room: Room,
        counters: Counters,
        clock: Callable[[], float],
        free_bytes: Callable[[], int],
    ) -> None:
        self.file = file
        self.table = table
        self.gone = gone
        self.index = index
        self.counters = counters
        self.lock = threading.Condition()
        self.order = threading.Lock()
        self.high = 0  # slots of the file
        self.write = 0  # number of the last write
        self.degraded: str | None = None
        self.closed = False  # nothing is found or taken any more
        self.free: set[int] = set()
        self.busy: set[int] = set()
        self.unclean: dict[int, list[Former]] = {}
        self.former: dict[int, list[Former]] = {}
        self.taken: set[int] = set()
        self.dirty: set[int] = set()
        self.used: set[int] = set()  # read since: their records lack the last use, no more
        self._window: deque[Victim | int] = deque()
        self.stem = stem
        self._room = room
        self._clock = clock
        self._free_bytes = free_bytes
        self._full = False  # the disk had no space: no growth until it has again

    # What a put does.

    def take(self, count: int) -> list[int]:
        """Up to `count` slots to write, ascending, busy from here on: fewer where the window ends,
        none where there is no room, or the disk fails. Call with `order` held."""
        for _ in range(3):
            if self.degraded is not None:
                return []
            with self.lock:
                taken = list(islice(iter(self._next, None), count))
            if taken:
                return sorted(taken)
            if not self.checkpoint():
                return []
        return []

    def _next(self) -> int | None:
        while self._window:
            candidate = self._window.popleft()
            if isinstance(candidate, Victim):
                if not self.index.still_goes(candidate):
                    continue
                slot = candidate.entry.slot
                self.evict(candidate.entry, orphan=candidate.orphan is not None)
                self.former.setdefault(slot, []).append(
                    Former(candidate.entry.name, candidate.entry.nonce)
                )
            else:
                slot = candidate
                if slot in self.free:
                    self.free.discard(slot)
                elif slot == self.high:
                    self.high += 1
                else:
                    continue
            self.busy.add(slot)
            self.taken.add(slot)
            self.dirty.add(slot)
            return slot
        return None

    def evict(self, entry: Entry, *, orphan: bool) -> None:
        """Take an entry out to make room. Call with `lock` held."""
        self.index.remove(entry)
        if orphan:
            self.counters.evicted_orphan += 1
        else:
            self.counters.evicted_space += 1

    def note_use(self, entry: Entry, now: float) -> None:
        """Count a use of a page. Call with `lock` held."""
        entry.last_use = now
        entry.uses += 1
        self.used.add(entry.slot)

    def settle(self, entry: Entry) -> None:
        """A taken slot was written. Call with `lock` held."""
        self.busy.discard(entry.slot)
        self.index.add(entry)

    def spoil(self, slot: int, *former: Former) -> None:
        """What is in a slot is of no use, and may hold parts of these pages. With `lock` held."""
        self.busy.discard(slot)
        self.unclean.setdefault(slot, []).extend(former)
        self.unclean[slot].extend(self.former.get(slot, ()))
        self.dirty.add(slot)

    def forsake(self, entry: Entry) -> None:
        """An entry turned out to be bad: its slot is wiped later. Call with `lock` held."""
        if self.index.entries.get(entry.name) is entry:
            self.index.remove(entry)
            self.counters.evicted_bad += 1
            self.spoil(entry.slot, Former(entry.name, entry.nonce))

    # Checkpoints.

    def checkpoint(self, *, uses: bool = False, ahead: bool = True) -> bool:
        """Make all writes that have settled certain and choose the next window; False where the
        disk refuses, or no slot can be had. Call with `order` held.

        uses: save when pages were last used, too. ahead: False leaves the window empty.
        """
        return self.guard("a checkpoint", lambda: self._checkpoint(uses=uses, ahead=ahead))

    def settle_all(self) -> None:
        """A checkpoint without a window. Raises OSError. Call with `order` held."""
        self._checkpoint(uses=False, ahead=False)

    def _checkpoint(self, *, uses: bool, ahead: bool) -> bool:
        with self.lock:
            settled = self.taken - self.busy
        self.clean()
        self.file.sync()
        if uses:
            with self.lock:
                self.dirty |= self.used & self.index.owners.keys()
                self.used.clear()
        self.save_records(set(self.dirty))
        if ahead:
            self._press()
        with self.lock:
            # Slots that settled while we synced are in doubt until the next checkpoint.
            self.taken -= settled
            for slot in settled:
                self.former.pop(slot, None)
            in_doubt = sorted(self.taken)
            self.dirty |= self.taken
            self._window = deque()
        plan = self._plan() if ahead else []
        coming = [each.entry.slot if isinstance(each, Victim) else each for each in plan]
        self.save_state(coming + in_doubt)
        self._window = deque(plan)
        return bool(plan)

    def save_state(self, window: Collection[int]) -> None:
        """Write down which slots are in doubt. Raises OSError."""
        self.table.save_state(
            State(self.write, self._clock(), tuple(window), self.counters.as_mapping())
        )

    def clean(self) -> None:
        """Wipe unclean slots, on the disk when it returns, then free them. Raises OSError. Call
        with `order` held."""
        with self.lock:
            slots = [slot for slot in self.unclean if slot not in self.busy]
        if not slots:
            return
        for slot in slots:
            self.file.wipe(slot)
        self.file.sync()
        self.save_records(slots)
        with self.lock:
            for slot in slots:
                del self.unclean[slot]
                self.former.pop(slot, None)
                if slot < self.high:
                    self.free.add(slot)

    def save_records(self, slots: Collection[int]) -> None:
        """Write the records of these slots as they are now, and sync. Raises OSError."""
        with self.lock:
            self.dirty.difference_update(slots)
        try:
            self.table.save_blocks(slots, self._record, self.high)
            self.table.sync()
        except OSError:
            with self.lock:
                self.dirty.update(slots)
            raise

    def _record(self, slot: int) -> Record | None:
        entry = self.index.owners.get(slot)
        if entry is None:
            return None
        return Record(
            entry.name,
            entry.link,
            entry.nonce,
            entry.position,
            entry.write,
            entry.last_use,
            entry.uses,
        )

    def _plan(self) -> list[Victim | int]:
        """The slots of the next window: free ones, then growth, then what may be evicted. Only what
        holds `order` changes the first two, so that `lock` is taken for the last."""
        count = max(1, min(LARGEST_WINDOW - len(self.taken), self._window_slots))
        plan: list[Victim | int] = [*heapq.nsmallest(count, self.free)]
        plan.extend(range(self.high, self.high + self._growth(count - len(plan))))
        if not plan:
            # A part of a small slab only, so that what is chosen is not long out of date.
            with self.lock:
                plan.extend(self.index.victims(max(1, min(count, self.high // 8, VICTIMS_MOST))))
        return plan

    @property
    def _window_slots(self) -> int:
        return max(1, min(LARGEST_WINDOW, WINDOW_BYTES // self.file.layout.slot_bytes))

    def _press(self) -> None:
        """Before the window is chosen: where it will not fit, others may make room."""
        if not self._full and len(self.free) < self._window_slots:
            least, wanted = self.high + 1, self.high + self._window_slots
            self._room.press(self.stem, self.bytes_for(least), self.bytes_for(wanted))

    def _growth(self, wanted: int) -> int:
        """By how many slots the files may grow now; the room for them is claimed."""
        if wanted > 0 and self._full:
            self._full = self._free_bytes() < 4 * self.file.layout.slot_bytes
        if wanted <= 0 or self._full:
            grown = 0
        else:
            size = self.file.layout.slot_bytes
            left = min(
                self._room.left(self.stem), self.bytes_for(self.high) + self._free_bytes() // 2
            )
            grown = max(0, min(wanted, (left - self.bytes_for(self.high)) // size))
            while grown and self.bytes_for(self.high + grown) > left:
                grown -= 1
        while not self._room.claim(self.stem, self.bytes_for(self.high + grown)):
            if grown == 0:
                break
            grown //= 2
        return grown

    @property
    def file_bytes(self) -> int:
        """Size of the slab's files now, or a little more."""
        return (
            SLOTS_OFFSET
            + self.high * self.file.layout.slot_bytes
            + Table.bytes_for(self.high)
            + self.gone.file_bytes
        )

    def slots_for(self, bytes_: int) -> int:
        """How many slots must go to give so many bytes back."""
        return -(-bytes_ // self.file.layout.slot_bytes)

    def bytes_for(self, slots: int) -> int:
        """Size of the slab's files with so many slots, with room for the next tombstones."""
        gone = -(-(self.gone.file_bytes + 1) // GONE_STEP) * GONE_STEP
        return SLOTS_OFFSET + slots * self.file.layout.slot_bytes + Table.bytes_for(slots) + gone

    def cut(self, target: int) -> None:
        """Shorten the files to `target` slots, none beyond is in use. Raises OSError. Call with
        `order` held."""
        self.file.truncate(target)
        self.file.sync()
        self.table.truncate(target)
        with self.lock:
            self.high = target
            self.free = {slot for slot in self.free if slot < target}
            self.dirty = {slot for slot in self.dirty if slot < target}
        if target:
            self.save_records([target - 1])  # the rest of its block is empty now
        self.save_state([])
        self._room.claim(self.stem, self.bytes_for(target))

    def release(self) -> int:
        """Give back the room of slots that were to be written next and are not there yet; how many
        bytes it was. Raises OSError. Call with `order` held."""
        before = self._room.claimed(self.stem)
        self.settle_all()
        self._room.claim(self.stem, self.bytes_for(self.high))
        return before - self._room.claimed(self.stem)

    def claim_tombstones(self) -> bool:
        """Claim the room for the tombstones that are remembered; False if there is none."""
        return self._room.claim(self.stem, self.bytes_for(self.high))

    # Faults.

    def guard(self, doing: str, act: Callable[[], bool | None]) -> bool:
        """Run `act`, whether it says True; an OSError is counted, makes the slab degraded, and is
        False."""
        try:
            return bool(act())
        except OSError as error:
            self.fault(error, doing)
            return False

    def fault(self, error: OSError, doing: str) -> None:
        """Count an I/O error and stop writing, saying why, until a probe succeeds."""
        if error.errno == errno.ENOSPC:
            reason = f"no space left on the disk ({doing})"
        else:
            words = os.strerror(error.errno) if error.errno else str(error)
            reason = f"{doing}: {words}"
        with self.lock:
            self.counters.io_errors += 1
            self._full = self._full or error.errno == errno.ENOSPC
            fresh = self.degraded is None
            self.degraded = reason
            if not self.file.writable:
                self._distrust()
        if fresh:
            log.warning("The page store stops writing: %s", reason)

    def _distrust(self) -> None:
        """A sync failed: whatever was written since the last checkpoint may be lost or not."""
        for slot in self.taken - self.busy:
            entry = self.index.owners.get(slot)
            if entry is not None:
                self.forsake(entry)
            elif slot not in self.free:
                self.spoil(slot)

    @property
    def full(self) -> bool:
        """Whether the disk had no space for growth when last tried."""
        return self._full
