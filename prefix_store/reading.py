"""Reading pages of a slab: by runs of slots that follow each other, each page verified by itself.

    names -> index: pin -> slots in order -> one read a run -> each slot: header, token ids, page

The pages of a chat were mostly written one after the other, so they mostly lie so, and a read of
several small slots costs little more than that of one. What a run brings is held for one page after
the other exactly as if each had been read alone; a run that the disk refuses is read slot by slot,
so that a bad sector costs one page.
"""

import time
from collections.abc import Callable, Iterator, Sequence

from prefix_store.index import Entry
from prefix_store.layout import unpack_slot_header
from prefix_store.names import PageName
from prefix_store.sealing import Sealer
from prefix_store.slab_file import SlotRun
from prefix_store.slots import Slots
from prefix_store.values import PageRead, Verdict

# What came of a page: it is the one (True), it has other token ids (None), it is not what was
# sealed (False), or why the disk did not give it.
_Outcome = bool | None | OSError


class _Wanted:
    """A page that the index knows, pinned. place: among those that were asked for. refusal: of the
    run that it is the first of, which was then read slot by slot."""

    __slots__ = ("entry", "outcome", "place", "refusal", "slot")

    def __init__(self, place: int, entry: Entry) -> None:
        self.place = place
        self.entry = entry
        self.slot = entry.slot
        self.outcome: _Outcome = False
        self.refusal: OSError | None = None


class Reading:
    """The reading side of one slab. Any thread."""

    def __init__(self, slots: Slots, sealer: Sealer, clock: Callable[[], float]) -> None:
        self._slots = slots
        self._sealer = sealer
        self._clock = clock

    def get(self, reads: Sequence[PageRead]) -> list[bool]:
        """See `Slab.get`; sizes have been checked."""
        step = self._slots.file.run_slots
        results: list[bool] = []
        for first in range(0, len(reads), step):
            results.extend(self._get(reads[first : first + step]))
        return results

    def _get(self, reads: Sequence[PageRead]) -> list[bool]:
        """As many pages as one run holds."""
        began = time.perf_counter()
        results = [False] * len(reads)
        wanted = self._pin([read.name for read in reads])
        self._examine(wanted, [read.tokens for read in reads], [read.into for read in reads])
        for error in self._book(wanted, began, absent=len(reads) - len(wanted)):
            self._slots.fault(error, "reading a page")
        for page in wanted:
            results[page.place] = page.outcome is True
        return results

    def verify(
        self, names: Sequence[PageName], into: Sequence[bytearray | memoryview]
    ) -> list[Verdict]:
        """See `Slab.verify`; sizes have been checked."""
        step = self._slots.file.run_slots
        verdicts: list[Verdict] = []
        for first in range(0, len(names), step):
            last = first + step
            verdicts.extend(self._verify(names[first:last], into[first:last]))
        return verdicts

    def _verify(
        self, names: Sequence[PageName], into: Sequence[bytearray | memoryview]
    ) -> list[Verdict]:
        """As many pages as one run holds."""
        verdicts = [Verdict.ABSENT] * len(names)
        wanted = self._pin(names)
        self._examine(wanted, [None] * len(names), into)
        slots, errors = self._slots, list[OSError]()
        with slots.lock:
            for page in wanted:
                entry, outcome = page.entry, page.outcome
                entry.pins -= 1
                if page.refusal is not None:
                    errors.append(page.refusal)
                if outcome is True:
                    verdicts[page.place] = Verdict.RIGHT
                elif slots.index.entries.get(entry.name) is entry and entry.slot == page.slot:
                    refused = isinstance(outcome, OSError)
                    verdicts[page.place] = Verdict.UNREADABLE if refused else Verdict.WRONG
                    slots.forsake(entry)
                    if isinstance(outcome, OSError):
                        errors.append(outcome)
        for error in errors:
            slots.fault(error, "checking a page")
        return verdicts

    def _examine(
        self,
        wanted: Sequence[_Wanted],
        tokens: Sequence[bytes | None],
        into: Sequence[bytearray | memoryview],
    ) -> None:
        """Read and open pinned pages; they are unpinned where that raises. tokens, into: by the
        pages' places."""
        try:
            memory = self._slots.file.reading_run()
            for first, last in adjacent([page.slot for page in wanted]):
                self._read_run(wanted[first:last], first, memory)
                for at in range(first, last):
                    place = wanted[at].place
                    self._open(wanted[at], tokens[place], into[place], memory, at)
        except BaseException:
            # A buffer that cannot be written, say: that tells nothing about the pages.
            with self._slots.lock:
                for page in wanted:
                    page.entry.pins -= 1
            raise

    def _pin(self, names: Sequence[PageName]) -> list[_Wanted]:
        """The pages that are here, in the order of their slots."""
        slots = self._slots
        wanted: list[_Wanted] = []
        with slots.lock:
            entries = {} if slots.closed else slots.index.entries
            for place, name in enumerate(names):
                entry = entries.get(name)
                if entry is not None:
                    entry.pins += 1
                    wanted.append(_Wanted(place, entry))
        wanted.sort(key=_slot)
        return wanted

    def _read_run(self, pages: Sequence[_Wanted], first: int, memory: SlotRun) -> None:
        """Bring slots that follow each other into memory, from its place `first` on."""
        file, size = self._slots.file, self._sealer.layout.slot_bytes
        sealed = self._sealer.layout.sealed_bytes
        last = first + len(pages)
        wanted = memory.part(first, last)[: (len(pages) - 1) * size + sealed]
        try:
            got = file.read_run(pages[0].slot, wanted)
        except OSError as error:
            if len(pages) == 1:
                pages[0].outcome = error
                return
            for place, page in enumerate(pages, first):
                self._read_run([page], place, memory)
            if not any(isinstance(page.outcome, OSError) for page in pages):
                pages[0].refusal = error  # nothing is lost, but a disk that errs is told of
            return
        for place, page in enumerate(pages):
            page.outcome = place * size + sealed <= got

    def _open(
        self,
        page: _Wanted,
        tokens: bytes | None,
        into: bytearray | memoryview,
        memory: SlotRun,
        place: int,
    ) -> None:
        if page.outcome is not True:
            return
        slot, sealer = memory.slots[place], self._sealer
        header = unpack_slot_header(sealer.shape, sealer.slab_id, slot.header)
        # The name asked for, and the very write that the index knows: an older one is stale.
        if header is None or header.name != page.entry.name or header.nonce != page.entry.nonce:
            page.outcome = False
        else:
            page.outcome = sealer.page(header, slot, tokens, into)

    def _book(self, wanted: Sequence[_Wanted], began: float, *, absent: int) -> list[OSError]:
        """Unpin and count; the errors to tell of."""
        slots, counters = self._slots, self._slots.counters
        now = self._clock()
        hits, errors = 0, list[OSError]()
        with slots.lock:
            counters.missed_absent += absent
            for page in wanted:
                entry, outcome = page.entry, page.outcome
                entry.pins -= 1
                if page.refusal is not None:
                    errors.append(page.refusal)
                if outcome is True:
                    slots.note_use(entry, now)
                    hits += 1
                elif slots.index.entries.get(entry.name) is not entry or entry.slot != page.slot:
                    counters.missed_absent += 1  # dropped or moved under our hands
                elif outcome is None:
                    counters.missed_tokens += 1
                elif outcome is False:
                    counters.missed_authentication += 1
                    slots.forsake(entry)
                else:
                    counters.missed_io += 1
                    slots.forsake(entry)
                    errors.append(outcome)
            counters.hits += hits
            counters.read_bytes += hits * self._sealer.shape.page_bytes
            if hits:
                counters.read_seconds += time.perf_counter() - began
        return errors


def adjacent(slots: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The longest runs of ascending slots of which each is one more than the one before it, as
    places: the first, and the one after the last."""
    first = 0
    for place in range(1, len(slots) + 1):
        if place == len(slots) or slots[place] != slots[place - 1] + 1:
            yield first, place
            first = place


def _slot(page: _Wanted) -> int:
    return page.slot
