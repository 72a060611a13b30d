"""What is typed at a real server's socket is there when it is sent."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Subprotocol

import chatserve
from chatserve.chat.conversations.history import History
from chatserve.chat.store.conversation import Role, Turn
from chatserve.chat.text.text_floor import read_text_floor
from tests.wiring.server import Server, running

MODEL = Path(chatserve.__file__).parent / "demonstration" / "model"
SYSTEM = "Be brief."
PAGE_TOKENS = 16
DEADLINE_SECONDS = 60.0
TEXT = "The lamp in the small room is green and the door to the garden is shut. " * 55


def prompt_tokens() -> int:
    """Of the turn, when it is sent."""
    history = History(read_text_floor(MODEL), context_length=4096, reserve=16)
    turn = Turn(id="t1", parent=None, role=Role.USER, text=TEXT, created=1.0)
    return len(history.prompt(SYSTEM, [turn]).tokens)


@asynccontextmanager
async def socket(server: Server) -> AsyncGenerator[ClientConnection]:
    url = server.url.replace("http", "ws", 1) + "/api/socket"
    subprotocols = [Subprotocol("chatserve.v1")]
    async with connect(url, subprotocols=subprotocols, max_size=None) as connection:
        yield connection


async def conversation(server: Server) -> str:
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
        made = await client.post("/api/conversations", json={"system": SYSTEM})
        return made.json()["id"]


async def tell(connection: ClientConnection, kind: str, **fields: object) -> None:
    frame = {"type": kind, "request": kind} | fields
    await connection.send(orjson.dumps(frame).decode())


async def sent(connection: ClientConnection, conversation: str) -> dict[str, Any]:
    """Send the text; the reply's final event."""
    turn = {"id": "t1", "content": TEXT, "max_tokens": 4, "temperature": 0}
    await tell(connection, "send", conversation=conversation, **turn)
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (event := orjson.loads(await connection.recv()))["event"] != "done":
            assert event["event"] != "failed", event
    return event


async def drafted(server: Server, tokens: int) -> None:
    """So many tokens are computed ahead."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while server.metric("chatserve_draft_tokens_total") < tokens:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    with running(tmp_path_factory.mktemp("drafts")) as started:
        yield started


async def test_of_a_typed_message_at_most_two_pages_are_computed_after_the_send(
    server: Server,
) -> None:
    name = await conversation(server)
    async with socket(server) as connection:
        await tell(connection, "focus", conversation=name)
        for end in range(0, len(TEXT) + 1, 400):
            await tell(connection, "draft", conversation=name, text=TEXT[:end])
        await tell(connection, "draft", conversation=name, text=TEXT)
        await drafted(server, (prompt_tokens() // PAGE_TOKENS - 1) * PAGE_TOKENS)
        done = await sent(connection, name)
    assert done["usage"]["prompt_tokens"] == prompt_tokens() > 800
    assert done["receipt"]["computed"] <= 2 * PAGE_TOKENS
    assert server.metric("chatserve_draft_pages") == 0, "all of them were adopted"


async def test_with_drafts_off_the_whole_message_is_computed_after_the_send(
    tmp_path: Path,
) -> None:
    with running(tmp_path, ["--drafts", "off"]) as other:
        name = await conversation(other)
        async with socket(other) as connection:
            await tell(connection, "draft", conversation=name, text=TEXT)
            await tell(connection, "ping")
            assert orjson.loads(await connection.recv())["event"] == "pong"
            assert other.metric("chatserve_drafts") == 0
            done = await sent(connection, name)
        assert done["receipt"]["computed"] == done["usage"]["prompt_tokens"]
        assert other.metric("chatserve_draft_tokens_total") == 0
