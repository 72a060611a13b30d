"""The table of a slab: the checkpoint of its index, one record a slot, written in place.

Records lie in blocks of 42 with a code each, so that a checkpoint writes only the blocks of slots
that changed, and a damaged block costs a look at the headers of its 42 slots. Beside them stands
the state: the window (the slots that may have been written since the last checkpoint) and the
counters. It has two places, written in turn, so that one of them is always whole.
"""

import json
import struct
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from prefix_store.files import Files, read_bytes, write_all
from prefix_store.layout import (
    BLOCKS_OFFSET,
    CODE_BYTES,
    RECORDS_PER_BLOCK,
    STATE_BYTES,
    STATE_OFFSETS,
    TABLE_MAGIC,
    UNIT,
    Record,
    pack_file_header,
    pack_record,
    unpack_block,
)
from prefix_store.sealing import StoreKeys
from prefix_store.values import PageShape

# turn, write number, saved at, length of the counters, slots in the window
_STATE = struct.Struct("<QQdII")
_COUNTERS_AT = 64
_WINDOW_AT = UNIT
LARGEST_WINDOW = (STATE_BYTES - CODE_BYTES - _WINDOW_AT) // 4
BATCH_BLOCKS = 256  # a megabyte of table read at a time


@dataclass(frozen=True, slots=True)
class State:
    """What the last checkpoint knew. window: slots that may have been written since."""

    write: int = 0
    saved_at: float = 0.0
    window: tuple[int, ...] = ()
    counters: Mapping[str, float] = field(default_factory=dict[str, float])


class Table:
    """The table file of one slab. One thread at a time."""

    def __init__(
        self, files: Files, path: Path, keys: StoreKeys, shape: PageShape, slab_id: bytes
    ) -> None:
        self._files = files
        self._path = path
        self._keys = keys
        self._shape = shape
        self._slab_id = slab_id
        self._descriptor: int | None = None
        self._turn = 0
        self._unsynced: set[int] = set()  # blocks written since the last sync that succeeded

    @staticmethod
    def bytes_for(slots: int) -> int:
        """Length of the table file of a slab with so many slots."""
        return BLOCKS_OFFSET + UNIT * -(-slots // RECORDS_PER_BLOCK)

    def create(self) -> None:
        """Write an empty table in place of what is there, and sync it."""
        self.close()
        self._descriptor = self._files.open(self._path, create=True)
        self._files.truncate(self._descriptor, 0)
        write_all(self._files, self._descriptor, self._header(), 0)
        self._turn = 0
        for _ in STATE_OFFSETS:
            self.save_state(State())

    def load(
        self, slots: int, *, repair: bool = True
    ) -> tuple[State, list[Record | None], list[int]]:
        """The state, a record for each of `slots` slots and the rest of the last block, and the
        slots whose record is lost.

        Raises OSError; a file that is missing or not this slab's counts as all records lost, and
        is made anew where `repair`.
        """
        try:
            self._descriptor = self._files.open(self._path, create=False, writable=repair)
            ours = read_bytes(self._files, self._descriptor, UNIT, 0) == self._header()
        except FileNotFoundError:
            ours = False
        if not ours or self._descriptor is None:
            if repair:
                self.create()
            return State(), [None] * slots, list(range(slots))
        records: list[Record | None] = []
        lost: list[int] = []
        blocks = -(-slots // RECORDS_PER_BLOCK)
        for first in range(0, blocks, BATCH_BLOCKS):
            many = min(BATCH_BLOCKS, blocks - first)
            raw = memoryview(
                read_bytes(self._files, self._descriptor, UNIT * many, BLOCKS_OFFSET + UNIT * first)
            )
            for place in range(many):
                block = raw[UNIT * place : UNIT * (place + 1)]
                number = first + place
                if len(block) == UNIT and self._block_code(number, block) == bytes(
                    block[-CODE_BYTES:]
                ):
                    records.extend(unpack_block(block))
                else:
                    begin = number * RECORDS_PER_BLOCK
                    lost.extend(range(begin, min(begin + RECORDS_PER_BLOCK, slots)))
                    records.extend([None] * RECORDS_PER_BLOCK)
        state, whole = self._load_state()
        # With one state damaged, the newer one may be lost: any slot may have been written since.
        return state, records, lost if whole else list(range(slots))

    def save_blocks(
        self, slots: Collection[int], record: Callable[[int], Record | None], length: int
    ) -> None:
        """Write the blocks of the given slots as `record` says they are, not synced. A table of
        `length` slots: records beyond are empty. Raises OSError."""
        blocks = {slot // RECORDS_PER_BLOCK for slot in slots} | self._unsynced
        self._unsynced |= blocks
        descriptor = self._writable()
        for block in sorted(blocks):
            first = block * RECORDS_PER_BLOCK
            body = b"".join(
                pack_record(record(slot) if slot < length else None)
                for slot in range(first, first + RECORDS_PER_BLOCK)
            ).ljust(UNIT - CODE_BYTES, b"\0")
            write_all(
                self._files,
                descriptor,
                body + self._block_code(block, body + bytes(CODE_BYTES)),
                BLOCKS_OFFSET + UNIT * block,
            )

    def sync(self) -> None:
        """Return when all that was written is on the disk. Raises OSError, and then the descriptor
        is gone and the same blocks are written again next time."""
        descriptor = self._writable()
        try:
            self._files.sync(descriptor)
        except OSError:
            self.close()
            raise
        self._unsynced.clear()

    def save_state(self, state: State) -> None:
        """Write the state at its other place, and sync. Raises OSError."""
        assert len(state.window) <= LARGEST_WINDOW
        counters = json.dumps(dict(state.counters)).encode()
        assert len(counters) <= UNIT - _COUNTERS_AT
        turn = self._turn + 1
        head = _STATE.pack(turn, state.write, state.saved_at, len(counters), len(state.window))
        body = (head.ljust(_COUNTERS_AT, b"\0") + counters).ljust(_WINDOW_AT, b"\0")
        body += struct.pack(f"<{len(state.window)}I", *state.window)
        body = body.ljust(STATE_BYTES - CODE_BYTES, b"\0")
        descriptor = self._writable()
        write_all(self._files, descriptor, body + self._state_code(body), STATE_OFFSETS[turn % 2])
        self.sync()
        self._turn = turn

    def is_longer(self, slots: int) -> bool:
        """Whether the file has records of more slots. Raises OSError."""
        return self._files.size(self._writable()) > self.bytes_for(slots)

    def truncate(self, slots: int) -> None:
        """Cut the file to so many slots. Raises OSError."""
        self._files.truncate(self._writable(), self.bytes_for(slots))
        kept = -(-slots // RECORDS_PER_BLOCK)
        self._unsynced = {block for block in self._unsynced if block < kept}

    def saved_at(self) -> float | None:
        """When the newest state was written, or None where none is whole. Raises OSError."""
        self._descriptor = self._files.open(self._path, create=False, writable=False)
        try:
            state, _ = self._load_state()
            return state.saved_at if self._turn else None
        finally:
            self.close()

    def close(self) -> None:
        """Give the descriptor back."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):
                self._files.close(descriptor)

    def _writable(self) -> int:
        if self._descriptor is None:
            self._descriptor = self._files.open(self._path, create=False)
        return self._descriptor

    def _load_state(self) -> tuple[State, bool]:
        """The newest state that is whole, and whether both are."""
        assert self._descriptor is not None
        best, whole = State(), True
        for offset in STATE_OFFSETS:
            raw = read_bytes(self._files, self._descriptor, STATE_BYTES, offset)
            body = raw[:-CODE_BYTES]
            if len(raw) < STATE_BYTES or self._state_code(body) != raw[-CODE_BYTES:]:
                whole = False
                continue
            turn, write, saved_at, length, slots = _STATE.unpack_from(body)
            if turn <= self._turn:
                continue
            self._turn = turn
            counters: dict[str, float] = json.loads(body[_COUNTERS_AT : _COUNTERS_AT + length])
            window = struct.unpack_from(f"<{slots}I", body, _WINDOW_AT)
            best = State(write, saved_at, tuple(window), counters)
        return best, whole

    def _header(self) -> bytes:
        fields = pack_file_header(TABLE_MAGIC, self._shape, self._slab_id)
        return (fields + self._keys.code(b"table header", fields)).ljust(UNIT, b"\0")

    def _block_code(self, block: int, raw: bytes | memoryview) -> bytes:
        place = b"table block" + self._slab_id + block.to_bytes(8, "little")
        return self._keys.code(place, raw[:-CODE_BYTES])

    def _state_code(self, body: bytes) -> bytes:
        return self._keys.code(b"table state" + self._slab_id, body)
