"""LiveReplies: every reply that is under way in this process, and how it came to be.

It may not know owners' rights, HTTP or pages. Theory of operation: a reply that is `running` in
the store is live here, or about to be, from one of three causes.

    accepted    the store has just said so
    in doubt    the store did not answer `accept`: it is asked until it does, and what it has not
                accepted by then it never will, however late the call arrives
    left over   the process before this one ended: `resume_all`, or whoever asks for it first

Work that must not end with the one who asked for it has a task of the lifespan's; its errors go
to those who wait for it, and never to the task group.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from chatserve.chat.backoff import Backoff
from chatserve.chat.conversations.answering import Answering
from chatserve.chat.conversations.assignment import AnswerMeans, Assignment
from chatserve.chat.conversations.chat_reply import ChatReply
from chatserve.chat.conversations.recall import recalled
from chatserve.chat.service import PreparedT
from chatserve.chat.store.session_store import Unreadable
from chatserve.errors import Conflict, NotFound, Unavailable

_log = logging.getLogger(__name__)

T = TypeVar("T")
Work = Coroutine[Any, Any, T]


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveLimits:
    """resumptions_max: replies that are taken up at one time after a start. doubts_max: turns that
    are looked for at one time, because the store did not say whether it kept them. lost_max:
    deleted conversations whose last turns may still be on their way."""

    resumptions_max: int = 8
    doubts_max: int = 1_000
    lost_max: int = 4_096


class LiveReplies(Generic[PreparedT]):
    """Replies by id. On the event loop."""

    def __init__(
        self, means: AnswerMeans[PreparedT], task_group: asyncio.TaskGroup, limits: LiveLimits
    ) -> None:
        self.draining = False
        self.resumed_total = 0
        self._means = means
        self._task_group = task_group
        self._limits = limits
        self._answerings: dict[str, Answering[PreparedT]] = {}
        self._taking_up: dict[str, asyncio.Future[ChatReply]] = {}
        self._lost: dict[tuple[str, str], None] = {}  # conversations, oldest first
        self._doubts: set[asyncio.Task[None]] = set()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._answerings)

    @property
    def by_id(self) -> Mapping[str, Answering[PreparedT]]:
        """All of them."""
        return self._answerings

    @property
    def doubts(self) -> int:
        """Turns in doubt."""
        return len(self._doubts)

    # Beginning -------------------------------------------------------------------------------

    def begin(self, assignment: Assignment, on_over: Callable[[], None] | None = None) -> ChatReply:
        """Give a reply its task. Nothing waits between the store's word and this."""
        answering = Answering(assignment, self._means)
        reply = answering.reply
        self._answerings[reply.id] = answering
        self._quiet.clear()

        def over() -> None:
            del self._answerings[reply.id]
            if not self._answerings:
                self._quiet.set()
            if on_over is not None:
                on_over()

        answering.start(self._task_group, over)
        if self._closed:
            answering.suspend()
        elif (reply.owner, reply.conversation) in self._lost:
            answering.lose()
        return reply

    async def take_up(self, reply: str) -> ChatReply:
        """The live reply of one that is running in the store.

        Raises NotFound, Conflict if it has ended, Unavailable.
        """
        live = self._answerings.get(reply)
        if live is not None:
            return live.reply
        taking_up = self._taking_up.get(reply)
        if taking_up is None:
            if self.draining:
                raise self.shutting_down()
            taking_up = self.spawn(self._resume(reply), name=f"taking up {reply}")
            self._taking_up[reply] = taking_up
            taking_up.add_done_callback(lambda _: self._taking_up.pop(reply))
        return await asyncio.shield(taking_up)

    async def _resume(self, reply: str) -> ChatReply:
        means = self._means
        kept = await means.store.resume(reply)
        entries = await means.store.log(reply)
        encoding = means.history.encoding
        try:
            trip = asyncio.get_running_loop().run_in_executor(
                means.executor,
                lambda: recalled(kept, entries, text=means.text, encoding=encoding),
            )
        except RuntimeError as error:  # the executor's way to say that it was shut down
            raise self.shutting_down() from error
        assignment = await trip
        self.resumed_total += 1
        return self.begin(assignment)

    async def resume_all(self) -> None:
        """Take up all that were running when the process before this one ended.

        Waits for a store that is away. Returns when all are under way, and those that cannot go
        on are being ended.
        """
        try:
            ids = iter(await self.persist(self._means.store.running))
        except Unavailable:
            return  # draining
        async with asyncio.TaskGroup() as group:
            for _ in range(self._limits.resumptions_max):
                group.create_task(self._resume_some(ids))

    async def _resume_some(self, ids: Iterator[str]) -> None:
        for reply in ids:
            await self._resume_one(reply)

    async def _resume_one(self, reply: str) -> None:
        try:
            await self.persist(lambda: self.take_up(reply))
        except Unreadable:
            _log.error("reply %s cannot be taken up: its conversation is damaged", reply)
        except (NotFound, Conflict, Unavailable):
            pass  # deleted or ended meanwhile, or the next start takes it up
        except Exception:
            _log.exception("reply %s cannot be taken up", reply)

    def doubt(self, owner: str, reply: str) -> None:
        """The store may have accepted this reply: find out, and take it up then."""
        if self.draining or len(self._doubts) >= self._limits.doubts_max:
            return
        task = self._task_group.create_task(self._find_out(owner, reply), name=f"doubt {reply}")
        self._doubts.add(task)
        task.add_done_callback(self._doubts.discard)

    async def _find_out(self, owner: str, reply: str) -> None:
        try:
            accepted = await self.persist(lambda: self._means.store.settle(owner, reply))
        except (NotFound, Unavailable):
            return
        if accepted:
            await self._resume_one(reply)

    # Ending ----------------------------------------------------------------------------------

    def of(self, owner: str, conversation: str) -> tuple[Answering[PreparedT], ...]:
        """Those of a conversation."""
        return tuple(
            answering
            for answering in self._answerings.values()
            if (answering.reply.owner, answering.reply.conversation) == (owner, conversation)
        )

    def lose(self, owner: str, conversation: str) -> tuple[Answering[PreparedT], ...]:
        """End those of a conversation that was deleted, and what is just about to begin; which they
        are. Synchronous, idempotent."""
        found = self.of(owner, conversation)
        for answering in found:
            answering.lose()
        self._lost[owner, conversation] = None
        if len(self._lost) > self._limits.lost_max:
            del self._lost[next(iter(self._lost))]
        return found

    def found(self, owner: str, conversation: str) -> None:
        """A conversation of this id is kept again."""
        self._lost.pop((owner, conversation), None)

    async def wait_quiet(self) -> None:
        """Wait until none is under way."""
        await self._quiet.wait()

    async def suspend_all(self) -> None:
        """Leave all as they are in the store; returns when their tasks are over."""
        self.draining = self._closed = True
        for doubt in self._doubts:
            doubt.cancel()
        for answering in tuple(self._answerings.values()):
            answering.suspend()
        await self._quiet.wait()

    # Tasks -----------------------------------------------------------------------------------

    def spawn(self, work: Work[T], *, name: str) -> "asyncio.Future[T]":
        """Work that goes on when nobody waits for it. Raises Unavailable where none may begin."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        async def carry_out() -> None:
            try:
                future.set_result(await work)
            except Exception as error:
                future.set_exception(error)
                future.exception()  # it counts as seen if nobody waits any more

        carrying = carry_out()
        try:
            task = self._task_group.create_task(carrying, name=name)
        except RuntimeError as error:
            carrying.close()
            work.close()
            raise self.shutting_down() from error

        def over(_: object) -> None:
            work.close()  # where the task was cancelled before its first step
            future.cancel()

        task.add_done_callback(over)
        return future

    async def persist(self, call: Callable[[], Work[T]]) -> T:
        """Ask the store as often as it takes. Raises Unreadable, and Unavailable while draining."""
        options = self._means.options
        backoff = Backoff(options.retry_seconds_first, options.retry_seconds_max)
        while True:
            try:
                return await call()
            except Unreadable:
                raise
            except Unavailable:
                if self.draining:
                    raise
            await self._means.clock.sleep(backoff.next())

    def shutting_down(self) -> Unavailable:
        """Why nothing new begins."""
        retry_after = self._means.options.retry_after
        return Unavailable("The server is shutting down.", retry_after=retry_after)
