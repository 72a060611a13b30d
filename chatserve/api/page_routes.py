"""The chat page and the admin page: static files, read once, without any data in them.

They are built from `web/`.

Theory of operation: names under `assets/` hold a hash of what is in them, so a browser may keep
those for ever and asks for nothing but `/` again, with its ETag. Each text is compressed once,
here, since what a page weighs is what a new user waits for.
"""

import gzip
import hashlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

_FOLDER = files("chatserve.api").joinpath("page")
_ENTRIES = {"index.html": "/", "admin.html": "/admin"}
_ASSETS = "assets"
_MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
}
_FOR_EVER = "public, max-age=31536000, immutable"


@dataclass(frozen=True, slots=True)
class StaticFile:
    """One file as it is served: its path in URLs, and what goes out."""

    path: str
    content: bytes
    media_type: str
    caching: str

    @property
    def tag(self) -> str:
        """What an ETag has between its quotes."""
        return hashlib.sha256(self.content).hexdigest()[:32]


def _found() -> Iterator[StaticFile]:
    for name, path in _ENTRIES.items():
        yield _file(_FOLDER.joinpath(name), path, "no-cache")
    for each in sorted(_FOLDER.joinpath(_ASSETS).iterdir(), key=lambda one: one.name):
        yield _file(each, f"/{_ASSETS}/{each.name}", _FOR_EVER)


def _file(source: Traversable, path: str, caching: str) -> StaticFile:
    return StaticFile(
        path, source.read_bytes(), _MEDIA_TYPES[source.name.rpartition(".")[2]], caching
    )


_FILES = tuple(_found())

STATIC_PATHS = frozenset(each.path for each in _FILES)


def page_routes() -> list[BaseRoute]:
    """The pages and what they load."""
    return [Route(each.path, _static(each), methods=["GET"]) for each in _FILES]


def _static(served: StaticFile) -> Callable[[Request], Awaitable[Response]]:
    packed = gzip.compress(served.content, 9, mtime=0)
    common = {
        "Cache-Control": served.caching,
        "Cross-Origin-Opener-Policy": "same-origin",
        "Vary": "Accept-Encoding",
    }
    # Two representations, so two tags.
    plain_tag, packed_tag = f'"{served.tag}"', f'"{served.tag}-gzip"'
    plain = common | {"ETag": plain_tag}
    compressed = common | {"ETag": packed_tag}

    async def serve(request: Request) -> Response:
        small = _takes_gzip(request.headers.get("accept-encoding", ""))
        headers, tag = (compressed, packed_tag) if small else (plain, plain_tag)
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        if small:
            headers = headers | {"Content-Encoding": "gzip"}
        return Response(
            packed if small else served.content, media_type=served.media_type, headers=headers
        )

    return serve


def _takes_gzip(accepted: str) -> bool:
    for each in accepted.split(","):
        coding, _, weight = each.partition(";")
        if coding.strip().lower() in ("gzip", "*"):
            return weight.replace(" ", "").lower().rstrip("0") not in ("q=", "q=.", "q=0.")
    return False
