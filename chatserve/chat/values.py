"""The frozen values of the chat floor: what was asked in words, and what comes back."""

from dataclasses import dataclass, field

from chatserve.engine.values import LOCAL_TENANT, Receipt
from chatserve.errors import ChatserveError


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat. role is system, developer, user or assistant."""

    role: str
    content: str
    name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """Messages to be rendered by the model's chat template."""

    messages: tuple[Message, ...]
    add_generation_prompt: bool = True
    continue_final_message: bool = False


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Plain text for `/v1/completions`; the tokenizer adds its own special tokens (BOS)."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids for `/v1/completions`, taken as they are."""

    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How to answer. None means: the model's own default, else the API's.

    stop: strings that end a reply (left out of its text). stop_token_ids: ids besides the model's.
    top_logprobs: None = no logprobs. seed None: drawn at acceptance.
    """

    samples: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request for a reply, as floor 5 hands it down."""

    request_id: str
    prompt: ChatPrompt | TextPrompt | TokenPrompt
    generation: Generation = field(default_factory=Generation)
    tenant: str = LOCAL_TENANT
    cache_salt: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class TokenChance:
    """One token's log probability, as shown to clients. text may be a fragment of a character."""

    token_id: int
    text: str
    token_bytes: bytes
    logprob: float
    top: tuple["TokenChance", ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New text of one sample; seq is the code points of its text up to the end of this delta.

    token_ids: the ids whose text this delta completes. chances: as long as token_ids, or empty.
    """

    sample: int
    seq: int
    text: str
    token_ids: tuple[int, ...] = ()
    chances: tuple[TokenChance, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleEnd:
    """The end of one sample. stop_reason: the stop string or stop id that matched, if any."""

    sample: int
    finish_reason: str  # "stop" | "length" | "abort" | "error"
    stop_reason: str | int | None = None
    error: ChatserveError | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request, over all its samples."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds, by a monotonic clock, from acceptance."""

    to_first_token: float | None
    total: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The one final event of a reply whose samples have all ended."""

    usage: Usage
    receipt: Receipt
    timings: Timings


@dataclass(frozen=True, slots=True)
class Failed:
    """The one final event of a reply that could not be finished."""

    error: ChatserveError


ReplyEvent = Delta | SampleEnd | Done | Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What a model's makers suggest where an asker is silent."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
