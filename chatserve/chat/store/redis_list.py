"""An owner's conversations in Redis, part by part.

The index is a sorted set beside the conversations, in another slot, so it is no part of their
atomic calls. What holds of it: every conversation is in it (it is written before the conversation),
and no score is above its conversation's time of update (it is written after). So what is listed
and not there is taken out, and a score that lags is raised, when a listing has come by: not before,
for what is raised stands in front of the place where the next part begins.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

from chatserve.chat.store.conversation import Conversation
from chatserve.chat.store.conversation_list import Place, holds
from chatserve.chat.store.redis_link import WRONG_TYPE, Command, RedisLink
from chatserve.chat.store.redis_values import (
    OWNER_INDEX,
    SEARCHED_FIELDS,
    Damaged,
    keys_of,
    meta_key,
    read_conversation,
    read_text,
    unpack,
)
from chatserve.chat.store.session_store import Page

BATCH_MAX = 100  # conversations whose heads are fetched in one trip
# A search ends its call when it has looked at so much, or for so long: the rest is the next part.
SEARCH_BYTES_MAX = 16 << 20
SEARCH_SECONDS_MAX = 0.4
SEARCH_TRIP_BYTES = 1 << 20  # of texts fetched in one trip, unless one conversation has more


@dataclass(slots=True)
class _Head:
    """A conversation as listed. place: by its score. size: of its texts, about."""

    place: Place
    conversation: Conversation
    size: int


@dataclass(slots=True)
class _Gathered:
    """What a call has found, and how far it has looked. lagging: it has passed these, whose
    scores are to be raised."""

    lagging: list[Conversation] = field(default_factory=list[Conversation])
    found: list[Conversation] = field(default_factory=list[Conversation])
    last: Place | None = None
    bytes_left: int = SEARCH_BYTES_MAX


class RedisList:
    """The listing of one store."""

    def __init__(self, link: RedisLink, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._link = link
        self._clock = clock

    async def page(
        self, owner: str, *, after: Place | None, limit: int, search: str | None
    ) -> Page:
        """The part behind a place."""
        assert limit > 0
        gathered = _Gathered()
        page = await self._gathered(owner, gathered, after=after, limit=limit, search=search)
        await self._raise(owner, gathered.lagging)
        return page

    async def _gathered(
        self,
        owner: str,
        gathered: _Gathered,
        *,
        after: Place | None,
        limit: int,
        search: str | None,
    ) -> Page:
        deadline = self._clock() + SEARCH_SECONDS_MAX
        async for heads in self._batches(owner, after, min(limit + 1, BATCH_MAX)):
            for group in _groups(heads) if search else [heads]:
                if search:
                    kept = await self._matching(group, search.casefold())
                    gathered.bytes_left -= sum(head.size for head in group)
                else:
                    kept = {head.place.id for head in group}
                for head in group:
                    if len(gathered.found) == limit:
                        assert gathered.last is not None
                        return Page(tuple(gathered.found), gathered.last.written())
                    gathered.last = head.place
                    if head.conversation.updated > head.place.updated:
                        gathered.lagging.append(head.conversation)
                    if head.place.id in kept:
                        gathered.found.append(head.conversation)
                if gathered.bytes_left < 0 or self._clock() > deadline:
                    assert gathered.last is not None
                    return Page(tuple(gathered.found), gathered.last.written())
        return Page(tuple(gathered.found), None)

    async def _batches(
        self, owner: str, after: Place | None, size: int
    ) -> AsyncIterator[list[_Head]]:
        """The heads behind a place, latest first. Each batch is looked up by the place before it:
        what moves to the front meanwhile shifts nothing."""
        index, skipped = OWNER_INDEX + owner, 0
        while True:
            top = "+inf" if after is None else repr(after.updated)
            command = ("ZREVRANGEBYSCORE", index, top, "-inf", "WITHSCORES")
            (answer,) = await self._link.run([(*command, "LIMIT", skipped, size)])
            listed = _places(answer)
            places = [place for place in listed if after is None or place < after]
            if places:
                yield await self._heads(owner, places)
                after, skipped = places[-1], 0
            else:
                skipped += len(listed)  # all were updated at the same moment
            if len(listed) < size:
                return

    async def _heads(self, owner: str, places: Sequence[Place]) -> list[_Head]:
        commands = [("HMGET", meta_key(place.id), *SEARCHED_FIELDS) for place in places]
        answers = await self._link.run(commands, excused=(WRONG_TYPE,))
        heads: list[_Head] = []
        gone: list[Place] = []
        for place, answer in zip(places, answers, strict=True):
            if isinstance(answer, Exception):
                continue  # opening it says so
            values = cast("list[bytes | None]", answer)
            if values[0] is None:
                gone.append(place)
                continue
            try:
                conversation = read_conversation(place.id, iter(values))
            except Damaged:
                continue
            if conversation.owner != owner:
                continue
            heads.append(_Head(place, conversation, int(values[-1] or 0)))
        if gone:
            await self._take_out(owner, gone)
        return heads

    async def _raise(self, owner: str, lagging: Sequence[Conversation]) -> None:
        index = OWNER_INDEX + owner
        chores: list[Command] = [
            ("ZADD", index, "XX", "GT", repr(each.updated), each.id) for each in lagging
        ]
        for first in range(0, len(chores), BATCH_MAX):
            some = chores[first : first + BATCH_MAX]
            await self._link.run(some, optional=len(some))

    async def _take_out(self, owner: str, places: Sequence[Place]) -> None:
        """One that was being made comes back: its maker had written here before."""
        index = OWNER_INDEX + owner
        commands: list[Command] = []
        for place in places:
            commands += [("ZREM", index, place.id), ("EXISTS", meta_key(place.id))]
        answers = await self._link.run(commands, optional=len(commands))
        back: list[Command] = [
            ("ZADD", index, repr(place.updated), place.id)
            for place, there in zip(places, answers[1::2], strict=True)
            if there
        ]
        if back:
            await self._link.run(back, optional=len(back))

    async def _matching(self, heads: Sequence[_Head], sought: str) -> set[str]:
        """Ids of those in which the text is found."""
        found = {head.place.id for head in heads if holds(sought, head.conversation.title, ())}
        others = [head for head in heads if head.place.id not in found]
        if others:
            answers = await self._link.run(
                [self._link.script("texts", keys_of(head.place.id), ()) for head in others],
                excused=(WRONG_TYPE,),
            )
            for head, answer in zip(others, answers, strict=True):
                if await asyncio.to_thread(_holds, sought, answer):
                    found.add(head.place.id)
        return found


def _places(answer: object) -> list[Place]:
    """Of a sorted set's members with their scores, in a row."""
    row = cast("list[bytes]", answer)
    return [
        Place(float(score), member.decode("utf-8"))
        for member, score in zip(row[::2], row[1::2], strict=True)
    ]


def _groups(heads: Sequence[_Head]) -> list[list[_Head]]:
    """In order, so many at a time as one trip fetches texts of."""
    groups: list[list[_Head]] = []
    room = 0
    for head in heads:
        if not groups or head.size > room:
            groups.append([])
            room = SEARCH_TRIP_BYTES
        groups[-1].append(head)
        room -= head.size
    return groups


def _holds(sought: str, packed: object) -> bool:
    """In a thread: whether one of a conversation's texts has it."""
    try:
        items = unpack(packed)
        next(items)
        return any(sought in read_text(value).casefold() for value in items)
    except Damaged:
        return False
