"""What an admin sees of the cache, on a whole server: it agrees with the server's own counts."""

import asyncio
import base64
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import orjson

from tests.wiring.in_process import living
from tests.wiring.recall import all_kept, state_of
from tests.wiring.test_cache_actions import (
    KEYS,
    LEAST,
    PAGE_TOKENS,
    POOL,
    done,
    people,
    talked,
)

OPTIONS = ("--host-memory", "16MiB", "--kv-memory", POOL, "--context-length", "512")


async def seen(client: httpx.AsyncClient, what: str, **query: str) -> dict[str, Any]:
    answer = await client.get(f"/admin/cache/{what}", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def read(shown: dict[str, Any], tier: str) -> tuple[Counter[str], int, int]:
    """Pages by state, those that are leased, and the owners of all."""
    cells = base64.b64decode(shown[tier]["cells"])
    assert len(cells) == shown[tier]["pages"]
    states = Counter(shown["states"][cell & shown["state_bits"]] for cell in cells)
    leased = sum(bool(cell & shown["leased_bit"]) for cell in cells)
    return states, leased, sum(cell >> shown["owners_shift"] for cell in cells)


async def test_the_page_map_agrees_with_the_counts_of_each_tier(tmp_path: Path) -> None:
    with living(tmp_path, *OPTIONS) as server:
        async with server.client() as client:
            name = await talked(client, 1)
            await talked(client, 2)
            await all_kept(client)
            leased = await done(client, "lease", conversation=name, seconds=600)
            shown, state = await seen(client, "pages"), await state_of(client)
            assert shown["page_tokens"] == PAGE_TOKENS
            states, with_lease, owners = read(shown, "device")
            pages = state["cache"]["pages"]
            assert states == Counter({key: pages[key] for key in shown["states"] if pages[key]})
            assert states["cached"] >= 2 * LEAST // PAGE_TOKENS
            assert (with_lease, owners) == (leased["pages"], 0)
            states, with_lease, owners = read(shown, "host")
            host = state["engine"]["tiers"]["host"]
            assert (states["free"], states["cached"]) == (host["free"], host["cached"])
            assert with_lease == leased["host_pages"] == host["leased"]


async def test_the_stream_of_samples_tells_what_the_server_counts(tmp_path: Path) -> None:
    with living(tmp_path, *OPTIONS) as server:
        async with server.client() as client:
            await talked(client, 3)
            await all_kept(client)
            state = await state_of(client)
            names = list[str]()
            samples = list[dict[str, Any]]()
            async with client.stream("GET", "/admin/cache/events") as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("event: "):
                        names.append(line[7:])
                    elif line.startswith("data: ") and names[-1] == "sample":
                        samples.append(orjson.loads(line[6:]))
                        if len(samples) == 2:
                            break
            assert names == ["history", "sample", "sample"]
            first, second = samples
            pages = state["cache"]["pages"]
            assert first["device_pages"] == pages["total"]
            assert first["device_cached_pages"] == pages["cached"] >= LEAST // PAGE_TOKENS
            assert first["disk_pages"] == state["disk"]["slabs"][0]["pages"]
            assert first["page_bytes"] == state["disk"]["slabs"][0]["shape"]["page_bytes"]
            assert first["store_available"] is True
            assert second["seconds"] >= 1.0
            assert second["generated_tokens_a_second"] == 0.0, "nobody chats"
            assert second["step_99th_percentile_seconds"] is None


async def test_who_looks_does_not_hold_up_the_end_of_the_server(tmp_path: Path) -> None:
    with living(tmp_path, "--shutdown-timeout", "3600") as server:
        client = server.client()
        stream = client.stream("GET", "/admin/cache/events")
        answer = await stream.__aenter__()
        lines = answer.aiter_lines()
        assert await anext(lines) == "event: history"
        ended = asyncio.create_task(asyncio.to_thread(server.end))
        rest = [line async for line in lines]
        await ended
        await stream.__aexit__(None, None, None)
        await client.aclose()
        assert rest[-1] == "", "the last event is whole"


async def test_conversations_are_listed_with_the_places_of_their_pages(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(KEYS)
    with living(tmp_path, *OPTIONS, "--api-key-file", str(keys)) as server:
        async with people(server) as (admin, ann):
            first, second = await talked(ann, 4), await talked(admin, 5)
            await all_kept(admin)
            shown = await seen(admin, "conversations")
            assert shown["next"] is None
            newest, older = shown["conversations"]
            assert (newest["id"], newest["owner"]) == (second, "root")
            assert (older["id"], older["owner"]) == (first, "ann")
            assert newest["updated"] >= older["updated"]
            assert set(older) == {"id", "owner", "updated", "pages"}, "nothing of what was said"
            leased = await done(admin, "lease", conversation=first, seconds=60)
            pages = older["pages"]
            assert pages == {"device": leased["pages"], "host": 0, "disk": 0, "nowhere": 0}
            assert pages["device"] >= LEAST // shown["page_tokens"]

            await done(admin, "evict", conversation=first)
            part = await seen(admin, "conversations", limit="1")
            assert [each["id"] for each in part["conversations"]] == [second]
            rest = await seen(admin, "conversations", limit="1", after=part["next"])
            (gone,) = rest["conversations"]
            assert gone["pages"] == {
                "device": 0,
                "host": 0,
                "disk": pages["device"],
                "nowhere": 0,
            }
            assert rest["next"] is None
            wrong = await admin.get("/admin/cache/conversations", params={"after": "!"})
            assert wrong.status_code == 400


async def test_what_left_the_device_alone_is_in_host_memory(tmp_path: Path) -> None:
    options = ("--host-memory", "64MiB", "--kv-memory", POOL, "--context-length", "512")
    with living(tmp_path, *options) as server:
        async with server.client() as client:
            first = await talked(client, 6)
            await all_kept(client)
            for number in range(12):
                await talked(client, 100 + number)
            await all_kept(client)
            shown = await seen(client, "conversations")
            places = {each["id"]: each["pages"] for each in shown["conversations"]}
            assert places[first]["host"] > 0
            assert sum(places[first].values()) >= LEAST // PAGE_TOKENS
            on_device = sum(pages["device"] for pages in places.values())
            assert on_device <= (await state_of(client))["cache"]["pages"]["total"]
