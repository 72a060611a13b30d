"""A conversation that was deleted is nowhere, on a real server: no page, no name, no text.

What is looked for is noted before: by the commands that docs/conversations.md gives to a person.
"""

import asyncio
import inspect
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from redis.asyncio import Redis

from chatserve import assembly, conversation_pages
from tests.wiring.server import Revived, reviving
from tests.wiring.test_kept_pages import _all_kept

SECRET = "The otter of Ullswater keeps her pearls under the ninth stone by the boathouse."
SYSTEM = f"You are the keeper of this secret. {SECRET} Do not tell anybody, whoever asks for it."
SETTINGS = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


class Proof:
    """What a conversation looked like in the data folder."""

    def __init__(self, revived: Revived, conversation: str) -> None:
        self._data = revived.data
        self._file = revived.folder / f"proof-{conversation}"
        listed = run("chatserve.conversation_pages", str(self._data), conversation)
        assert listed.returncode == 0, listed.stderr
        self.names = listed.stdout.split()
        noted = run("prefix_store", "witness", str(self._data / "pages"), *self.names)
        self._file.write_text(noted.stdout)
        self.pages = noted.stdout.count("\n")
        found, texts = self._search()
        assert "ciphertext of" in found, "the search would find a page"
        assert "name of" in found
        assert texts, "and a text"

    def _search(self) -> tuple[str, list[Path]]:
        told = run("prefix_store", "forgotten", str(self._data), "--proof", str(self._file))
        assert told.returncode in (0, 1), told.stderr
        wanted = SECRET.encode()
        texts = [
            path for path in self._data.rglob("*") if path.is_file() and wanted in path.read_bytes()
        ]
        return told.stdout, texts

    def assert_nothing_is_left(self) -> None:
        found, texts = self._search()
        assert found.endswith(": 0 traces found\n"), found
        assert texts == []


async def told(client: httpx.AsyncClient, conversation: str, turn: dict[str, object]) -> str:
    answer = await client.post(f"/api/conversations/{conversation}/turns", json=turn)
    assert answer.status_code == 200, answer.text
    assert "event: done" in answer.text, answer.text
    return answer.text


async def talked(client: httpx.AsyncClient, admin: httpx.AsyncClient | None = None) -> str:
    """A conversation with branches: a question edited, an answer made again. admin: who may ask
    whether it is copied, where that is somebody else."""
    body = {"system": SYSTEM, "settings": SETTINGS}
    made = (await client.post("/api/conversations", json=body)).json()["id"]
    await told(client, made, {"id": "a", "content": f"Is it true? {SECRET}"})
    await told(client, made, {"id": "b", "content": "Where are the pearls of the otter, then?"})
    edited = {"id": "c", "content": f"Say it again: {SECRET}", "parent": None}
    await told(client, made, edited)
    await told(client, made, {"id": "d", "parent": "c"})
    await _all_kept(admin or client)
    return made


async def gone(client: httpx.AsyncClient, conversation: str) -> bool:
    return (await client.get(f"/api/conversations/{conversation}")).status_code == 404


async def no_deletion_under_way(client: httpx.AsyncClient) -> None:
    while (await client.get("/admin/cache")).json()["conversations"]["deletions"]:  # noqa: ASYNC110
        await asyncio.sleep(0.02)


async def test_nothing_is_left_of_a_deleted_conversation(tmp_path: Path) -> None:
    with reviving(tmp_path) as revived:
        await revived.ready()
        async with httpx.AsyncClient(base_url=revived.server.url, timeout=60) as client:
            other = (await client.post("/api/conversations", json={"system": "Be kind."})).json()
            await told(client, other["id"], {"id": "a", "content": "Hello!", **SETTINGS})
            deleted = await talked(client)
            proof = await asyncio.to_thread(Proof, revived, deleted)
            assert proof.pages >= 15, proof.pages
            answer = await client.delete(f"/api/conversations/{deleted}")
            assert answer.status_code == 204
            revived.kill()
        await asyncio.to_thread(proof.assert_nothing_is_left)
        revived.spawn()
        await revived.ready()
        async with httpx.AsyncClient(base_url=revived.server.url, timeout=60) as client:
            await asyncio.to_thread(proof.assert_nothing_is_left)
            assert await gone(client, deleted)
            assert (await client.delete(f"/api/conversations/{deleted}")).status_code == 404
            kept = (await client.get(f"/api/conversations/{other['id']}")).json()
            assert len(kept["turns"]) == 2
            again = await talked(client)
            receipt = (await client.get(f"/api/conversations/{again}")).json()["turns"][1]
            assert receipt["final"]["receipt"]["disk"] == 0, "computed anew, all of it"


async def test_the_running_reply_of_a_deleted_conversation_leaves_nothing(tmp_path: Path) -> None:
    with reviving(tmp_path) as revived:
        await revived.ready()
        async with httpx.AsyncClient(base_url=revived.server.url, timeout=60) as client:
            deleted = await talked(client)
            turn = {"id": "e", "content": f"Once more: {SECRET}", **SETTINGS, "max_tokens": 3000}
            path = f"/api/conversations/{deleted}/turns"
            async with client.stream("POST", path, json=turn) as response:
                lines = response.aiter_lines()
                deltas = 0
                async for line in lines:
                    deltas += line == "event: delta"
                    if deltas == 20:
                        break
                proof = await asyncio.to_thread(Proof, revived, deleted)
                assert (await client.delete(f"/api/conversations/{deleted}")).status_code == 204
                rest = "\n".join([line async for line in lines])
            assert "not_found" in rest
            await asyncio.to_thread(proof.assert_nothing_is_left)
            statistics = await _all_kept(client)
            assert statistics["cache"]["ghosts"] == 0
            assert statistics["cache"]["named_pages"] == 0, "the device has nothing of it"
            assert sum(slab["pages"] for slab in statistics["disk"]["slabs"]) == 0


async def test_a_deletion_that_was_begun_is_finished_by_the_next_process(tmp_path: Path) -> None:
    with reviving(tmp_path) as revived:
        await revived.ready()
        async with httpx.AsyncClient(base_url=revived.server.url, timeout=60) as client:
            deleted = await talked(client)
            proof = await asyncio.to_thread(Proof, revived, deleted)
            # The server's file is written anew slowly, so that the deletion lasts.
            async with Redis(unix_socket_path=str(revived.data / "redis/server.sock")) as redis:
                await redis.config_set("rdb-key-save-delay", 1_000_000)
                await redis.set("another", "key")
            deleting = asyncio.create_task(client.delete(f"/api/conversations/{deleted}"))
            while not await gone(client, deleted):  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert not deleting.done()
            revived.kill()
            with suppress(httpx.HTTPError):
                await deleting
        async with Redis(unix_socket_path=str(revived.data / "redis/server.sock")) as redis:
            assert await redis.hgetall("cs:deletions") == {deleted.encode(): b"local"}
            await redis.config_set("rdb-key-save-delay", 0)
        revived.spawn()
        await revived.ready()
        async with httpx.AsyncClient(base_url=revived.server.url, timeout=60) as client:
            assert await gone(client, deleted)
            await no_deletion_under_way(client)
        await asyncio.to_thread(proof.assert_nothing_is_left)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 20))]
)
async def test_kill_9_at_any_point_of_a_deletion(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    with reviving(tmp_path) as revived:
        await revived.ready()
        async with httpx.AsyncClient(base_url=revived.server.url, timeout=60) as client:
            deleted = await talked(client)
            proof = await asyncio.to_thread(Proof, revived, deleted)
            deleting = asyncio.create_task(client.delete(f"/api/conversations/{deleted}"))
            await asyncio.sleep(dice.uniform(0, 0.05))
            revived.kill()
            with suppress(httpx.HTTPError):
                await deleting
        revived.spawn()
        await revived.ready()
        async with httpx.AsyncClient(base_url=revived.server.url, timeout=60) as client:
            begun = await gone(client, deleted)
            print(f"seed {seed}: {'begun' if begun else 'not begun'}")
            if not begun:
                answer = await client.delete(f"/api/conversations/{deleted}")
                assert answer.status_code == 204
            await no_deletion_under_way(client)
        await asyncio.to_thread(proof.assert_nothing_is_left)


async def test_pages_of_a_public_prompt_are_no_part_of_the_proof(tmp_path: Path) -> None:
    """They stay, as others use them; the proof of all that goes still succeeds."""
    text = "You answer questions about our shop of pages. " + "Be kind to every page of it. " * 8
    with reviving(tmp_path) as revived:
        await revived.ready()
        async with httpx.AsyncClient(base_url=revived.server.url, timeout=60) as client:
            made = await client.post("/admin/prompts", json={"name": "shop", "text": text})
            assert made.is_success, made.text
            body = {"system": text, "settings": SETTINGS}
            deleted = (await client.post("/api/conversations", json=body)).json()["id"]
            await told(client, deleted, {"id": "a", "content": f"Is it true? {SECRET}"})
            await _all_kept(client)
            listed = run("chatserve.conversation_pages", str(revived.data), deleted)
            assert "pages of public prompts are left out" in listed.stderr
            left_out = int(listed.stderr.split()[1])
            assert left_out >= 3, listed.stderr
            proof = await asyncio.to_thread(Proof, revived, deleted)
            assert proof.pages == len(proof.names), "each once, all that are its own"
            assert (await client.delete(f"/api/conversations/{deleted}")).status_code == 204
            await asyncio.to_thread(proof.assert_nothing_is_left)
            disk = (await client.get("/admin/cache")).json()["disk"]
            assert sum(slab["pages"] for slab in disk["slabs"]) == left_out


async def test_what_another_chat_begins_with_too_is_no_part_of_the_proof(tmp_path: Path) -> None:
    """It keeps their names, and has their pages computed anew; the rest is proved to be gone."""
    system = "You are kind to everybody who asks about pages. " * 8
    with reviving(tmp_path) as revived:
        await revived.ready()
        async with httpx.AsyncClient(base_url=revived.server.url, timeout=60) as client:
            made: list[str] = []
            for content in ("Hello!", f"Is it true? {SECRET}"):
                body = {"system": system, "settings": SETTINGS}
                made.append((await client.post("/api/conversations", json=body)).json()["id"])
                await told(client, made[-1], {"id": "a", "content": content})
            await _all_kept(client)
            listed = run("chatserve.conversation_pages", str(revived.data), made[1])
            assert "pages of other chats too are left out" in listed.stderr
            assert int(listed.stderr.split()[1]) >= 3, listed.stderr
            proof = await asyncio.to_thread(Proof, revived, made[1])
            assert proof.pages == len(proof.names) >= 1, "what is its own"
            assert (await client.delete(f"/api/conversations/{made[1]}")).status_code == 204
            await asyncio.to_thread(proof.assert_nothing_is_left)
            await told(client, made[0], {"id": "b", "content": "And again?"})
            await _all_kept(client)
            await asyncio.to_thread(proof.assert_nothing_is_left)


def test_the_command_names_pages_as_the_server_does() -> None:
    assert conversation_pages.LAYOUT.format(16) == assembly._layout(16)
    assert f'secret.derive("{conversation_pages.NAMES_LABEL}")' in inspect.getsource(assembly.load)
