"""Bell: rung by many, heard by one.

What `asyncio.Event` is for any number of waiters, for exactly one: a token wakes three tasks on
its way from the engine to a viewer, and the general case costs a queue of waiters each time.
"""

import asyncio


class Bell:
    """On one event loop; `ring` may be called before, while and after somebody waits."""

    __slots__ = ("_rung", "_waiter")

    def __init__(self) -> None:
        self._rung = False
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        """Let the one who waits, or will, go on."""
        self._rung = True
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def mute(self) -> None:
        """What was rung so far is taken care of."""
        self._rung = False

    async def wait(self) -> None:
        """Return once it has been rung since the last `mute`. One waiter at a time."""
        if self._rung:
            return
        assert self._waiter is None, "a bell has one waiter"
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
