"""Warm-up: the largest steps, run before there are requests, to see what memory they need.

Pages get what steps leave (`page_budget.py`), so the steps come first, over a pool of just the
pages that they touch. All that a step may need must come up in them: as many tokens and as many
rows of logits as it may have, and each row chosen in the way that needs the most.
"""

import array

from chatserve.engine.plan import SampleOrder, Slice, StepPlan
from chatserve.engine.values import Sampling

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
        table = array.array("i", range(first_page, first_page + pages)).tobytes()
        history = (0,) * count
        order = SampleOrder(
            index, 0, _SAMPLING, sample=0, position=count, history=history, prompt_tokens=count - 1
        )
        slices.append(Slice(index, 0, 0, history, None, table, write=True, orders=(order,)))
        left -= count
        first_page += pages
    return StepPlan(0, 0, (), tuple(slices)), first_page
