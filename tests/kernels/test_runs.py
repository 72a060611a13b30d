"""Which stretches of pages are read for which rows."""

import random
from collections.abc import Sequence

import numpy as np
import pytest

from chatserve_kernels import runs
from chatserve_kernels.runs import (
    MATRIX_ROWS_MIN,
    SHARED_TOKENS_MIN,
    Run,
    find_runs,
    laid_out,
)

PAGE = 16


def tree(numbers: random.Random, page_size: int) -> tuple[np.ndarray, list[int]]:
    """Page tables whose rows branch off one another anywhere, and their lengths."""
    free = iter(range(1, 100_000))
    tables: list[list[int]] = []
    lengths: list[int] = []
    for _ in range(numbers.randint(1, 12)):
        parent = numbers.choice(tables) if tables and numbers.random() < 0.8 else []
        kept = parent[: numbers.randint(0, len(parent))]
        table = [*kept, *(next(free) for _ in range(numbers.randint(1, 12)))]
        # Whole pages may be all there is, where a reply is read anew from a shared page.
        used = numbers.randint((len(kept) or 1) * page_size - page_size + 1, len(table) * page_size)
        if numbers.random() < 0.2 and kept:
            table, used = kept, len(kept) * page_size
        tables.append(table)
        lengths.append(used)
    result = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
    for index, table in enumerate(tables):
        result[index, : len(table)] = table
    return result, lengths


@pytest.mark.parametrize("seed", range(200))
def test_each_row_reads_its_own_positions_once(seed: int) -> None:
    numbers = random.Random(seed)
    page_size = numbers.choice([8, 16, 64])
    tables, lengths = tree(numbers, page_size)
    decoding = sorted(numbers.sample(range(len(lengths)), numbers.randint(1, len(lengths))))
    rows = {sequence: sequence for sequence in decoding}
    found = find_runs(
        tables, lengths, rows, page_size=page_size, window=None, apart=MATRIX_ROWS_MIN
    )
    for sequence in decoding:
        read: list[tuple[int, int]] = []
        for run in found:
            if sequence in run.members:
                for position in range(run.start, run.end):
                    page = int(tables[run.sequence, position // page_size])
                    read.append((position, page))
        expected = [(at, int(tables[sequence, at // page_size])) for at in range(lengths[sequence])]
        assert sorted(read) == expected
    # What is long enough is read once for all.
    for first in decoding:
        for second in decoding:
            if first < second:
                whole = min(lengths[first], lengths[second]) // page_size
                same = tables[first, :whole] == tables[second, :whole]
                alike = whole if same.all() else int(same.argmin())
                together = sum(
                    run.end - run.start
                    for run in found
                    if first in run.members and second in run.members
                )
                assert alike * page_size - SHARED_TOKENS_MIN < together <= alike * page_size


def test_a_tree_is_read_as_a_tree() -> None:
    tables = np.array(
        [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8, 10], [1, 2, 3, 4, 11, 0, 0, 0, 0]],
        dtype=np.int32,
    )
    found = find_runs(
        tables, [140, 139, 70], {0: 0, 1: 1, 2: 2}, page_size=16, window=None, apart=MATRIX_ROWS_MIN
    )
    parts = {(run.start, run.end, tuple(sorted(run.members))) for run in found}
    assert parts == {
        *((0, 64, (0, 1, 2)), (64, 128, (0, 1))),
        *((128, 140, (0,)), (128, 139, (1,)), (64, 70, (2,))),
    }


def read_by(found: Sequence[Run], row: int, tables: np.ndarray) -> list[tuple[int, int]]:
    """The positions and their places that the runs read for a row."""
    read: list[tuple[int, int]] = []
    for run in found:
        if row in run.members:
            start, end = run.start, run.end
            if run.spans is not None:
                start, end = run.spans[run.members.index(row)]
                assert run.start <= start < end <= run.end
            read += [(at, int(tables[run.sequence, at // PAGE])) for at in range(start, end)]
    return sorted(read)


@pytest.mark.parametrize("most", [40, 10_000], ids=["cut", "whole"])
@pytest.mark.parametrize("seed", range(150))
def test_in_a_window_each_row_reads_what_it_sees_once(
    seed: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "RUN_TOKENS_MAX", most)
    numbers = random.Random(seed)
    tables, lengths = tree(numbers, PAGE)
    rows = {sequence: 2 * sequence + 1 for sequence in range(len(lengths))}
    window = numbers.choice([1, 9, 70, 130])
    for apart in (None, 2, MATRIX_ROWS_MIN):
        found = find_runs(tables, lengths, rows, page_size=PAGE, window=window, apart=apart)
        cut = [piece for run in found for piece in runs._cut(run)]  # pyright: ignore[reportPrivateUsage]
        for pieces in (found, cut):
            for sequence, row in rows.items():
                first = max(0, lengths[sequence] - window)
                seen = range(first, lengths[sequence])
                expected = [(at, int(tables[sequence, at // PAGE])) for at in seen]
                assert read_by(pieces, row, tables) == expected
            least = MATRIX_ROWS_MIN if pieces is cut else apart
            apart_ones = [run for run in pieces if run.spans is not None]
            assert all(least and len(run.members) >= min(least, 4) for run in apart_ones)
            in_order = [list(run.spans) for run in pieces if run.spans is not None]
            assert all(some == sorted(some) for some in in_order)


def test_rows_share_what_their_windows_have_in_common() -> None:
    tables = np.zeros((5, 12), dtype=np.int32)
    tables[:, :9] = range(1, 10)
    tables[:, 9:] = 10 + np.arange(15).reshape(5, 3)
    lengths, rows = [150, 160, 170, 180, 190], {n: n for n in range(5)}
    found = find_runs(tables, lengths, rows, page_size=16, window=100, apart=MATRIX_ROWS_MIN)
    (shared,) = (run for run in found if len(run.members) > 1)
    assert (shared.start, shared.end, shared.members) == (50, 144, (0, 1, 2, 3, 4))
    assert shared.spans == ((50, 144), (60, 144), (70, 144), (80, 144), (90, 144))
    own = {(run.start, run.end, run.members) for run in found if run is not shared}
    assert own == {(144, length, (row,)) for row, length in enumerate(lengths)}
    wide = find_runs(tables, lengths, rows, page_size=16, window=190, apart=None)
    assert wide == find_runs(
        tables, lengths, rows, page_size=16, window=None, apart=MATRIX_ROWS_MIN
    )
    alike = find_runs(tables, [180] * 5, rows, page_size=16, window=100, apart=MATRIX_ROWS_MIN)
    assert Run(0, 80, 144, (0, 1, 2, 3, 4)) in alike, "all see the same"
    few = find_runs(
        tables, lengths[:3], {0: 0, 1: 1, 2: 2}, page_size=16, window=100, apart=MATRIX_ROWS_MIN
    )
    assert not any(len(run.members) > 1 for run in few)
    two = find_runs(tables, lengths[:2], {0: 0, 1: 1}, page_size=16, window=100, apart=2)
    assert Run(0, 50, 144, (0, 1), ((50, 144), (60, 144))) in two


def test_a_window_reads_its_positions_alone() -> None:
    tables = np.array([[1, 2, 3], [1, 2, 4]], dtype=np.int32)
    found = find_runs(tables, [40, 3], {0: 4, 1: 6}, page_size=16, window=10, apart=None)
    assert found == [Run(0, 30, 40, (4,)), Run(1, 0, 3, (6,))]


def test_long_runs_are_cut_and_parts_numbered_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "RUN_TOKENS_MAX", 100)
    found = [Run(3, 0, 128, (7, 9)), Run(5, 128, 140, (9,))]
    tables = np.zeros((6, 9), dtype=np.int32)
    laid = laid_out(tables, found)
    read = []
    for index in range(len(laid.sequences)):
        for place in range(laid.first_members[index], laid.first_members[index + 1]):
            stretch = (int(laid.starts[index]), int(laid.ends[index]))
            read.append((*stretch, int(laid.members[place]), int(laid.slots[place])))
    assert [part[:3] for part in read[:2]] == [(0, 100, 7), (0, 100, 9)], "the most work first"
    assert laid.rows.tolist() == [7, 9]
    assert laid.first_slots.tolist() == [0, 2, 5]
    slots = {row: sorted(slot for *_, mine, slot in read if mine == row) for row in (7, 9)}
    assert slots == {7: [0, 1], 9: [2, 3, 4]}
