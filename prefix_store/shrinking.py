"""Giving bytes back to the disk: a slab with fewer slots.

    checkpoint            nothing is in doubt
    evict, wipe           until the pages left fit in fewer slots
    window = holes        the slots that pages from the end will be copied into
    copy, sync            a slot says nothing of its place, so its bytes are copied as they are
    records of the holes  from here on a page that is there twice is recognised (recovery, 5)
    cut slab, cut table

A crash between any two leaves each page in one slot at least, or in a slot of the window.
"""

from prefix_store.index import Index
from prefix_store.slots import Former, Slots
from prefix_store.table import LARGEST_WINDOW

MOVES = LARGEST_WINDOW // 2  # at a time: they have to stand in the window


def shrink(slots: Slots, fewer: int) -> bool:
    """Cut up to `fewer` slots; False where pages in use stood in the way. Raises OSError. Call with
    `order` held."""
    while fewer > 0 and slots.high > 0:
        step = min(fewer, MOVES)
        if not _shrink(slots, max(0, slots.high - step)):
            return False
        fewer -= step
    return True


def _shrink(slots: Slots, target: int) -> bool:
    with slots.lock:
        # Puts that have their slot already end without `order`; no other can take one.
        slots.lock.wait_for(lambda: not slots.busy)
    slots.settle_all()
    with slots.lock:
        for victim in slots.index.victims(len(slots.index) - target):
            entry = victim.entry
            slots.evict(entry, orphan=victim.orphan is not None)
            slots.spoil(entry.slot, Former(entry.name, entry.nonce))
    slots.clean()
    with slots.lock:
        movers = [entry for slot, entry in slots.index.owners.items() if slot >= target]
        holes = sorted(slot for slot in slots.free if slot < target)[: len(movers)]
        if len(holes) < len(movers):
            return False
    slots.save_state(holes)
    buffer = slots.file.buffer()
    for entry, hole in zip(movers, holes, strict=True):
        if slots.file.read(entry.slot, buffer, len(buffer)):
            slots.file.write(hole, buffer)
    slots.file.sync()
    with slots.lock:
        for entry, hole in zip(movers, holes, strict=True):
            _move(slots.index, entry.slot, hole)
            slots.free.discard(hole)
    slots.save_records(holes)
    slots.cut(target)
    return True


def _move(index: Index, slot: int, hole: int) -> None:
    entry = index.owners.pop(slot, None)
    if entry is not None:  # not forsaken by a read meanwhile
        entry.slot = hole
        index.owners[hole] = entry
