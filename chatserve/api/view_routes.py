"""What an admin sees of the cache, under `/admin/cache`. The door wants an admin's key.

    GET pages    what every page of memory is now, a byte a page

It may not know what a page is: the answers are made by whoever has them.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

_PATH = "/admin/cache"


class CacheViews(Protocol):
    """Where the answers come from. Nothing is changed by any of them."""

    def pages(self) -> Mapping[str, object]:
        """Each tier of memory as one string, and how it is read."""
        ...


def view_routes(find: Callable[[], CacheViews]) -> list[BaseRoute]:
    """find: raises Unavailable while the model is loading."""

    async def pages(request: Request) -> Response:
        return _json(find().pages())

    return [Route(f"{_PATH}/pages", pages, methods=["GET"])]


def _json(value: Mapping[str, object]) -> Response:
    return Response(
        orjson.dumps(value),
        media_type="application/json",
        headers={"Cache-Control": "no-store"},
    )
