"""SIGTERM on the whole server while chats are being answered, and two servers on one data folder.

One server's three lives: the first drain has all the time it needs, the second one none.
"""

import asyncio
import itertools
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.wiring.chat_client import (
    ChatSocket,
    Refused,
    ReplyView,
    Severed,
    by_socket,
    resume_by_sse,
    send_by_sse,
)
from tests.wiring.server import ENDLESS, Revived, completed, free_port, reviving

OPTIONS = ["--dtype", "float32", "--kv-memory", "64MiB", "--log-level", "info"]
TIMES = ("--shutdown-timeout", "120"), ("--shutdown-timeout", "0.5")
GOING_AWAY = 1001
END_SECONDS_MAX = 180.0
LINE = ENDLESS | {"content": "Tell me of the sea.", "temperature": 0}
SHORT = LINE | {"max_tokens": 1_000}  # longer than it takes to look at a drain
LONG = LINE | {"max_tokens": 3_000}
_asks = itertools.count()


@asynccontextmanager
async def conversations(revived: Revived) -> AsyncIterator[httpx.AsyncClient]:
    await revived.ready()
    async with httpx.AsyncClient(base_url=revived.server.url, timeout=60) as client:
        yield client


async def new_view(client: httpx.AsyncClient) -> ReplyView:
    made = await client.post("/api/conversations", json={})
    made.raise_for_status()
    return ReplyView(conversation=made.json()["id"], ask=f"ask-{next(_asks)}")


async def whole(client: httpx.AsyncClient, view: ReplyView) -> dict[str, list[dict[str, object]]]:
    answer = await client.get(f"/api/conversations/{view.conversation}")
    answer.raise_for_status()
    return answer.json()


async def left_alone(revived: Revived, view: ReplyView, turn: dict[str, object]) -> None:
    """Send a turn and leave once it is accepted: nobody looks at its reply."""
    bytes_max = 64
    while view.reply is None:
        bytes_max += 64
        with pytest.raises(Severed):
            await send_by_sse(revived.port, view, turn, bytes_max=bytes_max)


async def speaking(view: ReplyView, reading: "asyncio.Task[None]") -> None:
    """Wait until the view, which is being read, gets new text."""
    heard = asyncio.Event()
    view.watcher = lambda name: heard.set() if name == "delta" else None
    hearing = asyncio.create_task(heard.wait())
    await asyncio.wait({hearing, reading}, return_when=asyncio.FIRST_COMPLETED)
    assert heard.is_set(), reading
    view.watcher = lambda _: None


async def check_new_work_is_refused(revived: Revived, client: httpx.AsyncClient) -> None:
    listed = (await client.get("/api/conversations")).json()["conversations"]
    view = ReplyView(conversation=listed[0]["id"], ask="too-late")
    with pytest.raises(Refused) as refused:
        await send_by_sse(revived.port, view, SHORT)
    assert refused.value.status == 503
    assert int(refused.value.headers["retry-after"]) >= 1
    with pytest.raises(Refused) as refused:
        await ChatSocket.open(revived.port)
    assert refused.value.status == 503
    assert int(refused.value.headers["retry-after"]) >= 1
    turns = (await whole(client, view))["turns"]
    assert view.ask not in [turn["id"] for turn in turns], "what is refused is not kept"


async def until_red(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(END_SECONDS_MAX):
        while True:
            answer = await client.get("/ready")
            if answer.status_code != 200:
                break
    assert answer.status_code == 503
    assert answer.json() == {"status": "draining"}


async def closed(opened: ChatSocket) -> int | None:
    """The code with which the server closes a socket; what it says before is left aside."""
    try:
        while True:
            await opened.frames()
    except Severed as severed:
        return severed.code


async def test_a_drain_ends_what_it_can_and_leaves_the_rest_to_the_next_start(
    tmp_path: Path,
) -> None:
    with reviving(tmp_path, [*OPTIONS, *TIMES[0]]) as revived:
        alone = await drain_with_time(revived)
        revived.spawn(*TIMES[1])
        views = await drain_without_time(revived, alone)
        revived.spawn()
        await take_up(revived, views)
        assert "Traceback" not in revived.logs()


async def drain_with_time(revived: Revived) -> ReplyView:
    """Replies go on to their end, looked at or not; the rest is refused or told to go."""
    async with conversations(revived) as client:
        check_second_server_is_refused(revived)
        alone, watched = await new_view(client), await new_view(client)
        await left_alone(revived, alone, SHORT)
        with (
            await ChatSocket.open(revived.port) as idle,
            await ChatSocket.open(revived.port) as busy,
        ):
            await busy.say(
                {"type": "send", "conversation": watched.conversation, "id": watched.ask}
                | SHORT
                | {"request": watched.ask}
            )
            reading = asyncio.create_task(busy.watch([watched]))
            await speaking(watched, reading)
            revived.server.process.send_signal(signal.SIGTERM)
            await until_red(client)
            await check_new_work_is_refused(revived, client)
            assert await closed(idle) == GOING_AWAY
            assert not watched.ended, "the drain was over before it was looked at"
            alone.forget()
            await send_by_sse(revived.port, alone, SHORT)  # a turn of before may be sent again
            await reading
            assert await closed(busy) == GOING_AWAY
    assert await revived.terminated(END_SECONDS_MAX) == 0
    for view in (alone, watched):
        assert view.kind == "done"
        assert view.epochs == {1}
    return alone


async def drain_without_time(revived: Revived, alone: ReplyView) -> Sequence[ReplyView]:
    """What does not end in time is broken off: its viewers see no end."""
    async with conversations(revived) as client:
        kept = await whole(client, alone)
        assert [turn["content"] for turn in kept["turns"]] == [SHORT["content"], alone.text]
        assert kept["turns"][1]["final"] == alone.final
        assert kept["replies"] == []
        by_sse, by_one_socket = await new_view(client), await new_view(client)
        reading = asyncio.create_task(send_by_sse(revived.port, by_sse, LONG))
        watching = asyncio.create_task(
            by_socket(revived.port, [by_one_socket], {by_one_socket.ask: LONG})
        )
        await speaking(by_sse, reading)
        await speaking(by_one_socket, watching)
        revived.server.process.send_signal(signal.SIGTERM)
        await reading
        with pytest.raises(Severed) as severed:
            await watching
    assert await revived.terminated(END_SECONDS_MAX) == 0
    assert by_sse.put_off, "a stream ends without a final event"
    assert (by_sse.final, by_one_socket.final) == (None, None)
    assert by_sse.text
    assert severed.value.code == GOING_AWAY, "a socket is told to go"
    return by_one_socket, by_sse


async def take_up(revived: Revived, views: Sequence[ReplyView]) -> None:
    """The next start goes on where the drain broke off."""
    async with conversations(revived) as client:
        for view in views:
            before, view.put_off = view.text, False
            assert view.final is None
            (reply,) = (await whole(client, view))["replies"]
            assert (reply["id"], reply["state"]) == (view.reply, "running")
            reading = asyncio.create_task(resume_by_sse(revived.port, view))
            await speaking(view, reading)
            (await client.delete(f"/api/replies/{view.reply}")).raise_for_status()
            await reading
            assert view.final is not None
            assert view.final["finish_reason"] == "abort"
            assert 2 in view.epochs
            assert view.text.startswith(before), "all that was said before the end was logged"
            assert len(view.text) > len(before)
            kept = await whole(client, view)
            assert [turn["content"] for turn in kept["turns"]] == [LONG["content"], view.text]
            assert kept["replies"] == []


def check_second_server_is_refused(revived: Revived) -> None:
    """At once, in one line, with the holder's process."""
    options = ["--port", str(free_port()), "--data-dir", str(revived.data)]
    second = completed("serve", *options, seconds_max=END_SECONDS_MAX)
    assert second.returncode == 2
    assert second.stderr.startswith(f"chatserve: The data folder {revived.data} is in use by")
    assert f"process {revived.server.process.pid}" in second.stderr
    assert len(second.stderr.splitlines()) == 1
