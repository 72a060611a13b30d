"""The outermost layer: gives each request an id, answers every error, and writes one log line.

It may not know what a request says: the log holds the id, the tenant, the route's path, the
status and durations, never a body, a query or a key. Theory of operation: ASGI messages pass
through and are watched for the status and for the end of the body; whatever exception comes up is
turned into OpenAI's shape if nothing was sent yet, else the connection is closed. A WebSocket is
one request, from its handshake (whose refusal is an HTTP answer) to its end. What the log says of
a failure is `failure_log.py`'s matter.
"""

import contextlib
import logging
import secrets
import time
from collections.abc import Callable

import orjson
from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatserve.api.body import ClientGone
from chatserve.api.failure_log import PATH_LENGTH_MAX, FailureLog
from chatserve.api.problems import ApiError, problem_response
from chatserve.errors import ChatserveError

ACCESS_LOGGER = "chatserve.access"

_UNLOGGED_PATHS = frozenset({"/health", "/ready"})
_SWITCHING_STATUS = 101
_INTERNAL_ERROR_CODE = 1011
_GONE_STATUS = 499  # as proxies log a client that left before the answer began

_access = logging.getLogger(ACCESS_LOGGER)


class Watched:
    """One answer on its way out."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.status: int | None = None
        self.begun_at: float | None = None
        self.complete = False

    async def send(self, message: Message) -> None:
        """Pass a message on, and note what it means."""
        kind = message["type"]
        if kind == "websocket.send" or (
            kind == "http.response.body" and message.get("more_body", False)
        ):
            await self._send(message)  # a part of many, of which nothing is noted
            return
        kind = kind.removeprefix("websocket.")
        if kind in ("http.response.start", "accept"):
            self.status = message.get("status", _SWITCHING_STATUS)
            self.begun_at = time.monotonic()
            message.setdefault("headers", [])
            MutableHeaders(scope=message)["X-Request-Id"] = self._request_id
        await self._send(message)
        if kind in ("http.response.body", "close"):
            self.complete = True


class AccessLog:
    """ASGI middleware; the outermost one."""

    def __init__(
        self, app: ASGIApp, *, on_answer: Callable[[str, int], None] = lambda path, status: None
    ) -> None:
        self._app = app
        self._on_answer = on_answer
        self._failures = FailureLog()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        request_id = secrets.token_hex(12)
        scope.setdefault("state", {})["request_id"] = request_id
        scope["state"]["failures"] = self._failures
        watched = Watched(send, request_id)
        try:
            response = await self._answered(scope, receive, watched)
            if response is not None:
                for name, value in scope["state"].get("answer_headers", {}).items():
                    response.headers[name] = value
                await response(scope, receive, watched.send)
        finally:
            self._note(scope, watched, began)

    async def _answered(self, scope: Scope, receive: Receive, watched: Watched) -> Response | None:
        """Run the app; the response for what it raised, if there is one to send."""
        try:
            await self._app(scope, receive, watched.send)
        except ClientGone:
            return None
        except ChatserveError as error:
            if error.status >= 500:
                self._failures.note(scope, error)
            if watched.status is None:
                return problem_response(error)
            await _break_off(scope, watched)
        except Exception as error:
            if isinstance(error, OSError) and scope["type"] == "websocket":
                return None  # as the server says that the peer has gone
            self._failures.note(scope, error)
            if watched.status is None:
                return problem_response(ApiError("The server made a mistake; see its log."))
            await _break_off(scope, watched)
        return None

    def _note(self, scope: Scope, watched: Watched, began: float) -> None:
        path = scope["path"]
        status = watched.status or _GONE_STATUS
        self._on_answer(path, status)
        if path in _UNLOGGED_PATHS:
            return
        now = time.monotonic()
        holder = scope["state"].get("holder")
        first = None if watched.begun_at is None else round(watched.begun_at - began, 6)
        line = {
            "event": "request",
            "request": scope["state"]["request_id"],
            "tenant": None if holder is None else holder.name,
            "method": scope.get("method", "GET"),
            "path": path[:PATH_LENGTH_MAX],
            "status": status,
            "complete": watched.complete,
            "seconds_to_head": first,
            "seconds": round(now - began, 6),
        }
        _access.info(orjson.dumps(line).decode())


async def _break_off(scope: Scope, watched: Watched) -> None:
    """End an answer that cannot be completed."""
    if scope["type"] == "http":
        raise _Broken from None
    with contextlib.suppress(OSError):
        await watched.send({"type": "websocket.close", "code": _INTERNAL_ERROR_CODE})


class _Broken(Exception):
    """The answer broke after its head was sent; the connection layer closes the connection."""
