"""Residence: where what was kept of one conversation is to be, as an admin wishes.

It may not know pages, and asks nobody who the owner is: an admin may name any conversation.

    lease, evict   by names: those that endings of replies told the store, those of replies that
                   run, and those of drafts
    warm           by ids: the path to the current leaf, as the next turn's prompt will begin
    latest, names  whose pages there are at all, for who looks where they are

A reply that a process before this one left without an ending has told nobody its names: it is found
by deletion (`deletion.py`), and passed over here, where nothing depends on having them all.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from chatserve.chat.conversations.assignment import AnswerMeans
from chatserve.chat.conversations.drafts import path_to, settled_ids
from chatserve.chat.conversations.latest import latest
from chatserve.chat.conversations.live_replies import LiveReplies
from chatserve.chat.conversations.wish_door import WishDoor
from chatserve.chat.service import PreparedT
from chatserve.chat.store.conversation import ReplyState, Turn
from chatserve.chat.store.session_store import Page
from chatserve.engine.values import Request
from chatserve.engine.wishes import Dismissed, Leased, Warmth

T = TypeVar("T")


class DraftedNames(Protocol):
    """What was computed ahead."""

    def noted(self, conversation: str) -> frozenset[bytes]:
        """Its names, for one conversation."""
        ...


class Residence(Generic[PreparedT]):
    """One process's. On the event loop. All raise NotFound for an unknown conversation, and
    Unavailable where the store or the executor does."""

    def __init__(
        self,
        means: AnswerMeans[PreparedT],
        live: LiveReplies[PreparedT],
        drafts: DraftedNames | None,
        wishes: WishDoor[PreparedT],
    ) -> None:
        self._means = means
        self._live = live
        self._drafts = drafts
        self._wishes = wishes

    async def lease(self, conversation: str, seconds: float) -> Leased:
        """Others leave memory before what this one has there, for so many seconds; 0 ends that."""
        return self._wishes.lease(await self._names(conversation), seconds)

    async def evict(self, conversation: str) -> Dismissed:
        """What nobody uses of it leaves memory; what the disk has stays there."""
        return self._wishes.evict(await self._names(conversation))

    async def warm(self, conversation: str) -> Warmth:
        """Bring up what is kept of the path to its current leaf; while a reply is written there, of
        the path before that. Nothing is computed."""
        store = self._means.store
        owner = await store.owner(conversation)
        known, turns, replies = await store.tree(owner, conversation)
        by_id = {turn.id: turn for turn in turns}
        parents = {turn.id: turn.parent for turn in turns}
        parents |= {reply.id: reply.turn for reply in replies}
        running = {reply.id for reply in replies if reply.state is ReplyState.RUNNING}
        at, path = known.leaf, path_to(known.leaf, by_id, running)
        while path is None and at is not None:
            at = parents.get(at)
            path = path_to(at, by_id, running)
        system, turns_there = known.system, path or ()
        prepared = await self._off_loop(lambda: self._prepare(owner, system, turns_there))
        return Warmth() if prepared is None else self._wishes.warm(prepared)

    def _prepare(self, owner: str, system: str | None, turns: tuple[Turn, ...]) -> PreparedT | None:
        """In a thread. None: there is not one whole piece that is sure."""
        tokens = settled_ids(self._means.history, system, turns, "")
        if not tokens:
            return None
        request = Request(request_id="warm", tokens=tokens, max_tokens=0, tenant=owner)
        return self._means.engine.prepare(request)

    async def latest(self, owners: Sequence[str], *, limit: int, after: str | None) -> Page:
        """The latest conversations of these owners, as one list (`latest.py`)."""
        return await latest(self._means.store, owners, limit=limit, after=after)

    async def _names(self, conversation: str) -> frozenset[bytes]:
        return await self.names(await self._means.store.owner(conversation), conversation)

    async def names(self, owner: str, conversation: str) -> frozenset[bytes]:
        """What its pages are called, of 32 bytes each, as far as that is known; none of what is
        not the owner's any more."""
        told = await self._means.store.page_names(conversation)
        running = self._live.of(owner, conversation)
        drafted = frozenset[bytes]() if self._drafts is None else self._drafts.noted(conversation)
        names = told | drafted
        if running:
            rows = await self._off_loop(lambda: [each.page_names() for each in running])
            names = names.union(*rows)
        return names

    async def _off_loop(self, work: Callable[[], T]) -> T:
        try:
            trip = asyncio.get_running_loop().run_in_executor(self._means.executor, work)
        except RuntimeError as error:  # the executor's way to say that it was shut down
            raise self._live.shutting_down() from error
        return await trip
