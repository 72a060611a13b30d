"""The minimal chat page: three static files, read once, without any data in them."""

import hashlib
from collections.abc import Awaitable, Callable
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/chat.js": ("chat.js", "text/javascript; charset=utf-8"),
}

STATIC_PATHS = frozenset(_FILES)


def page_routes() -> list[BaseRoute]:
    """The page and what it loads."""
    return [Route(path, _static(*named), methods=["GET"]) for path, named in _FILES.items()]


def _static(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    content = files("chatserve.api").joinpath("page", name).read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {
        "ETag": tag,
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
    }

    async def serve(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return serve
