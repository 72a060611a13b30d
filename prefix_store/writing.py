"""Writing pages of a slab: by runs of slots that follow each other.

    names -> tickets -> take slots -> seal each -> one write a run -> settle: in the index

A put announces its names first (tickets), so that a drop finds what is on its way: a page not yet
begun is not written any more, one being written is awaited and wiped. Pages of one call get
ascending slots in the order in which they were given, so that a chat lies in one piece as far as
free slots do.
"""

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from prefix_store.index import Entry
from prefix_store.layout import NO_LINK
from prefix_store.names import PageName
from prefix_store.reading import adjacent
from prefix_store.sealing import NONCE_BYTES, NONCES_BYTES, Sealer, StoreKeys
from prefix_store.slots import Former, Slots
from prefix_store.values import PageWrite


class Ticket:
    """A page that a put is about to write. cancelled: a drop was faster. writing: begun."""

    __slots__ = ("cancelled", "stored", "write", "writing")

    def __init__(self, write: PageWrite) -> None:
        self.write = write
        self.cancelled = False
        self.writing = False
        self.stored = False


class _Sealed:
    """A page in this thread's memory, on its way to a slot."""

    __slots__ = ("link", "nonce", "number", "own", "slot", "ticket")

    def __init__(
        self, ticket: Ticket, slot: int, number: int, nonce: bytes, link: bytes, own: bytes
    ) -> None:
        self.ticket = ticket
        self.slot = slot
        self.number = number
        self.nonce = nonce
        self.link = link
        self.own = own


class Writing:
    """The writing side of one slab. Any thread."""

    def __init__(
        self, slots: Slots, sealer: Sealer, keys: StoreKeys, clock: Callable[[], float]
    ) -> None:
        self._slots = slots
        self._sealer = sealer
        self._keys = keys
        self._clock = clock
        self.tickets: dict[PageName, Ticket] = {}  # changed with the slots' lock held

    def put(self, writes: Sequence[PageWrite]) -> list[bool]:
        """See `Slab.put`; names and sizes have been checked."""
        tickets, held = self._announce(writes)
        step = self._slots.file.run_slots
        line = [ticket for ticket in tickets if ticket is not None]
        try:
            while line:
                line = self._write(line[:step]) + line[step:]
            # What is there already, and what came twice, last: it may just have been written.
            touched = self._touch(
                [write.name for write, mine in zip(writes, tickets, strict=True) if mine is None]
            )
        finally:
            with self._slots.lock:
                self._withdraw(ticket for ticket in tickets if ticket is not None)
                for entry in held:
                    entry.pins -= 1
        return [next(touched) if ticket is None else ticket.stored for ticket in tickets]

    def cancel(self, name: PageName) -> None:
        """A name is dropped: what is not begun is not written. Call with the slots' lock held."""
        ticket = self.tickets.get(name)
        if ticket is not None:
            ticket.cancelled = True

    def in_flight(self, names: Collection[PageName]) -> bool:
        """Whether a thread is just writing one of these pages. With the slots' lock held."""
        return any(ticket.writing for name, ticket in self.tickets.items() if name in names)

    def _announce(self, writes: Sequence[PageWrite]) -> tuple[list[Ticket | None], list[Entry]]:
        """Tickets for the names to write, and pins on the pages that are there already: they must
        not make room for the others."""
        slots, tickets, held = self._slots, list[Ticket | None](), list[Entry]()
        with slots.lock:
            for write in writes:
                ticket = None
                entry = slots.index.entries.get(write.name)
                if entry is not None:
                    entry.pins += 1
                    held.append(entry)
                elif write.name not in self.tickets and not slots.closed:
                    ticket = self.tickets[write.name] = Ticket(write)
                tickets.append(ticket)
        return tickets, held

    def _withdraw(self, tickets: Iterable[Ticket]) -> None:
        """Whoever waits for these names may go on. Call with the slots' lock held."""
        for ticket in tickets:
            if self.tickets.get(ticket.write.name) is ticket:
                del self.tickets[ticket.write.name]
        self._slots.lock.notify_all()

    def _touch(self, names: Sequence[PageName]) -> Iterator[bool]:
        """Count a use of each that is here; which of them are."""
        slots, found = self._slots, list[bool]()
        if names:
            now = self._clock()
            with slots.lock:
                for name in names:
                    entry = None if slots.closed else slots.index.entries.get(name)
                    if entry is not None:
                        slots.note_use(entry, now)
                    found.append(entry is not None)
                slots.counters.touched += sum(found)
                slots.counters.refused += len(found) - sum(found)
        return iter(found)

    def _write(self, run: Sequence[Ticket]) -> list[Ticket]:
        """Write some pages, no more than a run holds; those that are still to be written."""
        slots = self._slots
        began = time.perf_counter()
        # The pages before these may be leaves and first in line: they must not make room.
        parents: list[Entry] = []
        try:
            with slots.order:
                going = self._begin(run, parents)
                taken = slots.take(len(going)) if going else []
                first = slots.write + 1
                slots.write += len(taken)
            if not taken:
                self._refuse(going)
                return []
            rest = going[len(taken) :]
            generation = slots.file.generation
            try:
                sealed = self._seal(going[: len(taken)], taken, first, parents)
                written, error = self._store(taken)
            except BaseException:
                # A page that is not in one piece, say: its slot is for others again.
                with slots.lock:
                    for ticket, slot in zip(going, taken, strict=False):
                        slots.spoil(slot, Former(ticket.write.name, None))
                raise
            with slots.lock:
                for ticket in rest:
                    ticket.writing = False
                if slots.file.generation != generation:
                    written = 0  # a sync failed meanwhile: nobody knows what is on the disk
                self._settle(sealed, written)
                self._withdraw(each.ticket for each in sealed)
                if written:
                    slots.counters.write_seconds += time.perf_counter() - began
        finally:
            with slots.lock:
                for entry in parents:
                    entry.pins -= 1
        if error is not None:
            slots.fault(error, "writing a page")
        return rest

    def _begin(self, run: Sequence[Ticket], parents: list[Entry]) -> list[Ticket]:
        """Those of a run that nobody has dropped, which from here on a drop waits for; their
        parents are pinned and added."""
        slots = self._slots
        with slots.lock:
            going = [ticket for ticket in run if not ticket.cancelled]
            slots.counters.refused += len(run) - len(going)
            self._withdraw(ticket for ticket in run if ticket.cancelled)
            for ticket in going:
                ticket.writing = True
                parent = ticket.write.parent
                entry = None if parent is None else slots.index.entries.get(parent)
                if entry is not None:
                    entry.pins += 1
                    parents.append(entry)
        return going

    def _refuse(self, tickets: Sequence[Ticket]) -> None:
        with self._slots.lock:
            self._slots.counters.refused += len(tickets)
            self._withdraw(tickets)

    def _seal(
        self, going: Sequence[Ticket], taken: Sequence[int], first: int, parents: Sequence[Entry]
    ) -> list[_Sealed]:
        """Fill this thread's memory, a slot for each."""
        memory = self._slots.file.writing_run()
        random = os.urandom(NONCES_BYTES * len(going))
        links: dict[PageName | None, bytes] = {entry.name: entry.own for entry in parents}
        links[None] = NO_LINK
        sealed: list[_Sealed] = []
        for place, (ticket, slot) in enumerate(zip(going, taken, strict=True)):
            write = ticket.write
            link = links.get(write.parent)
            if link is None:
                link = self._keys.link(write.parent)
            own = links[write.name] = self._keys.link(write.name)
            nonces = random[NONCES_BYTES * place : NONCES_BYTES * (place + 1)]
            number = first + place
            self._sealer.seal(write, link, number, nonces, memory.slots[place])
            sealed.append(_Sealed(ticket, slot, number, nonces[NONCE_BYTES:], link, own))
        return sealed

    def _store(self, taken: Sequence[int]) -> tuple[int, OSError | None]:
        """Write this thread's memory to these slots; how many of the first are written, and why
        the others are not."""
        file, memory = self._slots.file, self._slots.file.writing_run()
        for first, last in adjacent(taken):
            try:
                file.write(taken[first], memory.part(first, last))
            except OSError as error:
                return first, error
        return len(taken), None

    def _settle(self, sealed: Sequence[_Sealed], written: int) -> None:
        """Into the index with the first `written`, unless they were dropped meanwhile. Call with
        the slots' lock held."""
        slots, now = self._slots, self._clock()
        stored = 0
        for place, page in enumerate(sealed):
            write = page.ticket.write
            if place >= written or page.ticket.cancelled:
                slots.spoil(page.slot, Former(write.name, page.nonce))
                continue
            slots.settle(
                Entry(
                    name=write.name,
                    link=page.link,
                    own=page.own,
                    slot=page.slot,
                    position=write.position,
                    nonce=page.nonce,
                    write=page.number,
                    last_use=now,
                )
            )
            page.ticket.stored = True
            stored += 1
        slots.counters.writes += stored
        slots.counters.write_bytes += stored * self._sealer.shape.page_bytes
        slots.counters.refused += len(sealed) - stored
