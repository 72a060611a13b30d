"""FixedStep: decode rows whose metadata lies in tensors that stay where they are.

May not know: layers, models. What was recorded once and is run again (a CUDA graph) launches the
same numbers of programs, which read the same addresses. So all numbers of a step are rounded up to
one of a few sizes, and what comes behind the step's own does nothing:

    rows     one more writes nowhere (page -1), and is the member of a tile without positions,
             which gives it zeros
    tiles    one more has no members; its programs read and write nothing
    joins    one more has no parts; its programs write nothing
    tables   lie end to end, each as long as its sequence: a tile names the beginning of its own
             among them, in place of a sequence

How many tiles a step has depends on its contexts. A *spread* says for how many there is room, in
three degrees, so that there are few different sizes: each row has one tile; some have several; some
tiles have several rows.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chatserve_kernels.batch import AttentionBatch
from chatserve_kernels.gpu.tiles import (
    JOIN_FIELDS,
    MEMBER_FIELDS,
    TILE_FIELDS,
    TileKind,
    TileRecords,
    Tiles,
    TileShape,
    tile_records,
)
from chatserve_kernels.packing import laid_out, piece, put, staging

# Of a tree of prefixes: a leaf and a branch for each row, and as many again for branches that are
# divided.
_STRETCHES_EACH = 4


class Spread(IntEnum):
    """How rows and tiles meet."""

    WHOLE = 0  # each row is one tile
    PARTED = 1  # some rows are several
    SHARED = 2  # some tiles have several rows


class FixedSizes(NamedTuple):
    """What a recorded step is recorded for."""

    rows: int
    spread: Spread


class DecodeRows(NamedTuple):
    """A step of sequences with one query each. tokens, positions: int64 [rows]; write_pages,
    write_offsets: int64 [rows], where each one's K and V go, page -1 for nowhere; lengths: tokens
    attended to; tables: int32 [rows, pages]."""

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    write_pages: NDArray[np.int64]
    write_offsets: NDArray[np.int64]
    lengths: Sequence[int]
    tables: NDArray[np.int32]


Records = Mapping[TileKind, TileRecords]


def decode_records(rows: DecodeRows, kinds: Sequence[TileKind], *, page_size: int) -> Records:
    """A step's tiles of each kind."""
    return {
        kind: tile_records(
            range(len(rows.lengths) + 1),
            rows.lengths,
            host_tables=rows.tables,
            page_size=page_size,
            window=kind.window,
            shape=kind.shape,
        )
        for kind in kinds
    }


def spread_of(records: Records) -> Spread:
    """The least that has room for them."""
    return max(map(_spread_of, records.values()))


def _spread_of(records: TileRecords) -> Spread:
    if len(records.members) > len(records.tiles):
        return Spread.SHARED
    return Spread.PARTED if len(records.joins) else Spread.WHOLE


@dataclass(frozen=True, slots=True)
class TileSizes:
    """Of a kind's tiles in a recorded step. A member has a slot where there are joins."""

    tiles: int
    members: int
    joins: int
    height: int


def tile_sizes(kind: TileKind, sizes: FixedSizes) -> TileSizes:
    """What one kind has room for."""
    rows, spread, shape = sizes.rows, sizes.spread, kind.shape
    # A tile more for each share of the step's work, at the most.
    pieces = -(-shape.programs // shape.kv_heads)
    if spread is Spread.WHOLE:
        return TileSizes(rows, rows, 0, shape.height(1))
    if spread is Spread.PARTED:
        return TileSizes(rows + pieces, rows + pieces, rows, shape.height(1))
    height = _highest(shape)
    stretches = _STRETCHES_EACH * rows
    members = stretches + min(rows, height // shape.group) * pieces
    return TileSizes(stretches + pieces, members, rows, height)


def _highest(shape: TileShape) -> int:
    return shape.height(shape.height_max)


class FixedBatch(AttentionBatch):
    """Decode rows whose lengths and tables are in their tiles alone: for kernels that read those,
    and for nobody else."""

    _fixed: Mapping[TileKind, Tiles]

    def __init__(
        self,
        tiles: Mapping[TileKind, Tiles],
        *,
        write_pages: Tensor,
        write_offsets: Tensor,
        page_size: int,
    ) -> None:
        rows = write_pages.shape[0]
        super().__init__(
            query_starts=tuple(range(rows + 1)),
            context_lengths=(1,) * rows,
            page_tables=write_pages.new_zeros((rows, 1)),
            write_pages=write_pages,
            write_offsets=write_offsets,
            write_rows=None,
            page_size=page_size,
        )
        object.__setattr__(self, "_fixed", dict(tiles))  # it is frozen for everybody else

    def tiles(self, window: int | None, shape: TileShape) -> Tiles:
        """Of a kind that there is room for. Raises ValueError for another."""
        tiles = self._fixed.get(TileKind(window, shape))
        if tiles is None:
            raise ValueError(f"no room for tiles of the window {window} and {shape}")
        return tiles

    @property
    def readable(self) -> bool:
        """As AttentionBatch has it."""
        return False


class FixedStep:
    """A step of fixed sizes in the bytes of a buffer, uint8 [any], on the device.

    tokens, positions: int64 [sizes.rows]. batch: as attention wants it.
    """

    def __init__(
        self, buffer: Tensor, sizes: FixedSizes, kinds: Sequence[TileKind], *, page_size: int
    ) -> None:
        self.sizes = sizes
        self._buffer, self._page_size = buffer, page_size
        self._kinds = {kind: tile_sizes(kind, sizes) for kind in kinds}
        shapes: list[tuple[torch.dtype, tuple[int, ...]]] = [(torch.int64, (sizes.rows,))] * 4
        for room in self._kinds.values():
            shapes.append((torch.int32, (room.tiles, TILE_FIELDS)))
            shapes.append((torch.int32, (room.members, MEMBER_FIELDS)))
            shapes.append((torch.int32, (room.joins, JOIN_FIELDS)))
        *self._starts, self._tables_start = laid_out(
            dtype.itemsize * int(np.prod(shape)) for dtype, shape in shapes
        )
        views = [
            piece(buffer, start, shape, dtype)
            for start, (dtype, shape) in zip(self._starts, shapes, strict=True)
        ]
        self.tokens, self.positions, pages, offsets, *records = views
        entries = (buffer.shape[0] - self._tables_start) // torch.int32.itemsize
        tables = piece(buffer, self._tables_start, (entries, 1), torch.int32)
        tiles: dict[TileKind, Tiles] = {}
        for at, (kind, room) in enumerate(self._kinds.items()):
            mine, members, joins = records[3 * at : 3 * at + 3]
            slots = room.members if room.joins else 0
            tiles[kind] = Tiles(
                tiles=mine,
                members=members,
                joins=joins,
                slots=slots,
                height=room.height,
                tables=tables,
            )
        self.batch = FixedBatch(
            tiles, write_pages=pages, write_offsets=offsets, page_size=page_size
        )

    def fill(self, given: DecodeRows, records: Records) -> bool:
        """Bring a step's metadata there, by one copy that nobody waits for. Returns False where it
        does not fit."""
        rows, missing = len(given.lengths), self.sizes.rows - len(given.lengths)
        assert missing >= 0, "more rows than it is for"
        pages = [-(-length // self._page_size) for length in given.lengths]
        size = self._tables_start + torch.int32.itemsize * sum(pages)
        if size > self._buffer.shape[0]:
            return False
        beginnings = np.cumsum([0, *pages[:-1]])
        nothing = np.zeros(missing, dtype=np.int64)
        arrays = [
            np.concatenate((given.tokens, nothing)),
            np.concatenate((given.positions, nothing)),
            np.concatenate((given.write_pages, nothing - 1)),
            np.concatenate((given.write_offsets, nothing)),
        ]
        for kind, room in self._kinds.items():
            padded = _padded(records[kind], room, beginnings, rows, missing)
            if padded is None:
                return False
            arrays += padded
        tables = [table[:count] for table, count in zip(given.tables, pages, strict=True)]
        stage = staging(size, self._buffer.device)
        host = stage.numpy()
        for start, array in zip(self._starts, arrays, strict=True):
            put(host, start, array)
        put(host, self._tables_start, np.concatenate(tables))
        self._buffer[:size].copy_(stage, non_blocking=True)
        return True


def _padded(
    records: TileRecords,
    room: TileSizes,
    beginnings: NDArray[np.int64],
    rows: int,
    missing: int,
) -> list[NDArray[np.int32]] | None:
    """Tiles, members and joins as there is room for them, for `rows` rows and as many `missing`
    ones; None where there is too little."""
    counts = len(records.tiles) + missing, len(records.members) + missing, len(records.joins)
    if any(map(operator.gt, counts, (room.tiles, room.members, room.joins))):
        return None
    tiles = np.zeros((room.tiles, TILE_FIELDS), dtype=np.int32)
    tiles[: len(records.tiles)] = records.tiles
    tiles[: len(records.tiles), 0] = beginnings[records.tiles[:, 0]]
    first = len(records.members) + np.arange(missing)
    tiles[len(records.tiles) : counts[0], 3] = first
    tiles[len(records.tiles) : counts[0], 4] = first + 1
    members = np.zeros((room.members, MEMBER_FIELDS), dtype=np.int32)
    members[: len(records.members)] = records.members
    members[first, 0] = rows + np.arange(missing)
    members[first, 3] = -1
    joins = np.zeros((room.joins, JOIN_FIELDS), dtype=np.int32)
    joins[: len(records.joins)] = records.joins
    return [tiles, members, joins]
