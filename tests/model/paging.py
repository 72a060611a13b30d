"""A plain page keeper for model tests: sequences, tables, and one forward pass over slices."""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chatserve.model import LoadedModel
from chatserve_kernels import AttentionBatch


@dataclass
class Sequence:
    """Known tokens, how many are computed, and the pages they are in."""

    tokens: list[int]
    computed: int = 0
    pages: list[int] = field(default_factory=list[int])


class Paging:
    """Owns a pool full of NaN; hands pages out in random order."""

    def __init__(self, model: LoadedModel, *, pages: int, seed: int) -> None:
        self.model = model
        self.pool = model.layout.allocate(pages, model.device, fill=float("nan"))
        self.free = list(range(pages))
        random.Random(seed).shuffle(self.free)

    def step(
        self,
        slices: list[tuple[Sequence, int]],
        *,
        suppress_writes: bool = False,
        logit_rows: list[int] | None = None,
    ) -> list[Tensor]:
        """Compute the next `count` tokens of each sequence; logits [count, vocabulary] each.

        With logit_rows: one tensor [len(logit_rows), vocabulary] for those rows of the batch.
        """
        size = self.model.layout.page_size
        tokens: list[int] = []
        positions: list[int] = []
        write_pages: list[int] = []
        starts, contexts = [0], []
        for sequence, count in slices:
            begin, end = sequence.computed, sequence.computed + count
            while len(sequence.pages) * size < end:
                sequence.pages.append(self.free.pop())
            tokens += sequence.tokens[begin:end]
            positions += range(begin, end)
            write_pages += [sequence.pages[p // size] for p in range(begin, end)]
            starts.append(starts[-1] + count)
            contexts.append(end)
            sequence.computed = end
        longest = max(len(sequence.pages) for sequence, _ in slices)
        padded = [s.pages + [0] * (longest - len(s.pages)) for s, _ in slices]
        none = torch.empty(0, dtype=torch.int64)
        positions_tensor = torch.tensor(positions)
        batch = AttentionBatch(
            query_starts=tuple(starts),
            context_lengths=tuple(contexts),
            page_tables=torch.tensor(padded),
            write_pages=none if suppress_writes else torch.tensor(write_pages),
            write_offsets=none if suppress_writes else positions_tensor % size,
            write_rows=none if suppress_writes else None,
            page_size=size,
        )
        logits = self.model.forward(
            torch.tensor(tokens),
            positions_tensor,
            batch,
            pool=self.pool,
            logit_rows=torch.tensor(
                range(len(tokens)) if logit_rows is None else logit_rows, dtype=torch.int64
            ),
        )
        if logit_rows is not None:
            return [logits]
        return list(logits.split([count for _, count in slices]))
