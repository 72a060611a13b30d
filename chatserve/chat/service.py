"""ChatService: the door of the chat floor, from an Ask to a Reply under way.

It may not know HTTP, pages or tensors. Theory of operation of `open`: what can be refused by
looking at numbers is refused first; rendering, tokenizing and naming pages are pure and linear in
the prompt, so they run in one trip to the executor; then, without waiting, the engine takes the
request and the reply gets its task. What looks far too long is counted by pieces before it is
encoded: a trip costs what the context costs, however much was sent. A call that is cancelled on
its trip leaves a computation that nobody looks at and nothing else, and at most `Crowd.places` of
those exist.

    ask ─▶ check ─▶ (executor: size ▸ render ▸ encode ▸ limits ▸ Engine.prepare)
        ─▶ Engine.open ─▶ Reply
"""

import asyncio
import secrets
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

from chatserve.chat.crowd import Crowd
from chatserve.chat.reply import API_PATIENCE, Clock, Patience, Reply
from chatserve.chat.text.known_ids import (
    FoundPrompt,
    KnownIds,
    KnownStatistics,
    is_answerable,
)
from chatserve.chat.text.prompt_ids import PromptIds
from chatserve.chat.text.sample import SampleText, TextRule
from chatserve.chat.text.stop_strings import StopStrings
from chatserve.chat.text.template import Rendered, no_template
from chatserve.chat.text.text_floor import TextFloor
from chatserve.chat.text.text_sizes import TextSizes
from chatserve.chat.values import Ask, ChatPrompt, Generation, SamplingDefaults, TokenPrompt
from chatserve.engine.stream import Stream
from chatserve.engine.values import Request, Sampling
from chatserve.errors import ContextLengthExceeded, RequestError, Unavailable

SEED_BITS = 63  # of a drawn seed: it fits any client's signed 64-bit integer

# Estimated prompts of so many contexts are counted by pieces: below that encoding once is cheaper,
# and tells the very number.
_SUSPECT_CONTEXTS = 2

PreparedT = TypeVar("PreparedT")


class EngineDoor(Protocol[PreparedT]):
    """What the engine floor offers."""

    @property
    def context_length(self) -> int:
        """Tokens that a sequence may have, prompt and reply together."""
        ...

    @property
    def vocabulary_size(self) -> int:
        """Token ids are below this."""
        ...

    def check_room(self, tenant: str, preparing: int, own: int) -> None:
        """On the loop. Raises what `open` would once those under preparation are open, of whom so
        many are the tenant's own."""
        ...

    def prepare(self, request: Request) -> PreparedT:
        """Pure, for any thread."""
        ...

    def open(self, prepared: PreparedT) -> Stream:
        """On the loop, never waits. May raise a ChatserveError."""
        ...

    def page_names(self, prepared: PreparedT, tokens: Sequence[int]) -> tuple[bytes, ...]:
        """What is kept of these tokens under a prepared request's ways is called so, by pieces: 32
        bytes each, which stand for all before them. Pure, for any thread."""
        ...

    def own_names(self, prepared: PreparedT, tokens: Sequence[int]) -> frozenset[bytes]:
        """Every name that `page_names` may ever have given to a piece of these tokens that is one
        tenant's own. For any thread."""
        ...

    def withhold(self, rows: Iterable[Sequence[bytes]]) -> frozenset[bytes]:
        """Keep nothing more of what follows these rows of names. All names that are kept of it: the
        rows' and those that continue one of them. On the loop, never waits."""
        ...

    async def forget(self, names: Collection[bytes]) -> None:
        """Keep nothing under these names, anywhere. Raises Unavailable: to be tried again."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """Where the service works.

    task_group: the lifespan's, owner of the replies' tasks. executor: for tokenization. crowd: who
    is accepted and not yet in the engine.
    """

    task_group: asyncio.TaskGroup
    executor: Executor
    crowd: Crowd
    clock: Clock


def draw_seed() -> int:
    """A seed for a request that brought none."""
    return secrets.randbits(SEED_BITS)


class ChatService(Generic[PreparedT]):
    """Accepts asks. One per process, on the event loop."""

    def __init__(
        self,
        engine: EngineDoor[PreparedT],
        text: TextFloor,
        workshop: Workshop,
        *,
        draw_seed: Callable[[], int] = draw_seed,
        patience: Patience = API_PATIENCE,
    ) -> None:
        self._engine = engine
        self._text = text
        self._workshop = workshop
        self._draw_seed = draw_seed
        self._patience = patience
        self._sizes = TextSizes(text.tokenizer)
        self._known = (
            None if text.template is None else KnownIds(PromptIds(text.tokenizer, text.template))
        )

    def check_room(self, tenant: str) -> None:
        """Raise what `open` would for any ask of a tenant now: Busy, or Unavailable."""
        crowd = self._workshop.crowd
        self._engine.check_room(tenant, crowd.count, crowd.of(tenant))

    def known_statistics(self) -> KnownStatistics | None:
        """Of the ids kept for who sends every message each time; None without a template."""
        return None if self._known is None else self._known.statistics()

    async def open(self, ask: Ask) -> Reply:
        """Accept an ask and return its reply, which the caller views at once.

        Raises RequestError for what can never be answered, or what `Engine.open` raises.
        Cancelling the call leaves nothing behind.
        """
        workshop = self._workshop
        accepted_at = workshop.clock.now()
        if isinstance(ask.prompt, ChatPrompt) and self._text.template is None:
            raise no_template()
        check_token_ids(ask.generation, self._engine.vocabulary_size)
        if isinstance(ask.prompt, TokenPrompt):
            _check_ids("prompt", ask.prompt.tokens, self._engine.vocabulary_size)
        seed = ask.generation.seed
        if seed is None:
            seed = self._draw_seed()
        self.check_room(ask.tenant)  # a refusal costs no tokenization
        workshop.crowd.enter(ask.tenant)
        try:
            async with workshop.crowd.places:
                request, prompt, prepared = await self._off_loop(ask, seed)
        finally:
            workshop.crowd.leave(ask.tenant)
        # From here on nothing waits: the stream has an owner before anybody could be cancelled.
        stream = self._engine.open(prepared)
        rule = self._text_rule(ask, request)
        reply = Reply(
            stream,
            [SampleText(each, self._text.tokenizer, rule) for each in range(request.samples)],
            prompt_tokens=len(request.tokens),
            accepted_at=accepted_at,
            clock=workshop.clock,
            patience=self._patience,
            on_done=partial(self._remember, prompt),
        )
        reply.start(workshop.task_group)
        return reply

    def _remember(self, prompt: FoundPrompt, samples: Sequence[SampleText]) -> None:
        """A client may send this reply back, as a message before its next one."""
        if self._known is not None:
            for sample in samples:
                if sample.end is not None and sample.end.error is None:
                    self._known.remember(
                        prompt,
                        sample.token_ids,
                        "".join(sample.texts),
                        ended_by_id=sample.ended_by_id,
                    )

    def _off_loop(
        self, ask: Ask, seed: int
    ) -> asyncio.Future[tuple[Request, FoundPrompt, PreparedT]]:
        loop, executor = asyncio.get_running_loop(), self._workshop.executor
        try:
            return loop.run_in_executor(executor, self._prepare, ask, seed)
        except RuntimeError as error:  # the executor's way to say that it was shut down
            raise Unavailable("The server is shutting down.") from error

    def _prepare(self, ask: Ask, seed: int) -> tuple[Request, FoundPrompt, PreparedT]:
        """All that takes time, in a thread of the executor."""
        self._check_size(ask)
        prompt = self._prompt(ask)
        request = self._request(ask, prompt.tokens, seed)
        return request, prompt, self._engine.prepare(request)

    def _check_size(self, ask: Ask) -> None:
        """Refuse what is far too long without encoding much more than would fit."""
        context_length, prompt = self._engine.context_length, ask.prompt
        if isinstance(prompt, TokenPrompt):
            return
        chat = isinstance(prompt, ChatPrompt)
        texts = [each.content for each in prompt.messages] if chat else [prompt.text]
        if sum(map(self._sizes.estimate, texts)) <= _SUSPECT_CONTEXTS * context_length:
            return
        if chat:
            # What the template writes: it may leave out a part of the messages.
            written = self._render(prompt)
        else:
            control = self._text.tokenizer.control
            written = Rendered(prompt.text, tuple(control.find(prompt.text)))
        least = self._sizes.count_written_up_to(context_length, written.text, written.spans)
        if least > context_length:
            raise _too_long(ask, context_length, context_length=context_length, more=True)

    def _prompt(self, ask: Ask) -> FoundPrompt:
        if isinstance(ask.prompt, ChatPrompt) and is_answerable(ask.prompt):
            if self._known is None:
                raise no_template()
            found = self._known.prompt(ask.tenant, ask.cache_salt, ask.prompt.messages)
        else:
            found = FoundPrompt(self._tokens(ask), None, None)
        if not found.tokens:
            raise RequestError("The prompt has no tokens.", param=_prompt_param(ask))
        return found

    def _tokens(self, ask: Ask) -> tuple[int, ...]:
        text = self._text
        if isinstance(ask.prompt, TokenPrompt):
            return ask.prompt.tokens
        if isinstance(ask.prompt, ChatPrompt):
            rendered = self._render(ask.prompt)
            return text.tokenizer.encode_rendered(rendered.text, rendered.spans)
        return text.tokenizer.encode_text(ask.prompt.text)

    def _render(self, prompt: ChatPrompt) -> Rendered:
        if self._text.template is None:
            raise no_template()
        return self._text.template.render(prompt)

    def _request(self, ask: Ask, tokens: tuple[int, ...], seed: int) -> Request:
        generation = ask.generation
        max_tokens = _max_tokens(ask, len(tokens), self._engine.context_length)
        if generation.min_tokens > max_tokens:
            raise RequestError(
                f"min_tokens is {generation.min_tokens}, but at most {max_tokens} tokens can "
                "be generated.",
                param="min_tokens",
            )
        own_stops = frozenset[int]() if generation.ignore_eos else self._text.stop_ids
        return Request(
            request_id=ask.request_id,
            tokens=tokens,
            max_tokens=max_tokens,
            tenant=ask.tenant,
            cache_salt=ask.cache_salt,
            samples=generation.samples,
            sampling=sampling_of(generation, self._text.defaults, seed),
            stop_ids=own_stops | frozenset(generation.stop_token_ids),
            min_tokens=generation.min_tokens,
            priority=ask.priority,
        )

    def _text_rule(self, ask: Ask, request: Request) -> TextRule:
        # A new message is a text of its own; all else goes on where the prompt's text ends.
        goes_on = not isinstance(ask.prompt, ChatPrompt) or ask.prompt.continue_final_message
        return TextRule(
            stops=StopStrings(ask.generation.stop),
            context=request.tokens[-1] if goes_on else None,
            silent_stop_ids=request.stop_ids,
            named_stop_ids=frozenset(ask.generation.stop_token_ids) - self._text.stop_ids,
            searched_after=request.min_tokens,
        )


def _prompt_param(ask: Ask) -> str:
    return "messages" if isinstance(ask.prompt, ChatPrompt) else "prompt"


def check_token_ids(generation: Generation, vocabulary_size: int) -> None:
    """Raise RequestError for ids outside the vocabulary: on the device they would be an index out
    of range."""
    biased = tuple(token for token, _ in generation.logit_bias)
    _check_ids("stop_token_ids", generation.stop_token_ids, vocabulary_size)
    _check_ids("logit_bias", biased, vocabulary_size)


def _check_ids(param: str, ids: tuple[int, ...], vocabulary_size: int) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < vocabulary_size):
        raise RequestError(
            f"{param} has a token id outside the vocabulary of {vocabulary_size}.", param=param
        )


def _max_tokens(ask: Ask, prompt_tokens: int, context_length: int) -> int:
    """The tokens to generate at most: what was asked for, or the room left."""
    asked = ask.generation.max_tokens
    if asked is not None and asked < 1:
        raise RequestError("max_tokens must be at least 1.", param="max_tokens")
    needed = prompt_tokens + (asked or 1)
    if needed <= context_length:
        return asked or context_length - prompt_tokens
    raise _too_long(ask, prompt_tokens, context_length=context_length)


def _too_long(
    ask: Ask, prompt_tokens: int, *, context_length: int, more: bool = False
) -> ContextLengthExceeded:
    """more: the prompt has more tokens than these; how many was not counted."""
    param, asked = _prompt_param(ask), ask.generation.max_tokens
    least = "more than " if more else ""
    said = (
        f"your {param} resulted in {least}{prompt_tokens} tokens"
        if asked is None
        else f"you requested {least}{prompt_tokens + asked} tokens "
        f"({least}{prompt_tokens} in the {param}, {asked} in the completion)"
    )
    return ContextLengthExceeded(
        f"This model's maximum context length is {context_length} tokens. However, {said}. "
        f"Please reduce the length of the {param}" + (" or completion." if asked else "."),
        param=param,
    )


def sampling_of(generation: Generation, defaults: SamplingDefaults, seed: int) -> Sampling:
    """What was asked for, over what the model's makers suggest."""

    def chosen(asked: float | None, default: float) -> float:
        return default if asked is None else asked

    return Sampling(
        temperature=chosen(generation.temperature, defaults.temperature),
        top_k=defaults.top_k if generation.top_k is None else generation.top_k,
        top_p=chosen(generation.top_p, defaults.top_p),
        min_p=chosen(generation.min_p, defaults.min_p),
        repetition_penalty=chosen(generation.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=generation.presence_penalty,
        frequency_penalty=generation.frequency_penalty,
        logit_bias=generation.logit_bias,
        seed=seed,
        top_logprobs=generation.top_logprobs,
    )
