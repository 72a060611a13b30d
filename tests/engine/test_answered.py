"""A request that goes on where an earlier one was cut off: the same tokens, chosen the same way."""

import random
from dataclasses import replace

import pytest

from chatserve.engine.plan import SampleOrder, StepPlan
from chatserve.engine.values import Request, Sampling
from tests.engine.build import Setup, ask, build, quiet, random_tokens, running
from tests.engine.oracle import listen

LENGTH = 24
Choice = tuple[int, dict[int, int], tuple[int, ...]]


def _counts(order: SampleOrder) -> dict[int, int]:
    return dict(zip(order.counts.ids.tolist(), order.counts.generated.tolist(), strict=True))


async def run(request: Request) -> tuple[tuple[int, ...], dict[int, Choice]]:
    """The tokens, and for each position what its choice was made of."""
    house = build(Setup(steps_in_flight=1))
    orders: dict[int, SampleOrder] = {}

    def look(plan: StepPlan) -> None:
        orders.update((order.position, order) for item in plan.slices for order in item.orders)

    house.runner.before_step = look
    async with running(house) as engine:
        with engine.open(house.prepare(request)) as stream:
            (heard,) = await listen(stream)
        await quiet(house)
    choices = {
        position: (order.sampling.seed, _counts(order), order.banned)
        for position, order in orders.items()
    }
    return tuple(heard.tokens), choices


@pytest.mark.parametrize("min_tokens", [0, 9])
@pytest.mark.parametrize("seed", range(4))
async def test_a_request_cut_off_anywhere_goes_on_as_if_it_had_not_been(seed: int, min_tokens: int):
    source = random.Random(seed)
    prompt = random_tokens(source, 11)
    whole = replace(
        ask(prompt, LENGTH, min_tokens=min_tokens, stop_ids=frozenset(random_tokens(source, 6))),
        sampling=Sampling(temperature=1.0, seed=seed, frequency_penalty=0.5),
    )
    tokens, choices = await run(whole)
    assert len(tokens) > min_tokens
    for cut in range(1, len(tokens)):
        rest = replace(whole, tokens=prompt + tokens[:cut], max_tokens=LENGTH - cut, answered=cut)
        again, chosen = await run(rest)
        assert again == tokens[cut:]
        assert chosen == {at: choice for at, choice in choices.items() if at in chosen}
        assert min(chosen) == len(prompt) + cut
