"""The door, in pairs: what may pass, and the same with one thing wrong."""

from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from chatserve.api.gate import RateLimit
from chatserve.api.keys import KeyRing, key_ring
from chatserve.api.page_routes import STATIC_PATHS
from chatserve.api.session import COOKIE_NAME, Sessions
from chatserve.errors import Busy, SettingsError
from tests.api.harness import CHAT, COOKIE_KEY, MODEL, Site, site

ADMIN, USER, OTHER = "admin-key-0123456789", "user-key-0123456789", "other-key-0123456789"


@pytest.fixture
def keys(tmp_path: Any) -> KeyRing:
    path = tmp_path / "keys.toml"
    path.write_text(
        f"""
        [[keys]]
        name = "ada"
        key = "{ADMIN}"
        role = "admin"
        [[keys]]
        name = "bob"
        key = "{USER}"
        requests = 2
        [[keys]]
        name = "eve.x"
        key = "{OTHER}"
        """
    )
    return key_ring(key_file=path)


@pytest.fixture
async def keyed(keys: KeyRing) -> AsyncGenerator[Site]:
    async with site(keys=keys, cors_origins=["https://friend.example"]) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def chat(client: httpx.AsyncClient, **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.post("/v1/chat/completions", json=CHAT, headers=names)


# -- keys


async def test_a_request_needs_a_key_and_is_its_tenants(keyed: Site) -> None:
    async with keyed.client() as client:
        for wrong in ({}, {"Authorization": f"Basic {USER}"}, bearer(USER + "x"), bearer("x")):
            answer = await chat(client, **wrong)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert not keyed.service.asks
        assert (await chat(client, **bearer(USER))).status_code == 200
        assert (await chat(client, **bearer(OTHER))).status_code == 200
    assert [ask.tenant for ask in keyed.service.asks] == ["bob", "eve.x"]


@pytest.mark.parametrize(
    ("path", "none", "user", "admin"),
    [
        ("/health", 200, 200, 200),
        ("/ready", 200, 200, 200),
        ("/", 200, 200, 200),
        *((path, 200, 200, 200) for path in sorted(STATIC_PATHS)),
        ("/metrics", 401, 403, 200),
        ("/v1/models", 401, 200, 200),
        (f"/v1/models/{MODEL.name}", 401, 200, 200),
        ("/v1/models/other", 401, 404, 404),
        ("/admin/cache", 401, 403, 200),
        ("/admin/other", 401, 403, 404),
        ("/admin/", 401, 403, 404),
        ("/admin/cache/", 401, 403, 404),
        ("/%61dmin/cache", 401, 403, 200),
        ("//admin/cache", 401, 404, 404),
        ("/./admin/cache", 401, 404, 404),
        ("/ADMIN/cache", 401, 404, 404),
        ("/health/../admin/cache", 401, 404, 404),
        ("/api/session", 200, 200, 200),
        ("/docs", 401, 404, 404),
        ("/page/index.html", 401, 404, 404),
    ],
)
async def test_what_each_role_may_get(
    keyed: Site, path: str, *, none: int, user: int, admin: int
) -> None:
    expected = {"": none, USER: user, ADMIN: admin}
    for key, status in expected.items():
        lines = [f"GET {path} HTTP/1.1", "Host: localhost", "Connection: close", "", ""]
        if key:
            lines.insert(1, f"Authorization: Bearer {key}")
        answer = await keyed.talk("\r\n".join(lines).encode())
        assert answer.startswith(b"HTTP/1.1 %d " % status), (key, answer[:60])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"model": MODEL.name, "prompt": "hi"}),
    ],
)
async def test_a_users_key_does_not_go_ahead_of_others(
    keyed: Site, path: str, body: dict[str, Any]
) -> None:
    async with keyed.client() as client:

        async def status(key: str, priority: int) -> int:
            answer = await client.post(
                path, json=body | {"priority": priority}, headers=bearer(key)
            )
            if answer.status_code != 200:
                error = answer.json()["error"]
                assert error["param"] == "priority"
                assert error["type"] == "invalid_request_error"
                assert "admin" in error["message"]
            return answer.status_code

        assert [await status(USER, each) for each in (-10, -1, 0, 10)] == [400, 400, 200, 200]
        assert [await status(ADMIN, each) for each in (-10, -1, 0, 10)] == [200] * 4
        assert (await client.post("/api/session", json={"key": USER})).status_code == 200
        by_cookie = await client.post(path, json=body | {"priority": -1})
        assert by_cookie.status_code == 400
    assert [ask.priority for ask in keyed.service.asks] == [0, 10, -10, -1, 0, 10]


async def test_without_keys_everybody_goes_ahead_of_others() -> None:
    async with site() as running, running.client() as client:
        answer = await client.post("/v1/chat/completions", json=CHAT | {"priority": -10})
        assert answer.status_code == 200
    assert running.service.asks[0].priority == -10


async def test_without_keys_everybody_is_local_and_admin() -> None:
    async with site() as running, running.client() as client:
        assert (await chat(client, **bearer("whatever"))).status_code == 200
        assert (await client.get("/admin/cache")).status_code == 200
        assert (await client.post("/api/session", json={"key": ""})).json()["role"] == "admin"
        told = await client.get("/api/session")
        assert told.json() == {"name": "local", "role": "admin"}
    assert running.service.asks[0].tenant == "local"


async def test_a_single_key_is_an_admins() -> None:
    async with site(keys=key_ring(api_key=ADMIN)) as running, running.client() as client:
        assert (await client.get("/admin/cache")).status_code == 401
        assert (await client.get("/admin/cache", headers=bearer(ADMIN))).status_code == 200


async def test_requests_at_once_are_limited_by_key_before_the_body_is_read(keyed: Site) -> None:
    keyed.service.script = lambda ask: []
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {USER}\r\n"
        "Content-Type: application/json\r\n"
    )
    streamed = CHAT | {"stream": True}
    async with (
        keyed.client(headers=bearer(USER)) as client,
        client.stream("POST", "/v1/chat/completions", json=streamed),
        client.stream("POST", "/v1/chat/completions", json=streamed),
    ):
        refused = await keyed.talk(f"{head}Connection: close\r\nContent-Length: 9\r\n\r\n".encode())
        assert refused.startswith(b"HTTP/1.1 429 ")
        assert b"retry-after: 1\r\n" in refused.lower()
        async with client.stream(
            "POST", "/v1/chat/completions", json=streamed, headers=bearer(OTHER)
        ) as answer:
            assert answer.status_code == 200


@pytest.mark.parametrize(
    "text",
    [
        "keys = 3",
        "[[keys]]\nname = 'a'",
        "[[keys]]\nname = 'a b'\nkey = '0123456789'",
        "[[keys]]\nname = 'a'\nkey = 'short'",
        "[[keys]]\nname = 'a'\nkey = '0123456789'\nrole = 'king'",
        "[[keys]]\nname = 'a'\nkey = '0123456789'\nrequests = 0",
        "[[keys]]\nname = 'a'\nkey = '0123456789'\nlimit = 1",
        "[[keys]]\nname = 'a'\nkey = '0123456789'\ncache_share = 1.1",
        "[[keys]]\nname = 'a'\nkey = '0123456789'\ncache_share = -0.1",
        "[[keys]]\nname = 'a'\nkey = '0123456789'\ncache_share = nan",
        "[[keys]]\nname = 'a'\nkey = '0123456789'\ncache_share = 0.6\n"
        "[[keys]]\nname = 'b'\nkey = '9876543210'\ncache_share = 0.6",
        "[[keys]]\nname = 'a'\nkey = '0123456789'\n[[keys]]\nname = 'a'\nkey = '9876543210'",
        "[[keys]]\nname = 'a'\nkey = '0123456789'\n[[keys]]\nname = 'b'\nkey = '0123456789'",
        "[[keys",
    ],
)
def test_a_wrong_key_file_is_one_clear_error_without_the_key(text: str, tmp_path: Any) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        key_ring(key_file=path)
    assert "0123456789" not in str(caught.value)
    with pytest.raises(SettingsError):
        key_ring(key_file=tmp_path / "absent.toml")


# -- Host, Origin, media


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("localhost:8000", True),
        ("LOCALHOST:8000", True),
        ("127.0.0.1:1", True),
        ("127.8.8.8", True),
        ("[::1]:8000", True),
        ("chat.example", True),
        ("bound.example:80", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("chat.example.evil", False),
        ("chat.example@evil", False),
        ("10.0.0.1", False),
        ("0.0.0.0", False),
        ("[::1", False),
        ("", False),
    ],
)
async def test_only_our_hosts_are_answered(host: str, *, allowed: bool) -> None:
    async with site(host="bound.example", allowed_hosts=["Chat.Example"]) as running:
        for path in ("/health", "/", "/v1/models"):
            answer = await running.talk(
                f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
            )
            assert answer.startswith(b"HTTP/1.1 200 " if allowed else b"HTTP/1.1 403 ")


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:9", 200),
        ("https://localhost:9", 200),
        ("https://friend.example", 200),
        ("http://localhost", 403),
        ("http://localhost:90", 403),
        ("https://evil.example", 403),
        ("https://friend.example.evil", 403),
        ("null", 403),
        ("", 403),
        ("file://localhost:9", 403),
    ],
)
async def test_foreign_origins_change_nothing(keyed: Site, origin: str, *, status: int) -> None:
    async with keyed.client(headers=bearer(USER) | {"Host": "localhost:9"}) as client:
        answer = await chat(client, Origin=origin)
        assert answer.status_code == status
        allowed = answer.headers.get("access-control-allow-origin")
        assert allowed == (origin if "friend.example" in origin and status == 200 else None)
        friend = origin == "https://friend.example"
        session = await client.delete("/api/session", headers={"Origin": origin})
        assert session.status_code == (403 if friend or status == 403 else 204)
    assert len(keyed.service.asks) == (1 if status == 200 else 0)


@pytest.mark.parametrize(
    ("media", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=UTF-8", 200),
        ("application/json; charset=latin-1", 415),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("application/jsonp", 415),
        ("", 415),
    ],
)
async def test_a_body_must_be_json(media: str, *, status: int) -> None:
    async with site() as running, running.client() as client:
        answer = await chat(client, Content_Type=media)
        assert answer.status_code == status


async def test_a_preflight_is_answered_for_friends_on_v1_only(keyed: Site) -> None:
    ask = {"Access-Control-Request-Method": "POST", "Origin": "https://friend.example"}
    async with keyed.client() as client:
        good = await client.options("/v1/chat/completions", headers=ask)
        assert good.status_code == 204
        assert good.headers["access-control-allow-origin"] == "https://friend.example"
        assert "authorization" in good.headers["access-control-allow-headers"]
        for path, origin in (
            ("/v1/chat/completions", "https://evil.example"),
            ("/api/session", "https://friend.example"),
            ("/admin/cache", "https://friend.example"),
        ):
            bad = await client.options(path, headers=ask | {"Origin": origin})
            assert bad.status_code in (401, 405)
            assert "access-control-allow-origin" not in bad.headers
        refused = await chat(client, Origin="https://friend.example")
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://friend.example"


async def test_every_answer_carries_the_security_headers(keyed: Site) -> None:
    async with keyed.client() as client:
        answers = [await client.get(path) for path in (*STATIC_PATHS, "/v1/models", "/nowhere")]
        for answer in answers:
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert len(answer.headers["x-request-id"]) == 24


# -- cookies


async def sign_in(client: httpx.AsyncClient, key: str) -> httpx.Response:
    return await client.post("/api/session", json={"key": key})


async def test_a_cookie_counts_as_its_key_until_it_is_ended(keyed: Site) -> None:
    async with keyed.client() as client:
        answer = await sign_in(client, USER)
        assert answer.json() == {"name": "bob", "role": "user"}
        told = await client.get("/api/session")
        assert (told.status_code, told.json()) == (200, answer.json())
        assert told.headers["cache-control"] == "no-store"
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert "Path=/" in cookie
        assert USER not in cookie
        assert (await chat(client)).status_code == 200
        assert (await client.get("/admin/cache")).status_code == 403
        assert (await chat(client, **bearer("wrong"))).status_code == 401
        stolen = client.cookies[COOKIE_NAME]
        assert (await client.delete("/api/session")).status_code == 204
        assert COOKIE_NAME not in client.cookies
        nobody = await client.get("/api/session")
        assert (nobody.status_code, nobody.json()) == (200, {"name": None, "role": None})
        claimed = await client.get("/api/session", headers=bearer("wrong"))
        assert claimed.status_code == 401
        assert (await chat(client, Cookie=f"{COOKIE_NAME}={stolen}")).status_code == 401
    assert keyed.service.asks[0].tenant == "bob"


async def test_a_cookie_is_secure_behind_tls(keyed: Site) -> None:
    async with keyed.client(headers={"Origin": "https://localhost:9", "Host": "localhost:9"}) as c:
        assert "Secure" in (await sign_in(c, USER)).headers["set-cookie"]


async def test_sign_in_refuses_wrong_keys_and_then_any_for_a_while(keyed: Site) -> None:
    async with keyed.client() as client:
        for wrong in ({"key": "wrong"}, {"key": 5}, {}, [1]):
            answer = await client.post("/api/session", json=wrong)
            assert answer.status_code in (400, 401)
            assert "set-cookie" not in answer.headers
        answers = [await sign_in(client, "wrong") for _ in range(8)]
        assert [a.status_code for a in answers] == [401] * 6 + [429] * 2
        assert int(answers[-1].headers["retry-after"]) >= 1
        assert (await sign_in(client, USER)).status_code == 429


def sessions(keys: KeyRing, now: list[float], key: bytes = COOKIE_KEY) -> Sessions:
    return Sessions(key, keys, seconds=100, ended_max=2, wall_clock=lambda: now[0])


def test_forged_expired_and_outdated_cookies_are_refused(keys: KeyRing) -> None:
    now = [1_000.0]
    ours = sessions(keys, now)
    bob, eve = keys.named("bob"), keys.named("eve.x")
    assert bob is not None
    assert eve is not None
    cookie = ours.issue(bob)
    assert ours.find(cookie) is bob
    assert ours.find(ours.issue(eve)) is eve
    name, session, expiry, tag = cookie.split(".")
    forged = [
        f"{b'ada'.hex()}.{session}.{expiry}.{tag}",
        f"{name}.{session}.{int(expiry) + 1}.{tag}",
        f"{name}.{'0' * 32}.{expiry}.{tag}",
        f"{name}.{session}.{expiry}.{tag[:-1]}",
        f"{name}.{session}.{expiry}.",
        f"{name}.{session}.{expiry}.\udcff",
        f"zz.{session}.{expiry}.{tag}",
        f"{name}.{session}.x.{tag}",
        "",
        "....",
        sessions(keys, now, bytes(32)).issue(bob),
    ]
    assert [ours.find(each) for each in forged] == [None] * len(forged)
    changed = key_ring(api_key="a-new-key-for-local")
    assert sessions(changed, now).find(cookie) is None
    now[0] += 100
    assert ours.find(cookie) is None


def test_ended_sessions_stay_ended_and_are_few(keys: KeyRing) -> None:
    now = [1_000.0]
    ours = sessions(keys, now)
    bob = keys.named("bob")
    assert bob is not None
    cookies = [ours.issue(bob) for _ in range(3)]
    ours.end("nonsense")
    ours.end(cookies[0])
    ours.end(cookies[1])
    assert [ours.find(each) for each in cookies] == [None, None, bob]


def test_a_rate_limit_refills_and_forgets_the_oldest_address() -> None:
    now = [0.0]
    limit = RateLimit(2, 10.0, 2, clock=lambda: now[0])
    limit.take("a")
    limit.take("a")
    with pytest.raises(Busy) as caught:
        limit.take("a")
    assert caught.value.retry_after == pytest.approx(5.0)
    now[0] += 5.0
    limit.take("a")
    with pytest.raises(Busy):
        limit.take("a")
    limit.take("b")
    limit.take("c")
    limit.take("a")
