"""A client of conversations, for tests of a real server: turns sent, replies watched."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

WAIT_SECONDS_MAX = 30.0  # for anything that must happen

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that was not met. retry_after: the header."""

    status: int
    code: str
    retry_after: str | None
    seconds: float


@dataclass
class Watched:
    """What one viewer has seen of a reply."""

    reply: str = ""
    turn: str = ""
    text: str = ""
    last_id: str = ""
    final: Json | None = None
    kind: str = ""
    news: asyncio.Condition = field(default_factory=asyncio.Condition)

    def take(self, kind: str, cursor: str, data: Json) -> None:
        """One event."""
        assert self.final is None, "an event after the final one"
        self.last_id = cursor or self.last_id
        match kind:
            case "accepted":
                self.reply, self.turn = str(data["reply"]), str(data["turn"])
            case "delta":
                self.text += str(data["text"])
                assert len(self.text) == data["seq"]
            case "snapshot":
                self.text = str(data["text"])
            case "done" | "failed":
                self.kind, self.final = kind, data
            case _:
                assert kind == "progress", kind

    async def until_longer(self, characters: int) -> None:
        """Wait for so many more characters, or the end."""
        goal = len(self.text) + characters
        await self._until(lambda: len(self.text) >= goal or self.final is not None)

    async def until_ended(self) -> None:
        """Wait for the final event."""
        await self._until(lambda: self.final is not None)

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_SECONDS_MAX), self.news:
            await self.news.wait_for(condition)


class ChatClient:
    """One key's view of one server."""

    def __init__(self, url: str, key: str | None = None) -> None:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.http = httpx.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=WAIT_SECONDS_MAX,
            limits=httpx.Limits(max_connections=None),
        )

    async def __aenter__(self) -> "ChatClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def new(self, **fields: object) -> str:
        """A conversation's id."""
        answer = await self.http.post("/api/conversations", json=fields)
        assert answer.status_code == 201, answer.text
        return answer.json()["id"]

    async def whole(self, conversation: str) -> Json:
        """With its turns."""
        answer = await self.http.get(f"/api/conversations/{conversation}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def stop(self, reply: str) -> None:
        """End a reply."""
        answer = await self.http.delete(f"/api/replies/{reply}")
        assert answer.status_code == 204, answer.text

    async def send(self, conversation: str, ask: str, **fields: object) -> Watched | Refusal:
        """Send a turn and watch its reply to the end."""
        seen = Watched()
        refusal = await self.watch(conversation, {"id": ask, "content": "Hello!"} | fields, seen)
        return refusal or seen

    async def watch(self, conversation: str, turn: Json, seen: Watched) -> Refusal | None:
        """Send a turn; its reply's events go where others can see them."""
        path, began = f"/api/conversations/{conversation}/turns", time.monotonic()
        async with (
            asyncio.timeout(WAIT_SECONDS_MAX),
            self.http.stream("POST", path, json=turn) as answer,
        ):
            if answer.status_code != 200:
                return await refusal_of(answer, began)
            await _read(answer, seen)
        return None

    async def resume(self, seen: Watched) -> int:
        """Go on where a viewer was cut off; the answer's status."""
        headers = {"Last-Event-ID": seen.last_id} if seen.last_id else {}
        path = f"/api/replies/{seen.reply}/events"
        async with self.http.stream("GET", path, headers=headers) as answer:
            if answer.status_code == 200:
                await _read(answer, seen)
            return answer.status_code

    @asynccontextmanager
    async def watching(
        self, conversation: str, ask: str, **fields: object
    ) -> "AsyncGenerator[Watched]":
        """A reply that has begun to speak, watched in a task; the block ends with its end."""
        seen = Watched()
        turn = {"id": ask, "content": "Tell a long story."} | fields
        task = asyncio.create_task(self.watch(conversation, turn, seen))
        try:
            await seen.until_longer(1)
            yield seen
            async with asyncio.timeout(WAIT_SECONDS_MAX):
                assert await task is None
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def refusal_of(answer: httpx.Response, began: float) -> Refusal:
    """A refused request's answer."""
    await answer.aread()
    return Refusal(
        status=answer.status_code,
        code=answer.json()["error"]["code"],
        retry_after=answer.headers.get("retry-after"),
        seconds=time.monotonic() - began,
    )


async def _read(answer: httpx.Response, seen: Watched) -> None:
    event = cursor = ""
    async for line in answer.aiter_lines():
        name, _, value = line.partition(": ")
        if name == "event":
            event = value
        elif name == "id":
            cursor = value
        elif name == "data":
            seen.take(event, cursor, json.loads(value))
            cursor = ""
            async with seen.news:
                seen.news.notify_all()
