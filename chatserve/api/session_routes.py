"""`POST /api/session` exchanges a key for a cookie, so that the page need not keep the key.

The only route that takes a key in its body, and therefore limited in attempts by address. `GET`
tells who one is signed in as, null where that is nobody: a page asks before anything that needs a
key. `DELETE` signs out.
"""

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from chatserve.api.body import BodyBudget, decode_object, read_body
from chatserve.api.gate import RateLimit
from chatserve.api.keys import LOCAL_HOLDER, Holder, KeyRing
from chatserve.api.security import session_cookie
from chatserve.api.session import COOKIE_NAME, Sessions
from chatserve.errors import RequestError, Unauthorized

_BODY_BYTES_MAX = 4_096  # a key and a few quotes


def session_routes(
    keys: KeyRing, sessions: Sessions, attempts: RateLimit, budget: BodyBudget
) -> list[BaseRoute]:
    """Sign in and out, and who is signed in."""

    async def tell(request: Request) -> Response:
        holder: Holder | None = request.scope["state"]["holder"]
        return _signed_in(holder)

    async def begin(request: Request) -> Response:
        attempts.take(request.client.host if request.client else "")
        with budget.lease() as lease:
            body = await read_body(
                request.headers, request.receive, lease=lease, limit=_BODY_BYTES_MAX
            )
        key = decode_object(body).get("key")
        if not isinstance(key, str):
            raise RequestError("The key is missing.", param="key")
        if not keys:
            return _signed_in(LOCAL_HOLDER)
        holder = keys.find(key)
        if holder is None:
            raise Unauthorized("The API key is wrong.")
        response = _signed_in(holder)
        response.set_cookie(
            COOKIE_NAME,
            sessions.issue(holder),
            max_age=sessions.seconds,
            httponly=True,
            samesite="strict",
            secure=_over_tls(request),
        )
        return response

    async def end(request: Request) -> Response:
        cookie = session_cookie(request.headers)
        if cookie:
            sessions.end(cookie)
        response = Response(status_code=204)
        response.delete_cookie(
            COOKIE_NAME, httponly=True, samesite="strict", secure=_over_tls(request)
        )
        return response

    return [
        Route("/api/session", tell, methods=["GET"]),
        Route("/api/session", begin, methods=["POST"]),
        Route("/api/session", end, methods=["DELETE"]),
    ]


def _signed_in(holder: Holder | None) -> Response:
    shown: dict[str, str | None] = {"name": None, "role": None}
    if holder is not None:
        shown = {"name": holder.name, "role": "admin" if holder.admin else "user"}
    return Response(
        orjson.dumps(shown), media_type="application/json", headers={"Cache-Control": "no-store"}
    )


def _over_tls(request: Request) -> bool:
    # A TLS proxy talks plain HTTP to us, but the page's Origin says how the browser came.
    return request.url.scheme == "https" or request.headers.get("origin", "").startswith("https:")
