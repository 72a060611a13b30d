"""OpenAI's shapes for answers: chat completions and completions, whole and in chunks.

It knows the values of the chat floor and nothing of sockets or of how events arrive. One `Shape`
belongs to one HTTP request; `choice` counts over all prompts and their samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from chatserve.chat.values import Delta, Done, SampleEnd, TokenChance

JsonObject = dict[str, object]


@dataclass(slots=True)
class Choice:
    """What has arrived of one choice. Holds text only where the whole answer is wanted."""

    texts: list[str] = field(default_factory=list[str])
    token_ids: list[int] = field(default_factory=list[int])
    chances: list[TokenChance] = field(default_factory=list[TokenChance])
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What every object of one answer repeats."""

    id: str
    model: str
    created: int
    return_token_ids: bool = False
    logprobs: bool = False
    include_usage: bool = False


def usage(results: Sequence[Done]) -> JsonObject:
    """Tokens over all replies of one HTTP request."""
    prompt = sum(result.usage.prompt_tokens for result in results)
    completion = sum(result.usage.completion_tokens for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(result.usage.cached_tokens for result in results)
        },
    }


def particulars(results: Sequence[Done]) -> JsonObject:
    """chatserve's own part: where the prompt's tokens came from, and how long it took."""
    receipt: JsonObject = {
        name: sum(getattr(result.receipt, name) for result in results)
        for name in ("device", "host", "disk", "computed")
    }
    saved = [result.receipt.saved for result in results if result.receipt.saved is not None]
    receipt["saved"] = round(sum(saved), 6) if saved else None
    misses = [result.receipt.miss for result in results if result.receipt.miss is not None]
    receipt["miss"] = misses[0].as_mapping() if misses else None
    firsts = [r.timings.to_first_token for r in results if r.timings.to_first_token is not None]
    return {
        "receipt": receipt,
        "timings": {
            "to_first_token": None if not firsts else round(min(firsts), 6),
            "total": round(max((r.timings.total for r in results), default=0.0), 6),
        },
    }


class Shape:
    """What chat completions and completions have in common."""

    whole_object: str
    chunk_object: str

    def __init__(self, labels: Labels) -> None:
        self.labels = labels

    def opening(self, choice: int) -> JsonObject | None:
        """The chunk that opens a choice, if the shape has one."""
        raise NotImplementedError

    def delta(self, choice: int, delta: Delta) -> JsonObject:
        """The chunk for new text."""
        raise NotImplementedError

    def end(self, choice: int, end: SampleEnd) -> JsonObject:
        """The chunk that ends a choice."""
        raise NotImplementedError

    def whole_choice(self, index: int, choice: Choice) -> JsonObject:
        """One finished choice of a whole answer."""
        raise NotImplementedError

    def last(self, results: Sequence[Done]) -> JsonObject:
        """The chunk without choices that carries the usage."""
        chunk = self._envelope(self.chunk_object, [])
        chunk["usage"] = usage(results)
        chunk["chatserve"] = particulars(results)
        return chunk

    def whole(self, choices: Sequence[Choice], results: Sequence[Done]) -> JsonObject:
        """The whole answer."""
        answer = self._envelope(
            self.whole_object,
            [self.whole_choice(index, choice) for index, choice in enumerate(choices)],
        )
        answer["usage"] = usage(results)
        answer["chatserve"] = particulars(results)
        return answer

    def _chunk(self, choice: JsonObject) -> JsonObject:
        chunk = self._envelope(self.chunk_object, [choice])
        if self.labels.include_usage:
            chunk["usage"] = None
        return chunk

    def _envelope(self, kind: str, choices: list[JsonObject]) -> JsonObject:
        return {
            "id": self.labels.id,
            "object": kind,
            "created": self.labels.created,
            "model": self.labels.model,
            "choices": choices,
        }

    def _with_ids(self, choice: JsonObject, token_ids: Sequence[int]) -> JsonObject:
        if self.labels.return_token_ids:
            choice["token_ids"] = list(token_ids)
        return choice


class ChatShape(Shape):
    """`chat.completion`."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, choice: int) -> JsonObject | None:
        delta: JsonObject = {"role": "assistant", "content": ""}
        return self._chunk(
            {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}
        )

    def delta(self, choice: int, delta: Delta) -> JsonObject:
        chunk: JsonObject = {
            "index": choice,
            "delta": {"content": delta.text},
            "logprobs": self._logprobs(delta.chances),
            "finish_reason": None,
        }
        return self._chunk(self._with_ids(chunk, delta.token_ids))

    def end(self, choice: int, end: SampleEnd) -> JsonObject:
        return self._chunk(
            {
                "index": choice,
                "delta": {},
                "logprobs": None,
                "finish_reason": end.finish_reason,
                "stop_reason": end.stop_reason,
            }
        )

    def whole_choice(self, index: int, choice: Choice) -> JsonObject:
        message: JsonObject = {
            "role": "assistant",
            "content": "".join(choice.texts),
            "refusal": None,
        }
        shown: JsonObject = {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.chances),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        return self._with_ids(shown, choice.token_ids)

    def _logprobs(self, chances: Sequence[TokenChance]) -> JsonObject | None:
        if not self.labels.logprobs:
            return None
        content: list[JsonObject] = []
        for chance in chances:
            entry = _chance(chance)
            entry["top_logprobs"] = [_chance(other) for other in chance.top]
            content.append(entry)
        return {"content": content, "refusal": None}


class CompletionShape(Shape):
    """`text_completion`."""

    whole_object = "text_completion"
    chunk_object = "text_completion"

    def opening(self, choice: int) -> JsonObject | None:
        return None

    def delta(self, choice: int, delta: Delta) -> JsonObject:
        chunk: JsonObject = {
            "index": choice,
            "text": delta.text,
            "logprobs": self._logprobs(delta.chances, delta.seq - len(delta.text)),
            "finish_reason": None,
        }
        return self._chunk(self._with_ids(chunk, delta.token_ids))

    def end(self, choice: int, end: SampleEnd) -> JsonObject:
        return self._chunk(
            {
                "index": choice,
                "text": "",
                "logprobs": None,
                "finish_reason": end.finish_reason,
                "stop_reason": end.stop_reason,
            }
        )

    def whole_choice(self, index: int, choice: Choice) -> JsonObject:
        shown: JsonObject = {
            "index": index,
            "text": "".join(choice.texts),
            "logprobs": self._logprobs(choice.chances, 0),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        return self._with_ids(shown, choice.token_ids)

    def _logprobs(self, chances: Sequence[TokenChance], offset: int) -> JsonObject | None:
        if not self.labels.logprobs:
            return None
        offsets: list[int] = []
        for chance in chances:
            offsets.append(offset)
            offset += len(chance.text)
        return {
            "tokens": [chance.text for chance in chances],
            "token_logprobs": [_finite(chance.logprob) for chance in chances],
            "top_logprobs": [
                {other.text: _finite(other.logprob) for other in chance.top} for chance in chances
            ],
            "text_offset": offsets,
        }


def _chance(chance: TokenChance) -> JsonObject:
    return {
        "token": chance.text,
        "logprob": _finite(chance.logprob),
        "bytes": list(chance.token_bytes),
    }


def _finite(logprob: float) -> float:
    """JSON has no infinity: a banned token is shown as OpenAI shows the very unlikely."""
    return max(logprob, -9999.0)
