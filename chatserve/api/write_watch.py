"""Notices a peer that does not take what we say to it, and ends the connection.

It may not know a protocol. Theory of operation: from the moment that bytes wait in our process
(the transport says so: its high water mark is 0) until none does, the amount is looked at twice in
`write_seconds`; a peer that took too little meanwhile is aborted, because `close` would wait for
that same peer to read.
"""

import asyncio

from chatserve.api.limits import Limits


class WriteWatch:
    """One per connection; `begin` at pause_writing, `end` at resume_writing and at its loss."""

    def __init__(self, transport: asyncio.Transport, limits: Limits) -> None:
        self._transport = transport
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        transport.set_write_buffer_limits(high=0)

    def begin(self) -> None:
        """Bytes wait for the peer."""
        if self._timer is None:
            self._look_later()

    def end(self) -> None:
        """No byte does."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_later(self) -> None:
        self._timer = self._loop.call_later(
            self._limits.write_seconds / 2, self._look, self._transport.get_write_buffer_size()
        )

    def _look(self, waiting_before: int) -> None:
        taken = waiting_before - self._transport.get_write_buffer_size()
        if taken < self._limits.write_bytes_min:
            self._transport.abort()
        else:
            self._look_later()
