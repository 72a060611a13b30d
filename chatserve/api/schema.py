"""From decoded JSON to a Job: the asks of one HTTP request, and how to show the answer.

It may not know sockets or replies. Theory of operation: neutral values of unsupported fields are
dropped, the rest is converted strictly by msgspec (types and fixed ranges), then come the checks
that need the server's limits, and at last the frozen values of the chat floor. Every refusal
names the field in `param`.
"""

import re
from dataclasses import dataclass
from typing import TypeVar, cast

import msgspec

from chatserve.api.collaborators import ModelInfo
from chatserve.api.fields import (
    ChatFields,
    CompletionFields,
    GenerationFields,
    MessageFields,
    SamplingFields,
    TextPart,
)
from chatserve.api.limits import Limits
from chatserve.api.neutral import without_neutral
from chatserve.api.problems import ModelNotFound
from chatserve.chat.values import (
    Ask,
    ChatPrompt,
    Generation,
    Message,
    TextPrompt,
    TokenPrompt,
)
from chatserve.errors import RequestError, UnsupportedField

_INT31 = 2**31 - 1
_MESSAGE_LENGTH_MAX = 200
_ID = re.compile(r"0|[1-9][0-9]{0,9}")
_AT = re.compile(r"^(.*?)(?: - at `(?:key in )?\$\.?([^`]*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"^Object contains unknown field `(.*)`$", re.DOTALL)

_CHAT_NAMES = frozenset(ChatFields.__struct_fields__)
_COMPLETION_NAMES = frozenset(CompletionFields.__struct_fields__)

FieldsT = TypeVar("FieldsT", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One HTTP request, understood. Several asks when several prompts were given."""

    asks: tuple[Ask, ...]
    stream: bool
    include_usage: bool
    return_token_ids: bool
    logprobs: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """Who asks, as the door found out. admin: may go ahead of others (`priority` below 0); where
    there are no keys everybody is."""

    request_id: str
    tenant: str
    admin: bool


def chat_job(fields: dict[str, object], asker: Asker, *, model: ModelInfo, limits: Limits) -> Job:
    """Decode the body of `/v1/chat/completions`. Raises RequestError that names the field; a
    `priority` below 0 is refused where the asker is no admin."""
    messages = fields.get("messages")
    # Counted before anything is made of them.
    if isinstance(messages, list) and not 1 <= len(cast(list[object], messages)) <= (
        limits.messages_max
    ):
        raise _bad("messages", f"There must be 1 to {limits.messages_max} messages.")
    body = convert(without_neutral(fields, _CHAT_NAMES), ChatFields)
    _check_common(body, asker, model, limits)
    adds_prompt = body.add_generation_prompt
    if adds_prompt is None:
        adds_prompt = not body.continue_final_message
    if adds_prompt and body.continue_final_message:
        raise _bad(
            "continue_final_message",
            "add_generation_prompt and continue_final_message exclude each other.",
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise _bad("top_logprobs", "top_logprobs needs logprobs to be true.")
    max_tokens = body.max_tokens if body.max_tokens is not None else body.max_completion_tokens
    if body.max_completion_tokens is not None and body.max_completion_tokens != max_tokens:
        raise _bad("max_tokens", "max_tokens and max_completion_tokens contradict each other.")
    prompt = ChatPrompt(
        messages=tuple(_message(index, each) for index, each in enumerate(body.messages)),
        add_generation_prompt=adds_prompt,
        continue_final_message=body.continue_final_message,
    )
    generation = _generation(
        body,
        limits,
        max_tokens=max_tokens,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    return _job(body, asker, prompts=(prompt,), generation=generation)


def completion_job(
    fields: dict[str, object], asker: Asker, *, model: ModelInfo, limits: Limits
) -> Job:
    """Decode the body of `/v1/completions`. Raises as `chat_job` does."""
    body = convert(without_neutral(fields, _COMPLETION_NAMES), CompletionFields)
    _check_common(body, asker, model, limits)
    prompts = _prompts(body.prompt, limits)
    if len(prompts) * body.n > limits.samples_max:
        raise _bad("prompt", f"There may be at most {limits.samples_max} choices over all prompts.")
    generation = _generation(body, limits, max_tokens=body.max_tokens, top_logprobs=body.logprobs)
    return _job(body, asker, prompts=prompts, generation=generation)


def _bad(param: str, message: str) -> RequestError:
    return RequestError(message, param=param)


def convert(fields: dict[str, object], kind: type[FieldsT]) -> FieldsT:
    """Strictly; every refusal names its field."""
    try:
        return msgspec.convert(fields, kind, strict=True)
    except msgspec.ValidationError as error:
        raise _field_error(str(error)) from None


def _field_error(message: str) -> RequestError:
    """msgspec's message ends in the path of the field: that becomes `param`."""
    found = _AT.match(message)
    assert found is not None  # the pattern's second half is optional
    # msgspec quotes values; a quotation need not be longer than an answer.
    text, path = found[1][:_MESSAGE_LENGTH_MAX], found[2] or None
    unknown = _UNKNOWN.match(text)
    if unknown is not None:
        name = unknown[1][:64]
        path = f"{path}.{name}" if path else name
        return UnsupportedField(f"The field {name!r} is not supported.", param=path)
    missing = re.match(r"^Object missing required field `([a-z_]+)`$", text)
    if missing is not None and path is None:
        path = missing[1]
    return RequestError(f"{path}: {text}." if path else f"{text}.", param=path)


def check_model(name: str, model: ModelInfo) -> None:
    """Raise ModelNotFound for another model's name."""
    if name not in (model.name, model.short_name):
        raise ModelNotFound(
            f"The model asked for is not served here; {model.name!r} is.", param="model"
        )


def _check_common(body: GenerationFields, asker: Asker, model: ModelInfo, limits: Limits) -> None:
    check_model(body.model, model)
    if body.n > limits.samples_max:
        raise _bad("n", f"n may be at most {limits.samples_max}.")
    if body.priority < 0 and not asker.admin:
        raise _bad("priority", "A priority below 0, ahead of others, needs an admin's key.")
    if body.stream_options is not None and not body.stream:
        raise _bad("stream_options", "stream_options needs stream to be true.")
    if len(body.cache_salt) > limits.salt_length_max:
        raise _bad("cache_salt", f"cache_salt is longer than {limits.salt_length_max}.")
    check_token_ids(body, limits)


def check_token_ids(body: SamplingFields, limits: Limits) -> None:
    """Refuse too many stop_token_ids."""
    if len(body.stop_token_ids) > limits.stop_token_ids_max:
        raise _bad(
            "stop_token_ids", f"There may be at most {limits.stop_token_ids_max} stop_token_ids."
        )


def _message(index: int, fields: MessageFields) -> Message:
    content = fields.content
    if content is None:
        if fields.role != "assistant":
            raise _bad(f"messages[{index}].content", "The content is missing.")
        content = ""
    if isinstance(content, list):
        # vLLM's rule for templates that take text.
        content = "\n".join(_part_text(part) for part in content)
    return Message(fields.role, content, fields.name)


def _part_text(part: TextPart) -> str:
    return part.text


def _prompts(
    prompt: str | list[str | int | list[int]], limits: Limits
) -> tuple[TextPrompt | TokenPrompt, ...]:
    if isinstance(prompt, str):
        return (TextPrompt(prompt),)
    if not prompt:
        raise _bad("prompt", "The prompt is empty.")
    if isinstance(prompt[0], int):
        ids = [token for token in prompt if isinstance(token, int)]
        if len(ids) != len(prompt) or not all(0 <= token <= _INT31 for token in ids):
            raise _bad("prompt", "A prompt of token ids holds whole numbers from 0 on.")
        return (TokenPrompt(tuple(ids)),)
    if len(prompt) > limits.samples_max:
        raise _bad("prompt", f"There may be at most {limits.samples_max} prompts.")
    prompts: list[TextPrompt | TokenPrompt] = []
    for each in prompt:
        if isinstance(each, int) or type(each) is not type(prompt[0]):
            raise _bad("prompt", "Prompts are all texts, or all lists of token ids.")
        if each == []:
            raise _bad("prompt", "A prompt is empty.")
        prompts.append(TextPrompt(each) if isinstance(each, str) else TokenPrompt(tuple(each)))
    return tuple(prompts)


def stop_strings(stop: str | list[str], limits: Limits) -> tuple[str, ...]:
    """One or several, each within its limits."""
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(strings) > limits.stop_strings_max:
        raise _bad("stop", f"There may be at most {limits.stop_strings_max} stop strings.")
    if any(not 1 <= len(text) <= limits.stop_string_length_max for text in strings):
        raise _bad("stop", f"A stop string has 1 to {limits.stop_string_length_max} characters.")
    return strings


def token_bias(given: dict[str, float], limits: Limits) -> tuple[tuple[int, float], ...]:
    """By token id, in their order."""
    if len(given) > limits.logit_bias_max:
        raise _bad("logit_bias", f"There may be at most {limits.logit_bias_max} entries.")
    bias: dict[int, float] = {}
    for key, value in given.items():
        # One id has one spelling, so that no key overrides another: not 01, nor +1.
        if not _ID.fullmatch(key) or int(key) > _INT31:
            raise _bad("logit_bias", "The keys of logit_bias are token ids.")
        bias[int(key)] = value
    return tuple(sorted(bias.items()))


def _generation(
    body: GenerationFields, limits: Limits, *, max_tokens: int | None, top_logprobs: int | None
) -> Generation:
    if top_logprobs is not None and top_logprobs > limits.top_logprobs_max:
        param = "top_logprobs" if isinstance(body, ChatFields) else "logprobs"
        raise _bad(param, f"{param} may be at most {limits.top_logprobs_max}.")
    if max_tokens is not None and body.min_tokens > max_tokens:
        raise _bad("min_tokens", "min_tokens is greater than max_tokens.")
    return Generation(
        samples=body.n,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        stop=stop_strings(body.stop, limits),
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        temperature=body.temperature,
        top_k=None if body.top_k is None else max(0, body.top_k),  # vLLM's -1 means off
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=token_bias(body.logit_bias, limits),
        seed=body.seed,
        top_logprobs=top_logprobs,
    )


def _job(
    body: GenerationFields,
    asker: Asker,
    *,
    prompts: tuple[ChatPrompt | TextPrompt | TokenPrompt, ...],
    generation: Generation,
) -> Job:
    several = len(prompts) > 1
    asks = tuple(
        Ask(
            request_id=f"{asker.request_id}-{index}" if several else asker.request_id,
            prompt=prompt,
            generation=generation,
            tenant=asker.tenant,
            cache_salt=body.cache_salt,
            priority=body.priority,
        )
        for index, prompt in enumerate(prompts)
    )
    return Job(
        asks=asks,
        stream=body.stream,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        return_token_ids=body.return_token_ids,
        logprobs=generation.top_logprobs is not None,
    )
