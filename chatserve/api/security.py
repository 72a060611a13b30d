"""The door: decides for each request, by its path and headers alone, whether it may go on.

It may not know what any route does. Theory of operation, in this order, the first refusal wins:
the Host is ours (else a foreign page could reach us by DNS rebinding); the asker is known where
the path needs one (a bearer key, else the cookie); admin paths need an admin; what may change
state comes from our own page or from no page at all, and carries JSON. A WebSocket's handshake may
change state and carries nothing: browsers let any page open one, so its Origin is all there is.
`admit` is a plain function of the head; `Door` performs what it decides, adds the headers that
every answer has, and ends what goes on under a cookie with its session (`signed_in.py`).
"""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatserve.api.keys import LOCAL_HOLDER, Holder, KeyRing
from chatserve.api.session import COOKIE_NAME, Sessions
from chatserve.api.signed_in import SignedIn
from chatserve.errors import Forbidden, Unauthorized, UnsupportedMedia

HANDSHAKE = "(handshake)"  # in the place of a method; no method is spelled like this
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_SESSION_PATH = "/api/session"
_WILDCARDS = frozenset({"", "0.0.0.0", "::"})

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the door goes by. hosts and origins are lower case; origins open `/v1` to pages."""

    keys: KeyRing
    sessions: Sessions
    hosts: frozenset[str]
    origins: frozenset[str]
    open_paths: frozenset[str]  # of static files; they hold no data

    @classmethod
    def of(
        cls,
        keys: KeyRing,
        sessions: Sessions,
        *,
        host: str,
        allowed_hosts: Iterable[str] = (),
        cors_origins: Iterable[str] = (),
        static_paths: Iterable[str] = (),
    ) -> "Policy":
        """The policy for the address listened to and the options given."""
        hosts = {"localhost", host.lower(), *(name.lower() for name in allowed_hosts)}
        return cls(
            keys=keys,
            sessions=sessions,
            hosts=frozenset(hosts - _WILDCARDS),
            origins=frozenset(origin.lower().rstrip("/") for origin in cors_origins),
            open_paths=frozenset({"/health", "/ready", *static_paths}),
        )


def admit(policy: Policy, method: str, path: str, headers: Headers) -> Holder | None:
    """Who may go on (None on paths that are open to all), or a Forbidden and the like."""
    if not _is_our_host(policy, headers.getlist("host")):
        raise Forbidden("This Host is not served here; see --allowed-host.")
    holder = None
    if not _is_open(policy, method, path, headers):
        holder = _authenticate(policy, headers)
        if _is_for_admins(path) and not holder.admin:
            raise Forbidden("This needs an admin's key.")
    if method not in _SAFE_METHODS:
        _check_origin(policy, path, headers)
        if method != HANDSHAKE:
            _check_media(method, headers)
    return holder


def _is_open(policy: Policy, method: str, path: str, headers: Headers) -> bool:
    if path != _SESSION_PATH:
        return path in policy.open_paths
    # Who signs in or out comes without a key, or with one that has ended. Who asks whether he is
    # signed in may be nobody; but a key that is shown is a claim.
    asks = method in _SAFE_METHODS
    return not asks or ("authorization" not in headers and _signed_in(policy, headers) is None)


def _is_for_admins(path: str) -> bool:
    """Metrics too: the cache's counters would tell one tenant of another's hits."""
    return path in ("/admin", "/metrics") or path.startswith("/admin/")


def _is_our_host(policy: Policy, values: list[str]) -> bool:
    if len(values) != 1:
        return False
    try:
        name = urlsplit(f"//{values[0]}").hostname or ""
    except ValueError:
        return False
    if name in policy.hosts:
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _authenticate(policy: Policy, headers: Headers) -> Holder:
    if not policy.keys:
        return LOCAL_HOLDER
    given = headers.get("authorization")
    if given is not None:
        scheme, _, key = given.partition(" ")
        holder = policy.keys.find(key.strip()) if scheme.lower() == "bearer" else None
        if holder is None:
            raise Unauthorized("The API key is wrong.")
        return holder
    holder = _signed_in(policy, headers)
    if holder is None:
        raise Unauthorized("This needs an API key: Authorization: Bearer KEY.")
    return holder


def _signed_in(policy: Policy, headers: Headers) -> Holder | None:
    """Whose cookie it is; everybody is the local holder where there are no keys."""
    if not policy.keys:
        return LOCAL_HOLDER
    cookie = session_cookie(headers)
    return policy.sessions.find(cookie) if cookie else None


def _signed_in_by(policy: Policy, headers: Headers) -> str | None:
    """The cookie that a request was admitted by, if it was by one."""
    return session_cookie(headers) if policy.keys and "authorization" not in headers else None


def session_cookie(headers: Headers) -> str | None:
    """The value of our cookie, if there is one."""
    return cookie_parser(headers.get("cookie", "")).get(COOKIE_NAME)


def _check_origin(policy: Policy, path: str, headers: Headers) -> None:
    origins = headers.getlist("origin")
    if not origins:
        return  # not a browser's cross-site request: browsers always say where those come from
    if len(origins) > 1:
        raise Forbidden("Requests from other sites are refused.")
    origin = origins[0].lower()
    if path.startswith("/v1/") and origin in policy.origins:
        return
    # The scheme is left out: behind a TLS proxy we only see http.
    scheme, _, authority = origin.partition("://")
    if scheme not in ("http", "https") or authority != headers.get("host", "").lower():
        raise Forbidden("Requests from other sites are refused.")


def _check_media(method: str, headers: Headers) -> None:
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    if method == "DELETE" and not has_body:
        return
    kind, *parameters = [
        part.strip().lower() for part in headers.get("content-type", "").split(";")
    ]
    charsets = [part for part in parameters if part.startswith("charset=")]
    if kind != "application/json" or any(
        part.removeprefix("charset=").strip('"') not in ("utf-8", "utf8") for part in charsets
    ):
        raise UnsupportedMedia("The Content-Type must be application/json, in UTF-8.")


class Door:
    """ASGI middleware that performs what `admit` decides."""

    def __init__(self, app: ASGIApp, *, policy: Policy) -> None:
        self._app = app
        self._policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        method, path = scope.get("method", HANDSHAKE), scope["path"]
        shared = self._cross_origin(path, headers)

        async def send_with_headers(message: Message) -> None:
            if message["type"].removeprefix("websocket.") == "http.response.start":
                answer = MutableHeaders(scope=message)
                for name, value in (_HEADERS | shared).items():
                    answer[name] = value
            await send(message)

        scope.setdefault("state", {})["answer_headers"] = _HEADERS | shared
        if method == "OPTIONS" and shared:
            # A preflight comes without the key; it reveals nothing and changes nothing.
            await Response(status_code=204, headers=_preflight())(scope, receive, send_with_headers)
            return
        holder = admit(self._policy, method, path, headers)
        scope["state"]["holder"] = holder
        cookie = None if holder is None else _signed_in_by(self._policy, headers)
        if cookie is None:
            await self._app(scope, receive, send_with_headers)
        else:
            signed_in = SignedIn(send_with_headers, self._policy.sessions, cookie)
            await signed_in.run(self._app, scope, receive)

    def _cross_origin(self, path: str, headers: Headers) -> dict[str, str]:
        """What tells a browser that an allowed page may read this answer."""
        origin = headers.get("origin", "").lower()
        if not path.startswith("/v1/") or origin not in self._policy.origins:
            return {}
        return {"Access-Control-Allow-Origin": headers["origin"], "Vary": "Origin"}


def _preflight() -> dict[str, str]:
    return {
        "Access-Control-Allow-Methods": "GET, POST",
        # The wildcard does not cover Authorization.
        "Access-Control-Allow-Headers": "authorization, *",
        "Access-Control-Max-Age": "600",
    }
