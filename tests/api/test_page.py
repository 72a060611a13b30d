"""How the page is served: to everybody, compressed, kept by browsers as long as it is true."""

import gzip
import re

import pytest

from chatserve.api.keys import key_ring
from tests.api.harness import Site, site

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


async def assets(served: Site) -> list[str]:
    """What the page loads at once."""
    async with served.client() as client:
        index = (await client.get("/")).text
    return re.findall(r'(?:src|href)="(/assets/[^"]+)"', index)


async def test_the_page_and_what_it_loads_need_no_key() -> None:
    async with site(keys=key_ring(api_key="a-key-0123456789")) as served, served.client() as client:
        index = await client.get("/")
        assert index.status_code == 200
        assert index.headers["content-type"] == "text/html; charset=utf-8"
        loaded = await assets(served)
        assert {name.rpartition(".")[2] for name in loaded} == {"js", "css"}
        for name in loaded:
            answer = await client.get(name)
            assert answer.status_code == 200
            kind = "text/javascript" if name.endswith("js") else "text/css"
            assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
            assert answer.headers["x-content-type-options"] == "nosniff"
        for name in ("/assets/../index.html", "/assets/", "/source.sha256", "/assets/none.js"):
            assert (await client.get(name)).status_code in (401, 404)


async def test_everything_in_the_page_is_allowed_by_its_policy() -> None:
    async with site() as served, served.client() as client:
        index = await client.get("/")
        assert index.headers["content-security-policy"] == POLICY
        assert index.headers["cross-origin-opener-policy"] == "same-origin"
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", index.text)
        for script in re.findall(r"<script[^>]*>(.*?)</script>", index.text, re.DOTALL):
            assert script.strip() == ""


async def test_assets_are_kept_for_ever_and_the_page_is_asked_for_again() -> None:
    async with site() as served, served.client() as client:
        index = await client.get("/")
        assert index.headers["cache-control"] == "no-cache"
        again = await client.get("/", headers={"If-None-Match": index.headers["etag"]})
        assert again.status_code == 304
        assert again.content == b""
        other = await client.get("/", headers={"If-None-Match": '"another"'})
        assert other.status_code == 200
        for name in await assets(served):
            assert re.search(r"-[\w-]{8}\.(js|css)$", name), "its name tells of its content"
            answer = await client.get(name)
            assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"


@pytest.mark.parametrize(
    ("accepted", "packed"),
    [
        ("gzip, deflate, br", True),
        ("br;q=1.0, gzip;q=0.5", True),
        ("*", True),
        ("identity", False),
        ("", False),
        ("gzip;q=0", False),
        ("gzip; q=0.0, br", False),
    ],
)
async def test_texts_are_compressed_for_those_who_can_read_it(accepted: str, packed: bool) -> None:
    async with site() as served, served.client() as client:
        async with client.stream("GET", "/", headers={"Accept-Encoding": accepted}) as answer:
            raw = b"".join([piece async for piece in answer.aiter_raw()])
        plain = await client.get("/", headers={"Accept-Encoding": "identity"})
        assert (answer.headers.get("content-encoding") == "gzip") == packed
        assert (gzip.decompress(raw) if packed else raw) == plain.content
        assert answer.headers["vary"] == "Accept-Encoding"
        assert (answer.headers["etag"] == plain.headers["etag"]) != packed
