"""Trial: what a prompt's token costs, measured before anybody asks.

Chats may be so short that no step of theirs is long enough to measure what computing a prompt
costs. What is found of them would be told without the time that it saved, so two steps are run
before there are requests: one of a single token, one of some pages. The difference is what the
tokens cost, without what every step costs.
"""

import array

from chatserve.engine.plan import SampleOrder, Slice, StepPlan
from chatserve.engine.runner import Runner, run
from chatserve.engine.values import Sampling

TOKENS = 64  # a whole prompt of a short chat, and no noticeable part of a start
_RUNS = 2  # of each; the first may wait for memory and threads, so the quicker one counts


def prompt_token_seconds(runner: Runner, *, tokens: int, page_size: int) -> float:
    """Seconds that one more token of a prompt takes, from a prompt of so many tokens, at least two.

    They lie in the runner's first pages, which hold nothing yet; what is left there has no name.
    Blocks. Raises what `Runner.start` may raise.
    """
    assert tokens > 1
    one, whole = (_quickest(runner, count, page_size) for count in (1, tokens))
    return max(0.0, whole - one) / (tokens - 1)


def _quickest(runner: Runner, count: int, page_size: int) -> float:
    table = array.array("i", range(-(-count // page_size))).tobytes()
    # A sampled token, so that the step has not ended before the device has computed it.
    orders = (SampleOrder(0, 0, Sampling(), sample=0, position=count),)
    prompt = Slice(0, 0, 0, (0,) * count, None, table, write=True, orders=orders)
    plan = StepPlan(0, 0, (), (prompt,))
    return min(run(runner, plan).seconds for _ in range(_RUNS))
