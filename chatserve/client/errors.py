"""Every error that the client raises on purpose, as one tree.

    ChatError            status, code, message, param, retry_after
    ├── Refused          the server's answer to what was asked: 4xx or 5xx
    ├── ReplyFailed      the reply ended with `failed`; what it said before is in its `text`
    ├── TextReplaced     text that was given to the reader is not the reply's text any more
    ├── Unreachable      nobody answered for as long as the limits allow
    ├── BrokenProtocol   whoever answered does not speak as chatserve does
    └── ClientClosed     the client was closed while somebody waited

`status` is an HTTP status, or None where the error is not the server's. `retry_after` is in
seconds, or None where coming back makes no sense.
"""

import chatserve.errors
from chatserve.errors import ChatserveError

STATUS_UNKNOWN = 500


class ChatError(Exception):
    """Root of the tree. `code` is stable and machine-readable."""

    def __init__(
        self,
        message: str,
        *,
        code: str,
        status: int | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.status = status
        self.param = param
        self.retry_after = retry_after


class Refused(ChatError):
    """The server's answer, by HTTP or by the socket."""


class ReplyFailed(ChatError):
    """The reply ended without being done."""


class TextReplaced(ChatError):
    """Raised once by an iteration over a reply's texts; the next one begins with the new text.

    A server that crashed says the lost part of a reply anew, and only where it comes out
    differently is this raised.
    """

    def __init__(self) -> None:
        super().__init__("The reply's text is another one now.", code="text_replaced")


class Unreachable(ChatError):
    """No server there, or none that answers."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message, code="unreachable", retry_after=retry_after)


class BrokenProtocol(ChatError):
    """An answer that means nothing to us."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="broken_protocol")


class ClientClosed(ChatError):
    """The client's block has ended."""

    def __init__(self) -> None:
        super().__init__("The client is closed.", code="client_closed")


def _tree(kind: type[ChatserveError]) -> list[type[ChatserveError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _tree(child))]


# A socket's frame says the code alone; of two errors with one code the tree's upper one counts.
_STATUSES = {
    kind.code: kind.status
    for kind in reversed(_tree(ChatserveError))
    if kind.__module__ == chatserve.errors.__name__
}


def status_of(code: str) -> int:
    """The HTTP status that goes with an error's code."""
    return _STATUSES.get(code, STATUS_UNKNOWN)
