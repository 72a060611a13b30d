"""`GET /admin/cache/events`: what moves in the server, as server-sent events, for an admin.

    event: history   {"columns": [...], "rows": [[...], ...]}    the last five minutes, as far as
                     somebody looked, oldest first; several where they are long, one at the least;
                     later: what a viewer that was slow has not seen
    event: sample    {column: value, ...}                        once a second

Theory of operation: as of a reply's events (`chat_routes.py`): the stream lasts as long as its
viewer is there, and owns nothing. It ends within a second when the server drains, which waits for
streams; who comes back finds another server, or none.
"""

from collections.abc import AsyncIterator, Sequence

from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from chatserve.api import sse
from chatserve.api.answer import Desk
from chatserve.api.event_stream import EventStream
from chatserve.api.keys import Holder
from chatserve.api.presence import never, unless_gone
from chatserve.api.sampler import Sampler
from chatserve.api.samples import COLUMNS, Row

ROWS_MAX = 75  # of one event: a stalled reader may have 64 KiB waiting in the process


def sample_routes(desk: Desk, sampler: Sampler) -> list[BaseRoute]:
    """The one route."""
    endpoint = SamplesEndpoint(desk, sampler)
    return [Route("/admin/cache/events", endpoint, methods=["GET"])]


class SamplesEndpoint:
    """An ASGI app."""

    def __init__(self, desk: Desk, sampler: Sampler) -> None:
        self._desk = desk
        self._sampler = sampler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        desk = self._desk
        holder: Holder = scope["state"]["holder"]
        with desk.gate.enter(holder.name, holder.requests_max or desk.limits.connections_max):
            response = EventStream(self._frames(), desk.limits)
            await unless_gone(receive, response(scope, never, send))

    async def _frames(self) -> AsyncIterator[bytes]:
        sampler = self._sampler
        seen = sampler.taken
        for piece in _histories(sampler.since(0)):
            yield piece
        while not self._desk.health.draining:
            await sampler.wait(seen)
            rows, seen = sampler.since(seen), sampler.taken
            if len(rows) == 1:
                yield b"event: sample\n" + sse.frame(dict(zip(COLUMNS, rows[0], strict=True)))
            else:
                for piece in _histories(rows):
                    yield piece


def _histories(rows: Sequence[Row]) -> list[bytes]:
    return [
        b"event: history\n"
        + sse.frame({"columns": COLUMNS, "rows": rows[place : place + ROWS_MAX]})
        for place in range(0, len(rows) or 1, ROWS_MAX)
    ]
