"""RedisLease: one chatserve at a time keeps its conversations in a Redis that was given to it.

It may not know conversations. The lease is one key that expires (`LEASE_KEY`); its value names the
process that has it, and counts its renewals:

    <drawn id> <renewals> <process> <since> <host>

Theory of operation. A process that finds another's name at its start waits. If the count goes on,
the other lives: StartError. If the key expires, or the count stands still for as long as it should
take to expire (the server's clock was set back), the other is dead, and the lease is ours. From
then on a task renews it, and takes it again where it is missing: after FLUSHALL, after a restart
that kept nothing, or when we, or the Redis, hung for longer than it lasts.

    ours ── missing ──▶ ours, taken again
    ours ── another's name ──▶ lost ── missing ──▶ ours: what the other left running is nobody's

The lease itself stops no write. What must not happen twice is decided where it is written: the
scripts `accept` and `resume` look at the lease and refuse while another has it, and a reply that
another has taken up has a later epoch, under which its log and its end are closed to us. So two
that both believe to be alone, for as long as it takes to notice, still make each reply once.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import cast

from chatserve.chat.store.redis_link import RedisLink
from chatserve.chat.store.redis_values import LEASE_KEY
from chatserve.errors import StartError, Unavailable

_log = logging.getLogger(__name__)

ID_BYTES = 12
LEASE_SECONDS = 6.0  # without renewal; a killed process keeps the next one waiting for so long
RENEW_SECONDS = 2.0  # three tries before it expires, and a call takes less than a second
LOOK_SECONDS = 0.25  # while waiting
WAIT_SECONDS_MAX = 3 * LEASE_SECONDS  # in all, where looks fail
HOST_CHARACTERS_MAX = 100


class RedisLease:
    """One process's. `take` first, then `keep` in a task, `release` at the end."""

    def __init__(
        self,
        link: RedisLink,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.id = secrets.token_urlsafe(ID_BYTES)
        self.lost = False  # another has it
        self._link = link
        self._clock = clock
        self._sleep = sleep
        self._since = int(time.time())
        self._renewals = 0
        self._handed_back = asyncio.Event()

    async def take(self) -> None:
        """Take it, waiting for a dead process's to expire. Raises StartError where another lives.

        A Redis that does not answer is no refusal: `keep` takes it then, or finds that it is lost.
        """
        try:
            is_ours, seen = await self._claim()
        except Unavailable:
            return
        if is_ours:
            return
        _log.warning(
            "%s: %s had these conversations; waiting up to %.0f s for a sign of life",
            self._link.place,
            described(seen),
            LEASE_SECONDS,
        )
        began = unchanged_since = self._clock()
        answers = True
        while self._clock() < began + WAIT_SECONDS_MAX:
            await self._sleep(LOOK_SECONDS)
            is_dead = self._clock() >= unchanged_since + LEASE_SECONDS
            try:
                is_ours, found = await self._claim(over=seen if is_dead else b"")
                answers = True
            except Unavailable:
                answers = False
                unchanged_since = self._clock()  # it could not renew it either
                continue
            if is_ours:
                return
            if found != seen:
                break
        if not answers:
            raise StartError(f"--redis-url: {self._link.place} does not answer any more.")
        raise StartError(
            f"--redis-url: {self._link.place} has the conversations of another chatserve, "
            f"{described(seen)}: end that one first, or name another database."
        )

    async def keep(self) -> None:
        """Renew it, until cancelled."""
        while True:
            await self._sleep(RENEW_SECONDS)
            try:
                self._note(*await self._claim())
            except Unavailable:
                pass  # told by the link; there are some tries before it expires
            except Exception:
                _log.exception("the lease of %s cannot be renewed", self._link.place)

    async def release(self) -> None:
        """Let the next process have it at once."""
        with contextlib.suppress(Unavailable):
            await self._link.run([self._link.script("release", [LEASE_KEY], (self.id,))])

    async def handed_back(self) -> None:
        """Wait until it is ours again after it was lost."""
        await self._handed_back.wait()
        self._handed_back.clear()

    # Inside ----------------------------------------------------------------------------------

    async def _claim(self, over: bytes = b"") -> tuple[bool, bytes]:
        """Take or renew it where no other has it: whether it is ours now, and what was there (empty
        where it was missing). over: another's value that does not count. Raises Unavailable."""
        self._renewals += 1
        value = f"{self.id} {self._renewals} {os.getpid()} {self._since} {socket.gethostname()}"
        milliseconds = int(1_000 * LEASE_SECONDS)
        arguments = (self.id, value, milliseconds, over)
        (answer,) = await self._link.run([self._link.script("lease", [LEASE_KEY], arguments)])
        taken, found = cast("tuple[int, bytes | None]", answer)
        return taken == 1, found or b""

    def _note(self, is_ours: bool, found: bytes) -> None:
        if not is_ours:
            if not self.lost:
                self.lost = True
                _log.error(
                    "another chatserve, %s, has taken the conversations at %s: no reply is begun "
                    "here any more, and those that it carries on are left to it",
                    described(found),
                    self._link.place,
                )
        elif self.lost:
            self.lost = False
            _log.warning("the conversations at %s are ours again", self._link.place)
            self._handed_back.set()
        elif not found:
            _log.warning("the lease of %s was missing: taken again", self._link.place)


@asynccontextmanager
async def held(lease: RedisLease) -> AsyncGenerator[None]:
    """Have the lease for as long as the block lasts. Raises StartError."""
    await lease.take()
    async with asyncio.TaskGroup() as group:
        keeping = group.create_task(lease.keep(), name="lease")
        try:
            yield
        finally:
            keeping.cancel()
            await lease.release()


def described(value: bytes) -> str:
    """The process that a lease's value names. It is another's text, and goes to a terminal."""
    fields = value.decode("utf-8", "replace").split(" ", 4)
    if len(fields) < 5 or not (fields[2].isdecimal() and fields[3].isdecimal()):
        return "an unknown process"
    _, _, process, since, host = fields
    host = "".join(letter for letter in host if letter.isprintable())[:HOST_CHARACTERS_MAX]
    moment = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(min(int(since), 1 << 36)))
    return f"process {process[:20]} on {host}, since {moment}"
