"""An HTTP client that costs little, so that many of them can share cores with the server.

One connection, one request at a time, bodies of JSON. httpx spends several milliseconds a request
once its pool holds a hundred connections (it looks through them all), which is what would be
measured.
"""

import asyncio
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import h11
import orjson

READ_BYTES = 65_536


class LightClient:
    """A kept-alive connection: `async with LightClient(url) as client`."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._host, self._port = parts.hostname, parts.port

    async def __aenter__(self) -> Self:
        """Connect."""
        await self._connect()
        return self

    async def _connect(self) -> None:
        self._http = h11.Connection(h11.CLIENT)
        self._used = False
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connection."""
        self._writer.close()

    async def post(self, path: str, body: object) -> tuple[int, dict[str, str], Any]:
        """Status, headers in small letters, and the answer's JSON.

        A connection that was used before and breaks is made anew, once: servers close idle ones.
        Raises ConnectionError where the server closed instead of answering.
        """
        if self._used:
            try:
                return await self._post(path, body)
            except ConnectionError:
                self._writer.close()
                await self._connect()
        return await self._post(path, body)

    async def _post(self, path: str, body: object) -> tuple[int, dict[str, str], Any]:
        content = orjson.dumps(body)
        headers = [
            ("host", f"{self._host}:{self._port}"),
            ("content-type", "application/json"),
            ("content-length", str(len(content))),
        ]
        head = h11.Request(method="POST", target=path, headers=headers)
        out = [self._http.send(head), self._http.send(h11.Data(content))]
        out.append(self._http.send(h11.EndOfMessage()))
        self._writer.write(b"".join(part for part in out if part))
        answer = await self._event()
        if not isinstance(answer, h11.Response):
            raise ConnectionError(f"not an answer: {answer}")
        found: list[bytes] = []
        while not isinstance(event := await self._event(), h11.EndOfMessage):
            if not isinstance(event, h11.Data):
                raise ConnectionError(f"the answer broke off: {event}")
            found.append(bytes(event.data))
        self._http.start_next_cycle()
        self._used = True
        named = {name.decode(): value.decode() for name, value in answer.headers}
        return answer.status_code, named, orjson.loads(b"".join(found))

    async def _event(self) -> object:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            data = await self._reader.read(READ_BYTES)
            if not data:
                raise ConnectionError("the server closed the connection without an answer")
            self._http.receive_data(data)
        return event
