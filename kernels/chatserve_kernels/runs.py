"""Runs: which stretch of pages is read for which rows, so that shared pages are read once.

Theory: the contexts of decode rows are paths in a tree of pages, as their prefixes are shared. A
run is a stretch of one path with the rows that all pass through it: from where a branch begins to
where it parts. Attention over a context is a sum over its runs: each gives a maximum, a sum of
weights and a weighted sum of values, and these are joined exactly (flash decoding; for shared
prefixes Hydragen, arXiv 2402.05099, section 3.1). The queries of a slice share pages too: a run is
some neighbours among them, and the last of them sees furthest.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A run for several rows costs each of them a part to be joined: not for a page or two.
SHARED_TOKENS_MIN = 64
# A longer run is cut: a single long context is work for several threads.
RUN_TOKENS_MAX = 2048
# Queries of a slice that read their pages together: their records are to stay in the cache.
SLICE_ROWS = 32
# From so many rows on, pages are laid out anew for products of matrices.
MATRIX_ROWS_MIN = 4

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Run:
    """Positions start to end of `sequence`'s page table, read for the rows `members` of the
    flattened batch. spans: where each one's positions begin and end, neither before those of the
    member before; None where each sees all."""

    sequence: int
    start: int
    end: int
    members: tuple[int, ...]
    spans: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """All runs of a step, as arrays of int64; the most work first.

    tables: the step's page tables, int32 [sequences, pages], contiguous.
    sequences, starts, ends: one for each run; matrices: 1 where products of matrices pay or its
    members see different positions. first_members: runs + 1, where each run's members begin.
    members: their rows of the flattened batch, those of a run in the order of what they see;
    member_starts, member_ends: what each sees of the run; slots: the part that each of them gets,
    so that the parts of the i-th row of `rows` are first_slots[i] to first_slots[i + 1]. rows: of
    the flattened batch, ascending.
    prepared: what a program makes of them once, for all layers of a step.
    """

    tables: NDArray[np.int32]
    sequences: Integers
    starts: Integers
    ends: Integers
    matrices: Integers
    first_members: Integers
    members: Integers
    member_starts: Integers
    member_ends: Integers
    slots: Integers
    rows: Integers
    first_slots: Integers
    prepared: dict[Any, Any] = field(default_factory=dict[Any, Any])


def find_runs(
    tables: NDArray[np.int32],
    lengths: Sequence[int],
    rows: Mapping[int, int],
    *,
    page_size: int,
    window: int | None,
    apart: int | None,
) -> list[Run]:
    """The runs of the sequences with one query each.

    tables: [sequences, pages]. lengths: tokens attended to, of every sequence. rows: of those
    sequences, their rows in the flattened batch.
    window: where given, each reads only its last positions. apart: from so many rows on those of
    a run may see different positions; None: never, so that nothing is shared where a window ends
    inside a context.
    """
    firsts = {
        row: 0 if window is None else max(0, lengths[sequence] - window)
        for sequence, row in rows.items()
    }
    if apart is None and any(firsts.values()):
        return [
            Run(sequence, firsts[row], lengths[sequence], (row,)) for sequence, row in rows.items()
        ]
    runs = _tree(tables, lengths, rows, page_size)
    return [part for run in runs for part in _in_window(run, firsts, apart or MATRIX_ROWS_MIN)]


def _in_window(run: Run, firsts: Mapping[int, int], apart: int) -> list[Run]:
    """What its members see of a run. firsts: of each row, the first position that it sees. apart:
    from so many on they see different positions of one run."""
    seen = sorted((max(run.start, firsts[row]), row) for row in run.members)
    seen = [(start, row) for start, row in seen if start < run.end]
    if not seen:
        return []
    members, starts = tuple(row for _, row in seen), [start for start, _ in seen]
    if starts[0] == starts[-1]:
        return [Run(run.sequence, starts[0], run.end, members)]
    if len(seen) < apart:
        return [Run(run.sequence, start, run.end, (row,)) for start, row in seen]
    spans = tuple((start, run.end) for start in starts)
    return [Run(run.sequence, starts[0], run.end, members, spans)]


def _tree(
    tables: NDArray[np.int32], lengths: Sequence[int], rows: Mapping[int, int], page_size: int
) -> list[Run]:
    """The runs where each row sees all of its context."""
    # Any order of bytes puts tables with a common beginning side by side. Only whole pages count.
    whole = {sequence: lengths[sequence] // page_size for sequence in rows}
    order = sorted(rows, key=lambda sequence: tables[sequence, : whole[sequence]].tobytes())
    common = _common_pages(tables[order], [whole[sequence] for sequence in order])
    runs: list[Run] = []
    stack = [(0, len(order), 0)] if order else []
    while stack:
        low, high, depth = stack.pop()
        sequence = order[low]
        if high - low == 1:
            if lengths[sequence] > depth * page_size:
                start = depth * page_size
                runs.append(Run(sequence, start, lengths[sequence], (rows[sequence],)))
            continue
        inside = common[low : high - 1]
        shared = int(inside.min())
        if (shared - depth) * page_size >= SHARED_TOKENS_MIN:
            members = tuple(rows[each] for each in order[low:high])
            runs.append(Run(sequence, depth * page_size, shared * page_size, members))
            depth = shared
        cuts = [low, *(low + 1 + np.flatnonzero(inside == shared)).tolist(), high]
        stack.extend((first, end, depth) for first, end in itertools.pairwise(cuts))
    return runs


def _common_pages(tables: NDArray[np.int32], whole: Sequence[int]) -> Integers:
    """How many whole pages each table and the next begin with alike: [tables - 1]."""
    if len(tables) < 2:
        return np.zeros(0, dtype=np.int64)
    same = tables[1:] == tables[:-1]
    alike = np.where(same.all(axis=1), tables.shape[1], same.argmin(axis=1))
    wholes = np.asarray(whole, dtype=np.int64)
    return np.minimum(alike, np.minimum(wholes[1:], wholes[:-1]))


def slice_runs(
    sequence: int, first_row: int, queries: int, length: int, window: int | None
) -> list[Run]:
    """The runs of one sequence's slice: its queries are the last of `length` tokens, and lie in
    the flattened batch from first_row on. window: as `ops.paged_attention` has it."""
    runs: list[Run] = []
    for first in range(0, queries, SLICE_ROWS):
        members = range(first, min(first + SLICE_ROWS, queries))
        ends = [length - queries + member + 1 for member in members]
        starts = [0 if window is None else max(0, end - window) for end in ends]
        rows = tuple(first_row + member for member in members)
        spans = tuple(zip(starts, ends, strict=True))
        runs.append(Run(sequence, starts[0], ends[-1], rows, spans))
    return runs


def laid_out(tables: NDArray[np.int32], runs: Sequence[Run]) -> Runs:
    """The runs as arrays."""
    pieces = [piece for run in runs for piece in _cut(run)]
    pieces.sort(key=lambda run: (run.end - run.start) * len(run.members), reverse=True)
    members = _integers(member for run in pieces for member in run.members)
    spans = [
        span for run in pieces for span in run.spans or [(run.start, run.end)] * len(run.members)
    ]
    rows, counts = np.unique(members, return_counts=True)
    slots = np.empty(len(members), dtype=np.int64)
    slots[np.argsort(members, kind="stable")] = np.arange(len(members))
    return Runs(
        tables=tables,
        sequences=_integers(run.sequence for run in pieces),
        starts=_integers(run.start for run in pieces),
        ends=_integers(run.end for run in pieces),
        matrices=_integers(
            run.spans is not None or len(run.members) >= MATRIX_ROWS_MIN for run in pieces
        ),
        first_members=_sums(len(run.members) for run in pieces),
        members=members,
        member_starts=_integers(start for start, _ in spans),
        member_ends=_integers(end for _, end in spans),
        slots=slots,
        rows=rows,
        first_slots=_sums(counts.tolist()),
    )


def _cut(run: Run) -> list[Run]:
    """A slice stays whole: it is work enough for several threads as it is."""
    if run.spans is not None and (len(run.members) == 1 or run.spans[0][1] < run.end):
        return [run]
    firsts = dict.fromkeys(run.members, run.start)
    if run.spans is not None:
        firsts = {row: start for row, (start, _) in zip(run.members, run.spans, strict=True)}
    return [
        part
        for start in range(run.start, run.end, RUN_TOKENS_MAX)
        for part in _in_window(
            Run(run.sequence, start, min(run.end, start + RUN_TOKENS_MAX), run.members),
            firsts,
            MATRIX_ROWS_MIN,
        )
    ]


def _integers(values: Iterable[int]) -> Integers:
    return np.fromiter(values, dtype=np.int64)


def _sums(counts: Iterable[int]) -> Integers:
    """0, then the sum of the first, of the first two, and so on."""
    return _integers(itertools.accumulate(counts, initial=0))
