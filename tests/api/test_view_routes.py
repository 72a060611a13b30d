"""What an admin sees of the cache, over HTTP."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from chatserve.api.keys import key_ring
from chatserve.errors import Unavailable
from tests.api.harness import site

KEYS = (
    '[[keys]]\nname = "ann"\nkey = "key-of-ann"\nrole = "admin"\n'
    '[[keys]]\nname = "bob"\nkey = "key-of-bob"\n'
)
PAGES = {"states": ["free"], "device": {"pages": 2, "cells": "AAA="}, "host": None}


class Views:
    """Shows what it is given. Stands for the whole cache as well."""

    @property
    def views(self) -> "Views":
        return self

    def pages(self) -> Mapping[str, object]:
        return PAGES

    async def conversations(
        self, owners: Sequence[str], *, limit: int, after: str | None
    ) -> Mapping[str, object]:
        return {"owners": list(owners), "limit": limit, "after": after}

    async def prefixes(self, *, limit: int) -> Mapping[str, object]:
        return {"limit": limit}


PATHS = ["/admin/cache/pages", "/admin/cache/conversations", "/admin/cache/prefixes"]


async def test_the_conversations_of_every_key_are_asked_for(tmp_path: Path) -> None:
    path = "/admin/cache/conversations"
    file = tmp_path / "keys.toml"
    file.write_text(KEYS)
    async with site(cache=Views) as running, running.client() as client:
        answer = await client.get(path)
        assert answer.json() == {"owners": ["local"], "limit": 50, "after": None}
        assert answer.headers["cache-control"] == "no-store"
        answer = await client.get(path, params={"limit": "0"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "limit")
        answer = await client.get(path, params={"after": ""})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "after")
    keys = key_ring(key_file=file)
    headers = {"Authorization": "Bearer key-of-ann"}
    async with site(cache=Views, keys=keys) as running, running.client(headers=headers) as client:
        answer = await client.get(path, params={"limit": "9999", "after": "there"})
        assert answer.json() == {"owners": ["ann", "bob"], "limit": 100, "after": "there"}


async def test_the_page_map_is_shown_as_it_is() -> None:
    async with site(cache=Views) as running, running.client() as client:
        answer = await client.get("/admin/cache/pages")
        assert (answer.status_code, answer.json()) == (200, PAGES)
        assert answer.headers["cache-control"] == "no-store"


async def test_so_many_prefixes_are_asked_for() -> None:
    path = "/admin/cache/prefixes"
    async with site(cache=Views) as running, running.client() as client:
        for limit, asked in ((None, 50), ("7", 7), ("101", 100)):
            answer = await client.get(path, params={} if limit is None else {"limit": limit})
            assert (answer.status_code, answer.json()) == (200, {"limit": asked})
            assert answer.headers["cache-control"] == "no-store"
        answer = await client.get(path, params={"limit": "-1"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "limit")


@pytest.mark.parametrize("path", PATHS)
async def test_only_an_admin_sees_anything(path: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(KEYS)
    keys = key_ring(key_file=file)
    async with site(cache=Views, keys=keys) as running, running.client() as client:
        for key, status in (("key-of-bob", 403), ("nobody", 401)):
            answer = await client.get(path, headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == status
        assert (await client.get(path)).status_code == 401


@pytest.mark.parametrize("path", PATHS)
async def test_while_the_model_loads_there_is_nothing_to_see(path: str) -> None:
    def loading() -> Views:
        raise Unavailable("The model is loading.", retry_after=2.0)

    async with site(cache=loading) as running, running.client() as client:
        answer = await client.get(path)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
