"""The latest conversations of several owners, as one list: for an admin.

Each owner's list is read by small parts, from the top down, and only as far as it is needed: some
`limit` conversations, and one part of each owner. A cursor of one owner's list is a place in time,
and so it is one of the common list too.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from chatserve.chat.store.conversation import Conversation
from chatserve.chat.store.conversation_list import Place
from chatserve.chat.store.session_store import Page, SessionStore


@dataclass(slots=True)
class _Shelf:
    """What is read and not taken of one owner's list, and where the rest begins; None: no rest."""

    owner: str
    rest: str | None
    read: deque[Conversation] = field(default_factory=deque[Conversation])

    async def fill(self, store: SessionStore, part: int) -> None:
        """Read a part, as after a cursor."""
        while not self.read and self.rest is not None:
            await self.begin(store, part, self.rest)

    async def begin(self, store: SessionStore, part: int, after: str | None) -> None:
        page = await store.list(self.owner, after=after, limit=part)
        self.read.extend(page.conversations)
        self.rest = page.next

    def __lt__(self, other: "_Shelf") -> bool:
        """The one with the latest conversation first."""
        return Place.of(self.read[0]) > Place.of(other.read[0])


async def latest(
    store: SessionStore, owners: Sequence[str], *, limit: int, after: str | None = None
) -> Page:
    """The latest `limit` conversations after a cursor, of all these owners. next: the cursor of
    those that follow, None where there are none. Raises RequestError for what is no cursor, and
    what the store raises."""
    part = max(1, limit // max(1, len(owners)))
    shelves: list[_Shelf] = []
    for owner in owners:
        shelf = _Shelf(owner, None)
        await shelf.begin(store, part, after)
        await shelf.fill(store, part)
        if shelf.read:
            shelves.append(shelf)
    heapify(shelves)
    found: list[Conversation] = []
    while shelves and len(found) < limit:
        shelf = heappop(shelves)
        found.append(shelf.read.popleft())
        await shelf.fill(store, part)
        if shelf.read:
            heappush(shelves, shelf)
    return Page(tuple(found), Place.of(found[-1]).written() if shelves and found else None)
