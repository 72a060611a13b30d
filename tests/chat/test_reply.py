"""Replies: their viewers, their ends, and what is left at each point of cancellation."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest

from chatserve.chat.reply import Patience
from chatserve.chat.values import Delta, Done, Failed, SampleEnd
from chatserve.engine.values import Emission, FinishReason, TokenLogprobs
from chatserve.errors import EngineError, NumericalFault, Unavailable
from tests.chat.conftest import Floor, build, read, settle


def _text(events, sample: int = 0) -> str:
    return "".join(
        each.text for each in events if isinstance(each, Delta) and each.sample == sample
    )


async def test_a_reply_streams_and_ends_in_done(floor: Floor):
    reply, run = await floor.open()
    end = floor.text.tokenizer.control.ids["<|im_end|>"]
    tokens = floor.ids("the dog")
    with reply.view() as viewing:
        floor.time.seconds += 2
        run.give(tokens[:1])
        first = await anext(viewing)
        floor.time.seconds += 1
        run.give([*tokens[1:], end], finish=FinishReason.STOP)
        events = [first, *(await read(viewing))]
    assert first == Delta(
        sample=0, seq=len(first.text), text=first.text, token_ids=tuple(tokens[:1])
    )
    assert _text(events) == "the dog"
    told = [token for each in events if isinstance(each, Delta) for token in each.token_ids]
    assert told == [*tokens, end]
    ended, done = events[-2:]
    assert ended == SampleEnd(sample=0, finish_reason="stop")
    assert isinstance(done, Done)
    assert done.usage.prompt_tokens == len(run.request.tokens)
    assert done.usage.completion_tokens == len(told)
    assert done.usage.cached_tokens == 1
    assert (done.timings.to_first_token, done.timings.total) == (2.0, 3.0)
    assert not run.aborted, "no abort after a normal end"
    assert floor.time.due == []


async def test_a_slow_viewer_finds_one_merged_delta_per_sample(floor: Floor):
    reply, run = await floor.open(samples=2)
    with reply.view() as viewing:
        for token in floor.ids("the quick brown fox"):
            run.give([token], sample=0)
            run.give([token], sample=1)
            await settle()
        for sample in (0, 1):
            run.give(sample=sample, finish=FinishReason.LENGTH)
        await settle()
        events = await read(viewing)
    assert [type(each) for each in events] == [Delta, Delta, SampleEnd, SampleEnd, Done]
    assert [each.text for each in events[:2]] == ["the quick brown fox"] * 2
    assert events[0].seq == len("the quick brown fox")


async def test_a_late_viewer_gets_the_text_so_far_as_one_delta(floor: Floor):
    reply, run = await floor.open()
    with reply.view() as early:
        for token in floor.ids("the dog"):
            run.give([token])
            await settle()
            await anext(early)
        with reply.view() as late:
            assert (await anext(late)).text == "the dog"
            run.give(floor.ids(" barks"), finish=FinishReason.LENGTH)
            assert _text(await read(early)) == _text(await read(late)) == " barks"
    with reply.view() as last:
        events = await read(last)
    assert _text(events) == "the dog barks"
    assert isinstance(events[-1], Done)


async def test_samples_take_turns(floor: Floor):
    reply, run = await floor.open(samples=3)
    token = floor.ids("a")
    with reply.view() as viewing:
        for sample in (2, 0, 1):
            run.give(token, sample=sample)
        await settle()
        order = []
        for _ in range(3):
            order.append((await anext(viewing)).sample)
            run.give(token, sample=2)  # a busy one does not push in
            await settle()
        assert sorted(order) == [0, 1, 2]


async def test_a_stop_string_ends_a_sample_and_tells_the_engine_what_to_keep(floor: Floor):
    reply, run = await floor.open(stop=("END",))
    kept = floor.ids("the dog")
    with reply.view() as viewing:
        run.give([*kept, *floor.ids("END"), *floor.ids(" surplus")])
        await settle()
        run.give(floor.ids("more"))  # a step that was already in flight
        events = await read(viewing)
    assert _text(events) == "the dog"
    assert run.finished == {0: len(kept)}
    assert events[-2] == SampleEnd(sample=0, finish_reason="stop", stop_reason="END")
    assert events[-1].usage.completion_tokens == len(kept)
    assert not run.aborted


async def test_one_samples_stop_string_leaves_the_others_running(floor: Floor):
    reply, run = await floor.open(stop=("X",), samples=2)
    with reply.view() as viewing:
        run.give(floor.ids("aX"), sample=0)
        await settle()
        run.give(floor.ids("bcd"), sample=1, finish=FinishReason.LENGTH)
        events = await read(viewing)
    assert (_text(events, 0), _text(events, 1)) == ("a", "bcd")
    reasons = {each.sample: each.finish_reason for each in events if isinstance(each, SampleEnd)}
    assert reasons == {0: "stop", 1: "length"}


async def test_logprobs_go_with_the_tokens_they_belong_to(floor: Floor):
    reply, run = await floor.open(top_logprobs=1)
    tokens = floor.ids("the dog")
    top = ((tokens[0], -0.5),)
    with reply.view() as viewing:
        run.give(
            tokens,
            logprobs=tuple(TokenLogprobs(-1.0, top) for _ in tokens),
            finish=FinishReason.LENGTH,
        )
        delta = (await read(viewing))[0]
    assert [each.token_id for each in delta.chances] == list(delta.token_ids) == tokens
    assert b"".join(each.token_bytes for each in delta.chances) == b"the dog"
    assert delta.chances[0].top[0].logprob == -0.5


async def test_an_error_of_the_engine_ends_the_reply_in_failed(floor: Floor):
    reply, run = await floor.open()
    error = NumericalFault("NaN")
    with reply.view() as viewing:
        run.give(floor.ids("the"))
        run.give(finish=FinishReason.ERROR, error=error)
        events = await read(viewing)
    assert events[-2] == SampleEnd(sample=0, finish_reason="error", error=error)
    assert events[-1] == Failed(error)


async def test_an_error_of_one_sample_leaves_the_others_done(floor: Floor):
    reply, run = await floor.open(samples=2)
    with reply.view() as viewing:
        run.give(sample=0, finish=FinishReason.ERROR, error=NumericalFault("NaN"))
        run.give(floor.ids("dog"), sample=1, finish=FinishReason.LENGTH)
        events = await read(viewing)
    assert isinstance(events[-1], Done)
    assert _text(events, 1) == "dog"


# Leaving -----------------------------------------------------------------------------------------


async def test_the_last_viewer_gone_aborts_at_once(floor: Floor):
    reply, run = await floor.open()
    with reply.view() as first, reply.view() as second:
        run.give(floor.ids("the"))
        first.close()
        assert not run.aborted
        second.close()
        assert run.aborted
        second.close()
        assert [each async for each in second] == []
    await settle()
    with reply.view() as viewing:
        events = await read(viewing)
    assert events[-2] == SampleEnd(sample=0, finish_reason="abort")
    assert isinstance(events[-1], Done)


async def test_a_viewer_cancelled_while_it_waits_leaves_an_aborted_request(floor: Floor):
    reply, run = await floor.open()

    async def response():
        with reply.view() as viewing:
            await read(viewing)

    task = asyncio.create_task(response())
    await settle()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert run.aborted
    await settle()
    assert reply.final is not None


async def test_a_viewing_closed_by_another_task_ends_the_waiting_reader(floor: Floor):
    reply, run = await floor.open()
    with reply.view() as viewing:
        reader = asyncio.create_task(anext(viewing, "over"))
        await settle()
        viewing.close()
        assert await reader == "over"
    assert run.aborted


async def test_a_reply_that_nobody_ever_viewed_is_aborted_when_patience_ends(floor: Floor):
    reply, run = await floor.open()
    (timer,) = floor.time.due
    assert timer.seconds == 5.0
    run.give(floor.ids("the"))
    await settle()
    timer.call()
    assert run.aborted
    await settle()
    assert isinstance(reply.final, Done)


async def test_a_view_that_is_never_entered_holds_nothing(floor: Floor):
    reply, run = await floor.open()
    reply.view().close()
    assert not run.aborted
    assert len(floor.time.due) == 1
    floor.time.due[0].call()
    assert run.aborted


async def test_a_grace_period_starts_with_the_last_viewer_and_ends_with_the_next(floor: Floor):
    patient = build(
        floor.task_group,
        floor.executor,
        patience=Patience(before_first_view=5.0, after_last_view=60.0),
    )
    reply, run = await patient.open()
    with reply.view():
        assert patient.time.due == []
    (timer,) = patient.time.due
    assert timer.seconds == 60.0
    with reply.view():
        assert patient.time.due == []
    (again,) = patient.time.due
    again.call()
    assert run.aborted


async def test_leaving_after_the_end_aborts_nothing(floor: Floor):
    reply, run = await floor.open()
    with reply.view() as viewing:
        run.give(floor.ids("dog"), finish=FinishReason.LENGTH)
        await read(viewing)
    assert not run.aborted
    assert floor.time.due == []


# Things that break -------------------------------------------------------------------------------


async def test_a_mistake_of_ours_ends_one_reply_and_is_logged(floor: Floor, caplog):
    reply, run = await floor.open()
    other, other_run = await floor.open()
    with reply.view() as viewing, other.view() as other_viewing:
        with caplog.at_level(logging.ERROR, logger="chatserve.chat.reply"):
            run.given.add(0)
            run.stream.put(_unreadable())
            events = await read(viewing)
        assert isinstance(events[-1], Failed)
        assert isinstance(events[-1].error, EngineError)
        assert "Traceback" in caplog.text
        assert run.aborted
        other_run.give(floor.ids("dog"), finish=FinishReason.LENGTH)
        assert isinstance((await read(other_viewing))[-1], Done)


def _unreadable() -> Emission:
    return Emission(sample=0, tokens=("not an id",))  # type: ignore[arg-type]


async def test_a_reply_cancelled_by_the_shutdown_leaves_a_failed_event_and_a_closed_stream():
    seen = []
    with ThreadPoolExecutor(1) as executor:

        async def lifespan(begun: asyncio.Future):
            async with asyncio.TaskGroup() as task_group:
                floor = build(task_group, executor)
                reply, run = await floor.open()
                begun.set_result((reply, run))
                await asyncio.Event().wait()

        begun = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(lifespan(begun))
        reply, run = await begun
        with reply.view() as viewing:
            await settle()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            seen = await read(viewing)
    assert isinstance(seen[-1].error, Unavailable)
    assert run.aborted


async def test_a_reply_cancelled_before_its_first_step_leaves_a_closed_stream():
    kept = []
    with ThreadPoolExecutor(1) as executor:

        async def lifespan():
            async with asyncio.TaskGroup() as task_group:
                floor = build(task_group, executor)
                kept.extend(await floor.open())
                raise RuntimeError("the lifespan breaks before the reply's task runs")

        with pytest.raises(ExceptionGroup):
            await lifespan()
    reply, run = kept
    assert run.aborted
    assert isinstance(reply.final, Failed)
    with reply.view() as viewing:
        assert isinstance((await read(viewing))[-1], Failed)
