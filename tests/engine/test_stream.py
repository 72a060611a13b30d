"""The mailbox between the engine and one consumer."""

import asyncio

import pytest

from chatserve.engine.stream import Stream
from chatserve.engine.values import Emission, FinishReason, Receipt, TokenLogprobs


def stream_of(samples: int, closed: list[Stream] | None = None) -> Stream:
    return Stream(
        request_id="r",
        samples=samples,
        on_close=(closed if closed is not None else []).append,
        on_finish=lambda *_: None,
        on_progress=lambda _: None,
    )


async def test_a_late_consumer_finds_one_merged_emission_for_each_sample() -> None:
    stream = stream_of(2)
    receipt = Receipt(device=3, computed=4)
    stream.put(Emission(sample=0, tokens=(1,), receipt=receipt))
    stream.put(Emission(sample=1, tokens=(9,), logprobs=(TokenLogprobs(-1.0),)))
    stream.put(Emission(sample=0, tokens=(2,)))
    stream.put(Emission(sample=1, tokens=(8,), logprobs=(TokenLogprobs(-2.0),)))
    stream.put(Emission(sample=0, tokens=(3,), finish=FinishReason.LENGTH))
    first, second = await stream.get()
    assert first == Emission(
        sample=0, tokens=(1, 2, 3), finish=FinishReason.LENGTH, receipt=receipt
    )
    assert second.tokens == (9, 8)
    assert [item.logprob for item in second.logprobs] == [-1.0, -2.0]
    assert not stream.over


async def test_a_stream_is_over_after_the_last_samples_final_emission_and_stays_so() -> None:
    stream = stream_of(1)
    stream.put(Emission(sample=0, finish=FinishReason.STOP))
    assert len(await stream.get()) == 1
    assert await stream.get() == ()
    assert await stream.get() == ()
    with pytest.raises(AssertionError, match="after the final one"):
        stream.put(Emission(sample=0, tokens=(1,)))


async def test_closing_before_the_end_is_told_once_and_after_it_not_at_all() -> None:
    closed: list[Stream] = []
    stream = stream_of(1, closed)
    with stream:
        pass
    stream.close()
    assert closed == [stream]
    stream.put(Emission(sample=0, tokens=(1,), finish=FinishReason.STOP))
    assert await stream.get() == ()
    ended = stream_of(1, closed)
    ended.put(Emission(sample=0, finish=FinishReason.STOP))
    ended.close()
    assert closed == [stream]


async def test_a_waiting_reader_is_woken_by_mail_and_by_closing() -> None:
    stream = stream_of(1)
    reader = asyncio.create_task(stream.get())
    await asyncio.sleep(0)
    stream.put(Emission(sample=0, tokens=(5,)))
    assert [item.tokens for item in await reader] == [(5,)]
    reader = asyncio.create_task(stream.get())
    await asyncio.sleep(0)
    stream.close()
    assert await reader == ()
