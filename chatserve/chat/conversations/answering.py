"""Answering: the task of one chat's reply, from the accepted turn to its kept end.

It may not know HTTP, viewers' positions or pages. Theory of operation:

    prepare ─▶ open ─▶ consume ─▶ leave the log ─▶ store.end ─▶ conclude
    (executor)  │Busy: later        (one trip)      │Unavailable: later
                └─▶                                 └─▶

The task is the one consumer of the engine's Stream. Whatever cuts it short is a `_Cut`, delivered
as a cancellation of our own, so that it ends whatever is being waited for at once:

    cut         asked by                       the store gets          viewers get
    -           the sample's end               done, its turn          done
    -           an error                       failed, its text        failed
    STOPPED     stop(), the grace period       done ('abort')          done
    LOST        its owner: the conversation    nothing                 failed, not_found
                was deleted
    SUSPENDED   the end of a drain             nothing: resumable      no end: it breaks off
    SUPERSEDED  the log: another process has   nothing: it is that     no end: it breaks off
                taken it up                    one's
    (foreign)   the task group is cancelled    nothing: resumable      no end: it breaks off

A reply whose conversation the store has lost is not cut: its viewers get all of it, and an end that
says that it was not kept. Once generation has ended only a suspension can cut the rest. A reply
that is taken up after a crash begins with what its log holds: its ids are the end of the new
request's prompt, and the sample that was fed with them stands where it stood.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from functools import partial
from typing import Generic, TypeVar

from chatserve.chat.backoff import Backoff
from chatserve.chat.conversations.assignment import AnswerMeans, Assignment, text_rule
from chatserve.chat.conversations.chat_reply import ChatReply
from chatserve.chat.conversations.history import Prompt
from chatserve.chat.conversations.outcome import (
    Outcome,
    done,
    ending,
    failed,
    interrupted,
    unkept,
)
from chatserve.chat.service import PreparedT, check_token_ids, sampling_of
from chatserve.chat.store.conversation import Conversation, ReplyState
from chatserve.chat.store.session_store import Ending, Superseded, Unreadable
from chatserve.engine.stream import Stream
from chatserve.engine.values import Emission, FinishReason, Receipt, Request
from chatserve.errors import (
    Busy,
    ChatserveError,
    ContextLengthExceeded,
    EngineError,
    NotFound,
    Unavailable,
)

_log = logging.getLogger(__name__)

T = TypeVar("T")


class _Cut(Enum):
    STOPPED = "stopped"
    LOST = "lost"
    SUSPENDED = "suspended"
    SUPERSEDED = "superseded"


_WITHOUT_END = (_Cut.SUSPENDED, _Cut.SUPERSEDED)


class Answering(Generic[PreparedT]):
    """One reply's task. `stop`, `suspend` and `reply` are for others on the loop."""

    def __init__(self, assignment: Assignment, means: AnswerMeans[PreparedT]) -> None:
        self._assignment = assignment
        self._means = means
        self._answered = assignment.said.received_from(0)
        self._resumed = assignment.record.epoch > 1
        self._accepted_at = means.clock.now() - max(
            0.0, means.wall() - assignment.record.created if self._resumed else 0.0
        )
        self._prompt: Prompt | None = None
        self._prepared: PreparedT | None = None
        self._generated: list[int] = []  # whatever becomes of them
        self._generation_over = asyncio.Event()
        self._receipt: Receipt | None = None
        self._opened = False
        self._task: asyncio.Task[None] | None = None
        self._begun = False
        self._ending = False
        self._cut: _Cut | None = None
        self._cancelling = False
        self._tokens_at: float | None = None
        self._in_crowd = True
        means.crowd.enter(assignment.conversation.owner)
        self.reply = ChatReply(
            assignment.record,
            assignment.said,
            owner=assignment.conversation.owner,
            clock=means.clock,
            patience=means.options.patience,
            on_abandoned=self.stop,
            on_superseded=self._give_way,
        )
        means.log.enter(self.reply)

    # From outside --------------------------------------------------------------------------

    def start(self, task_group: asyncio.TaskGroup, on_over: Callable[[], None]) -> None:
        """Give the reply its task. Raises Unavailable where no task may start any more."""

        def over(_: object = None) -> None:
            self._settle()
            on_over()

        work = self._run()
        try:
            self._task = task_group.create_task(work, name=f"reply {self.reply.id}")
        except RuntimeError as error:
            work.close()
            over()
            raise self._unavailable() from error
        # A task that is cancelled before its first step never enters `_run`.
        self._task.add_done_callback(over)

    def stop(self) -> None:
        """End it with what it has. Synchronous, idempotent."""
        if not self._ending:
            self._interrupt(_Cut.STOPPED)

    def suspend(self) -> None:
        """Leave it as it is in the store, for the next start. Synchronous, idempotent."""
        self._interrupt(_Cut.SUSPENDED)

    def lose(self) -> None:
        """Its conversation was deleted: it is nobody's any more. Synchronous, idempotent."""
        if not self._ending:
            self._interrupt(_Cut.LOST)

    async def wait_generated(self) -> None:
        """Wait until the engine computes nothing more of it in this process."""
        await self._generation_over.wait()

    def page_names(self) -> tuple[bytes, ...]:
        """What the engine keeps of its prompt and its tokens is called so; for any thread, once
        generation is over."""
        if self._prompt is None or self._prepared is None:
            return ()
        tokens = (*self._prompt.tokens, *self._answered, *self._generated)
        return self._means.engine.page_names(self._prepared, tokens)

    def _give_way(self) -> None:
        if not self._ending:
            self._interrupt(_Cut.SUPERSEDED)

    def _interrupt(self, cut: _Cut) -> None:
        if self.reply.over or self._cut is _Cut.SUSPENDED:
            return
        self._cut = cut
        if self._begun and not self._cancelling:
            assert self._task is not None
            self._cancelling = True
            self._task.cancel()

    # The task ------------------------------------------------------------------------------

    async def _run(self) -> None:
        self._begun = True
        try:
            error = await self._generate_or_cut()
            self._ending = True
            if self._cut not in _WITHOUT_END:
                await self._end(error)
        except asyncio.CancelledError:
            if not self._was_ours():
                raise
        except Exception:
            _log.exception("reply %s cannot be ended", self.reply.id)
            self._conclude_with(EngineError("The server failed on this reply."))
        finally:
            self._settle()

    def _was_ours(self) -> bool:
        """Whether a cancellation that arrived is a cut, and nobody else's."""
        if not self._cancelling:
            return False
        self._cancelling = False
        assert self._task is not None
        return self._task.uncancel() == 0

    def _settle(self) -> None:
        """The task is over, or never began: nothing is left open. Idempotent."""
        self._generation_over.set()
        self._leave_crowd()
        if not self.reply.over:
            if self._cut is not _Cut.SUSPENDED:  # whose last words the log still writes
                self._means.log.forget(self.reply)
            self.reply.break_off()

    async def _generate_or_cut(self) -> ChatserveError | None:
        """Generate to the end; why not, where that is an error."""
        sample = self._assignment.said
        try:
            if self._cut is None and self._assignment.obstacle is None and sample.end is None:
                await self._generate()
        except asyncio.CancelledError:
            if not self._was_ours():
                raise
        except ChatserveError as error:
            return error
        except Exception:
            _log.exception("reply %s failed", self.reply.id)
            return EngineError("The server failed on this reply.")
        finally:
            self._leave_crowd()
            self._generation_over.set()
        return None if sample.end is None else sample.end.error

    async def _generate(self) -> None:
        prepared = await self._prepare()
        if prepared is None:
            # Taken up with all the tokens that it may have: what is held back is let go.
            self.reply.take(Emission(sample=0, finish=FinishReason.LENGTH))
            return
        stream = await self._open(prepared)
        try:
            with stream:
                self._opened = True
                self._leave_crowd()
                if not self._answered:
                    self.reply.watch(stream.progress)
                async for batch in stream:
                    for emission in batch:
                        self._take(stream, emission)
        finally:
            self._generated += stream.unread(0)

    async def _prepare(self) -> PreparedT | None:
        """One trip to the executor. The prompt is kept: its ids go to the log and the tree."""
        means = self._means
        loop = asyncio.get_running_loop()
        async with means.crowd.places:
            try:
                trip = loop.run_in_executor(means.executor, self._make_request)
            except RuntimeError as error:  # the executor's way to say that it was shut down
                raise self._unavailable() from error
            prompt, prepared = await trip
        self._prompt, self._prepared = prompt, prepared
        self.reply.settle_prompt(None if self._assignment.prompt_logged else prompt.turn_ids)
        return prepared

    def _make_request(self) -> tuple[Prompt, PreparedT | None]:
        """All that takes time, in a thread: the prompt's ids and its pages' names."""
        assignment, means, answered = self._assignment, self._means, self._answered
        generation, context = assignment.generation, means.engine.context_length
        check_token_ids(generation, means.engine.vocabulary_size)
        prompt = means.history.prompt(assignment.conversation.system, assignment.path)
        room = context - len(prompt.tokens)
        most = min(room, generation.max_tokens or room)
        if most < 1:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {context} tokens; the conversation up to "
                f"here has {len(prompt.tokens)}."
            )
        if len(answered) >= most:
            return prompt, None
        rule = text_rule(generation, means.text)
        request = Request(
            request_id=assignment.record.id,
            tokens=(*prompt.tokens, *answered),
            max_tokens=most - len(answered),
            tenant=assignment.conversation.owner,
            sampling=sampling_of(generation, means.text.defaults, generation.seed or 0),
            stop_ids=rule.silent_stop_ids,
            min_tokens=min(generation.min_tokens, most),
            answered=len(answered),
        )
        return prompt, means.engine.prepare(request)

    async def _open(self, prepared: PreparedT) -> Stream:
        """A place in the engine's queue, now or later: an accepted turn is not refused."""
        options = self._means.options
        backoff = Backoff(options.retry_seconds_first, options.retry_seconds_max)
        while True:
            try:
                return self._means.engine.open(prepared)
            except Busy:
                await self._means.clock.sleep(backoff.next())

    def _take(self, stream: Stream, emission: Emission) -> None:
        self._generated += emission.tokens
        if emission.tokens:
            self._measure(len(emission.tokens))
        if emission.receipt is not None and self._receipt is None:
            self._receipt = emission.receipt
        if self.reply.take(emission):
            kept = self._assignment.said.kept_tokens
            assert kept is not None
            # A stop string that began in tokens of before the crash: those are the prompt now.
            stream.finish(emission.sample, max(0, kept - len(self._answered)))
        self._means.log.touch(self.reply)

    def _measure(self, tokens: int) -> None:
        now, meter = self._means.clock.now(), self._means.meter
        if self._tokens_at is not None:
            meter.next_tokens(now - self._tokens_at, tokens)
        elif not self._answered:
            meter.first_token(now - self._accepted_at)
        self._tokens_at = now

    # The end -------------------------------------------------------------------------------

    async def _end(self, error: ChatserveError | None) -> None:
        means, reply = self._means, self.reply
        self._assignment.said.break_off("abort")
        await means.log.leave(reply)
        if self._cut is _Cut.LOST:
            self._conclude_with(NotFound("The conversation was deleted."))
            return
        outcome = self._outcome(error)
        kept = ending(
            self._assignment,
            outcome,
            self._prompt,
            encoding=means.history.encoding,
            now=means.wall(),
        )
        if kept.turn is not None:
            ids = await self._turn_ids(kept.turn.text)
            kept = replace(kept, turn=replace(kept.turn, token_ids=ids))
        names = await self._off_loop(self.page_names)
        if names is not None:
            kept = replace(kept, names=means.named.new(self._assignment.path, names))
        try:
            conversation = await self._keep(kept)
        except NotFound:
            outcome = unkept(outcome)
            reply.conclude(outcome.kind, outcome.data)
            return
        except Superseded:
            reply.break_off()
            return
        except Unreadable as error:
            _log.error("reply %s cannot be kept: its conversation is damaged", reply.id)
            self._conclude_with(error)
            return
        means.named.kept(reply.id, names or ())
        means.changes.publish(conversation.owner, conversation.id, conversation.revision)
        reply.conclude(outcome.kind, outcome.data)
        if outcome.state is ReplyState.DONE:
            sample = self._assignment.said.end
            assert sample is not None
            means.meter.sample_over(sample.finish_reason)
            means.meter.reply_over(
                means.clock.now() - self._accepted_at,
                0 if self._prompt is None else len(self._prompt.tokens),
            )

    def _outcome(self, error: ChatserveError | None) -> Outcome:
        obstacle = self._assignment.obstacle
        if obstacle is None and error is not None and self._answered and not self._opened:
            obstacle = error.message
        if obstacle is not None:
            return interrupted(obstacle)
        if error is not None:
            return failed(error)
        first_at = self.reply.first_token_at
        return done(
            self._assignment,
            self._prompt,
            self._receipt,
            # Who was taken up had its first token before anybody's clock began.
            to_first_token=(
                None if first_at is None or self._answered else first_at - self._accepted_at
            ),
            total=self._means.clock.now() - self._accepted_at,
        )

    async def _turn_ids(self, text: str) -> tuple[int, ...] | None:
        """The ids that the assistant's turn appends. None costs a tokenization later, no more."""
        said, reply_ids = self._assignment.said, self._means.history.reply_ids
        fit = partial(reply_ids, tuple(said.token_ids), text, ended_by_id=said.ended_by_id)
        return await self._off_loop(fit)

    async def _off_loop(self, work: Callable[[], T]) -> T | None:
        """In a thread; None where it fails, which costs time later, no more."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._means.executor, work)
        except Exception:
            _log.exception("something of reply %s is not kept", self.reply.id)
            return None

    async def _keep(self, kept: Ending) -> Conversation:
        """One trip, as often as it takes. Raises NotFound where the conversation is gone,
        Superseded and Unreadable."""
        options = self._means.options
        backoff = Backoff(options.retry_seconds_first, options.retry_seconds_max)
        while True:
            try:
                return await self._means.store.end(kept)
            except Unreadable:
                raise
            except Unavailable:
                await self._means.clock.sleep(backoff.next())

    # Little things -------------------------------------------------------------------------

    def _leave_crowd(self) -> None:
        if self._in_crowd:
            self._in_crowd = False
            self._means.crowd.leave(self.reply.owner)

    def _conclude_with(self, error: ChatserveError) -> None:
        if not self.reply.over:
            outcome = failed(error)
            self.reply.conclude(outcome.kind, outcome.data)

    def _unavailable(self) -> Unavailable:
        return Unavailable(
            "The server is shutting down; the reply goes on after its restart.",
            retry_after=self._means.options.retry_after,
        )
