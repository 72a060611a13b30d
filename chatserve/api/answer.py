"""Answers one request for a completion: from its head to its last byte.

It may not know fields (`schema.py`) or OpenAI's shapes (`wire.py`). Theory of operation: where the
queue is full that is said at once, so a crowd costs little; a place in the gate is taken before
the body is read; the body is decoded; then everything that waits for the engine runs inside
`unless_gone`, so a client that leaves while its request is queued, tokenized, streamed or blocked
in send ends the reply by leaving the `with reply.view()` block that stands around the response.
"""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import orjson
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chatserve.api import sse
from chatserve.api.body import BodyBudget, decode_object, read_body
from chatserve.api.collaborators import ChatService, Health, ModelInfo
from chatserve.api.event_stream import EventStream
from chatserve.api.gate import RequestGate
from chatserve.api.keys import Holder
from chatserve.api.limits import Limits
from chatserve.api.merging import Merged
from chatserve.api.presence import never, unless_gone
from chatserve.api.problems import problem
from chatserve.api.schema import Asker, Job
from chatserve.api.telemetry import ReplyClock, Telemetry
from chatserve.api.wire import Choice, Labels, Shape
from chatserve.chat.values import Delta, Done, Failed, SampleEnd
from chatserve.errors import Unavailable


class Decode(Protocol):
    """`chat_job` or `completion_job`."""

    def __call__(
        self, fields: dict[str, object], asker: Asker, *, model: ModelInfo, limits: Limits
    ) -> Job: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """What all endpoints share."""

    service: ChatService
    describe_model: Callable[[], ModelInfo]
    limits: Limits
    health: Health
    gate: RequestGate
    budget: BodyBudget
    telemetry: Telemetry

    @property
    def model(self) -> ModelInfo:
        """The served model, as far as it is known now: its context may shrink as it loads."""
        return self.describe_model()


class CompletionEndpoint:
    """An ASGI app: `POST /v1/chat/completions` or `POST /v1/completions`."""

    def __init__(
        self, desk: Desk, *, decode: Decode, shape: Callable[[Labels], Shape], id_prefix: str
    ) -> None:
        self._desk = desk
        self._decode = decode
        self._shape = shape
        self._id_prefix = id_prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        desk = self._desk
        if desk.health.draining or not desk.health.ready:
            raise Unavailable(
                "The server is stopping." if desk.health.draining else "The server is loading.",
                retry_after=desk.health.retry_after,
            )
        holder: Holder = scope["state"]["holder"]
        desk.service.check_room(holder.name)  # a refusal costs no reading, decoding or task
        places = holder.requests_max or desk.limits.connections_max
        with desk.gate.enter(holder.name, places), desk.budget.lease() as lease:
            body = await read_body(
                Headers(scope=scope), receive, lease=lease, limit=desk.limits.body_bytes_max
            )
            asker = Asker(
                request_id=scope["state"]["request_id"], tenant=holder.name, admin=holder.admin
            )
            job = self._decode(decode_object(body), asker, model=desk.model, limits=desk.limits)
            del body  # only its meaning is kept while the answer goes out
            labels = Labels(
                id=self._id_prefix + asker.request_id,
                model=desk.model.name,
                created=int(time.time()),
                return_token_ids=job.return_token_ids,
                logprobs=job.logprobs,
                include_usage=job.include_usage,
            )
            answer = Answer(desk, job, self._shape(labels))
            await unless_gone(receive, answer.send_through(scope, send))


class Answer:
    """One answer under way."""

    def __init__(self, desk: Desk, job: Job, shape: Shape) -> None:
        self._desk = desk
        self._job = job
        self._shape = shape
        self._samples = job.asks[0].generation.samples
        self._clock = ReplyClock(desk.telemetry)

    async def send_through(self, scope: Scope, send: Send) -> None:
        """Open the replies, look at them for as long as the response lasts, and send it."""
        with ExitStack() as viewings:
            opened = [
                viewings.enter_context((await self._desk.service.open(ask)).view())
                for ask in self._job.asks
            ]
            async with Merged(opened) as events:
                if self._job.stream:
                    response = self._streamed(events)
                else:
                    response = await self._whole(events)
                await response(scope, never, send)

    async def _whole(self, events: Merged) -> Response:
        choices = [Choice() for _ in range(self._samples * len(self._job.asks))]
        results: list[Done] = []
        async for index, event in events:
            match event:
                case Delta():
                    place = index * self._samples + event.sample
                    self._clock.delta(place, event)
                    choices[place].texts.append(event.text)
                    choices[place].token_ids.extend(event.token_ids)
                    choices[place].chances.extend(event.chances)
                case SampleEnd():
                    self._clock.end(event)
                    if event.error is not None:
                        raise event.error
                    choice = choices[index * self._samples + event.sample]
                    choice.finish_reason = event.finish_reason
                    choice.stop_reason = event.stop_reason
                case Done():
                    results.append(event)
                case Failed():
                    raise event.error
        self._clock.done(results)
        return Response(
            orjson.dumps(self._shape.whole(choices, results)), media_type="application/json"
        )

    def _streamed(self, events: Merged) -> Response:
        return EventStream(self._frames(events), self._desk.limits)

    async def _frames(self, events: Merged) -> AsyncIterator[bytes]:
        """Owns nothing, so that it does not matter whether it runs to its end."""
        shape = self._shape
        openings = [shape.opening(each) for each in range(self._samples * len(self._job.asks))]
        head = b"".join(sse.frame(chunk) for chunk in openings if chunk is not None)
        if head:
            yield head
        results: list[Done] = []
        async for index, event in events:
            match event:
                case Delta():
                    place = index * self._samples + event.sample
                    self._clock.delta(place, event)
                    if event.text or self._job.return_token_ids or self._job.logprobs:
                        yield sse.frame(shape.delta(place, event))
                case SampleEnd():
                    self._clock.end(event)
                    if event.error is not None:
                        yield sse.frame(problem(event.error))
                        return
                    place = index * self._samples + event.sample
                    yield sse.frame(shape.end(place, event))
                case Done():
                    results.append(event)
                case Failed():
                    yield sse.frame(problem(event.error))
                    return
        self._clock.done(results)
        if self._job.include_usage:
            yield sse.frame(shape.last(results))
        yield sse.DONE
