"""The bodies of `/v1/chat/completions` and `/v1/completions`, field by field, with their ranges.

What they share with turns of conversations (`chat_schema.py`) is `SamplingFields`.

The names are the wire's (OpenAI's, and vLLM's for the extras). `schema.py` converts decoded JSON
into these strictly (no bool for a number, no string for a number) and these into an Ask.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

_INT31 = 2**31 - 1
# Waiting ages a request by one step of priority every 10 s (`engine/waiting.py`), so that the least
# urgent is an equal of the most urgent newcomers after 200 s, and has its tenant's turn: no tenant
# can starve another one. Going ahead of others, below 0, is an admin's to say where there are keys
# (`schema.py`).
PRIORITY_MAX = 10

Probability = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
TokenId = Annotated[int, Meta(ge=0, le=_INT31)]
Count = Annotated[int, Meta(ge=0, le=_INT31)]
Positive = Annotated[int, Meta(ge=1, le=_INT31)]
EmptyList = Annotated[list[object], Meta(max_length=0)]


class TextPart(Struct, forbid_unknown_fields=True):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class MessageFields(Struct, forbid_unknown_fields=True, kw_only=True):
    """One message. The fields from `refusal` on are accepted when they are empty only.

    Clients send a reply's message back as they got it, empty fields included.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: EmptyList | None = None
    annotations: EmptyList | None = None


class StreamOptions(Struct, forbid_unknown_fields=True, kw_only=True):
    """`include_obfuscation` is padding against traffic analysis; its absence changes no answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class SamplingFields(Struct, kw_only=True):
    """How an answer is drawn: the same in `/v1` and in conversations."""

    max_tokens: Positive | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[str, Annotated[float, Meta(ge=-100.0, le=100.0)]] = {}
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] = []
    # vLLM's extras
    top_k: Annotated[int, Meta(ge=-1, le=_INT31)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100.0)] | None = None
    min_tokens: Count = 0
    ignore_eos: bool = False
    stop_token_ids: list[TokenId] = []


class GenerationFields(SamplingFields, kw_only=True):
    """What both routes of `/v1` have in common."""

    model: str
    n: Annotated[int, Meta(ge=1)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    # vLLM's extras
    cache_salt: str = ""
    priority: Annotated[int, Meta(ge=-PRIORITY_MAX, le=PRIORITY_MAX)] = 0
    return_token_ids: bool = False


class ChatFields(GenerationFields, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: list[MessageFields]
    max_completion_tokens: Positive | None = None
    logprobs: bool = False
    top_logprobs: Count | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False


class CompletionFields(GenerationFields, kw_only=True):
    """`POST /v1/completions`. prompt: a text, token ids, or a list of either."""

    prompt: str | list[str | int | list[TokenId]]
    logprobs: Count | None = None
