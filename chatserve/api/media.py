"""Refusals for what a body is made of, and that a path or a method that is not there goes first.

They know no route by name. `Uncoded` stands inside the door (`security.py`), `RouteFirst` around
it: who is told that the Content-Type is wrong would else look for his mistake in the body, where
no body of any kind is taken.
"""

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from chatserve.errors import MethodNotAllowed, NotFound, UnsupportedMedia

_PLAIN = frozenset({"", "identity"})


class Uncoded:
    """ASGI middleware: bodies come as they are. One that says that it is compressed is refused by
    that name, not as broken JSON."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        if scope["type"] == "http" and has_body:
            for coding in ",".join(headers.getlist("content-encoding")).split(","):
                if coding.strip().lower() not in _PLAIN:
                    shown = coding.strip()[:40]
                    raise UnsupportedMedia(
                        f"The Content-Encoding {shown!r} is not supported: send the body as it is."
                    )
        await self._app(scope, receive, send)


class RouteFirst:
    """ASGI middleware: turns UnsupportedMedia into NotFound or MethodNotAllowed (with Allow) where
    the body does not matter. The door has let the asker in by then, so nothing is told to others.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except UnsupportedMedia:
            site: Starlette = scope["app"]
            found = [(route.matches(scope)[0], route) for route in site.router.routes]
            if any(match is Match.FULL for match, _ in found):
                raise
            allowed: set[str] = set()
            for match, route in found:
                if match is Match.PARTIAL and isinstance(route, Route):
                    allowed |= route.methods or set()
            if not allowed:
                raise NotFound("No such route.") from None
            # The access log answers what is raised, with the headers that the door left there.
            scope["state"]["answer_headers"] |= {"Allow": ", ".join(sorted(allowed))}
            raise MethodNotAllowed("This route does not know that method.") from None
