"""A conversation that an admin forgets is as gone as one that its owner deletes; others' stay."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from redis.asyncio import Redis
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from chatserve.terminal.options import KEY_VARIABLE
from tests.wiring.server import Revived, reviving
from tests.wiring.test_cache_actions import KEYS
from tests.wiring.test_forgetting import SECRET, SETTINGS, Proof, gone, run, talked, told


@asynccontextmanager
async def people(
    folder: Path,
) -> AsyncGenerator[tuple[Revived, httpx.AsyncClient, httpx.AsyncClient]]:
    """A server, its admin, and a user."""
    keys = folder / "keys.toml"
    keys.write_text(KEYS)
    with reviving(folder, ["--api-key-file", str(keys)]) as revived:
        await revived.ready()
        async with client_of(revived, "root") as admin, client_of(revived, "ann") as ann:
            yield revived, admin, ann


def client_of(revived: Revived, name: str) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer key-of-{name}"}
    return httpx.AsyncClient(base_url=revived.server.url, headers=headers, timeout=60)


async def forget(client: httpx.AsyncClient, conversation: str) -> httpx.Response:
    return await client.post("/admin/cache/forget", json={"conversation": conversation})


async def other_of(client: httpx.AsyncClient) -> dict[str, Any]:
    """A short conversation that is to stay, as it is kept."""
    body = {"system": "Be kind, and count well.", "settings": SETTINGS}
    name = (await client.post("/api/conversations", json=body)).json()["id"]
    await told(client, name, {"id": "a", "content": "Count from one to twenty, please."})
    return (await client.get(f"/api/conversations/{name}")).json()


async def test_nothing_is_left_of_what_an_admin_forgets_and_others_stay(tmp_path: Path) -> None:
    async with people(tmp_path) as (revived, admin, ann):
        others = [(each, await other_of(each)) for each in (admin, ann)]
        forgotten = await talked(ann, admin)
        proof = await asyncio.to_thread(Proof, revived, forgotten)
        assert proof.pages >= 15, proof.pages
        assert (await forget(ann, forgotten)).status_code == 403
        assert not await gone(ann, forgotten)
        answer = await forget(admin, forgotten)
        assert (answer.status_code, answer.json()) == (200, {"conversations": 1})
        await asyncio.to_thread(proof.assert_nothing_is_left)
        assert await gone(ann, forgotten)
        listed = (await ann.get("/api/conversations")).json()["conversations"]
        assert [each["id"] for each in listed] == [others[1][1]["id"]]
        for client, before in others:
            now = (await client.get(f"/api/conversations/{before['id']}")).json()
            assert now == before
        assert (await forget(admin, forgotten)).status_code == 404
        revived.kill()
        revived.spawn()
        await revived.ready()
        await asyncio.to_thread(proof.assert_nothing_is_left)
        for client, before in others:
            assert (await client.get(f"/api/conversations/{before['id']}")).json() == before


async def test_who_looks_hears_of_it_as_of_the_owners_own_deletion(tmp_path: Path) -> None:
    async with people(tmp_path) as (revived, admin, ann):
        forgotten = await talked(ann, admin)
        turn = {"id": "e", "content": f"Once more: {SECRET}", **SETTINGS, "max_tokens": 900}
        url = revived.server.url.replace("http", "ws") + "/api/socket"
        headers = {"Authorization": "Bearer key-of-ann"}
        protocol = Subprotocol("chatserve.v1")
        async with (
            connect(url, additional_headers=headers, subprotocols=[protocol]) as socket,
            ann.stream("POST", f"/api/conversations/{forgotten}/turns", json=turn) as response,
        ):
            lines = response.aiter_lines()
            deltas = 0
            async for line in lines:
                deltas += line == "event: delta"
                if deltas == 20:
                    break
            assert deltas == 20, "the reply was over too soon"
            assert (await forget(admin, forgotten)).status_code == 200
            rest = "\n".join([line async for line in lines])
            assert "event: failed" in rest
            assert "not_found" in rest
            async for frame in socket:
                event = orjson.loads(frame)
                deleted = event["event"] == "changed" and event["revision"] is None
                if deleted and event["conversation"] == forgotten:
                    break
        assert await gone(ann, forgotten)


async def test_what_was_begun_is_finished_when_it_is_asked_for_again(tmp_path: Path) -> None:
    async with people(tmp_path) as (revived, admin, ann):
        forgotten = await talked(ann, admin)
        proof = await asyncio.to_thread(Proof, revived, forgotten)
        # The store's file is written anew slowly, so that the deletion lasts.
        async with Redis(unix_socket_path=str(revived.data / "redis/server.sock")) as redis:
            await redis.config_set("rdb-key-save-delay", 1_000_000)
            await redis.set("another", "key")
            first = asyncio.create_task(forget(admin, forgotten))
            while not await gone(ann, forgotten):  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert not first.done()
            second = asyncio.create_task(forget(admin, forgotten))
            await redis.config_set("rdb-key-save-delay", 0)
            assert [each.status_code for each in await asyncio.gather(first, second)] == [200, 200]
        await asyncio.to_thread(proof.assert_nothing_is_left)


async def test_the_command_forgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with people(tmp_path) as (revived, _, ann):
        name = (await other_of(ann))["id"]
        monkeypatch.setenv(KEY_VARIABLE, "key-of-root")
        words = ("chatserve", "cache", "forget", name, "--url", revived.server.url)
        done = await asyncio.to_thread(run, *words)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "1 conversation forgotten: nothing of it is kept\n"
        assert await gone(ann, name)
        again = await asyncio.to_thread(run, *words)
        assert again.returncode != 0
        assert "There is no such conversation" in again.stderr
