"""Warm-up: steps that run before there are requests.

The largest ones, to see what memory they need: pages get what steps leave (`page_budget.py`), so
these come first, over a pool of just the pages that they touch. All that a step may need must come
up in them: as many tokens and as many rows of logits as it may have, and each row chosen in the way
that needs the most.

Then small ones of every kind, on a device whose kernels are compiled where they are first wanted:
that takes seconds, for which nobody's reply should stand still.
"""

import array
import time
from collections.abc import Iterator, Sequence
from itertools import cycle

from chatserve.cache.block_manager import PageCopy
from chatserve.engine.plan import Moves, PageMove, SampleOrder, Slice, StepPlan, StepResult
from chatserve.engine.runner import Runner, run
from chatserve.engine.token_counts import TokenCounts
from chatserve.engine.values import Sampling

# More rows than any kernel's program holds.
ROWS_TOGETHER = 256
# More than what rows must have in common to read it together.
SHARED_POSITIONS = 128
COPIES = (1, 2, 4, 8)

# Filters, penalties and logprobs, none of them neutral.
_SAMPLING = Sampling(
    temperature=1.0,
    top_k=50,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    top_logprobs=20,
)
_WAYS = (Sampling(temperature=0.0), Sampling(temperature=1.0), _SAMPLING)


def largest_step(
    *, tokens: int, sequences: int, context_length: int, page_size: int
) -> tuple[StepPlan, int]:
    """A step of so many tokens, or as many as the sequences hold, each of which is asked for a
    next token; and how many pages it touches. All begin at position 0, so that nothing is read
    that the step has not written."""
    sequences = min(sequences, tokens)
    slices: list[Slice] = []
    left, first_page = tokens, 0
    for index in range(sequences):
        # As long as they may be, and one token for each of the rest.
        count = min(context_length, left - (sequences - index - 1))
        pages = -(-count // page_size)
        table = range(first_page, first_page + pages)
        slices.append(_begun(index, 0, count, table, _SAMPLING))
        left -= count
        first_page += pages
    return StepPlan(0, 0, (), tuple(slices)), first_page


def run_first_steps(
    runner: Runner, *, tokens: int, context_length: int, pages: int, page_size: int, slots: int
) -> float:
    """Run `first_steps`, of which nothing is kept; the seconds that it took. Blocks. Raises what
    `Runner.start` may raise."""
    started = time.monotonic()
    for plan in first_steps(
        tokens=tokens,
        context_length=context_length,
        pages=pages,
        page_size=page_size,
        slots=slots,
    ):
        run(runner, plan)
    for end in [runner.start(plan) for plan in _one_behind_the_other()]:
        if not isinstance(end, StepResult):
            end()
    return time.monotonic() - started


def first_steps(
    *, tokens: int, context_length: int, pages: int, page_size: int, slots: int
) -> Iterator[StepPlan]:
    """Small steps over the first of so many pages, to be run in this order: prompts of all sizes
    that kernels tell apart, each way to choose a token, rows that share a page, copies of some
    pages, a row that writes nothing beside one that writes, and a page's way to one of the host's
    slots and back. What finds no room is left out."""
    ways = cycle(_WAYS)
    most = min(ROWS_TOGETHER, tokens, context_length, pages * page_size)
    for size in (1 << power for power in range(most.bit_length())):
        yield StepPlan(0, 0, (), (_begun(0, 0, size, range(-(-size // page_size)), next(ways)),))
    shared = -(-SHARED_POSITIONS // page_size)
    free = shared + 2
    if free > pages or shared * page_size >= min(context_length, most + 1):
        return
    sharing = [
        _begun(row, shared * page_size, 1, (*range(shared), shared + row), next(ways))
        for row in range(2)
    ]
    for count in (0, *COPIES):
        if free + count <= pages:
            copies = tuple(PageCopy(0, free + each) for each in range(count))
            yield StepPlan(0, 0, copies, tuple(sharing))
    # The second one's page holds the position that it computes: it is a hit of all of its prompt.
    yield StepPlan(0, 0, (), (sharing[0], sharing[1]._replace(write=False)))
    if slots:
        for moves in (Moves(saves=(PageMove(0, 0),)), Moves(promotions=(PageMove(0, 1),))):
            yield StepPlan(0, 0, (), (), moves)


def _one_behind_the_other() -> Iterator[StepPlan]:
    """Two steps of one sequence: the second is to be started before the first one's token is known,
    which its penalties count."""
    first = _begun(0, 0, 1, (0,), _SAMPLING)
    (order,) = first.orders
    then = first._replace(start=1, tokens=(), pending=0, orders=(order._replace(position=2),))
    for item in (first, then):
        yield StepPlan(0, 0, (), (item,))


def _begun(
    sequence: int, start: int, count: int, pages: Sequence[int], sampling: Sampling
) -> Slice:
    """A slice of so many tokens, and a token after it."""
    tokens, end = (0,) * count, start + count
    counts = TokenCounts.of(array.array("i", bytes(4 * end)), end - 1)
    order = SampleOrder(sequence, 0, sampling, sample=0, position=end, counts=counts)
    table = array.array("i", pages).tobytes()
    return Slice(sequence, 0, start, tokens, None, table, write=True, orders=(order,))
