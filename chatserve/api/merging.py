"""Several viewings as one sequence of events, for a request with several prompts.

Theory of operation: one pump per viewing inside a TaskGroup that the `async with` block awaits,
one queue with a place for each. A full queue stops the pumps, and the viewings merge meanwhile,
so nothing grows. With a single viewing there is no pump and no queue.
"""

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from chatserve.api.collaborators import Viewing
from chatserve.chat.values import Done, Failed, ReplyEvent

_CUT_SHORT = "a reply ended without its final event"


class Merged:
    """Iterates over (index of the viewing, event) until each viewing had its final event."""

    def __init__(self, viewings: Sequence[Viewing]) -> None:
        self._viewings = viewings
        self._only = aiter(viewings[0]) if len(viewings) == 1 else None
        self._queue: asyncio.Queue[tuple[int, ReplyEvent]] = asyncio.Queue(len(viewings))
        self._open = len(viewings)
        self._group = asyncio.TaskGroup()
        self._pumps: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        if self._only is None:
            self._pumps = [
                self._group.create_task(self._pump(index, viewing))
                for index, viewing in enumerate(self._viewings)
            ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pump in self._pumps:
            pump.cancel()
        # The block's own error goes on as it is; the group would wrap it.
        await self._group.__aexit__(None, None, None)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, ReplyEvent]:
        if not self._open:
            raise StopAsyncIteration
        if self._only is not None:
            index, event = 0, await anext(self._only, None)
            assert event is not None, _CUT_SHORT
        else:
            index, event = await self._queue.get()
        if isinstance(event, Done | Failed):
            self._open -= 1
        return index, event

    async def _pump(self, index: int, viewing: Viewing) -> None:
        event: ReplyEvent | None = None
        async for event in viewing:
            await self._queue.put((index, event))
        assert isinstance(event, Done | Failed), _CUT_SHORT
