"""What an admin does to one conversation's pages, on a whole server: receipts tell whether it was
done."""

import itertools
import random
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from prefix_store.layout import SLOTS_OFFSET
from tests.wiring.in_process import Living, living
from tests.wiring.recall import all_kept, state_of, until
from tests.wiring.server import ENDLESS

WORDS = ["red", "blue", "green", "black", "white", "brown", "grey", "pink", "gold", "silver"]
SETTINGS = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
PAGE_TOKENS = 16
LEAST = 256  # tokens of a conversation of these tests
NUMBERS = itertools.count()  # of turns
POOL = "6MiB"  # of three or four conversations
KEYS = """
[[keys]]
name = "root"
key = "key-of-root"
role = "admin"
[[keys]]
name = "ann"
key = "key-of-ann"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Living]:
    folder = tmp_path_factory.mktemp("actions")
    keys = folder / "keys.toml"
    keys.write_text(KEYS)
    options = ["--api-key-file", str(keys), "--kv-memory", POOL, "--context-length", "512"]
    with living(folder, *options) as started:
        yield started


@asynccontextmanager
async def people(server: Living) -> AsyncGenerator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    """An admin, and a user."""
    async with server.client("key-of-root") as admin, server.client("key-of-ann") as ann:
        yield admin, ann


async def told(client: httpx.AsyncClient, conversation: str, content: str) -> dict[str, Any]:
    """A turn; the receipt of its reply."""
    turn = {"id": f"t{next(NUMBERS)}", "content": content}
    answer = await client.post(f"/api/conversations/{conversation}/turns", json=turn)
    assert answer.status_code == 200, answer.text
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    return orjson.loads(lines[-1])["receipt"]


async def talked(client: httpx.AsyncClient, seed: int) -> str:
    """A conversation of some 300 tokens that shares nothing with any other seed's."""
    print(f"seed {seed}")
    words = " ".join(random.Random(seed).choices(WORDS, k=200))
    body = {"system": f"{seed} {words}", "settings": SETTINGS}
    made = (await client.post("/api/conversations", json=body)).json()["id"]
    await told(client, made, "Hi")
    return made


async def done(admin: httpx.AsyncClient, action: str, **body: object) -> dict[str, int]:
    answer = await admin.post(f"/admin/cache/{action}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def fill(ann: httpx.AsyncClient, admin: httpx.AsyncClient, seed: int) -> None:
    """Others' pages, as many as the device has and more."""
    total = (await state_of(admin))["cache"]["pages"]["total"]
    for number in range(2 + total // 15):
        await talked(ann, seed + number)


async def test_a_leased_conversation_stays_while_others_fill_the_device(server: Living) -> None:
    async with people(server) as (admin, ann):
        for seconds in (600, 0):
            name = await talked(ann, 1_000 + seconds)
            await all_kept(admin)
            leased = await done(admin, "lease", conversation=name, seconds=seconds)
            assert leased["pages"] >= LEAST // PAGE_TOKENS
            shown = (await state_of(admin))["cache"]["leased_pages"]
            assert shown == (leased["pages"] if seconds else 0)
            await fill(ann, admin, 2_000 + seconds)
            receipt = await told(ann, name, "Hi again")
            assert (receipt["device"] >= LEAST) == bool(seconds), receipt
            await done(admin, "lease", conversation=name, seconds=0)


async def test_an_evicted_conversation_comes_from_the_disk_and_a_warmed_one_does_not(
    server: Living,
) -> None:
    async with people(server) as (admin, ann):
        name, other = await talked(ann, 1), await talked(ann, 2)
        await all_kept(admin)
        before = (await state_of(admin))["cache"]
        gone = await done(admin, "evict", conversation=name)
        assert gone["pages"] >= LEAST // PAGE_TOKENS
        assert gone["pages_stayed"] == gone["host_pages"] == gone["host_pages_stayed"] == 0
        after = (await state_of(admin))["cache"]
        assert after["pages"]["cached"] == before["pages"]["cached"] - gone["pages"]
        assert after["transit"]["lost_total"] == before["transit"]["lost_total"]
        receipt = await told(ann, name, "Hi again")
        assert receipt["disk"] >= LEAST
        assert (await told(ann, other, "Hi again"))["disk"] == 0, "nobody asked for that"

        await all_kept(admin)
        await done(admin, "evict", conversation=name)
        warmed = await done(admin, "warm", conversation=name)
        assert warmed["coming"] >= LEAST // PAGE_TOKENS
        assert warmed["device"] == warmed["below"] == warmed["nowhere"] == 0

        async def there() -> bool:
            found = await done(admin, "warm", conversation=name)
            return found["device"] == warmed["coming"]

        await until("the pages are not brought up", there)
        receipt = await told(ann, name, "And again")
        assert receipt["disk"] == 0
        assert receipt["device"] >= warmed["coming"] * PAGE_TOKENS


async def test_the_pages_of_a_running_reply_stay(server: Living) -> None:
    async with people(server) as (admin, ann):
        name = await talked(ann, 3)
        turn = {"id": "long", "content": "Go on", **ENDLESS, "max_tokens": 600}
        path = f"/api/conversations/{name}/turns"
        async with ann.stream("POST", path, json=turn) as response:
            lines = response.aiter_lines()
            async for line in lines:
                if line == "event: delta":
                    break
            gone = await done(admin, "evict", conversation=name)
            rest = "\n".join([line async for line in lines])
        assert "event: done" in rest
        assert gone["pages_stayed"] >= LEAST // PAGE_TOKENS
        assert gone["pages"] <= 1, "of the answer's end before, which this prompt may not have"


async def test_who_opens_a_chat_has_its_pages_held(server: Living) -> None:
    async with people(server) as (admin, ann):
        name = await talked(ann, 4)
        assert (await state_of(admin))["cache"]["leased_pages"] == 0
        url = server.url.replace("http", "ws", 1) + "/api/socket"
        headers = {"Authorization": "Bearer key-of-ann"}
        async with connect(
            url, subprotocols=[Subprotocol("chatserve.v1")], additional_headers=headers
        ) as socket:
            frame = {"type": "focus", "request": "f", "conversation": name}
            await socket.send(orjson.dumps(frame).decode())

            async def held() -> bool:
                return (await state_of(admin))["cache"]["leased_pages"] > 0

            await until("nothing is held", held)
        cache = (await state_of(admin))["cache"]
        assert cache["leased_pages"] <= cache["pages"]["total"] // 4
        await done(admin, "lease", conversation=name, seconds=0)
        assert (await state_of(admin))["cache"]["leased_pages"] == 0


async def test_a_user_may_not_and_an_unknown_conversation_is_not_found(server: Living) -> None:
    async with people(server) as (admin, ann):
        name = await talked(ann, 5)
        for action, more in (("lease", {"seconds": 1}), ("warm", {}), ("evict", {})):
            path = f"/admin/cache/{action}"
            refused = await ann.post(path, json={"conversation": name, **more})
            assert refused.status_code == 403
            unknown = await admin.post(path, json={"conversation": "nobodys", **more})
            assert unknown.status_code == 404


async def test_host_memory_has_its_part(tmp_path: Path) -> None:
    options = ["--host-memory", "16MiB", "--kv-memory", POOL, "--context-length", "512"]
    with living(tmp_path, *options) as server:
        async with server.client() as client:
            name = await talked(client, 6)
            await all_kept(client)
            leased = await done(client, "lease", conversation=name, seconds=60)
            assert leased["pages"] == leased["host_pages"] >= LEAST // PAGE_TOKENS
            state = await state_of(client)
            assert state["engine"]["tiers"]["host"]["leased"] == leased["host_pages"]
            gone = await done(client, "evict", conversation=name)
            assert (gone["pages"], gone["host_pages"]) == (leased["pages"], leased["host_pages"])
            receipt = await told(client, name, "Hi again")
            assert receipt["device"] == receipt["host"] == 0
            assert receipt["disk"] >= LEAST


async def test_a_flipped_byte_on_the_disk_is_found_and_the_page_computed_again(
    tmp_path: Path,
) -> None:
    with living(tmp_path, "--kv-memory", POOL, "--context-length", "512") as server:
        async with server.client() as client:
            name = await talked(client, 7)
            await all_kept(client)
            good = await done(client, "verify", pages=4096)
            assert good["checked"] == good["compared"] >= LEAST // PAGE_TOKENS
            assert good["wrong"] == good["unreadable"] == good["different"] == 0
            sample = await done(client, "verify", pages=3)
            assert sample["checked"] == 3
            slab = (await state_of(client))["disk"]["slabs"][0]
            (path,) = (server.data / "pages").glob("*.slab")
            with path.open("r+b") as file:
                file.seek(SLOTS_OFFSET + slab["slot_bytes"] + 1_000)  # in the second page
                (byte,) = file.read(1)
                file.seek(-1, 1)
                file.write(bytes([byte ^ 1]))
            bad = await done(client, "verify", pages=4096)
            assert bad["wrong"] == 1, bad
            assert bad["checked"] == good["checked"]
            after = await done(client, "verify", pages=4096)
            assert (after["checked"], after["wrong"]) == (good["checked"] - 1, 0)
            await done(client, "evict", conversation=name)
            receipt = await told(client, name, "Hi again")
            assert receipt["computed"] > 0
