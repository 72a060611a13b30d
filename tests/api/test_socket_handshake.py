"""`/api/socket`: who gets in, and what a handshake must look like."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus, NegotiationError
from websockets.typing import Origin, Subprotocol

from chatserve.api.keys import key_ring
from chatserve.api.session import COOKIE_NAME
from tests.api.harness import Site, close, quick, read_to_end, site, until
from tests.api.socket_peer import frame, handshake, peer, tab, text
from tests.api.test_connection import status_of

KEY, OTHER = "user-key-0123456789", "other-key-0123456789"


@pytest.fixture
async def served() -> AsyncGenerator[Site]:
    async with site() as running:
        yield running


@pytest.fixture
async def keyed(tmp_path: Any) -> AsyncGenerator[Site]:
    path = tmp_path / "keys.toml"
    path.write_text(f'[[keys]]\nname = "bob"\nkey = "{KEY}"\nrole = "user"\n')
    async with site(keys=key_ring(key_file=path)) as running:
        yield running


async def refusal(running: Site, **options: Any) -> tuple[int, bytes]:
    """The status and body that a client of the library gets."""
    with pytest.raises(InvalidStatus) as refused:
        async with tab(running, **options):
            pass
    response = refused.value.response
    assert response.headers["x-content-type-options"] == "nosniff"
    return response.status_code, bytes(response.body)


async def quiet(running: Site) -> None:
    await until(lambda: not running.server_state.tasks)
    await until(lambda: not running.server_state.connections)
    assert running.conversations.listeners == 0


# -- the subprotocol


async def test_the_subprotocol_is_chosen_among_others(served: Site) -> None:
    offered = [Subprotocol("soap"), Subprotocol("chatserve.v1"), Subprotocol("chatserve.v9")]
    async with tab(served, subprotocols=offered) as page:
        assert page.connection.subprotocol == "chatserve.v1"
        assert (await page.ask("ping"))["event"] == "pong"


@pytest.mark.parametrize("offered", [None, ["soap"], ["chatserve.v2"], ["CHATSERVE.V1"]])
async def test_without_our_subprotocol_there_is_no_socket(
    served: Site, offered: list[str] | None
) -> None:
    """Who speaks another version learns it at once, and not from frames it does not know."""
    status, body = await refusal(served, subprotocols=offered)
    assert status == 400
    assert b"chatserve.v1" in body
    await quiet(served)


async def test_no_extension_is_agreed_on(served: Site) -> None:
    """Compression would cost 64 KiB a socket, and lets a small message become a huge one."""
    async with tab(served, compression="deflate") as page:
        assert page.connection.response is not None
        assert "sec-websocket-extensions" not in page.connection.response.headers
        assert (await page.ask("ping"))["event"] == "pong"


# -- who


async def test_a_page_of_another_site_is_refused(served: Site) -> None:
    host = f"127.0.0.1:{served.port}"
    for origin in (f"http://{host}", f"https://{host}", None):
        async with tab(served, origin=origin and Origin(origin)) as page:
            assert (await page.ask("ping"))["event"] == "pong"
    for origin in (
        "https://evil.example",
        f"http://{host}.evil.example",
        "null",
        "http://127.0.0.1",
    ):
        status, _ = await refusal(served, origin=Origin(origin))
        assert status == 403, origin
    await quiet(served)


async def test_a_host_that_is_not_ours_is_refused(served: Site) -> None:
    answer = await served.talk(handshake({"Host": "evil.example"}))
    assert status_of(answer) == 403


async def test_a_socket_needs_a_key(keyed: Site) -> None:
    async with tab(keyed, additional_headers={"Authorization": f"Bearer {KEY}"}) as page:
        assert (await page.ask("ping"))["event"] == "pong"
    for headers in ({}, {"Authorization": f"Bearer {OTHER}"}, {"Cookie": f"{COOKIE_NAME}=x.y"}):
        status, body = await refusal(keyed, additional_headers=headers)
        assert status == 401
        assert OTHER.encode() not in body
    await quiet(keyed)


async def test_a_cookie_counts_as_its_key_until_it_is_ended(keyed: Site) -> None:
    async with keyed.client() as client:
        signed = await client.post("/api/session", json={"key": KEY})
        assert signed.status_code in (200, 204)
        cookie = {"Cookie": f"{COOKIE_NAME}={signed.cookies[COOKIE_NAME]}"}
        async with tab(keyed, additional_headers=cookie) as page:
            made = await keyed.conversations.create("bob", title=None, system=None, settings={})
            await page.send_turn(made.id)
        host = {"Origin": "https://evil.example"}
        assert (await refusal(keyed, additional_headers=cookie | host))[0] == 403
        assert (await client.delete("/api/session")).status_code == 204
        assert (await refusal(keyed, additional_headers=cookie))[0] == 401


async def test_sockets_of_one_key_have_a_limit() -> None:
    async with site(quick(connections_max=6)) as running:
        assert running.server_state is not None
        async with tab(running), tab(running), tab(running):
            status, body = await refusal(running)
            assert status == 429
            assert b"busy" in body
        await quiet(running)
        async with tab(running) as page:
            assert (await page.ask("ping"))["event"] == "pong"


@pytest.mark.parametrize(("state", "value"), [("draining", True), ("ready", False)])
async def test_a_server_that_is_stopping_or_loads_takes_no_sockets(
    served: Site, state: str, value: bool
) -> None:
    setattr(served.health, state, value)
    with pytest.raises(InvalidStatus) as refused:
        async with tab(served):
            pass
    assert refused.value.response.status_code == 503
    assert refused.value.response.headers["retry-after"] == "2"


async def test_another_path_is_no_socket(served: Site) -> None:
    for line in ("GET /api/sockets HTTP/1.1", "GET /api/socket/ HTTP/1.1", "GET / HTTP/1.1"):
        assert status_of(await served.talk(handshake(line=line))) == 404


async def test_a_client_that_takes_no_subprotocol_is_told_by_its_own_library(served: Site) -> None:
    """What we answer is ours; a client that did not offer it would have to refuse."""
    async with tab(served, subprotocols=[Subprotocol("chatserve.v1")]) as page:
        assert page.connection.subprotocol == "chatserve.v1"
    with pytest.raises((InvalidStatus, NegotiationError)):
        async with tab(served, subprotocols=[Subprotocol("other")]):
            pass


# -- faults


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-WebSocket-Key": None}, 400),
        ({"Sec-WebSocket-Key": ""}, 400),
        ({"Sec-WebSocket-Key": "dGhlIHNhbXBsZQ=="}, 400),
        ({"Sec-WebSocket-Key": "not base64 at all !!!!!!"}, 400),
        ({"Sec-WebSocket-Version": None}, 400),
        ({"Sec-WebSocket-Version": "8"}, 426),
        ({"Sec-WebSocket-Version": "14"}, 426),
        ({"Sec-WebSocket-Version": "13, 8"}, 426),
        ({"Sec-WebSocket-Protocol": "a b"}, 400),
        ({"Sec-WebSocket-Protocol": None}, 400),
        ({"Sec-WebSocket-Extensions": ";;"}, 101),
        # No handshake at all: the path has no other use.
        ({"Upgrade": None}, 404),
        ({"Upgrade": "h2c"}, 404),
        ({"Connection": "close"}, 404),
    ],
)
async def test_a_handshake_with_one_fault(
    served: Site, headers: dict[str, str | None], status: int
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(handshake(headers))
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n\r\n")
    assert status_of(head) == status
    if status == 426:
        assert b"sec-websocket-version: 13\r\n" in head.lower()
    if 400 <= status != 404:
        await read_to_end(reader)  # the server closes
    await close(writer)
    await quiet(served)


@pytest.mark.parametrize(
    ("line", "headers", "status"),
    [
        ("POST /api/socket HTTP/1.1", {"Content-Length": "0"}, 400),
        ("HEAD /api/socket HTTP/1.1", {}, 400),
        ("GET /api/socket HTTP/1.1", {"Content-Length": "2"}, 400),
        ("GET /api/socket HTTP/1.1", {"Transfer-Encoding": "chunked"}, 400),
        ("GET /api/socket HTTP/1.0", {}, 400),
    ],
)
async def test_a_handshake_is_a_get_without_a_body(
    served: Site, line: str, headers: dict[str, str], status: int
) -> None:
    answer = await served.talk(handshake(headers, line))
    assert status_of(answer) == status
    await quiet(served)


async def test_what_comes_in_one_piece_with_the_handshake_is_refused(served: Site) -> None:
    ping = text({"type": "ping", "request": "r"})
    assert status_of(await served.talk(handshake() + ping)) == 400
    assert status_of(await served.talk(handshake() + b"GET / HTTP/1.1\r\n\r\n")) == 400
    await quiet(served)


async def test_bytes_before_our_answer_are_refused_and_nothing_is_left() -> None:
    """The answer is held up where a handshake is held up most easily: by its sign-in."""
    async with site() as running:
        gate, entered = asyncio.Event(), asyncio.Event()
        inner = running.app.router

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            entered.set()
            await gate.wait()
            await inner(scope, receive, send)

        running.app.router = slow  # type: ignore[assignment]
        running.app.middleware_stack = running.app.build_middleware_stack()
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(handshake())
        async with asyncio.timeout(10):
            await entered.wait()
        writer.write(frame(1, b"{}"))
        answer = await read_to_end(reader)
        assert status_of(answer) == 400
        gate.set()
        await close(writer)
        await quiet(running)


async def test_a_handshake_in_single_bytes_is_good(served: Site) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    for byte in handshake():
        writer.write(bytes([byte]))
        await writer.drain()
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n\r\n")
    assert status_of(head) == 101
    await close(writer)
    await quiet(served)


async def test_a_client_that_goes_at_once_leaves_nothing(served: Site) -> None:
    for _ in range(20):
        _, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(handshake())
        await writer.drain()
        writer.transport.abort()
    await quiet(served)
    async with peer(served) as client:
        await client.pong()
