"""Reads a request's body within its limits and decodes its JSON.

Theory of operation: a declared length over the limit is refused before a byte is read; a chunked
body is counted as it comes. All bodies in memory count against one `BodyBudget`, taken and given
back by a `with` block, so many large bodies at once are refused as Busy instead of filling the
memory. What a refused peer still sends is thrown away by the connection, until its deadline.
"""

from types import TracebackType
from typing import Self, cast

import orjson
from starlette.datastructures import Headers
from starlette.types import Receive

from chatserve.errors import Busy, RequestError, TooLarge


class ClientGone(Exception):
    """The peer closed the connection before its request was whole: nobody is left to answer."""


class BodyBudget:
    """Bytes of request bodies that may be in memory at once."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.bytes_held = 0

    def lease(self) -> "BodyLease":
        """A share that grows with one body; give it back by leaving its `with` block."""
        return BodyLease(self)


class BodyLease:
    """One body's part of the budget."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._budget.bytes_held -= self._bytes
        self._bytes = 0

    def grow(self, count: int) -> None:
        """Take `count` bytes more, or raise Busy."""
        if self._budget.bytes_held + count > self._budget.bytes_max:
            raise Busy("Too many large requests at once.")
        self._budget.bytes_held += count
        self._bytes += count


async def read_body(headers: Headers, receive: Receive, *, lease: BodyLease, limit: int) -> bytes:
    """The whole body, at most `limit` bytes."""
    declared = headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > limit:
        raise TooLarge(f"The body may have at most {limit} bytes.")
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece = cast(bytes, message.get("body", b""))
        size += len(piece)
        if size > limit:
            raise TooLarge(f"The body may have at most {limit} bytes.")
        lease.grow(len(piece))
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)


def decode_object(body: bytes) -> dict[str, object]:
    """The body as a JSON object.

    orjson and not the standard library: it refuses NaN, numbers that overflow, lone surrogates
    and nesting deeper than 1,024.
    """
    try:
        value: object = orjson.loads(body)
    except orjson.JSONDecodeError:
        # The decoder's own words may quote the body, so they stay here.
        raise RequestError("The body is not valid JSON.") from None
    if not isinstance(value, dict):
        raise RequestError("The body must be a JSON object.")
    return cast(dict[str, object], value)
