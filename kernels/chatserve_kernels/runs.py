"""Runs: which stretch of pages is read for which decode rows, so that shared pages are read once.

Theory: the contexts of the rows are paths in a tree of pages, as their prefixes are shared. A run
is a stretch of one path with the rows that all pass through it: from where a branch begins to where
it parts. Attention over a context is a sum over its runs: each gives a maximum, a sum of weights
and a weighted sum of values, and these are joined exactly (flash decoding; for shared prefixes
Hydragen, arXiv 2402.05099, section 3.1).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A run for several rows costs each of them a part to be joined: not for a page or two.
SHARED_TOKENS_MIN = 64
# A longer run is cut: a single long context is work for several threads.
RUN_TOKENS_MAX = 2048

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Run:
    """Positions start to end of `sequence`'s page table, read for the sequences `members`."""

    sequence: int
    start: int
    end: int
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """All runs of a step, as arrays of int64; the most work first.

    tables: the step's page tables, int32 [sequences, pages], contiguous.
    sequences, starts, ends: one for each run. first_members: runs + 1, where each run's members
    begin. members: their rows of the flattened batch; slots: the part that
    each of them gets, so that the parts of the
    i-th row of `rows` are first_slots[i] to first_slots[i + 1]. rows: of the flattened batch.
    prepared: what a program makes of them once, for all layers of a step.
    """

    tables: NDArray[np.int32]
    sequences: Integers
    starts: Integers
    ends: Integers
    first_members: Integers
    members: Integers
    slots: Integers
    rows: Integers
    first_slots: Integers
    prepared: dict[Any, Any] = field(default_factory=dict[Any, Any])


def find_runs(
    tables: NDArray[np.int32],
    lengths: Sequence[int],
    decoding: Sequence[int],
    *,
    page_size: int,
    window: int | None,
) -> list[Run]:
    """The runs of these sequences with one query each.

    tables: [sequences, pages]. lengths: tokens attended to, of every sequence. decoding: indices.
    window: where given, each reads only its last positions, and nothing is shared.
    """
    if window is not None:
        return [
            Run(sequence, max(0, lengths[sequence] - window), lengths[sequence], (sequence,))
            for sequence in decoding
        ]
    # Any order of bytes puts tables with a common beginning side by side. Only whole pages count.
    whole = {sequence: lengths[sequence] // page_size for sequence in decoding}
    order = sorted(decoding, key=lambda sequence: tables[sequence, : whole[sequence]].tobytes())
    common = _common_pages(tables[order], [whole[sequence] for sequence in order])
    runs: list[Run] = []
    stack = [(0, len(order), 0)]
    while stack:
        low, high, depth = stack.pop()
        sequence = order[low]
        if high - low == 1:
            if lengths[sequence] > depth * page_size:
                runs.append(Run(sequence, depth * page_size, lengths[sequence], (sequence,)))
            continue
        inside = common[low : high - 1]
        shared = int(inside.min())
        if (shared - depth) * page_size >= SHARED_TOKENS_MIN:
            members = tuple(order[low:high])
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


def laid_out(tables: NDArray[np.int32], runs: Sequence[Run], rows: dict[int, int]) -> Runs:
    """The runs as arrays. rows: the row of the flattened batch of each sequence, in their order."""
    pieces = [
        Run(run.sequence, start, min(run.end, start + RUN_TOKENS_MAX), run.members)
        for run in runs
        for start in range(run.start, run.end, RUN_TOKENS_MAX)
    ]
    pieces.sort(key=lambda run: (run.end - run.start) * len(run.members), reverse=True)
    places = {sequence: index for index, sequence in enumerate(rows)}
    members = np.array([member for run in pieces for member in run.members], dtype=np.int64)
    counts = np.bincount([places[member] for member in members.tolist()], minlength=len(rows))
    first_slots = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(counts, out=first_slots[1:])
    free = first_slots[:-1].tolist()
    slots = np.empty(len(members), dtype=np.int64)
    for index, member in enumerate(members.tolist()):
        place = places[member]
        slots[index] = free[place]
        free[place] += 1
    first_members = np.zeros(len(pieces) + 1, dtype=np.int64)
    np.cumsum([len(run.members) for run in pieces], out=first_members[1:])
    return Runs(
        tables=tables,
        sequences=np.array([run.sequence for run in pieces], dtype=np.int64),
        starts=np.array([run.start for run in pieces], dtype=np.int64),
        ends=np.array([run.end for run in pieces], dtype=np.int64),
        first_members=first_members,
        members=np.array([rows[member] for member in members.tolist()], dtype=np.int64),
        slots=slots,
        rows=np.array(list(rows.values()), dtype=np.int64),
        first_slots=first_slots,
    )
