"""What an admin does to the cache: `POST /admin/cache/flush`. The door wants an admin's key.

Actions pass through the engine's loop, as everything does that changes pages.
"""

from collections.abc import Callable, Mapping

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

Flush = Callable[[], Mapping[str, int]]


def cache_routes(flush: Flush) -> list[BaseRoute]:
    """flush: empties memory of pages that nobody owns; how many of which memory. Raises
    Unavailable."""

    async def flush_memory(request: Request) -> Response:
        return Response(orjson.dumps(flush()), media_type="application/json")

    return [Route("/admin/cache/flush", flush_memory, methods=["POST"])]
