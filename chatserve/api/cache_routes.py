"""What an admin does to the cache: `POST /admin/cache/flush`. The door wants an admin's key.

Actions pass through the engine's loop, as everything does that changes pages.
"""

from collections.abc import Callable

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

Flush = Callable[[], int]


def cache_routes(flush: Flush) -> list[BaseRoute]:
    """flush: empties the device of pages that nobody owns; how many. Raises Unavailable."""

    async def flush_device(request: Request) -> Response:
        return Response(orjson.dumps({"pages": flush()}), media_type="application/json")

    return [Route("/admin/cache/flush", flush_device, methods=["POST"])]
