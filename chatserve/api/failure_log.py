"""FailureLog: what the log says about requests that ended in a fault of ours.

It may not know what a request says. Theory of operation: a failure that nobody expects is one
line with its traceback, without the exception's own text, which might quote a prompt. `Unavailable`
is expected: the store is away, the server is loading or going. Nothing in a traceback would tell
more than its message, and while it lasts every request meets it. So there is one line at the
first of a kind, that is of a route and a reason, and then as long as more of it come a count:

    unavailable ─▶ line ┄┄ 10 s ┄┄▶ line: 812 times ┄┄ 10 s ┄┄▶ nothing more: the kind is forgotten
"""

import asyncio
import logging
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import orjson
from starlette.types import Scope

from chatserve.errors import Unavailable

ERROR_LOGGER = "chatserve.error"
PATH_LENGTH_MAX = 200
COUNT_SECONDS = 10.0  # an outage of a day is some 8,600 lines of a kind
KINDS_MAX = 64  # routes times reasons, several times over; more are counted as one

_errors = logging.getLogger(ERROR_LOGGER)

Later = Callable[[float, Callable[[], None]], object]


@dataclass(frozen=True, slots=True)
class _Kind:
    route: str
    reason: str


_OTHERS = _Kind("others", "others")


class FailureLog:
    """One per app, on the event loop. later: as the loop's `call_later`, which is the default."""

    def __init__(self, later: Later | None = None) -> None:
        self._later = later
        self._counts: dict[_Kind, int] = {}  # since the last line; a timer runs for each

    def note(self, scope: Scope, error: BaseException) -> None:
        """A request's failure."""
        if not isinstance(error, Unavailable):
            _errors.error(orjson.dumps(_failure_line(scope, error)).decode())
            return
        kind = _Kind(_route(scope), error.message)
        if kind not in self._counts and len(self._counts) >= KINDS_MAX:
            kind = _OTHERS
        if kind in self._counts:
            self._counts[kind] += 1
            return
        self._counts[kind] = 0
        self._count_on(kind)
        _warn(kind, {"request": scope["state"]["request_id"]})

    def _count_on(self, kind: _Kind) -> None:
        later = self._later or asyncio.get_running_loop().call_later
        later(COUNT_SECONDS, lambda: self._tell(kind))

    def _tell(self, kind: _Kind) -> None:
        count = self._counts.pop(kind)
        if count:
            self._counts[kind] = 0
            self._count_on(kind)
            _warn(kind, {"times": count, "seconds": COUNT_SECONDS})


def log_failure(scope: Scope, error: BaseException) -> None:
    """Note a failure of a request in the log of its app."""
    failures: FailureLog = scope["state"]["failures"]
    failures.note(scope, error)


def _warn(kind: _Kind, more: dict[str, object]) -> None:
    line: dict[str, object] = {"event": "unavailable", "route": kind.route, "reason": kind.reason}
    _errors.warning(orjson.dumps(line | more).decode())


def _route(scope: Scope) -> str:
    """The path, with the names of its parts that differ from request to request."""
    names = {str(value): f"{{{name}}}" for name, value in scope.get("path_params", {}).items()}
    path: str = scope["path"]
    parts = [names.get(part, part) for part in path.split("/")]
    return f"{scope.get('method', 'GET')} {'/'.join(parts)}"[:PATH_LENGTH_MAX]


def _failure_line(scope: Scope, error: BaseException) -> dict[str, object]:
    frames = [
        f"{frame.filename.rpartition('chatserve/')[2]}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    return {
        "event": "failure",
        "request": scope["state"]["request_id"],
        "path": scope["path"][:PATH_LENGTH_MAX],
        "error": type(error).__name__,
        "traceback": frames,
    }
