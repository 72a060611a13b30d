"""A step's tokens reach their consumers a few at a turn of the loop, and all of them do."""

import asyncio

from chatserve.engine.engine import DELIVERIES_A_TURN
from chatserve.engine.stream import Stream
from chatserve.engine.values import Emission
from tests.engine.build import Setup, ask, build, running

STREAMS = 5 * DELIVERIES_A_TURN


async def test_a_turn_of_the_loop_delivers_to_a_few_streams_only() -> None:
    house = build(
        Setup(
            pages=4 * STREAMS,
            sequences_max=STREAMS,
            budget_min=8 * STREAMS,
            budget_max=8 * STREAMS,
        )
    )
    turn = 0
    delivered: list[int] = []  # the turn of each delivery
    put = Stream.put

    def noting(stream: Stream, emission: Emission) -> None:
        delivered.append(turn)
        put(stream, emission)

    def next_turn() -> None:
        nonlocal turn
        turn += 1
        loop.call_soon(next_turn)

    loop = asyncio.get_running_loop()
    loop.call_soon(next_turn)
    streams = [
        house.engine.open(house.prepare(ask((number, 1, 2), 6))) for number in range(STREAMS)
    ]
    for stream in streams:
        stream.put = noting.__get__(stream)
    async with running(house):
        said = await asyncio.gather(*(_tokens(stream) for stream in streams))
    assert all(len(tokens) == 6 for tokens in said)
    assert len(delivered) == 6 * STREAMS
    per_turn = [delivered.count(each) for each in set(delivered)]
    assert max(per_turn) <= DELIVERIES_A_TURN


async def _tokens(stream: Stream) -> list[int]:
    return [token async for batch in stream for emission in batch for token in emission.tokens]
