"""Tiles: which program of an attention kernel reads which positions for which rows.

May not know: Triton. It counts, in numpy, and hands over integers.

Theory: a tile is a stretch of a sequence's positions and its *members*, the rows that read it
together. A slice is some tiles of neighbouring queries, each from the first position that its
first query sees to the last one's own; a decode row is one tile; a prefix that decode rows share is
one tile for as many of them as one program takes (`../runs.py` finds the tree of those). Then every
tile is cut that is longer than an even share of the step's work, so that few long contexts keep all
multiprocessors busy and one long context does not keep a step waiting:

    share = positions of all tiles * kv heads / programs that the device runs at a time

A row that is member of one tile gets its result from that program. One that is member of several
has a slot for each part, side by side, and a place among the rows to be joined.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chatserve_kernels.runs import Run, find_runs

# A shorter piece is not worth the part that it leaves to be joined.
PIECE_POSITIONS_MIN = 256
# A piece ends where a program's steps through its positions do.
PIECE_POSITIONS_STEP = 64
# The least that a product of matrices takes on a side.
HEIGHT_MIN = 16

# Integers in a record, so that each begins at 16 bytes: all that kernels read may be taken at once.
TILE_FIELDS = 8
MEMBER_FIELDS = 4
JOIN_FIELDS = 4

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TileShape:
    """group: query heads of a kv head; kv_heads: programs for each tile; height_max: what one
    program has room for, a power of two, as lines of one query and one head each; programs: how
    many the device runs at a time."""

    group: int
    kv_heads: int
    height_max: int
    programs: int

    def height(self, queries: int) -> int:
        """Lines for so many queries that are read together, or as many as there is room for, at
        least one: a power of two."""
        least = max(HEIGHT_MIN, power_of_two(self.group))
        return max(least, min(self.height_max, power_of_two(self.group * queries)))


class TileKind(NamedTuple):
    """What layers have to have in common to read by the same tiles."""

    window: int | None
    shape: TileShape


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """All tiles of a step on a device, the longest first.

    tiles: int32 [tiles, 8]: sequence, first position, end, first member, end of the members.
    members: int32 [members, 4]: a row of the flattened batch, the first position that it sees of
        all, their end, and the slot of its part; -1 where there is no other.
    joins: int32 [joined rows, 4]: a row, its first slot, their end.
    slots: how many parts there are. height: lines of a program. tables: [sequences, pages],
    contiguous.
    """

    tiles: Tensor
    members: Tensor
    joins: Tensor
    slots: int
    height: int
    tables: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TileRecords:
    """The same in memory, in numpy: what `Tiles` says of each."""

    tiles: NDArray[np.int32]
    members: NDArray[np.int32]
    joins: NDArray[np.int32]
    slots: int
    height: int


@dataclass(frozen=True, slots=True, eq=False)
class _Stretch:
    """Positions start to end of a sequence for these rows."""

    sequence: int
    start: int
    end: int
    rows: Integers


def made_tiles(
    tables: Tensor,
    starts: Sequence[int],
    lengths: Sequence[int],
    *,
    host_tables: NDArray[np.int32] | None,
    page_size: int,
    window: int | None,
    shape: TileShape,
) -> Tiles:
    """tables: [sequences, pages], on the device where the tiles are wanted; the others as
    `tile_records` has them."""
    records = tile_records(
        starts,
        lengths,
        host_tables=host_tables,
        page_size=page_size,
        window=window,
        shape=shape,
    )
    return _on_device(records, tables)


def tile_records(
    starts: Sequence[int],
    lengths: Sequence[int],
    *,
    host_tables: NDArray[np.int32] | None,
    page_size: int,
    window: int | None,
    shape: TileShape,
) -> TileRecords:
    """starts, lengths: `query_starts` and `context_lengths` of an AttentionBatch. host_tables:
    [sequences, pages], without which nothing is shared."""
    first_seen, end_seen = _seen(starts, lengths, window)
    stretches = _decode_stretches(host_tables, starts, lengths, page_size=page_size, window=window)
    for sequence in range(len(lengths)):
        first, end = starts[sequence : sequence + 2]
        if end - first > 1:
            rows = np.arange(first, end)
            stretches.append(_Stretch(sequence, int(first_seen[first]), lengths[sequence], rows))
    height = shape.height(max(len(stretch.rows) for stretch in stretches))
    stretches = [
        part
        for stretch in stretches
        for part in _divided(stretch, height // shape.group, first_seen, end_seen)
    ]
    share = _share(stretches, shape)
    pieces = [
        piece for stretch in stretches for piece in _cut(stretch, share, first_seen, end_seen)
    ]
    pieces.sort(key=lambda piece: piece.end - piece.start, reverse=True)
    return _laid_out(pieces, first_seen, end_seen, height)


def _seen(
    starts: Sequence[int], lengths: Sequence[int], window: int | None
) -> tuple[Integers, Integers]:
    """The first position that each row sees, and their end."""
    begins, counts = np.asarray(starts[:-1]), np.diff(starts)
    rows = np.arange(starts[-1])
    end = rows + 1 + np.repeat(np.asarray(lengths) - counts - begins, counts)
    first = np.zeros_like(end) if window is None else np.maximum(0, end - window)
    return first, end


def _decode_stretches(
    tables: NDArray[np.int32] | None,
    starts: Sequence[int],
    lengths: Sequence[int],
    *,
    page_size: int,
    window: int | None,
) -> list[_Stretch]:
    """Of the sequences with one query; with no tables each for itself."""
    rows = {
        sequence: starts[sequence]
        for sequence in range(len(lengths))
        if starts[sequence + 1] - starts[sequence] == 1
    }
    if tables is not None:
        found = find_runs(tables, lengths, rows, page_size=page_size, window=window, apart=2)
    else:
        found = [
            Run(sequence, max(0, length - (window or length)), length, (rows[sequence],))
            for sequence, length in enumerate(lengths)
            if sequence in rows
        ]
    return [_Stretch(run.sequence, run.start, run.end, np.asarray(run.members)) for run in found]


def _divided(
    stretch: _Stretch, queries: int, first_seen: Integers, end_seen: Integers
) -> list[_Stretch]:
    """For so many rows at a time, each over what these see."""
    parts = [stretch.rows[at : at + queries] for at in range(0, len(stretch.rows), queries)]
    return [
        _Stretch(
            stretch.sequence,
            max(stretch.start, int(first_seen[rows].min())),
            min(stretch.end, int(end_seen[rows].max())),
            rows,
        )
        for rows in parts
    ]


def _share(stretches: Sequence[_Stretch], shape: TileShape) -> int:
    """How many positions a program should read at most."""
    positions = sum(stretch.end - stretch.start for stretch in stretches)
    return max(PIECE_POSITIONS_MIN, -(-positions * shape.kv_heads // shape.programs))


def _cut(stretch: _Stretch, share: int, first_seen: Integers, end_seen: Integers) -> list[_Stretch]:
    """In pieces of like length, each with the rows that see any of it."""
    length = stretch.end - stretch.start
    if length <= share:
        return [stretch]
    count = -(-length // share)
    step = -(-length // (count * PIECE_POSITIONS_STEP)) * PIECE_POSITIONS_STEP
    pieces: list[_Stretch] = []
    for start in range(stretch.start, stretch.end, step):
        end, rows = min(start + step, stretch.end), stretch.rows
        rows = rows[(first_seen[rows] < end) & (end_seen[rows] > start)]
        if len(rows):
            pieces.append(_Stretch(stretch.sequence, start, end, rows))
    return pieces


def _laid_out(
    pieces: Sequence[_Stretch], first_seen: Integers, end_seen: Integers, height: int
) -> TileRecords:
    counts = np.asarray([len(piece.rows) for piece in pieces])
    ends = np.cumsum(counts)
    rows = np.concatenate([piece.rows for piece in pieces])
    parts = np.bincount(rows, minlength=len(first_seen))
    # Slots of one row lie side by side; who has one part alone has none.
    several = np.flatnonzero(parts[rows] > 1)
    slots = np.full(len(rows), -1)
    slots[several[np.argsort(rows[several], kind="stable")]] = np.arange(len(several))
    joined = np.flatnonzero(parts > 1)
    slot_ends = np.cumsum(parts[joined])
    tiles = _records(
        TILE_FIELDS,
        np.asarray([piece.sequence for piece in pieces]),
        np.asarray([piece.start for piece in pieces]),
        np.asarray([piece.end for piece in pieces]),
        ends - counts,
        ends,
    )
    members = _records(MEMBER_FIELDS, rows, first_seen[rows], end_seen[rows], slots)
    joins = _records(JOIN_FIELDS, joined, slot_ends - parts[joined], slot_ends)
    return TileRecords(tiles, members, joins, slots=len(several), height=height)


def _on_device(records: TileRecords, tables: Tensor) -> Tiles:
    """Where the tables are."""
    tiles, members, joins = records.tiles, records.members, records.joins
    # One copy for all of them, which the host need not wait for.
    together = torch.from_numpy(np.concatenate([each.ravel() for each in (tiles, members, joins)]))
    if tables.device.type == "cuda":
        together = together.pin_memory().to(tables.device, non_blocking=True)
    sizes = [tiles.size, members.size, joins.size]
    flat_tiles, flat_members, flat_joins = together.split(sizes)
    return Tiles(
        tiles=flat_tiles.view(tiles.shape),
        members=flat_members.view(members.shape),
        joins=flat_joins.view(joins.shape),
        slots=records.slots,
        height=records.height,
        tables=tables.contiguous(),
    )


def power_of_two(number: int) -> int:
    """The least that is no less."""
    return 1 << (number - 1).bit_length()


def _records(fields: int, *columns: Integers) -> NDArray[np.int32]:
    """[len(column), fields], the rest 0."""
    records = np.zeros((len(columns[0]), fields), dtype=np.int32)
    for field, column in enumerate(columns):
        records[:, field] = column
    return records
