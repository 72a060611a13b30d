"""What an admin is told of shared prefixes, on a whole server: it agrees with the receipts."""

import re
from pathlib import Path
from typing import Any

import httpx

from tests.wiring.in_process import living
from tests.wiring.recall import all_kept, state_of
from tests.wiring.test_cache_actions import KEYS, PAGE_TOKENS, SETTINGS, done, people, told
from tests.wiring.test_cache_views import seen

OPTIONS = ("--kv-memory", "16MiB", "--host-memory", "16MiB", "--context-length", "1024")
# Each some pages long, whatever the replies are.
GREETING = "Hello! It rained today, and I read a book. " * 6
QUESTION = "What is a page? I took a walk, and met a friend. " * 6
FIELDS = {
    "above", "page", "label", "prompts", "owner", "public", "pages", "tokens", "owners", "hits",
    "hits_least", "saved_tokens", "saved_tokens_under", "branches", "copies",
}  # fmt: skip
SECRET = "The otter of Ullswater keeps her pearls under the ninth stone by the boathouse. "
PUBLIC = "You answer questions about our shop of pages, and you are kind. " * 6


async def talked(client: httpx.AsyncClient, system: str, *contents: str) -> list[dict[str, Any]]:
    """A conversation; its receipts."""
    body = {"system": system, "settings": SETTINGS}
    made = (await client.post("/api/conversations", json=body)).json()["id"]
    return [await told(client, made, content) for content in contents]


def found(receipts: list[dict[str, Any]]) -> int:
    return sum(each["device"] + each["host"] + each["disk"] for each in receipts)


async def test_what_is_told_is_what_the_receipts_told(tmp_path: Path) -> None:
    with living(tmp_path, *OPTIONS) as server:
        async with server.client() as client:
            assert (await seen(client, "prefixes"))["prefixes"] == []
            system = SECRET * 12
            receipts = [
                *await talked(client, system, GREETING, "And then?"),
                *await talked(client, system, QUESTION, "And then?"),
                *await talked(client, system, GREETING),
                *await talked(client, "Nobody else says this. " * 12, "Hello!"),
            ]
            await all_kept(client)
            shown = await seen(client, "prefixes")
            assert shown["page_tokens"] == PAGE_TOKENS
            assert shown["saved_tokens"] == found(receipts) > 0
            prefixes = shown["prefixes"]
            assert sum(each["saved_tokens"] for each in prefixes) == shown["saved_tokens"]
            assert sum(each["tokens"] for each in prefixes) == shown["shared_tokens"]
            assert not shown["more"]
            first = prefixes[0]
            assert set(first) == FIELDS, "nothing of what was said"
            assert (first["above"], first["owner"], first["public"]) == (None, "local", False)
            assert (first["hits"], first["owners"]) == (4, 0)
            assert first["saved_tokens_under"] == shown["saved_tokens"], "one system, one tree"
            least, most = (count * first["tokens"] for count in (first["hits_least"], 4))
            assert least <= first["saved_tokens"] <= most
            assert first["branches"] >= 2
            for place, each in enumerate(prefixes[1:], 1):
                assert each["above"] is not None
                assert each["above"] < place
            # Copies are where the cache's own counts say that they are.
            assert sum(first["copies"].values()) == first["pages"]
            assert first["copies"]["host"] == first["pages"]
            state = await state_of(client)
            assert shown["saved_tokens"] == state["cache"]["hit_tokens"]

            (one,) = (await seen(client, "prefixes", limit="1"))["prefixes"]
            assert one == first
            assert (await seen(client, "prefixes", limit="1"))["more"]
            assert len(prefixes) >= 3, "a branch for each of two chats"
            await done(client, "flush")
            assert (await seen(client, "prefixes"))["prefixes"] == []


async def test_each_keys_prefixes_have_its_name_and_public_ones_none(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(KEYS)
    with living(tmp_path, *OPTIONS, "--api-key-file", str(keys)) as server:
        async with people(server) as (admin, ann):
            made = await admin.post("/admin/prompts", json={"name": "shop", "text": PUBLIC})
            public_pages = made.json()["pages"]
            assert public_pages >= 3
            for each in (admin, ann, ann):
                # What follows the public part is each key's own.
                await talked(each, PUBLIC, SECRET * 3)
            shown = await seen(admin, "prefixes")
            public = [each for each in shown["prefixes"] if each["public"]]
            (shared,) = public
            assert (shared["owner"], shared["above"]) == (None, None)
            assert shared["prompts"] == ["shop"]
            assert re.fullmatch("[0-9a-f]{6}", shared["label"])
            again = (await seen(admin, "prefixes"))["prefixes"]
            labels = [each["label"] for each in again]
            assert labels == [each["label"] for each in shown["prefixes"]], "they stay"
            assert len(set(labels)) == len(labels)
            assert (shared["pages"], shared["hits"]) == (public_pages, 2)
            assert shared["branches"] == 2, "one for each key"
            (own,) = [each for each in shown["prefixes"] if not each["public"]]
            assert shown["prefixes"][own["above"]] == shared
            assert (own["owner"], own["hits"], own["prompts"]) == ("ann", 1, [])
            assert own["pages"] >= 2
            (one,) = (await seen(admin, "prefixes", limit="1"))["prefixes"]
            assert one == shared
            assert (await ann.get("/admin/cache/prefixes")).status_code == 403
            assert SECRET[:20] not in str(shown)

            assert (await admin.delete("/admin/prompts/shop")).is_success
            shown = await seen(admin, "prefixes")
            assert not any(each["public"] for each in shown["prefixes"])
            assert {each["owner"] for each in shown["prefixes"]} <= {"root", "ann"}
