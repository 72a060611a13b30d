"""An engine whose steps are taken by the test: the real Stream, and tokens of the test's choice."""

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from chatserve.engine.stream import Stream
from chatserve.engine.values import (
    Emission,
    FinishReason,
    Progress,
    Receipt,
    Request,
    TokenLogprobs,
)
from chatserve.errors import Busy, ChatserveError, Unavailable


@dataclass(slots=True)
class Run:
    """One request in the engine. `give` is a step of it."""

    request: Request
    stream: Stream
    aborted: bool = False
    finished: dict[int, int] = field(default_factory=dict)
    given: set[int] = field(default_factory=set)
    computed: int = 0  # of the prompt, as told

    def give(
        self,
        tokens: tuple[int, ...] | list[int] = (),
        *,
        sample: int = 0,
        finish: FinishReason | None = None,
        error: ChatserveError | None = None,
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> None:
        """Emit tokens of one sample."""
        if self.aborted or sample not in self.stream.unfinished:
            return
        receipt = None
        if sample not in self.given:
            self.given.add(sample)
            receipt = Receipt(device=1, computed=len(self.request.tokens) - 1)
        self.stream.put(
            Emission(
                sample=sample,
                tokens=tuple(tokens),
                logprobs=logprobs,
                finish=finish,
                error=error,
                receipt=receipt,
            )
        )


class ScriptedEngine:
    """The engine's door. `runs` are the requests in order of opening."""

    def __init__(self, *, context_length: int = 64, vocabulary_size: int = 600) -> None:
        self.context_length = context_length
        self.vocabulary_size = vocabulary_size
        self.runs: list[Run] = []
        self.refusal: ChatserveError | None = None
        self.on_prepare: Callable[[], None] = lambda: None
        self.opened = asyncio.Event()
        self.forgotten: set[bytes] = set()
        self.disk_refuses = False
        self.places = 1_000  # for requests that are open or on their way
        self.looked: list[tuple[str, int, int]] = []  # who asked for room, and who was on the way

    def check_room(self, tenant: str, preparing: int, own: int) -> None:
        """On the loop."""
        self.looked.append((tenant, preparing, own))
        if len(self.runs) + preparing >= self.places:
            raise Busy("Too many requests are waiting.", retry_after=1.0)

    def prepare(self, request: Request) -> Request:
        """In any thread."""
        self.on_prepare()
        return request

    def page_names(self, prepared: Request, tokens) -> tuple[bytes, ...]:
        """Of pages of four: in any thread."""
        names: list[bytes] = []
        for end in range(4, len(tokens) + 1, 4):
            text = repr((prepared.tenant, tuple(tokens[:end])))
            names.append(hashlib.sha256(text.encode()).digest())
        return tuple(names)

    def own_names(self, prepared: Request, tokens) -> frozenset[bytes]:
        """In any thread."""
        return frozenset(self.page_names(prepared, tokens))

    def withhold(self, rows) -> frozenset[bytes]:
        """On the loop."""
        return frozenset(name for row in rows for name in row)

    async def forget(self, names) -> None:
        """On the loop."""
        await asyncio.sleep(0)
        if self.disk_refuses:
            raise Unavailable("The disk refuses.", retry_after=5.0)
        self.forgotten |= set(names)

    def open(self, prepared: Request) -> Stream:
        """On the loop."""
        if self.refusal is not None:
            raise self.refusal
        stream = Stream(
            request_id=prepared.request_id,
            samples=prepared.samples,
            on_close=self._close,
            on_finish=self._finish,
            on_progress=self._progress,
        )
        self.runs.append(Run(prepared, stream))
        self.opened.set()
        return stream

    def _run_of(self, stream: Stream) -> Run:
        return next(run for run in self.runs if run.stream is stream)

    def _close(self, stream: Stream) -> None:
        self._run_of(stream).aborted = True

    def _finish(self, stream: Stream, sample: int, kept_tokens: int) -> None:
        run = self._run_of(stream)
        run.finished[sample] = kept_tokens
        run.give(sample=sample, finish=FinishReason.STOP)

    def _progress(self, stream: Stream) -> Progress:
        run = self._run_of(stream)
        return Progress(queued=0, prompt_tokens=len(run.request.tokens), computed=run.computed)


@dataclass(slots=True)
class ManualTimer:
    """A due call that only the test makes."""

    seconds: float
    call: Callable[[], None]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class ManualTime:
    """Time that stands still unless the test moves it."""

    def __init__(self) -> None:
        self.seconds = 100.0
        self.timers: list[ManualTimer] = []

    def now(self) -> float:
        return self.seconds

    def call_later(self, seconds: float, call: Callable[[], None]) -> ManualTimer:
        timer = ManualTimer(seconds, call)
        self.timers.append(timer)
        return timer

    @property
    def due(self) -> list[ManualTimer]:
        """Timers that would still ring."""
        return [timer for timer in self.timers if not timer.cancelled]
