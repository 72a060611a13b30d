"""A reply that is read over connections that are cut is, put together, the reply that was kept.

By Server-Sent Events and by WebSocket, cut after random numbers of bytes (in the answer's head, in
the handshake, in an event), and across kill -9 of the server. Greedy replies, so that what was kept
can be compared with a run that nobody disturbed.
"""

import asyncio
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import httpx
import pytest

from tests.seeds import drawn_seed
from tests.wiring.chat_client import (
    Refused,
    ReplyView,
    Severed,
    by_socket,
    resume_by_sse,
    send_by_sse,
)
from tests.wiring.server import ENDLESS, Revived, reviving

OPTIONS = ["--dtype", "float32", "--kv-memory", "64MiB", "--log-level", "warning"]
RESUMPTIONS_MIN = 100
# Past its own end a reply says anything, at any length; the penalty makes it say something new.
TURN = {
    "content": "Tell me of the sea.",
    "temperature": 0,
    "repetition_penalty": 1.2,
    "max_tokens": 240,
} | ENDLESS
SHORT = TURN | {"max_tokens": 120}
LONGER = TURN | {"max_tokens": 400}
# The head of an answer and `accepted` are some 500 bytes, an event about 70.
BYTES_MAX = 900
RETRY_SECONDS = 0.02  # between attempts while the server is away


@pytest.fixture(scope="module")
def revived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Revived]:
    with reviving(tmp_path_factory.mktemp("resume"), OPTIONS) as started:
        yield started


@pytest.fixture
def dice() -> random.Random:
    seed = drawn_seed()
    return random.Random(seed)


@dataclass
class Reader:
    """Reads one reply, by one way, over as many connections as it takes."""

    revived: Revived
    view: ReplyView
    dice: random.Random
    turn: Mapping[str, object]
    socket: bool
    resumptions_min: int
    cuts: int = 0

    async def to_the_end(self) -> None:
        while not self.view.ended:
            resumed_enough = self.view.resumptions >= self.resumptions_min
            limit = None if resumed_enough else self.dice.randrange(BYTES_MAX)
            self.view.put_off = False
            try:
                await self._once(limit)
            except Severed:
                self.cuts += 1
            except Refused as refused:
                check_come_back_later(refused)
            if not self.revived.announced:
                await asyncio.sleep(RETRY_SECONDS)

    async def _once(self, limit: int | None) -> None:
        port, view = self.revived.port, self.view
        if self.socket:
            await by_socket(port, [view], {view.ask: self.turn}, bytes_max=limit)
        elif view.reply is None:
            await send_by_sse(port, view, self.turn, bytes_max=limit)
        else:
            await resume_by_sse(port, view, bytes_max=limit)


def check_come_back_later(refused: Refused) -> None:
    """What a server says that is loading or going away."""
    assert refused.status == 503, refused
    assert float(refused.headers["retry-after"]) >= 1


async def new_view(client: httpx.AsyncClient, ask: str) -> ReplyView:
    made = await client.post("/api/conversations", json={"title": ask})
    made.raise_for_status()
    return ReplyView(conversation=made.json()["id"], ask=ask)


async def check_kept(
    client: httpx.AsyncClient, view: ReplyView, turn: Mapping[str, object]
) -> None:
    """What the client has put together is what the conversation has, once."""
    whole = (await client.get(f"/api/conversations/{view.conversation}")).json()
    asked, answered = whole["turns"]
    assert (asked["id"], asked["content"]) == (view.ask, turn["content"])
    assert (answered["id"], answered["content"]) == (view.reply, view.text)
    assert answered["final"] == view.final
    assert whole["replies"] == []
    assert view.kind == "done"
    assert view.final is not None
    assert view.final["finish_reason"] == "length"
    assert view.final["usage"]["completion_tokens"] == turn["max_tokens"]


async def test_replies_cut_at_random_bytes_are_put_together(
    revived: Revived, dice: random.Random
) -> None:
    await revived.ready()
    async with httpx.AsyncClient(base_url=revived.server.url, timeout=60) as client:
        readers = [
            Reader(
                revived, await new_view(client, ask), dice, TURN, ask == "socket", RESUMPTIONS_MIN
            )
            for ask in ("sse", "socket")
        ]
        async with asyncio.TaskGroup() as group:
            for reader in readers:
                group.create_task(reader.to_the_end())
        for reader in readers:
            view = reader.view
            print(
                f"{reader.cuts} cuts, {view.resumptions} resumptions, {len(view.text)} characters"
            )
            assert view.resumptions >= RESUMPTIONS_MIN
            assert view.epochs == {1}
            assert view.snapshots == 0, "nothing was lost, so nothing needed to be replaced"
            await check_kept(client, view, TURN)
            await resume_by_sse(revived.port, view)  # 204: nothing is left to come back for
            before = view.text
            view.forget()
            await resume_by_sse(revived.port, view)
            assert view.text == before, "who begins anew gets all of it"


async def test_replies_across_kills_of_the_server_are_put_together(
    revived: Revived, dice: random.Random
) -> None:
    await revived.ready()
    redis = revived.redis_pid()
    async with httpx.AsyncClient(base_url=revived.server.url, timeout=60) as client:
        undisturbed = await new_view(client, "undisturbed")
        await send_by_sse(revived.port, undisturbed, LONGER)
        views = [await new_view(client, f"killed-{number}") for number in range(4)]
    readers = [
        Reader(revived, view, dice, LONGER, socket=number % 2 == 1, resumptions_min=15)
        for number, view in enumerate(views)
    ]
    async with asyncio.TaskGroup() as group:
        for reader in readers:
            group.create_task(reader.to_the_end())
        # Where the kill falls in the replies is left to chance.
        begun = dice.randrange(1, 4)
        while sum(bool(view.text) for view in views) < begun:  # noqa: ASYNC110
            await asyncio.sleep(0)
        revived.kill()
        revived.spawn()
        await revived.ready()
    epochs = [sorted(view.epochs) for view in views]
    print(f"epochs {epochs}, snapshots {[view.snapshots for view in views]}")
    assert any(2 in view.epochs for view in views), "nobody was interrupted"
    assert revived.redis_pid() == redis, "the living server of conversations is adopted"
    async with httpx.AsyncClient(base_url=revived.server.url, timeout=60) as client:
        for view in views:
            await check_kept(client, view, LONGER)
            assert view.text == undisturbed.text
            assert view.final is not None
            assert undisturbed.final is not None
            assert counted(view.final["usage"]) == counted(undisturbed.final["usage"])
    assert "Traceback" not in revived.logs()


def counted(usage: dict[str, object]) -> dict[str, object]:
    """Without what depends on which pages were there."""
    return {name: count for name, count in usage.items() if name.endswith("_tokens")}
