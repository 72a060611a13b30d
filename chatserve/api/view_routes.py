"""What an admin sees of the cache, under `/admin/cache`. The door wants an admin's key.

    GET pages            what every page of memory is now, a byte a page
    GET conversations    whose they are: the latest first, and where the pages of each are;
                         ?limit and ?after as of the list of one's own
    GET prefixes         what more than one request uses, as a tree, and what that saves; ?limit

What is said in a conversation, its title too, is its owner's alone and not told here.
It may not know what a page is: the answers are made by whoever has them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from chatserve.api.chat_schema import page_query
from chatserve.api.keys import KeyRing
from chatserve.api.limits import Limits

_PATH = "/admin/cache"


class CacheViews(Protocol):
    """Where the answers come from. Nothing is changed by any of them."""

    def pages(self) -> Mapping[str, object]:
        """Each tier of memory as one string, and how it is read."""
        ...

    async def conversations(
        self, owners: Sequence[str], *, limit: int, after: str | None
    ) -> Mapping[str, object]:
        """The latest ones of these owners. Raises RequestError for what is no cursor, and
        Unavailable."""
        ...

    async def prefixes(self, *, limit: int) -> Mapping[str, object]:
        """The shared prefixes that save most, no more than so many."""
        ...


def view_routes(limits: Limits, keys: KeyRing, find: Callable[[], CacheViews]) -> list[BaseRoute]:
    """keys: whose conversations are shown. find: raises Unavailable while the model is loading."""

    async def pages(request: Request) -> Response:
        return _json(find().pages())

    async def conversations(request: Request) -> Response:
        after, limit, _ = page_query(request.query_params, limits)
        return _json(await find().conversations(keys.tenants, limit=limit, after=after))

    async def prefixes(request: Request) -> Response:
        _, limit, _ = page_query(request.query_params, limits)
        return _json(await find().prefixes(limit=limit))

    return [
        Route(f"{_PATH}/prefixes", prefixes, methods=["GET"]),
        Route(f"{_PATH}/pages", pages, methods=["GET"]),
        Route(f"{_PATH}/conversations", conversations, methods=["GET"]),
    ]


def _json(value: Mapping[str, object]) -> Response:
    return Response(
        orjson.dumps(value),
        media_type="application/json",
        headers={"Cache-Control": "no-store"},
    )
