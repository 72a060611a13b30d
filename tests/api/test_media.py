"""Path and method, then what a body is made of."""

import gzip
from typing import Any

import orjson
import pytest

from chatserve.api.keys import key_ring
from tests.api.harness import CHAT, MODEL, site

ADMIN = "admin-key-0123456789"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("PUT", "/v1/models", 405, "GET, HEAD"),
        ("POST", f"/v1/models/{MODEL.name}", 405, "GET, HEAD"),
        ("PATCH", "/v1/chat/completions", 405, "POST"),
        ("DELETE", "/v1/completions", 405, "POST"),
        ("PUT", "/admin/cache", 405, "GET, HEAD"),
        ("POST", "/nowhere", 404, None),
        ("POST", "/v1/chat/completions", 415, None),
    ],
)
async def test_path_and_method_come_before_the_body(
    method: str, path: str, status: int, allow: str | None
) -> None:
    bodies: list[dict[str, Any]] = [
        {"content": b"x=1", "headers": {"Content-Type": "text/plain"}},
        {"content": b"x=1"},
        {"json": CHAT, "headers": {"Content-Encoding": "gzip"}},
    ]
    async with site(keys=key_ring(api_key=ADMIN)) as keyed, keyed.client() as client:
        for body in bodies:
            headers = body.get("headers", {})
            answer = await client.request(
                method, path, **body | {"headers": headers | bearer(ADMIN)}
            )
            assert answer.status_code == status
            assert answer.headers.get("allow") == allow
            assert answer.json()["error"]["message"]
            assert answer.headers["x-content-type-options"] == "nosniff"
            # Whoever is nobody here is told nothing of what there is.
            assert (await client.request(method, path, **body)).status_code == 401
    assert not keyed.service.asks


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/session"])
async def test_a_body_that_is_compressed_is_refused_by_that_name(path: str) -> None:
    body = orjson.dumps(CHAT)
    packed = gzip.compress(body)
    async with site() as running, running.client() as client:
        for coding in ("gzip", "GZIP", "identity, gzip", "br", "x" * 200):
            headers = {"Content-Type": "application/json", "Content-Encoding": coding}
            answer = await client.post(path, content=packed, headers=headers)
            assert answer.status_code == 415
            message = answer.json()["error"]["message"]
            assert "Content-Encoding" in message
            assert coding.split(", ")[-1][:40] in message
            assert len(message) < 200
        assert not running.service.asks
        plain = {"Content-Type": "application/json", "Content-Encoding": "identity"}
        answer = await client.post("/v1/chat/completions", content=body, headers=plain)
        assert answer.status_code == 200
        looked = await client.get("/v1/models", headers={"Content-Encoding": "gzip"})
        assert looked.status_code == 200, "there is no body"
