"""RedisRewrite: a server's append-only file written anew, so that what was deleted is in no file.

A deleted key stays in the append-only file until the server writes that anew, from what it has in
memory. Theory of operation: a rewrite that begins after a deletion does not hold what was deleted,
and the files before it are removed as it ends. There is no call that waits for one, so the server
is asked for one and then looked at. All who wait share the next one to begin.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from chatserve.chat.store.redis_link import RedisLink, info_of
from chatserve.errors import Unavailable

LOOK_SECONDS = 0.02  # between looks at a rewrite, at first; doubled each time
LOOK_SECONDS_MAX = 0.5
RETRY_AFTER_SECONDS = 5.0
_BUSY = ("in progress", "active", "scheduled")  # of a rewrite, or a snapshot, as the server says it


class RedisRewrite:
    """One server's."""

    def __init__(
        self, link: RedisLink, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._link = link
        self._sleep = sleep
        self._turn = asyncio.Lock()
        self._begun = 0  # rewrites that were asked for
        self._ended = 0  # the last of them that is done

    async def done(self) -> None:
        """Return when a rewrite that began after this call is done, and the old files are gone.

        Raises Unavailable where the server is away, or could not do it.
        """
        wanted = self._begun + 1
        async with self._turn:
            if self._ended < wanted:
                await self._rewrite(wanted)

    async def _rewrite(self, number: int) -> None:
        self._begun = number
        while True:
            server = (await self._idle())["run_id"]
            (answer,) = await self._link.run([("BGREWRITEAOF",)], excused=_BUSY)
            if not isinstance(answer, Exception):
                break  # else one that the server began by itself was faster: it may be too old
        info = await self._idle()
        if info["run_id"] != server or info["aof_last_bgrewrite_status"] != "ok":
            raise Unavailable(
                "The store of conversations could not write its file anew.",
                retry_after=RETRY_AFTER_SECONDS,
            )
        self._ended = number

    async def _idle(self) -> Mapping[str, str]:
        """Wait until no rewrite runs or is due; what the server says of itself."""
        pause = LOOK_SECONDS
        while True:
            (answer,) = await self._link.run([("INFO",)])
            info = info_of(answer)
            busy = [info.get(f"aof_rewrite_{what}") for what in ("in_progress", "scheduled")]
            if info.get("aof_enabled") != "1" or busy == ["0", "0"]:
                return info
            await self._sleep(pause)
            pause = min(2 * pause, LOOK_SECONDS_MAX)
