"""Deleted on a server that cannot find the pages: they go from the disk all the same."""

import asyncio
from pathlib import Path

import httpx
import pytest

from tests.wiring.server import MODEL, reviving
from tests.wiring.test_forgetting import Proof, gone, no_deletion_under_way, talked

PAGES_MIN = 15


@pytest.mark.parametrize(
    "options",
    [
        ("--disk-capacity", "0"),
        ("--prefix-cache", "off"),
        ("--page-size", "32"),
        ("--disk-capacity", "0", "--host-memory", "16MiB"),
    ],
    ids=" ".join,
)
async def test_a_server_with_other_options_forgets_what_an_earlier_one_kept(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    with reviving(tmp_path) as revived:
        await revived.ready()
        async with httpx.AsyncClient(base_url=revived.server.url, timeout=60) as client:
            deleted = await talked(client)
        proof = await asyncio.to_thread(Proof, revived, deleted)
        assert proof.pages >= PAGES_MIN, proof.pages
        revived.kill()
        revived.spawn(*options)
        await revived.ready()
        async with httpx.AsyncClient(base_url=revived.server.url, timeout=60) as client:
            if "--page-size" not in options:
                ask = {"model": MODEL, "prompt": "One, two, three. " * 20, "max_tokens": 4}
                assert (await client.post("/v1/completions", json=ask)).status_code == 200
                transit = revived.server.cache()["cache"]["transit"]
                assert transit["unkept"] == 0, "waits for a disk that takes nothing"
            assert (await client.delete(f"/api/conversations/{deleted}")).status_code == 204
            await asyncio.to_thread(proof.assert_nothing_is_left)
        revived.kill()
        revived.spawn()
        await revived.ready()
        async with httpx.AsyncClient(base_url=revived.server.url, timeout=60) as client:
            again = await talked(client)
            turns = (await client.get(f"/api/conversations/{again}")).json()["turns"]
            assert turns[1]["final"]["receipt"]["disk"] == 0, "computed anew, all of it"


async def test_a_folder_that_cannot_be_opened_is_told_and_the_names_stay(tmp_path: Path) -> None:
    with reviving(tmp_path) as revived:
        await revived.ready()
        async with httpx.AsyncClient(base_url=revived.server.url, timeout=60) as client:
            deleted = await talked(client)
        proof = await asyncio.to_thread(Proof, revived, deleted)
        revived.kill()
        (revived.data / "pages").chmod(0o755)
        revived.spawn("--disk-capacity", "0")
        await revived.ready()
        async with httpx.AsyncClient(base_url=revived.server.url, timeout=60) as client:
            answer = await client.delete(f"/api/conversations/{deleted}")
            assert answer.status_code == 503
            assert answer.headers["retry-after"]
            assert await gone(client, deleted)
            (revived.data / "pages").chmod(0o700)
            await no_deletion_under_way(client)
            await asyncio.to_thread(proof.assert_nothing_is_left)
