"""Work that ends when its client leaves, whatever it is waiting for.

Theory of operation: one task does the work and one listens for `http.disconnect`; whichever ends
first ends the other, and both have ended when the call returns. What the work holds is released
by its own `with` blocks, because a cancelled task runs them.
"""

import asyncio
from collections.abc import Coroutine

from starlette.types import Message, Receive


async def unless_gone(receive: Receive, work: Coroutine[object, object, None]) -> None:
    """Run `work` to its end, or cancel it when the client has gone. Raises what it raises."""
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
    finally:
        # After the last byte the server also says 'disconnect': then the worker is all but done.
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)
    if not worker.cancelled():
        worker.result()


async def never(_: Message | None = None) -> Message:
    """A `receive` for responses inside `unless_gone`: somebody else listens."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError("nobody sets this future")


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
