"""The process's front: uvicorn with our connections, and a drain of our own.

It may not know the app. Theory of operation of the drain: uvicorn would stop streams at SIGTERM.
Here the first signal only calls `drain.begin` (readiness goes red, new asks are refused) and the
loop goes on ticking; when no request is open and no reply runs any more, or after
`shutdown_seconds`, `drain.expire` lets the replies still running say farewell, and only then
uvicorn's own shutdown runs, lifespan included. WebSockets are told at the first signal: each closes
with 1001 when its last reply has ended, or at uvicorn's shutdown. A second signal skips the
waiting, a third one the farewell too.
"""

import functools
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol, cast

import uvicorn
from starlette.types import ASGIApp

from chatserve.api.body import BodyBudget
from chatserve.api.connection import Connection
from chatserve.api.limits import Limits
from chatserve.api.socket_connection import SocketConnection

try:
    import resource
except ImportError:  # Windows
    resource = None

# More than any --host needs; the hard limit may be in the millions.
_DESCRIPTORS_WANTED = 32_768
_DESCRIPTORS_UNKNOWN = 1_024


class Drain(Protocol):
    """What the wiring floor does when the process is asked to end."""

    @property
    def busy(self) -> bool:
        """Something runs that no open request shows: replies of chats whose viewers are away."""
        ...

    def begin(self) -> None:
        """Refuse new work; `/ready` turns red."""
        ...

    def expire(self) -> None:
        """End the replies that still run, each with its final event."""
        ...


def descriptor_limit() -> int:
    """Raise the number of descriptors this process may open as far as it is allowed; give it."""
    if resource is None:
        return _DESCRIPTORS_UNKNOWN
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS_WANTED if hard == resource.RLIM_INFINITY else hard
    wanted = min(wanted, _DESCRIPTORS_WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):
            return soft
        return wanted
    return wanted if soft == resource.RLIM_INFINITY else soft


def server_config(
    app: ASGIApp, limits: Limits, *, host: str = "127.0.0.1", port: int = 8000
) -> uvicorn.Config:
    """uvicorn's settings, all of those that matter given here and none left to its environment."""
    protocol = functools.partial(Connection, limits=limits)
    socket_protocol = functools.partial(
        SocketConnection, limits=limits, budget=BodyBudget(limits.body_bytes_total_max)
    )
    return uvicorn.Config(
        cast(Any, app),
        host=host,
        port=port,
        http=cast(Any, protocol),
        ws=cast(Any, socket_protocol),
        ws_max_size=limits.body_bytes_max,
        ws_ping_interval=limits.socket_ping_seconds,
        ws_ping_timeout=limits.socket_pong_seconds,
        # 64 KiB and more a socket, for texts of a few bytes.
        ws_per_message_deflate=False,
        lifespan="on",
        workers=1,
        log_config=None,
        access_log=False,
        # Addresses in headers are a client's word; sign-ins are limited by the real one.
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=int(limits.idle_seconds),
        timeout_graceful_shutdown=limits.farewell_seconds,
        h11_max_incomplete_event_size=limits.head_bytes_max,
    )


class Server(uvicorn.Server):
    """uvicorn's server with the drain described above."""

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        drain: Drain,
        shutdown_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(config)
        self._drain = drain
        self._shutdown_seconds = shutdown_seconds
        self._clock = clock
        self._signals = 0
        self._drain_until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal's handler: only counts; the loop's next tick acts.

        The signal is not raised again after the end, as uvicorn would do: a drained process has
        done what it was asked and exits with status 0.
        """
        self._signals += 1
        if not self.started:
            self.should_exit = True  # nothing is served yet, so nothing is waited for
        if self._signals > 2:
            self.should_exit = True
            self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second; True ends the main loop."""
        if await super().on_tick(counter):
            return True
        if not self._signals:
            return False
        if self._drain_until is None:
            self._drain_until = self._clock() + self._shutdown_seconds
            self._drain.begin()
        for connection in list(self.server_state.connections):
            if isinstance(connection, SocketConnection):
                connection.drain()
        patient = self._signals == 1 and self._clock() < self._drain_until
        if (self.server_state.tasks or self._drain.busy) and patient:
            return False
        self._drain.expire()
        self.should_exit = True
        return True
