"""Deletions: a conversation that is deleted is forgotten everywhere, however often we are killed.

It may not know pages, files or Redis. A deletion is answered when nothing of it is left:

    engine.withhold: nothing more that its replies compute is kept; all that was kept has its name
      ▸ store.delete: nowhere to be found from here on, and under way     ── one durable step
      ▸ replies that run are cut
      ▸ engine.forget: no tier has the pages
      ▸ store.end_deletion: no names, and the store's files have no text

Until that step nothing has happened to the conversation, but that its next answers take longer.

What has begun is finished: by a call that comes again, by itself where the disk or the store did
not do its part (then the caller is told Unavailable), or by the next process.

Names of pages are those that the endings of replies told the store (`named_pages.py`), and those of
replies that are running. A reply that has neither, left over from a former process, is made
again as it may have been: with the cut that its receipt tells, or else with every cut that there
could have been, from the ids that were kept.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from chatserve.chat.backoff import Backoff
from chatserve.chat.conversations.answering import Answering
from chatserve.chat.conversations.assignment import AnswerMeans
from chatserve.chat.conversations.live_replies import LiveReplies
from chatserve.chat.conversations.outcome import left_out_of
from chatserve.chat.service import PreparedT
from chatserve.chat.store.conversation import Conversation, Role, Turn, conversation_of
from chatserve.chat.store.session_store import Unreadable, no_conversation
from chatserve.engine.values import Request
from chatserve.errors import NotFound, Unavailable

T = TypeVar("T")

_log = logging.getLogger(__name__)

RETRY_SECONDS_FIRST = 1.0  # of a deletion that could not be finished
RETRY_SECONDS_MAX = 60.0


class DraftNames(Protocol):
    """What was computed ahead."""

    def forget(self, conversation: str) -> frozenset[bytes]:
        """Compute nothing more ahead for it; the names of what was."""
        ...


@dataclass(frozen=True, slots=True)
class _Left:
    """A reply whose names nobody has told. path: of what it answers; ids: its own, as far as they
    are known; left_out: turns of its path that its prompt went without, None where nobody knows."""

    path: tuple[Turn, ...]
    ids: tuple[int, ...]
    left_out: int | None


_Key = tuple[str, str]  # owner, conversation


class Deletions(Generic[PreparedT]):
    """One process's. On the event loop."""

    def __init__(
        self,
        means: AnswerMeans[PreparedT],
        live: LiveReplies[PreparedT],
        drafts: DraftNames | None,
    ) -> None:
        self._means = means
        self._live = live
        self._drafts = drafts
        self._under_way: dict[_Key, asyncio.Future[None]] = {}
        self._again: dict[_Key, asyncio.Future[None]] = {}

    async def delete(self, owner: str, conversation: str) -> None:
        """Return when it is forgotten. Raises NotFound, and Unavailable where that could not be
        done yet: either it is as it was, or its deletion is under way. A caller that is
        cancelled changes nothing about it."""
        key = (owner, conversation)
        before = self._under_way.get(key)
        if before is not None:
            return await asyncio.shield(before)
        work = self._delete(owner, conversation)
        deleting = self._live.spawn(work, name=f"deleting {conversation}")
        self._under_way[key] = deleting
        deleting.add_done_callback(lambda _: self._under_way.pop(key))
        return await asyncio.shield(deleting)

    async def owner(self, conversation: str) -> str:
        """Whose it is, or was before its deletion began that is under way. Raises NotFound. For an
        admin alone."""
        store = self._means.store
        try:
            return await store.owner(conversation)
        except NotFound:
            for owner, deleted in await store.deletions():
                if deleted == conversation:
                    return owner
            raise

    async def finish_all(self) -> None:
        """Go on with what former processes began. Returns when all are being finished."""
        try:
            for key in await self._live.persist(self._means.store.deletions):
                self._finish_later(key)
        except Unavailable:
            pass  # draining

    def close(self) -> None:
        """Leave what is under way to the next process. Synchronous, idempotent."""
        for waiting in tuple(self._again.values()):
            waiting.cancel()

    @property
    def unfinished(self) -> int:
        """Deletions that are under way, or wait to be tried again."""
        return len(self._under_way.keys() | self._again.keys())

    # One deletion ----------------------------------------------------------------------------

    async def _delete(self, owner: str, conversation: str) -> None:
        known = True
        try:
            await self._begin(owner, conversation)
        except NotFound:
            # Lost by the store, or begun before.
            known = (owner, conversation) in await self._means.store.deletions()
        cut = self._live.lose(owner, conversation)
        if not known:
            raise no_conversation()
        self._means.changes.publish(owner, conversation, None)
        for answering in cut:
            await answering.wait_generated()
        # Of turns that came at the last moment; and of drafts.
        late = await self._names_of(cut) | self._drafted(conversation)
        try:
            await self._finish(conversation, late)
        except Unavailable:
            self._finish_later((owner, conversation), late)
            raise

    async def _begin(self, owner: str, conversation: str) -> None:
        """Until it is under way. Raises NotFound."""
        store = self._means.store
        with suppress(Unreadable):  # what is damaged can be deleted too
            await store.get(owner, conversation)
        running = self._live.of(owner, conversation)
        rows = await self._off_loop(lambda: [each.page_names() for each in running])
        names = {*self._means.engine.withhold(rows), *self._drafted(conversation)}
        try:
            names |= await self._left_names(owner, conversation, running)
        except Unreadable:
            _log.error("a damaged conversation is deleted: not all of its pages are known")
        await store.delete(owner, conversation, names=names)

    def _drafted(self, conversation: str) -> frozenset[bytes]:
        return frozenset[bytes]() if self._drafts is None else self._drafts.forget(conversation)

    async def _finish(self, conversation: str, late: frozenset[bytes] = frozenset()) -> None:
        store = self._means.store
        names = await store.forgotten_names(conversation)
        await self._means.engine.forget(names | late)
        await store.end_deletion(conversation)

    def _finish_later(self, key: _Key, late: frozenset[bytes] = frozenset()) -> None:
        if key in self._again or self._live.draining:
            return
        waiting = self._live.spawn(self._try_again(key[1], late), name=f"deleting {key[1]}")
        self._again[key] = waiting
        waiting.add_done_callback(lambda _: self._again.pop(key))

    async def _try_again(self, conversation: str, late: frozenset[bytes]) -> None:
        backoff = Backoff(RETRY_SECONDS_FIRST, RETRY_SECONDS_MAX)
        done = False
        while not done:
            try:
                await self._finish(conversation, late)
                done = True
            except Unavailable:
                if self._live.draining:
                    break
                await self._means.clock.sleep(backoff.next())
            except Exception:
                _log.exception("a deletion cannot be finished")
                await self._means.clock.sleep(backoff.next())

    # The names -------------------------------------------------------------------------------

    async def _names_of(self, answerings: Iterable[Answering[PreparedT]]) -> frozenset[bytes]:
        return await self._off_loop(
            lambda: frozenset(name for each in answerings for name in each.page_names())
        )

    async def _left_names(
        self, owner: str, conversation: str, running: Iterable[Answering[PreparedT]]
    ) -> set[bytes]:
        """Of replies that have told nobody."""
        store = self._means.store
        told = {*await store.named(owner, conversation), *(each.reply.id for each in running)}
        known, turns, records = await store.tree(owner, conversation)
        by_id = {turn.id: turn for turn in turns}
        left: list[_Left] = []
        for turn in turns:
            ours = conversation_of(turn.id) == conversation and turn.id not in told
            if ours and turn.role is Role.ASSISTANT and turn.parent is not None:
                path = _path_to(turn.parent, by_id)
                left.append(_Left(path, turn.token_ids or (), left_out_of(turn.final)))
        for record in records:
            if record.id not in told:
                entries = await store.log(record.id)
                ids = tuple(token for entry in entries for token in entry.token_ids)
                left.append(_Left(_path_to(record.turn, by_id), ids, None))
        return await self._off_loop(lambda: set(self._remade(known, left))) if left else set()

    def _remade(self, conversation: Conversation, left: Sequence[_Left]) -> Iterator[bytes]:
        """In a thread: names of prompts as they may have been, and of what was said to them."""
        engine, history = self._means.engine, self._means.history
        for each in left:
            for prompt in history.cuts(conversation.system, each.path, left_out=each.left_out):
                request = Request(
                    request_id="deleted", tokens=prompt, max_tokens=1, tenant=conversation.owner
                )
                yield from engine.own_names(engine.prepare(request), (*prompt, *each.ids))

    async def _off_loop(self, work: Callable[[], T]) -> T:
        try:
            trip = asyncio.get_running_loop().run_in_executor(self._means.executor, work)
        except RuntimeError as error:  # the executor's way to say that it was shut down
            raise self._live.shutting_down() from error
        return await trip


def _path_to(turn: str, by_id: Mapping[str, Turn]) -> tuple[Turn, ...]:
    path: list[Turn] = []
    at: str | None = turn
    while at is not None and at in by_id:
        path.append(by_id[at])
        at = by_id[at].parent
    return tuple(reversed(path))
