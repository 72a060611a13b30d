"""Bodies: what is accepted, what is refused, and which field is named."""

from typing import Any

import pytest

from chatserve.api.body import decode_object
from chatserve.api.fields import PRIORITY_MAX
from chatserve.api.schema import Asker, Job, chat_job, completion_job
from chatserve.chat.values import ChatPrompt, Message, TextPrompt, TokenPrompt
from chatserve.errors import NotFound, RequestError, UnsupportedField
from tests.api.harness import LIMITS, MODEL

ASKER = Asker(request_id="r", tenant="t", admin=True)
SAID: list[Any] = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> Job:
    body = {"model": MODEL.name, "messages": SAID} | fields
    return chat_job(body, ASKER, model=MODEL, limits=LIMITS)


def completion(**fields: Any) -> Job:
    body = {"model": MODEL.name, "prompt": "hi"} | fields
    return completion_job(body, ASKER, model=MODEL, limits=LIMITS)


@pytest.mark.parametrize("decode", [chat_job, completion_job])
def test_only_an_admin_goes_ahead_of_others(decode: Any) -> None:
    user = Asker(request_id="r", tenant="t", admin=False)
    body = {"model": MODEL.name} | ({"messages": SAID} if decode is chat_job else {"prompt": "hi"})
    for priority in range(-PRIORITY_MAX, PRIORITY_MAX + 1):
        asked = body | {"priority": priority}
        (ask,) = decode(asked, ASKER, model=MODEL, limits=LIMITS).asks
        assert ask.priority == priority
        if priority >= 0:
            (ask,) = decode(asked, user, model=MODEL, limits=LIMITS).asks
            assert ask.priority == priority
            continue
        with pytest.raises(RequestError, match="needs an admin's key") as caught:
            decode(asked, user, model=MODEL, limits=LIMITS)
        assert (caught.value.status, caught.value.param) == (400, "priority")


def test_a_plain_chat_has_the_defaults() -> None:
    job = chat()
    (ask,) = job.asks
    assert ask.prompt == ChatPrompt(messages=(Message("user", "hi"),))
    assert (ask.request_id, ask.tenant, ask.cache_salt) == ("r", "t", "")
    assert ask.generation.samples == 1
    assert ask.generation.temperature is None
    assert ask.generation.top_logprobs is None
    assert not job.stream


@pytest.mark.parametrize(
    "neutral",
    [
        {"tools": None},
        {"tools": []},
        {"tool_choice": "none"},
        {"parallel_tool_calls": True},
        {"functions": []},
        {"function_call": "none"},
        {"response_format": {"type": "text"}},
        {"store": False},
        {"user": "someone"},
        {"metadata": {"a": "b"}},
        {"service_tier": "auto"},
        {"modalities": ["text"]},
        {"reasoning_effort": None},
        {"use_beam_search": False},
        {"length_penalty": 1.0},
        {"chat_template_kwargs": {}},
        {"stop": None},
        {"n": None},
        {"temperature": None},
        {"max_tokens": None},
        {"logit_bias": {}},
        {"skip_special_tokens": True},
        {"something_new": None},
        {"logprobs": False, "top_logprobs": None},
        {"stream_options": None},
    ],
)
def test_a_neutral_value_means_the_same_as_none(neutral: dict[str, Any]) -> None:
    assert chat(**neutral) == chat()


@pytest.mark.parametrize("neutral", [{"echo": False}, {"suffix": ""}, {"best_of": 1}])
def test_neutral_values_of_completions(neutral: dict[str, Any]) -> None:
    assert completion(**neutral) == completion()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"store": True}, "store"),
        ({"store": 0}, "store"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"length_penalty": True}, "length_penalty"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"guided_json": {"a": 1}}, "guided_json"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"something_new": 0}, "something_new"),
        ({"x" * 100: 1}, "x" * 64 + "…"),
        ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "messages[0].x"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ],
)
def test_an_unsupported_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(UnsupportedField) as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": "1"}, "n"),
        ({"n": 1.0}, "n"),
        ({"n": LIMITS.samples_max + 1}, "n"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -1}, "min_p"),
        ({"top_k": -2}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 2_000}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [True]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [1] * 129}, "stop_token_ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias[...]"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"²": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 1, "01": 2}}, "logit_bias"),
        ({"logit_bias": {"00": 1}}, "logit_bias"),
        ({"logit_bias": {"2147483648": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
        ({"logit_bias": []}, "logit_bias"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {}}, "stream_options"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
        ({"cache_salt": 1}, "cache_salt"),
        ({"priority": "high"}, "priority"),
        ({"priority": PRIORITY_MAX + 1}, "priority"),
        ({"priority": -PRIORITY_MAX - 1}, "priority"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user", "content": ""}] * 4_097}, "messages"),
        ({"messages": [{"role": "king", "content": ""}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role"),
        ({"messages": [{"content": ""}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": ["hi"]}, "messages[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
        ),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ],
)
def test_a_wrong_value_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert len(caught.value.message) < 300


def test_missing_fields_are_named() -> None:
    for body, param in (({"messages": SAID}, "model"), ({"model": MODEL.name}, "messages")):
        with pytest.raises(RequestError) as caught:
            chat_job(body, ASKER, model=MODEL, limits=LIMITS)
        assert caught.value.param == param


def test_another_model_is_not_found() -> None:
    with pytest.raises(NotFound) as caught:
        chat(model="other")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_messages_of_all_roles_and_forms() -> None:
    given = [
        {
            "role": "system",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {"role": "developer", "content": "c\x00\u2028"},
        {"role": "user", "content": "<|im_start|>system", "name": "ann"},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [], "audio": None},
    ]
    prompt = chat(messages=given, continue_final_message=True).asks[0].prompt
    assert prompt == ChatPrompt(
        messages=(
            Message("system", "a\nb"),
            Message("developer", "c\x00\u2028"),
            Message("user", "<|im_start|>system", "ann"),
            Message("assistant", ""),
        ),
        add_generation_prompt=False,
        continue_final_message=True,
    )


def test_the_prompts_of_a_completion() -> None:
    assert completion(prompt="a").asks[0].prompt == TextPrompt("a")
    assert completion(prompt=[1, 2]).asks[0].prompt == TokenPrompt((1, 2))
    assert [ask.prompt for ask in completion(prompt=["a", ""]).asks] == [
        TextPrompt("a"),
        TextPrompt(""),
    ]
    asks = completion(prompt=[[1], [2, 3]], n=2, logprobs=0).asks
    assert [ask.prompt for ask in asks] == [TokenPrompt((1,)), TokenPrompt((2, 3))]
    assert [ask.request_id for ask in asks] == ["r-0", "r-1"]
    assert asks[0].generation.top_logprobs == 0


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        [[]],
        [1, "a"],
        ["a", 1],
        ["a", [1]],
        [[1], "a"],
        [[1], []],
        [True],
        [1.5],
        [-1],
        [2**31],
        [[-1]],
        [[True]],
        [[["a"]]],
        {},
        5,
        ["a"] * 9,
        [None],
    ],
)
def test_a_wrong_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(RequestError) as caught:
        completion(prompt=prompt)
    assert caught.value.param is not None
    assert caught.value.param.startswith("prompt")


def test_choices_over_all_prompts_have_one_limit() -> None:
    with pytest.raises(RequestError) as caught:
        completion(prompt=["a", "b", "c"], n=3)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b'"x"',
        b"null",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1e999}',
        b'{"a":' + b"1" * 5_000 + b"}",
        b'{"a":"\\ud800"}',
        b'{"a":"\xff"}',
        b'{"a":"\x00"}',
        b"[" * 100_000,
        b'{"a":' * 2_000,
        b'{"a":1}{}',
        b"\xef\xbb\xbf{}",
    ],
)
def test_bodies_that_are_not_json_objects_are_refused(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        decode_object(body)
    assert caught.value.code == "invalid_request"
