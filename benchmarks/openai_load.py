"""The client side of a comparison: streams through the door that all servers share, OpenAI's.

A stream costs next to nothing while it runs: bytes are kept with the time when they came, and are
read when it has ended.  What a server counts (`usage`) is taken from its last chunk; where it does
not count, each delta is a token and `Answer.counted` says so.
"""

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import h11
import httpx
import orjson
from tokenizers import Tokenizer

from benchmarks.random_model import random_word
from benchmarks.stream_clients import Stream, post_head

PATH = "/v1/chat/completions"
DONE = b"data: [DONE]"
LAST_PIECE = b"\r\n0\r\n\r\n"
ATTEMPTS_AT_LENGTH = 8  # to make a text of so many tokens; one that is next to it does as well

Message = dict[str, str]


class LoadError(Exception):
    """A request that did not end as it should. status: what was answered, 0 for nothing."""

    def __init__(self, what: str, status: int = 0) -> None:
        super().__init__(what)
        self.status = status


@dataclass(frozen=True, slots=True)
class Answer:
    """One reply as its reader saw it. Times in seconds from the request; `deltas`: when each came.

    counted: the server counted the tokens; otherwise they are deltas.
    """

    first_token: float
    total: float
    tokens: int
    counted: bool
    prompt_tokens: int | None
    cached_tokens: int | None  # of them, by the server's word
    deltas: tuple[float, ...]
    text: str

    @property
    def gaps(self) -> list[float]:
        """Times between one delta and the next."""
        return [later - sooner for sooner, later in zip(self.deltas, self.deltas[1:], strict=False)]

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second after the first one; None where they came all at once."""
        seconds = self.deltas[-1] - self.deltas[0]
        return (self.tokens - 1) / seconds if seconds else None


class CompletionStream(Stream):
    """A connection that asks once and keeps what it is answered."""

    def __init__(self, request: bytes) -> None:
        super().__init__()
        self.began = time.monotonic()
        self._request = request
        self._pieces: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        super().connection_made(transport)
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Kept as it is."""
        self.arrivals.append(time.monotonic())
        self._pieces.append(data)
        tail = b"".join(self._pieces[-3:])[-64:]
        if (DONE in tail or tail.endswith(LAST_PIECE)) and not self.ended.done():
            self.ended.set_result(None)

    def events(self) -> Iterator[tuple[str, dict[str, object]]]:
        """`delta` with text and time, `usage`, `done`, or `failed` with what was said."""
        try:
            for line, arrived in self._lines():
                if line == DONE:
                    yield "done", {}
                elif line.startswith(b"data: "):
                    yield from _told(orjson.loads(line[6:]), arrived)
        except (h11.RemoteProtocolError, orjson.JSONDecodeError) as error:
            yield "failed", {"message": f"what came is no answer: {error}", "status": 0}

    def _lines(self) -> Iterator[tuple[bytes, float]]:
        """The lines of the answer's body and when each was whole. Raises LoadError unless 200."""
        http = h11.Connection(h11.CLIENT)
        headers = [("host", "server"), ("content-length", "0")]
        http.send(h11.Request(method="POST", target=PATH, headers=headers))
        http.send(h11.EndOfMessage())
        rest, status = b"", 200
        for piece, arrived in zip(self._pieces, self.arrivals, strict=True):
            http.receive_data(piece)
            while isinstance(event := http.next_event(), h11.Response | h11.Data):
                if isinstance(event, h11.Response):
                    status = event.status_code
                else:
                    *lines, rest = (rest + bytes(event.data)).split(b"\n")
                    if status == 200:
                        yield from ((line.rstrip(b"\r"), arrived) for line in lines)
                    else:
                        rest = b"\n".join([*lines, rest])
        if status != 200:
            raise LoadError(f"it answered {status}: {_short(rest)}", status)


def _told(event: dict[str, Any], arrived: float) -> Iterator[tuple[str, dict[str, object]]]:
    if error := event.get("error"):
        yield "failed", {"message": f"its stream ended in an error: {_short(orjson.dumps(error))}"}
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
        if text:
            yield "delta", {"text": text, "arrived": arrived}
        if choice.get("finish_reason"):
            yield "done", {}
    if usage := event.get("usage"):
        yield "usage", usage


def _short(said: bytes) -> str:
    """The beginning of what was said, in one line."""
    return " ".join(said.decode(errors="replace").split())[:300]


@dataclass(frozen=True, slots=True)
class Door:
    """Where a server answers. plain: only the fields that every server knows. seconds_max: for a
    reply, and for an answer to anything else."""

    url: str
    model: str
    plain: bool = False
    seconds_max: float = 1_200.0

    async def ask(self, messages: Sequence[Message], tokens: int) -> Answer:
        """Stream one reply of that many tokens. Raises LoadError."""
        stream = await self._stream(self._body(messages, tokens))
        try:
            async with asyncio.timeout(self.seconds_max):
                await stream.ended
        except TimeoutError:
            raise LoadError(f"a reply was not over after {self.seconds_max:g} s") from None
        finally:
            stream.close()
        return _answer(stream)

    def _body(self, messages: Sequence[Message], tokens: int) -> dict[str, object]:
        body: dict[str, object] = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
        }
        if not self.plain:
            body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
        return body

    async def _stream(self, body: dict[str, object]) -> CompletionStream:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        assert parts.port is not None
        request = post_head(self.url, PATH, orjson.dumps(body), last=True)
        try:
            _, stream = await asyncio.get_running_loop().create_connection(
                lambda: CompletionStream(request), parts.hostname, parts.port
            )
        except OSError as error:
            raise LoadError(f"it took no connection: {error}") from None
        return stream


def _answer(stream: CompletionStream) -> Answer:
    deltas: list[float] = []
    text: list[str] = []
    usage: dict[str, Any] = {}
    whole = False
    for name, data in stream.events():
        if name == "failed":
            raise LoadError(str(data["message"]))
        if name == "delta":
            deltas.append(float(str(data["arrived"])) - stream.began)
            text.append(str(data["text"]))
        elif name == "usage":
            usage = data
        elif name == "done":
            whole = True
    if not stream.arrivals:
        raise LoadError("it closed the connection without an answer")
    if not whole:
        raise LoadError("its stream broke off before its end")
    if not deltas:
        raise LoadError("its stream ended without a word")
    counted = isinstance(usage.get("completion_tokens"), int)
    return Answer(
        first_token=deltas[0],
        total=stream.arrivals[-1] - stream.began,
        tokens=usage["completion_tokens"] if counted else len(deltas),
        counted=counted,
        prompt_tokens=usage.get("prompt_tokens"),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        deltas=tuple(deltas),
        text="".join(text),
    )


def served_model(url: str, folder: str, seconds_max: float) -> str | None:
    """The name under which a server serves the folder's model; None while it does not answer.

    Servers call it by its folder, by the folder's name, or as they like; one that lists several
    others is asked for the folder.
    """
    try:
        answer = httpx.get(url + "/v1/models", timeout=seconds_max, trust_env=False, verify=False)
        if answer.status_code != 200:
            return None
        names = [str(model["id"]) for model in answer.json()["data"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None
    for name in names:
        if name in (folder, Path(folder).name):
            return name
    return names[0] if len(names) == 1 else folder


class Words:
    """Random words, in numbers of a model's own tokens."""

    def __init__(self, folder: Path) -> None:
        """The model's folder. Raises ValueError where it has no tokenizer.json."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"there is no tokenizer.json in {folder.name}")
        self._tokenizer = Tokenizer.from_file(str(path))
        sample = 1_000
        self._per_word = self.count(_text(random.Random(0), sample)) / sample

    def count(self, text: str) -> int:
        """How many tokens the text has."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def text(self, seed: object, tokens: int) -> str:
        """A text that has that many tokens, or next to; others for other seeds."""
        words = max(1, round(tokens / self._per_word))
        text = ""
        for _ in range(ATTEMPTS_AT_LENGTH):
            text = _text(random.Random(repr(seed)), words)
            missing = round((tokens - self.count(text)) / self._per_word)
            if not missing:
                break
            words = max(1, words + missing)
        return text


def _text(dice: random.Random, words: int) -> str:
    return " ".join(random_word(dice) for _ in range(words))
