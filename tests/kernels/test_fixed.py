"""Decode steps in tensors of fixed sizes: each row sees its own, and what is more does nothing."""

import random
from collections import defaultdict

import numpy as np
import pytest
import torch

from chatserve_kernels.fixed import (
    DecodeRows,
    FixedSizes,
    FixedStep,
    Records,
    Spread,
    decode_records,
    spread_of,
)
from chatserve_kernels.gpu import tiles as module
from chatserve_kernels.gpu.tiles import TileKind, TileShape
from chatserve_kernels.ops import append_kv, paged_attention
from chatserve_kernels.packing import laid_out, sent, sent_together
from tests.kernels.test_runs import tree

BYTES = 1 << 20
ROWS = (1, 2, 4, 8, 16, 24, 32)


def rows_of(tables: np.ndarray, lengths: list[int], numbers: random.Random) -> DecodeRows:
    count = len(lengths)
    return DecodeRows(
        tokens=np.asarray([numbers.randrange(100) for _ in range(count)]),
        positions=np.asarray(lengths) - 1,
        write_pages=np.asarray([numbers.choice([-1, numbers.randrange(50)]) for _ in lengths]),
        write_offsets=np.asarray([numbers.randrange(8) for _ in lengths]),
        lengths=lengths,
        tables=tables,
    )


def seen(step: FixedStep, kind: TileKind, page_size: int) -> dict[int, list[tuple[int, int]]]:
    """(position, page) that each row sees; and slots are as joins have them."""
    tiles = step.batch.tiles(*kind)
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    slots: dict[int, list[int]] = defaultdict(list)
    for table, start, end, first_member, member_end, *_ in tiles.tiles.tolist():
        assert member_end - first_member <= tiles.height // kind.shape.group
        for row, first, last, slot in tiles.members[first_member:member_end].tolist():
            slots[row].append(slot)
            for position in range(max(start, first), min(end, last)):
                page = int(tiles.tables[table + position // page_size, 0])
                found[row].append((position, page))
    joined = {row: list(range(first, end)) for row, first, end, _ in tiles.joins.tolist() if end}
    for row, mine in slots.items():
        assert sorted(mine) == joined.get(row, [-1])
        assert max(mine) < max(1, tiles.slots)
    assert sorted(slots) == list(range(step.sizes.rows)), "each row gets something"
    return found


@pytest.mark.parametrize("seed", range(40))
def test_each_row_sees_its_own_positions_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    print(f"seed {seed}")
    numbers = random.Random(seed)
    page_size = numbers.choice([8, 16, 64])
    monkeypatch.setattr(module, "PIECE_POSITIONS_MIN", numbers.choice([16, 64, 256]))
    shape = TileShape(numbers.choice([1, 3, 8]), numbers.choice([1, 4]), 64, numbers.choice([1, 9]))
    kinds = (TileKind(None, shape), TileKind(numbers.choice([1, 20, 1000]), shape))
    buffer = torch.randint(-128, 127, (BYTES,), dtype=torch.int8).view(torch.uint8)
    steps: dict[FixedSizes, FixedStep] = {}
    for _ in range(6):  # into the same tensors again and again
        tables, lengths = tree(numbers, page_size)
        given = rows_of(tables, lengths, numbers)
        records = decode_records(given, kinds, page_size=page_size)
        rows = next(rows for rows in ROWS if rows >= len(lengths))
        sizes = FixedSizes(rows, spread_of(records))
        step = steps.setdefault(sizes, FixedStep(buffer, sizes, kinds, page_size=page_size))
        assert step.fill(given, records)
        for kind in kinds:
            found = seen(step, kind, page_size)
            for row in range(rows):
                length = lengths[row] if row < len(lengths) else 0
                span = range(max(0, length - (kind.window or length)), length)
                mine = [(at, int(tables[row, at // page_size])) for at in span]
                assert sorted(found[row]) == mine
        more = [0] * (rows - len(lengths))
        assert step.tokens.tolist() == [*given.tokens, *more]
        assert step.positions.tolist() == [*given.positions, *more]
        assert step.batch.write_pages.tolist() == [*given.write_pages, *(-1 for _ in more)]
        assert step.batch.write_offsets.tolist() == [*given.write_offsets, *more]


SHAPE = TileShape(group=4, kv_heads=8, height_max=128, programs=264)


def records_of(tables: np.ndarray, lengths: list[int], shape: TileShape = SHAPE) -> Records:
    given = rows_of(tables, lengths, random.Random(1))
    return decode_records(given, [TileKind(None, shape)], page_size=16)


def test_a_spread_tells_how_rows_and_tiles_meet() -> None:
    own = np.arange(1, 1 + 4 * 600, dtype=np.int32).reshape(4, 600)
    assert spread_of(records_of(own, [200, 250, 1, 16])) is Spread.WHOLE
    assert spread_of(records_of(own, [200, 9000, 1, 16])) is Spread.PARTED
    own[1, :8] = own[0, :8]
    assert spread_of(records_of(own, [200, 250, 1, 16])) is Spread.SHARED


@pytest.mark.parametrize("kv_heads", [1, 8, 32])
@pytest.mark.parametrize("rows", [1, 2, 8, 64, 128])
def test_there_is_room_for_what_steps_are_like(rows: int, kv_heads: int) -> None:
    """Few or many rows, long contexts or short, one prefix or several, of a device of 132
    multiprocessors."""
    shape = TileShape(group=32 // kv_heads, kv_heads=kv_heads, height_max=128, programs=264)
    numbers = random.Random(rows)
    buffer = torch.zeros(8 * BYTES, dtype=torch.uint8)
    pages = 600
    for shared in (0, 8, 128, 500):
        for families in (1, 3):
            for tail in (1, 300, 1500):
                tables = np.arange(1, 1 + rows * pages, dtype=np.int32).reshape(rows, pages)
                for row in range(rows):
                    tables[row, :shared] = tables[row % families, :shared]
                lengths = [shared * 16 + 1 + numbers.randrange(tail) for _ in range(rows)]
                given = rows_of(tables, lengths, numbers)
                kinds = [TileKind(window, shape) for window in (None, 100, 1000)]
                records = decode_records(given, kinds, page_size=16)
                sizes = FixedSizes(rows, spread_of(records))
                step = FixedStep(buffer, sizes, kinds, page_size=16)
                assert step.fill(given, records), (shared, families, tail)


def test_what_does_not_fit_is_told() -> None:
    kind = TileKind(None, SHAPE)
    tables = np.arange(1, 601, dtype=np.int32)[None]
    given = rows_of(tables, [9000], random.Random(1))
    records = decode_records(given, [kind], page_size=16)
    buffer = torch.zeros(BYTES, dtype=torch.uint8)
    assert not FixedStep(buffer, FixedSizes(1, Spread.WHOLE), [kind], page_size=16).fill(
        given, records
    )
    step = FixedStep(buffer, FixedSizes(1, Spread.PARTED), [kind], page_size=16)
    assert step.fill(given, records)
    start = step._tables_start  # pyright: ignore[reportPrivateUsage]
    sizes = FixedSizes(1, Spread.PARTED)
    for room, fits in ((start + 4 * 563, True), (start + 4 * 562, False)):
        assert FixedStep(buffer[:room], sizes, [kind], page_size=16).fill(given, records) == fits


def test_nobody_but_kernels_reads_a_batch_of_fixed_sizes() -> None:
    kind = TileKind(None, SHAPE)
    buffer = torch.zeros(BYTES, dtype=torch.uint8)
    batch = FixedStep(buffer, FixedSizes(2, Spread.WHOLE), [kind], page_size=8).batch
    kv, rows = torch.zeros((4, 2, 8, 1, 8)), torch.zeros((2, 1, 8))
    with pytest.raises(ValueError, match="only kernels"):
        append_kv(rows, rows, kv, batch)
    with pytest.raises(ValueError, match="only kernels"):
        paged_attention(rows, kv, batch, scale=1.0)
    with pytest.raises(ValueError, match="no room for tiles"):
        batch.tiles(3, SHAPE)


def test_arrays_are_brought_together() -> None:
    arrays = [
        np.arange(5),
        np.arange(12, dtype=np.int32).reshape(4, 3)[:, :2],
        np.zeros(0, dtype=np.int64),
        np.arange(3, dtype=np.int64)[::-1],
    ]
    assert laid_out([40, 0, 1, 16]) == [0, 48, 48, 64, 80]
    for tensor, array in zip(sent_together(arrays, torch.device("cpu")), arrays, strict=True):
        assert tensor.numpy().dtype == array.dtype
        assert np.array_equal(tensor.numpy(), array)
        assert tensor.data_ptr() % 16 == 0 or not tensor.numel()
    (same,) = sent(arrays[:1], torch.device("cpu"))
    assert np.shares_memory(same.numpy(), arrays[0]), "a CPU copies nothing"
