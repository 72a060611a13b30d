"""Engine: one loop that plans, dispatches, commits and delivers.

    open(request) ─▶ queue ─▶ plan n+1 ─▶ runner's thread
                               ▲              │ result n
                     deliver ◀─┴── commit n ◀─┘

Theory of operation. With two steps in flight the runner is never idle: step n+1 is planned and
handed over while step n runs (a GPU has it before n has ended, `runner.py`), and its unknown tokens
are named by (step, row). When n's result arrives it is committed, n+2 is planned and dispatched,
and only then are n's tokens delivered.
With one step in flight the same code plans after each commit. A result of very many rows leaves
the loop a turn between commit and plan, since the step in flight keeps the runner busy. Tokens are
delivered a few streams at a turn of the loop: a step's thousands of consumers would else be woken
in one turn, and all that waits for the loop would wait for all of them.

All scheduling state lives on the event loop. `prepare` is the one method for other threads.
An exception of our own in planning or committing starts the cache anew and queues everything
again (`Scheduler.recover`): text is truth, pages are a cache.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from chatserve.cache.statistics import CacheStatistics
from chatserve.engine.ferry import Ferry
from chatserve.engine.looks import Looks
from chatserve.engine.plan import StepResult
from chatserve.engine.runner import Runner, RunnerThread
from chatserve.engine.scheduler import Outcome, Scheduler
from chatserve.engine.sequence import PreparedRequest
from chatserve.engine.statistics import EngineStatistics
from chatserve.engine.stream import Stream
from chatserve.engine.traffic import Traffic
from chatserve.engine.values import Emission, FinishReason, Flushed, Progress, Request
from chatserve.engine.verifier import Verifier
from chatserve.engine.wishes import Wishes
from chatserve.errors import EngineError, Unavailable
from prefix_store.names import PageName, PageNamer, PublicNames, RootFields, token_bytes

_log = logging.getLogger(__name__)

ROWS_A_TURN = 512  # to commit before something else has its turn: some milliseconds
DELIVERIES_A_TURN = 64  # a few milliseconds of consumers' work
FORGET_RETRY_SECONDS = 5.0  # told where the disk refuses
CLOSE_TIMEOUT_SECONDS = 30.0  # a step on a slow CPU with a long slice


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """fingerprint: 32 bytes that stand for model and formats; layout: the page layout in words.

    steps_in_flight: 1 or 2. vocabulary_size: ids are below it. page_bytes: of one page, to be told;
    0: not known.
    """

    fingerprint: bytes
    layout: str
    vocabulary_size: int
    steps_in_flight: int = 2
    page_bytes: int = 0


class Engine:
    """Streams out for requests in. `run` must be running for anything to happen."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        namer: PageNamer,
        *,
        settings: EngineSettings,
        traffic: Traffic | None = None,
    ) -> None:
        """traffic: to and from the tiers below the device, None where there are none."""
        assert settings.steps_in_flight in (1, 2)
        self._scheduler = scheduler
        self._runner = runner
        self._namer = namer
        self._settings = settings
        # Read by any thread, so it is frozen, and swapped whole.
        self._public = PublicNames(
            namer.public_root(fingerprint=settings.fingerprint, layout=settings.layout)
        )
        self._public_pages = 0  # of one prompt, at the most that ever was
        self._streams: dict[int, Stream] = {}
        self._groups: dict[Stream, int] = {}
        self._results: deque[StepResult] = deque()
        self._outcomes: deque[Outcome] = deque()
        self._signal = asyncio.Event()
        self._ferry = Ferry(scheduler, traffic, self._signal)
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread: RunnerThread | None = None
        self._running_steps = 0
        self._recovering = False
        self._postponed: list[Callable[[], None]] = []
        self._stopped = False
        self.looks = Looks(scheduler)
        self.wishes = Wishes(scheduler, self._act, self.is_public)
        self.verifier = Verifier(
            scheduler,
            traffic,
            act=self._act,
            recovering=lambda: self._recovering,
            forget=self._forget,
        )
        self.on_step: Callable[[], None] = _nothing  # tests look at the invariants after each

    # Doors ---------------------------------------------------------------------------------

    @property
    def context_length(self) -> int:
        """Tokens that a sequence may have, prompt and reply together."""
        return self._scheduler.limits.context_length

    @property
    def vocabulary_size(self) -> int:
        """Token ids are below this."""
        return self._settings.vocabulary_size

    @property
    def healthy(self) -> bool:
        """Whether the device works, as far as we know."""
        return self._scheduler.broken is None

    def prepare(self, request: Request) -> PreparedRequest:
        """Name the request's pages, by the public names of now. For any thread, linear in its
        tokens."""
        settings = self._settings
        public = None if request.cache_salt else self._public
        fields = RootFields(
            tenant=request.tenant,
            cache_salt=request.cache_salt,
            fingerprint=settings.fingerprint,
            layout=settings.layout,
        )
        root = self._namer.root(fields)
        digest = blake2b(root + token_bytes(request.tokens), digest_size=16).digest()
        names = tuple(self._namer.names(root, request.tokens, public=public))
        return PreparedRequest(
            request=request, root=root, names=names, digest=digest, public=public
        )

    def page_names(self, prepared: PreparedRequest, tokens: Sequence[int]) -> tuple[PageName, ...]:
        """Names of a row's whole pages, as a prepared request's are named that goes on with these
        tokens. Pure, for any thread, linear in the tokens."""
        return tuple(self._namer.names(prepared.root, tokens, public=prepared.public))

    def public_names(self, tokens: Sequence[int]) -> tuple[PageName, ...]:
        """What the whole pages of a prompt that all tenants share are called. Pure, for any
        thread, linear in its tokens."""
        return tuple(self._namer.public_names(self._public.root, tokens))

    def publish(self, prompts: Iterable[Sequence[PageName]], *, tokens_max: int = 0) -> None:
        """From now on exactly the pages of these prompts (`public_names` of each) are shared by all
        tenants. Who is prepared already keeps the names that it has. On the loop.

        tokens_max: of all prompts that were ever published, by processes before this one too.
        """
        chains = tuple(prompts)
        self._public = replace(self._public, names=frozenset[PageName]().union(*chains))
        pages = tokens_max // self._namer.page_size
        self._public_pages = max([self._public_pages, pages, *map(len, chains)])

    def own_names(self, prepared: PreparedRequest, tokens: Sequence[int]) -> frozenset[PageName]:
        """Every name that a whole page of these tokens may have been given as this tenant's own,
        whatever was published then. For any thread; see `PageNamer.own_names` for its time."""
        pages = 0 if prepared.public is None else self._public_pages
        root, above = prepared.root, self._public.root
        return frozenset(self._namer.own_names(root, tokens, public_root=above, public_pages=pages))

    def check_room(self, tenant: str, preparing: int, own: int) -> None:
        """Raise what `open` would for any request of a tenant now: before the work of preparing it.

        preparing: requests that passed this check and have neither been opened nor given up; own:
        how many of them are the tenant's.
        """
        self._scheduler.check_room(tenant, preparing, own)

    def open(self, prepared: PreparedRequest) -> Stream:
        """Queue a request and return its stream. On the event loop; never waits.

        Raises what `Scheduler.submit` raises, and Unavailable once the engine has stopped.
        """
        if self._stopped:
            raise Unavailable("The server is shutting down.")
        group = self._scheduler.submit(prepared)
        stream = Stream(
            request_id=prepared.request.request_id,
            samples=prepared.request.samples,
            on_close=self._close_stream,
            on_finish=self._finish_sample,
            on_progress=self._progress,
        )
        self._streams[group] = stream
        self._groups[stream] = group
        self._idle.clear()
        self._signal.set()
        return stream

    def draft(self, key: Hashable, prepared: PreparedRequest) -> bool:
        """Compute a prompt's full pages ahead, while there are no requests; instead of the draft
        that this key had before. On the event loop; never waits. Returns whether it was taken."""
        if self._stopped or self._recovering:
            return False
        self._signal.set()
        try:
            return self._scheduler.draft(key, prepared)
        except Exception:
            _log.exception("the engine starts again on an empty cache")
            self._recovering = True
            return False

    def withdraw(self, key: Hashable) -> None:
        """Nobody wants this key's draft any more. Harmless if there is none."""
        self._act(lambda: self._scheduler.withdraw(key))

    async def wait_idle(self) -> None:
        """Wait for a moment without requests, the time for drafts."""
        await self._idle.wait()

    def flush(self) -> Flushed:
        """Forget the pages of the device and of host memory that nobody owns; how many. On the
        event loop."""
        flushed = Flushed()

        def flush() -> None:
            nonlocal flushed
            scheduler = self._scheduler
            flushed = Flushed(scheduler.blocks.flush(), scheduler.tiers.flush())

        self._act(flush)
        return flushed

    def is_public(self, name: PageName) -> bool:
        """Whether a page of this name is shared by all tenants, and so not one conversation's."""
        return name in self._public.names

    def withhold(self, rows: Iterable[Sequence[PageName]]) -> frozenset[PageName]:
        """Find none of these pages on the device any more, and name nothing that continues them
        there: what is computed for who runs is copied nowhere. Each row: names of a chain. On the
        event loop; never waits.

        Returns the rows' names, and those that continued a row (but a public one) until now.
        """
        rows = [row for row in rows if row]
        names = frozenset(name for row in rows for name in row)
        ends = [row[-1] for row in rows if not self.is_public(row[-1])]
        names |= self._scheduler.blocks.forgetting.family(ends)
        own = [name for name in names if not self.is_public(name)]
        self._act(lambda: self._scheduler.forget(own))
        return names

    async def forget(self, names: Collection[PageName]) -> None:
        """Forget these pages in every tier, public ones excepted. From the moment of the call
        nobody finds them; when it returns, no tier has them but the device those that are in use,
        which go on release. What computes them anew meanwhile may name them again.

        Raises Unavailable once the engine has stopped, and where a tier below refuses: its pages
        are out of reach then, and the call is to be made again.
        """
        if self._stopped:
            raise Unavailable("The server is shutting down.", retry_after=FORGET_RETRY_SECONDS)
        await self._forget([name for name in names if not self.is_public(name)])

    async def _forget(self, names: Collection[PageName]) -> None:
        wanted = frozenset(names)
        self._scheduler.blocks.forgetting.hide_below(wanted)
        self._act(lambda: self._scheduler.forget(wanted))
        try:
            await self._ferry.drop(wanted)
        except Exception as error:
            _log.error("pages cannot be forgotten now: %s", error)
            raise Unavailable(
                "The disk refuses to forget: it is tried again.", retry_after=FORGET_RETRY_SECONDS
            ) from error
        finally:
            self._scheduler.blocks.forgetting.dropped(wanted)

    def statistics(self) -> EngineStatistics:
        """A frozen picture of the scheduler, and of the I/O threads."""
        known = self._scheduler.statistics()
        return replace(
            known,
            page_bytes=self._settings.page_bytes,
            io_faults_total=self._ferry.faults,
            keep_processor_seconds_total=self._ferry.keep_processor_seconds,
        )

    def cache_statistics(self) -> CacheStatistics:
        """A frozen picture of the cache floor."""
        return self._scheduler.blocks.statistics()

    # The loop ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run steps until cancelled; then the runner's thread is joined and streams are ended."""
        assert not self._stopped, "an engine runs once"
        self._thread = RunnerThread(self._runner, self._arrive)
        self._ferry.begin()
        try:
            while True:
                self._signal.clear()
                if self._commit() > ROWS_A_TURN and self._running_steps:
                    await asyncio.sleep(0)
                self._step()
                await self._signal.wait()
                await asyncio.sleep(0)  # arrivals of this tick join the same step
        finally:
            # The streams first: a second cancellation may cut the waiting short.
            self._stopped = True
            self._end_streams()
            try:
                if not self._recovering:
                    await self._ferry.keep_rest()
            finally:
                # The pages' memory is the runner's: its thread ends after those that read it.
                try:
                    await self.verifier.close()
                    await self._ferry.close()
                finally:
                    self._thread.close()
                await asyncio.to_thread(self._thread.join, CLOSE_TIMEOUT_SECONDS)

    def _commit(self) -> int:
        """Commit what has arrived; returns how many rows that was.

        What came from below first, whoever it is for: no queue's head may strand it.
        """
        rows = 0
        try:
            while not self._recovering and self._ferry.finish_one():
                self.on_step()
            while self._results and not self._recovering:
                self._running_steps -= 1
                result = self._results.popleft()
                rows += len(result.tokens)
                self._outcomes += self._scheduler.commit(result)
                self.on_step()
        except Exception:
            _log.exception("the engine starts again on an empty cache")
            self._recovering = True
        return rows

    def _step(self) -> None:
        """Dispatch what is possible, deliver what was committed."""
        try:
            self._dispatch()
        except Exception:
            _log.exception("the engine starts again on an empty cache")
            self._recovering = True
        assert self._thread is not None
        if self._running_steps == 1 or self._recovering:
            self._thread.nothing_follows()
        read = self._ferry.under_way or self.verifier.under_way
        back = self._running_steps == len(self._results) and not read
        if self._recovering and back:
            self._recover()
        if self._scheduler.idle:
            self._idle.set()
        self._deliver(DELIVERIES_A_TURN)
        if self._outcomes:
            self._signal.set()

    def _dispatch(self) -> None:
        assert self._thread is not None
        while not self._recovering and self._running_steps < self._settings.steps_in_flight:
            plan = self._scheduler.plan()
            if plan is None:
                break
            self._thread.submit(plan)
            self._running_steps += 1
            self.on_step()
        if not self._recovering:
            self._ferry.order(idle=self._scheduler.idle)

    def _recover(self) -> None:
        """All steps and pages have come back: begin anew."""
        self._results.clear()
        self._ferry.restart()
        self._running_steps = 0
        self._recovering = False
        self._outcomes += self._scheduler.recover()
        postponed, self._postponed = self._postponed, []
        for action in postponed:
            try:
                action()
            except Exception:
                _log.exception("a consumer's wish failed twice")
        self._deliver()
        for stream, group in tuple(self._groups.items()):
            for sample in stream.unfinished - self._scheduler.samples(group):
                error = EngineError("The engine failed on this request.")
                self._outcomes.append(
                    Outcome(group, Emission(sample=sample, finish=FinishReason.ERROR, error=error))
                )
        self._signal.set()

    def _deliver(self, most: int | None = None) -> None:
        for _ in range(len(self._outcomes) if most is None else min(most, len(self._outcomes))):
            outcome = self._outcomes.popleft()
            stream = self._streams.get(outcome.group)
            if stream is None:
                continue
            stream.put(outcome.emission)
            if stream.over:
                del self._streams[outcome.group]
                del self._groups[stream]

    def _arrive(self, result: StepResult) -> None:
        self._results.append(result)
        self._signal.set()

    # Streams talk back ---------------------------------------------------------------------

    def _close_stream(self, stream: Stream) -> None:
        group = self._groups.pop(stream, None)
        if group is not None:
            del self._streams[group]
            for outcome in self._outcomes:
                if outcome.group == group:
                    stream.put(outcome.emission)
            self._act(lambda: self._scheduler.abort(group))

    def _finish_sample(self, stream: Stream, sample: int, kept_tokens: int) -> None:
        group = self._groups.get(stream)
        if group is not None:
            self._act(lambda: self._finish(group, sample, kept_tokens))

    def _finish(self, group: int, sample: int, kept_tokens: int) -> None:
        self._outcomes += self._scheduler.finish(group, sample, kept_tokens)

    def _act(self, action: Callable[[], None]) -> None:
        """Do it now, or after the recovery under way; a fault of ours is not the consumer's."""
        if not self._recovering:
            try:
                action()
            except Exception:
                _log.exception("the engine starts again on an empty cache")
                self._recovering = True
        if self._recovering:
            self._postponed.append(action)
        self._signal.set()

    def _progress(self, stream: Stream) -> Progress | None:
        group = self._groups.get(stream)
        return None if group is None else self._scheduler.progress(group)

    def _end_streams(self) -> None:
        """The engine stops: nobody waits for ever."""
        self._deliver()
        for stream in tuple(self._groups):
            for sample in stream.unfinished:
                error = Unavailable("The server is shutting down.")
                stream.put(Emission(sample=sample, finish=FinishReason.ERROR, error=error))
        self._streams.clear()
        self._groups.clear()


def _nothing() -> None:
    pass
