"""Which positions each program of a GPU's attention reads for which rows."""

import itertools
import os
import random
import subprocess
import sys
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch

from chatserve_kernels import AttentionBatch
from chatserve_kernels.gpu import tiles as module
from chatserve_kernels.gpu.tiles import Tiles, TileShape
from tests.kernels.test_runs import tree

SHAPE = TileShape(group=4, kv_heads=2, height_max=64, programs=8)


def batch_of(
    tables: np.ndarray, queries: list[int], lengths: list[int], page_size: int, **fields: Any
) -> AttentionBatch:
    nothing = torch.zeros(0, dtype=torch.int64)
    return AttentionBatch(
        query_starts=tuple(itertools.accumulate(queries, initial=0)),
        context_lengths=tuple(lengths),
        page_tables=torch.from_numpy(tables),
        write_pages=nothing,
        write_offsets=nothing,
        write_rows=nothing,
        page_size=page_size,
        **fields,
    )


def reads(tiles: Tiles, page_size: int) -> dict[int, list[tuple[int, int]]]:
    """(position, page) that each row sees, over all tiles that it is a member of."""
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for sequence, start, end, first_member, member_end, *_ in tiles.tiles.tolist():
        assert member_end > first_member
        for row, first, last, _ in tiles.members[first_member:member_end].tolist():
            for position in range(max(start, first), min(end, last)):
                found[row].append((position, int(tiles.tables[sequence, position // page_size])))
    return found


def slots(tiles: Tiles) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for row, _, _, slot in tiles.members.tolist():
        found[row].append(slot)
    return found


@pytest.mark.parametrize("seed", range(40))
def test_each_row_sees_its_own_positions_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    print(f"seed {seed}")
    numbers = random.Random(seed)
    page_size = numbers.choice([8, 16, 64])
    monkeypatch.setattr(module, "PIECE_POSITIONS_MIN", numbers.choice([16, 64, 256]))
    tables, lengths = tree(numbers, page_size)
    queries = [numbers.choice([1, 1, numbers.randint(1, min(length, 40))]) for length in lengths]
    window = numbers.choice([None, None, 1, 20, 1000])
    shape = TileShape(numbers.choice([1, 3, 8]), numbers.choice([1, 4]), 64, numbers.choice([1, 9]))
    batch = batch_of(tables, queries, lengths, page_size)
    tiles = batch.tiles(window, shape)
    assert batch.tiles(window, shape) is tiles
    found = reads(tiles, page_size)
    for sequence, length in enumerate(lengths):
        first, end = batch.query_starts[sequence : sequence + 2]
        for row in range(first, end):
            last = length - (end - row) + 1
            seen = range(max(0, last - (window or last)), last)
            mine = [(at, int(tables[sequence, at // page_size])) for at in seen]
            assert sorted(found[row]) == mine
    most = max(end - first for *_, first, end, _, _, _ in tiles.tiles.tolist())
    assert most <= tiles.height // shape.group
    joined = {row: (first, end) for row, first, end, _ in tiles.joins.tolist()}
    given = slots(tiles)
    for row, mine in given.items():
        assert mine == [-1] if row not in joined else sorted(mine) == list(range(*joined[row]))
    parts = [slot for mine in given.values() for slot in mine if slot >= 0]
    assert sorted(parts) == list(range(tiles.slots))
    assert len(joined) == len(tiles.joins)


def test_rows_that_share_pages_are_one_tile() -> None:
    tables = np.arange(1, 41, dtype=np.int32).reshape(4, 10)
    tables[:3, :6] = tables[0, :6]
    batch = batch_of(tables, [1, 1, 1, 1], [150, 149, 97, 150], 16)
    tiles = batch.tiles(None, SHAPE)
    members = [
        (start, end, sorted(tiles.members[first:last, 0].tolist()))
        for _, start, end, first, last, *_ in tiles.tiles.tolist()
    ]
    assert sorted(members) == [
        (0, 96, [0, 1, 2]),
        (0, 150, [3]),
        (96, 97, [2]),
        (96, 149, [1]),
        (96, 150, [0]),
    ]
    assert tiles.height == 16, "room for three queries of four heads"
    assert tiles.joins[:, 0].tolist() == [0, 1, 2]


def test_no_more_rows_come_together_than_a_program_has_room_for() -> None:
    tables = np.tile(np.arange(1, 11, dtype=np.int32), (40, 1))
    tables[:, 8] = np.arange(11, 51)
    tiles = batch_of(tables, [1] * 40, [130] * 40, 16).tiles(None, SHAPE)
    counts = (tiles.tiles[:, 4] - tiles.tiles[:, 3]).tolist()
    assert tiles.height == 64
    assert counts == [16, 16, 8, *[1] * 40], "the longest first"
    few = batch_of(tables[:5], [1] * 5, [130] * 5, 16).tiles(None, SHAPE)
    assert few.height == 32, "room for five queries of four heads"
    assert int(few.tiles[0, 4] - few.tiles[0, 3]) == 5


def test_tables_that_only_a_device_has_share_nothing() -> None:
    tables = np.tile(np.arange(1, 11, dtype=np.int32), (2, 1))
    batch = batch_of(tables, [1, 1], [150, 150], 16)
    alone = module.made_tiles(
        torch.from_numpy(tables), batch.query_starts, batch.context_lengths, host_tables=None,
        page_size=16, window=None, shape=SHAPE,
    )  # fmt: skip
    assert alone.tiles[:, :5].tolist() == [[0, 0, 150, 0, 1], [1, 0, 150, 1, 2]]
    together = batch_of(tables, [1, 1], [150, 150], 16, host_tables=tables).tiles(None, SHAPE)
    assert (together.tiles[:, 4] - together.tiles[:, 3]).tolist() == [2, 1, 1]


def test_work_is_cut_in_even_shares_where_programs_would_idle() -> None:
    tables = np.zeros((9, 512), dtype=np.int32)
    one = batch_of(tables[:1], [1], [8192], 16).tiles(None, SHAPE)
    assert one.tiles[:, 1:3].tolist() == [[at, at + 2048] for at in range(0, 8192, 2048)]
    assert (one.slots, one.joins[:, :3].tolist()) == (4, [[0, 0, 4]])
    odd = batch_of(tables[:1], [1], [7990], 16).tiles(None, SHAPE)
    assert odd.tiles[:, 1].tolist() == [0, 2048, 4096, 6144], "where a program's steps begin"
    short = batch_of(tables[:1], [1], [256], 16).tiles(None, SHAPE)
    assert (len(short.tiles), short.slots) == (1, 0), "too little to be cut"
    # One tile for each program: nothing is to be gained.
    tables[:] = np.arange(1, 10)[:, None]
    even = batch_of(tables[:4], [1] * 4, [2000] * 4, 16).tiles(None, SHAPE)
    assert (len(even.tiles), even.slots) == (4, 0)
    # A long context among short ones is not what all of them wait for.
    long = batch_of(tables, [1] * 9, [300] * 8 + [8192], 16).tiles(None, SHAPE)
    assert max(end - start for _, start, end, *_ in long.tiles.tolist()) <= 2700
    assert long.joins[:, 0].tolist() == [8]


def test_a_slice_reads_nothing_before_its_window() -> None:
    tables = np.arange(64, dtype=np.int32)[None]
    tiles = batch_of(tables, [40], [1000], 16).tiles(100, SHAPE)
    assert tiles.tiles[:, 1:3].tolist() == [[861, 976], [877, 992], [893, 1000]]


def test_host_tables_are_as_the_others() -> None:
    tables = np.zeros((2, 4), dtype=np.int32)
    with pytest.raises(ValueError, match="host_tables must be"):
        batch_of(tables, [1, 1], [3, 3], 16, host_tables=tables[:1])


def test_a_processor_without_a_gpu_never_loads_triton() -> None:
    program = """
import sys, torch
import chatserve_kernels as kernels
batch = kernels.AttentionBatch(
    query_starts=(0, 2), context_lengths=(2,), page_tables=torch.zeros((1, 1)).long(),
    write_pages=torch.zeros(2).long(), write_offsets=torch.arange(2), write_rows=None, page_size=8)
kv, rows = torch.zeros((1, 2, 8, 1, 8)), torch.ones((2, 1, 8))
kernels.append_kv(rows, rows, kv, batch)
kernels.paged_attention(rows, kv, batch, scale=1.0)
kernels.copy_pages(kv.view(1, -1), torch.zeros(1).long(), torch.zeros(1).long())
kernels.page_checksums(kv.view(1, -1), torch.zeros(1).long(), torch.ones(64).long())
sys.exit("triton" in sys.modules)
"""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", program], env=kept, check=True, timeout=300)
