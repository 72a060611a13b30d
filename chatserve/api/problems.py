"""Turns errors into OpenAI's wire shape; the only place that does.

`{"error": {"message", "type", "param", "code"}}`, as a JSON response or as an event of a stream
that has begun. Messages come from the error tree, so they hold no prompt text and no keys.
"""

import math

import orjson
from starlette.exceptions import HTTPException
from starlette.responses import Response

from chatserve.errors import (
    ChatserveError,
    MethodNotAllowed,
    NotFound,
    RequestError,
    TooLarge,
    Unavailable,
)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
_WITH_RETRY_AFTER = (429, 503)
_RETRY_AFTER_SECONDS = 1.0


class ModelNotFound(NotFound):
    """A model name that is not the served one."""

    code = "model_not_found"


class ApiError(ChatserveError):
    """Our own fault, told without details; those are in the log."""


def problem(error: ChatserveError) -> dict[str, object]:
    """The error object, ready for JSON."""
    kind = _TYPES.get(error.status)
    if kind is None:
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
    body: dict[str, object] = {
        "message": error.message,
        "type": kind,
        "param": error.param,
        "code": error.code,
    }
    return {"error": body}


def problem_response(error: ChatserveError, headers: dict[str, str] | None = None) -> Response:
    """The error as a JSON response, with Retry-After where coming back makes sense."""
    all_headers = dict(headers or {})
    if error.status in _WITH_RETRY_AFTER:
        seconds = error.retry_after if error.retry_after is not None else _RETRY_AFTER_SECONDS
        all_headers["Retry-After"] = str(max(1, math.ceil(seconds)))
    if error.status == 401:
        all_headers["WWW-Authenticate"] = "Bearer"
    return Response(
        orjson.dumps(problem(error)),
        status_code=error.status,
        headers=all_headers,
        media_type="application/json",
    )


def from_http_exception(exception: HTTPException) -> ChatserveError:
    """The router's own refusals, as members of our tree."""
    match exception.status_code:
        case 404:
            return NotFound("No such route.")
        case 405:
            return MethodNotAllowed("This route does not know that method.")
        case 413:
            return TooLarge("The body is too large.")
        case 503:
            return Unavailable("The server is not available.")
        case status if status < 500:
            return RequestError("The request is not valid.")
        case _:
            return ApiError("The server made a mistake.")
