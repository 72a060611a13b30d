"""The official openai client, sync and async, against the real socket."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import openai
import pytest

from chatserve.chat.values import Ask, Delta, Failed, ReplyEvent, SampleEnd, TextPrompt, TokenPrompt
from chatserve.errors import Busy, ContextLengthExceeded, StepFault, Unavailable
from tests.api.harness import MODEL, Site, done, site, soon

MESSAGES: list[Any] = [{"role": "user", "content": "one two three"}]


@pytest.fixture
async def served() -> AsyncGenerator[Site]:
    async with site() as running:
        yield running
    assert not running.service.left_open


def asynchronous(served: Site) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


async def test_async_client_gets_a_whole_answer(served: Site) -> None:
    async with asynchronous(served) as client:
        answer = await client.chat.completions.create(model=MODEL.name, messages=MESSAGES)
    assert answer.choices[0].message.content == "one two three"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == MODEL.name
    assert answer.object == "chat.completion"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 13
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 6
    assert answer.model_extra == {
        "chatserve": {
            "receipt": {
                "device": 6,
                "host": 0,
                "disk": 0,
                "computed": 4,
                "saved": None,
                "miss": None,
            },
            "timings": {"to_first_token": 0.25, "total": 1.25},
        }
    }


async def test_sync_client_streams(served: Site) -> None:
    def talk() -> list[Any]:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(
                model=MODEL.name,
                messages=MESSAGES,
                stream=True,
                stream_options={"include_usage": True},
            )
            return list(stream)

    chunks = await asyncio.to_thread(talk)
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == "one two three"
    assert texts[1:4] == ["one", " two", " three"]
    assert [c.choices[0].finish_reason for c in chunks if c.choices] == [None] * 4 + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 3
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 6


async def test_sync_client_gets_a_whole_answer_and_the_models(served: Site) -> None:
    def talk() -> tuple[Any, Any, Any]:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            return (
                client.chat.completions.create(model=MODEL.name, messages=MESSAGES),
                client.models.list(),
                client.models.retrieve(MODEL.name),
            )

    answer, models, model = await asyncio.to_thread(talk)
    assert answer.choices[0].message.content == "one two three"
    assert [each.id for each in models] == [MODEL.name]
    assert model.id == MODEL.name
    assert model.max_model_len == MODEL.context_length


async def test_three_choices_streamed_and_whole(served: Site) -> None:
    async with asynchronous(served) as client:
        answer = await client.chat.completions.create(model=MODEL.name, messages=MESSAGES, n=3)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert {choice.message.content for choice in answer.choices} == {"one two three"}
        texts = ["", "", ""]
        stream = await client.chat.completions.create(
            model=MODEL.name, messages=MESSAGES, n=3, stream=True
        )
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["one two three"] * 3
    assert [ask.generation.samples for ask in served.service.asks] == [3, 3]


async def test_logprobs_of_a_chat(served: Site) -> None:
    async with asynchronous(served) as client:
        answer = await client.chat.completions.create(
            model=MODEL.name, messages=MESSAGES, logprobs=True, top_logprobs=2
        )
        assert answer.choices[0].logprobs is not None
        content = answer.choices[0].logprobs.content
        assert content is not None
        assert [entry.token for entry in content] == ["one", " two", " three"]
        assert content[0].bytes == list(b"one")
        assert [other.logprob for other in content[0].top_logprobs] == [-0.5, -1.5]
        stream = await client.chat.completions.create(
            model=MODEL.name, messages=MESSAGES, logprobs=True, stream=True
        )
        shown = [chunk.choices[0].logprobs async for chunk in stream]
    tokens = [entry.token for each in shown if each for entry in each.content or []]
    assert tokens == ["one", " two", " three"]


async def test_completions_of_texts_and_ids(served: Site) -> None:
    async with asynchronous(served) as client:
        one = await client.completions.create(model=MODEL.name, prompt="a b", logprobs=1)
        ids = await client.completions.create(model=MODEL.name, prompt=[5, 6])
        texts = await client.completions.create(model=MODEL.name, prompt=["a b", "c"], n=2)
        lists = await client.completions.create(model=MODEL.name, prompt=[[1], [2, 3]])
        stream = await client.completions.create(
            model=MODEL.name, prompt=["a b", "c d"], n=2, stream=True
        )
        streamed = ["", "", "", ""]
        async for chunk in stream:
            streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert one.choices[0].text == "a b"
    assert one.choices[0].logprobs is not None
    assert one.choices[0].logprobs.tokens == ["a", " b"]
    assert one.choices[0].logprobs.text_offset == [0, 1]
    assert one.choices[0].logprobs.top_logprobs == [{"a0": -0.5}, {" b0": -0.5}]
    assert ids.choices[0].text == "5 6"
    assert [choice.text for choice in texts.choices] == ["a b", "a b", "c", "c"]
    assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
    assert texts.usage is not None
    assert texts.usage.prompt_tokens == 20
    assert [choice.text for choice in lists.choices] == ["1", "2 3"]
    assert streamed == ["a b", "a b", "c d", "c d"]
    prompts = [ask.prompt for ask in served.service.asks]
    assert prompts[:2] == [TextPrompt("a b"), TokenPrompt((5, 6))]
    names = [ask.request_id for ask in served.service.asks]
    assert len(set(names)) == len(names)


async def test_every_field_reaches_the_ask(served: Site) -> None:
    async with asynchronous(served) as client:
        await client.chat.completions.create(
            model=MODEL.name,
            messages=[
                {"role": "system", "content": "be brief"},
                {"role": "developer", "content": "really"},
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
            ],
            max_completion_tokens=7,
            temperature=0.5,
            top_p=0.9,
            stop=["x", "y"],
            seed=-3,
            logit_bias={"5": 10},
            presence_penalty=1,
            frequency_penalty=-1,
            user="someone",
            extra_body={
                "top_k": -1,
                "min_p": 0.1,
                "repetition_penalty": 1.2,
                "ignore_eos": True,
                "min_tokens": 2,
                "stop_token_ids": [3],
                "cache_salt": "salt",
                "priority": -1,
            },
        )
    ask = served.service.asks[0]
    generation = ask.generation
    assert (ask.tenant, ask.cache_salt, ask.priority) == ("local", "salt", -1)
    assert (generation.max_tokens, generation.min_tokens) == (7, 2)
    assert (generation.temperature, generation.top_p, generation.top_k) == (0.5, 0.9, 0)
    assert (generation.min_p, generation.repetition_penalty) == (0.1, 1.2)
    assert (generation.presence_penalty, generation.frequency_penalty) == (1.0, -1.0)
    assert (generation.stop, generation.stop_token_ids) == (("x", "y"), (3,))
    assert (generation.seed, generation.logit_bias) == (-3, ((5, 10.0),))
    assert generation.ignore_eos


async def test_token_ids_are_returned_when_asked_for(served: Site) -> None:
    async with asynchronous(served) as client:
        answer = await client.chat.completions.create(
            model=MODEL.name, messages=MESSAGES, extra_body={"return_token_ids": True}
        )
    assert answer.choices[0].model_extra == {"stop_reason": None, "token_ids": [0, 1, 2]}


@pytest.mark.parametrize(
    ("refusal", "kind", "code", "retry_after"),
    [
        (ContextLengthExceeded("Too long."), openai.BadRequestError, "context_length_exceeded", ""),
        (Busy("Full.", retry_after=3.2), openai.RateLimitError, "busy", "4"),
        (Unavailable("Broken."), openai.InternalServerError, "unavailable", "1"),
        (RuntimeError("a secret"), openai.InternalServerError, "internal_error", ""),
    ],
)
async def test_a_refused_ask_raises_in_the_client(
    served: Site,
    refusal: Exception,
    *,
    kind: type[openai.APIStatusError],
    code: str,
    retry_after: str,
) -> None:
    served.service.refusal = refusal
    for stream in (False, True):
        async with asynchronous(served) as client:
            with pytest.raises(kind) as caught:
                await client.chat.completions.create(
                    model=MODEL.name, messages=MESSAGES, stream=stream
                )
        assert caught.value.code == code
        assert "secret" not in str(caught.value)
        assert caught.value.response.headers.get("retry-after", "") == retry_after


async def test_wrong_fields_raise_in_the_client(served: Site) -> None:
    async with asynchronous(served) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="other", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError) as unsupported:
            await client.chat.completions.create(
                model=MODEL.name,
                messages=MESSAGES,
                tools=[{"type": "function", "function": {"name": "f"}}],
            )
        with pytest.raises(openai.BadRequestError) as wrong:
            await client.chat.completions.create(model=MODEL.name, messages=MESSAGES, temperature=3)
    assert missing.value.code == "model_not_found"
    assert MODEL.name in missing.value.message
    assert (unsupported.value.code, unsupported.value.param) == ("unsupported_field", "tools")
    assert wrong.value.param == "temperature"
    assert not served.service.asks


def half(ask: Ask) -> list[ReplyEvent]:
    return [Delta(sample=0, seq=4, text="half"), Failed(StepFault("A step failed."))]


async def test_a_fault_in_mid_stream_raises_in_the_client(served: Site) -> None:
    served.service.script = half
    async with asynchronous(served) as client:
        stream = await client.chat.completions.create(
            model=MODEL.name, messages=MESSAGES, stream=True
        )
        texts = [(await anext(stream)).choices[0].delta.content for _ in range(2)]
        assert texts == ["", "half"]
        with pytest.raises(openai.APIError, match="A step failed"):
            await anext(stream)
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model=MODEL.name, messages=MESSAGES)
    assert caught.value.code == "step_fault"


async def test_a_fault_of_one_choice_fails_the_answer(served: Site) -> None:
    served.service.script = lambda ask: [
        SampleEnd(sample=0, finish_reason="error", error=StepFault("A step failed.")),
        done(ask),
    ]
    async with asynchronous(served) as client:
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model=MODEL.name, messages=MESSAGES)


async def test_a_client_that_aborts_ends_its_reply(served: Site) -> None:
    served.service.script = lambda ask: [Delta(sample=0, seq=4, text="half")]
    async with asynchronous(served) as client:
        stream = await client.chat.completions.create(
            model=MODEL.name, messages=MESSAGES, stream=True
        )
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        await stream.close()
        reply = await served.service.replies.get()
        await soon(reply.left)
