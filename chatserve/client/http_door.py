"""HttpDoor: what is asked and answered in one piece. It may not know what is asked.

Theory of operation: one pool of connections; an answer is read up to a bound; whatever is not an
answer with a status under 400 is raised. Nothing is repeated: who asks knows whether that is safe.
"""

import json
from collections.abc import Mapping
from typing import Self

import httpx

from chatserve.client.errors import BrokenProtocol, Unreachable
from chatserve.client.limits import ClientLimits
from chatserve.client.wire import JsonObject, decoded, refusal_of_answer


class HttpDoor:
    """One per client; a context manager. proxy: the environment's."""

    def __init__(
        self, url: str, headers: Mapping[str, str], *, proxy: bool, limits: ClientLimits
    ) -> None:
        self._url = url
        self._limits = limits
        self._client = httpx.AsyncClient(
            base_url=url,
            headers=headers,
            trust_env=proxy,
            timeout=httpx.Timeout(limits.answer_seconds, connect=limits.connect_seconds),
            limits=httpx.Limits(
                max_connections=limits.connections_max,
                max_keepalive_connections=limits.connections_max,
            ),
        )

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def ask(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, object] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> JsonObject:
        """The answer's object; empty where it has no body. Raises ChatError."""
        content = None if body is None else json.dumps(body)
        headers = None if body is None else {"Content-Type": "application/json"}
        try:
            async with self._client.stream(
                method, path, content=content, headers=headers, params=query
            ) as answer:
                read = await self._read(answer)
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise Unreachable(f"Nothing answers at {self._url}: {_reason(error)}.") from error
        if answer.status_code >= 300:
            raise refusal_of_answer(answer.status_code, read, answer.headers.get("Retry-After"))
        return decoded(read) if read else {}

    async def _read(self, answer: httpx.Response) -> bytes:
        read = bytearray()
        async for piece in answer.aiter_bytes():
            read += piece
            if len(read) > self._limits.answer_bytes_max:
                raise BrokenProtocol("The server's answer is too large.")
        return bytes(read)


def _reason(error: httpx.HTTPError) -> str:
    match error:
        case httpx.ConnectTimeout() | httpx.ReadTimeout() | httpx.WriteTimeout():
            return "no answer in time"
        case httpx.ConnectError():
            return "connection refused" if "failed" in str(error) else str(error)
        case _:
            return str(error) or type(error).__name__
