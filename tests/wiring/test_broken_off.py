"""Viewings that a drain breaks off: whoever comes back has the whole reply, and one final event."""

import asyncio
import signal
from collections import Counter
from pathlib import Path

import httpx

from chatserve.client import ChatClient, ClientLimits
from tests.wiring.chat_client import ReplyView, resume_by_sse, send_by_sse
from tests.wiring.server import ENDLESS, reviving

OPTIONS = ["--dtype", "float32", "--kv-memory", "64MiB", "--shutdown-timeout", "0.2"]
WAIT_SECONDS_MAX = 180.0
SAMPLING = {
    "temperature": 0,
    "repetition_penalty": 1.2,
    "max_tokens": 1_200,
} | ENDLESS
TEXT = "Tell me of the sea."
TURN = {"content": TEXT} | SAMPLING
LIMITS = ClientLimits(reconnect_seconds_first=0.05, reconnect_seconds_max=0.5)


async def test_by_sse_and_by_the_client_a_reply_ends_once_over_two_lives(tmp_path: Path) -> None:
    with reviving(tmp_path, OPTIONS) as revived:
        await revived.ready()
        url = revived.server.url
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            made = [await http.post("/api/conversations", json={}) for _ in range(2)]
        undisturbed, view = [ReplyView(each.json()["id"], "ask") for each in made]
        await send_by_sse(revived.port, undisturbed, TURN)
        assert undisturbed.kind == "done"

        events = Counter[str]()
        heard = asyncio.Event()

        def hear(name: str) -> None:
            events[name] += 1
            if name == "delta":
                heard.set()

        view.watcher = hear
        async with asyncio.timeout(WAIT_SECONDS_MAX), ChatClient(url, limits=LIMITS) as client:
            reply = client.send(await client.create(), TEXT, **SAMPLING)
            reading = asyncio.create_task(send_by_sse(revived.port, view, TURN))
            await heard.wait()
            async for _ in reply:
                break
            revived.server.process.send_signal(signal.SIGTERM)
            await reading
            assert (view.ended, view.put_off) == (False, True)
            assert events["failed"] == events["done"] == 0
            assert not reply.over
            assert await revived.terminated(WAIT_SECONDS_MAX) == 0
            revived.spawn()
            await revived.ready()
            await resume_by_sse(revived.port, view)
            final = await reply.wait()
        assert events["failed"] == 0
        assert events["done"] == 1
        assert view.epochs == {1, 2}
        assert view.text == reply.text == undisturbed.text
        assert view.snapshots == 0, "all that was shown before the end was logged"
        assert reply.cursor is not None
        assert reply.cursor.epoch == 2
        assert final.usage.completion_tokens == SAMPLING["max_tokens"]
        assert "Traceback" not in revived.logs()
