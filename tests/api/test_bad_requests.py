"""Generated bad requests: always a 4xx in OpenAI's shape, and nothing changes.

CHATSERVE_SOAK_EXAMPLES sets how many the long form makes of each kind.
"""

import asyncio
import os
from collections.abc import Generator
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatserve.api.fields import ChatFields, CompletionFields
from tests.api.harness import CHAT, MODEL, FakeHealth, FakeService, Site, build, quick, site

SHORT = settings(
    max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=False
)
LONG = settings(
    max_examples=int(os.environ.get("CHATSERVE_SOAK_EXAMPLES", "4000")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

NAMES = [*ChatFields.__struct_fields__, *CompletionFields.__struct_fields__, "tools", "echo", "x"]
NUMBERS = st.one_of(
    st.integers(),
    st.integers(-3, 30),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 2**64]),
    st.floats(allow_nan=False, allow_infinity=False),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(), st.just(MODEL.name))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=8), inner, max_size=5)
    ),
    max_leaves=12,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.one_of(
                st.sampled_from(["system", "developer", "user", "assistant", "tool"]), VALUES
            ),
            "content": st.one_of(st.text(), VALUES),
            "name": VALUES,
            "tool_calls": VALUES,
            "extra": VALUES,
        },
    ),
    max_size=6,
)
FIELDS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5)
BODIES = st.one_of(
    FIELDS,
    FIELDS.map(lambda fields: CHAT | fields),
    FIELDS.map(lambda fields: {"model": MODEL.name, "prompt": "a"} | fields),
    st.builds(lambda fields, said: CHAT | fields | {"messages": said}, FIELDS, MESSAGES),
    VALUES,
)
ODD_JSON = st.sampled_from(
    [
        b"NaN",
        b"1e999",
        b"1" * 5_000,
        b'"\\ud800"',
        b'"\x00"',
        b"[" * 2_000,
        b"\xff",
        b"-",
        b"{",
        b"",
    ]
)


class Probe:
    """One app and one loop for all examples of a test."""

    def __init__(self) -> None:
        self.service, self.health = FakeService(), FakeHealth()
        self.app = build(self.service, self.health)
        self.runner = asyncio.Runner()
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=True)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://localhost")

    def post(self, path: str, content: bytes) -> httpx.Response:
        return self.runner.run(
            self.client.post(path, content=content, headers={"Content-Type": "application/json"})
        )

    def check(self, path: str, content: bytes) -> None:
        asked = len(self.service.asks)
        answer = self.post(path, content)
        if answer.status_code == 200:
            assert len(self.service.asks) > asked
        else:
            assert 400 <= answer.status_code < 500, answer.text
            assert len(self.service.asks) == asked
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert len(error["message"]) < 400
        assert not self.service.left_open
        self.service.asks.clear()
        self.service.all_replies.clear()

    def close(self) -> None:
        self.runner.run(self.client.aclose())
        self.runner.close()


@pytest.fixture
def probe() -> Generator[Probe]:
    made = Probe()
    yield made
    made.close()


def check_fields(probe: Probe, body: Any, *, chat: bool) -> None:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    try:
        content = orjson.dumps(body)
    except TypeError:  # integers that JSON numbers of 64 bits do not hold
        content = repr(body).encode("utf-8", "surrogatepass")
    probe.check(path, content)


def check_bytes(probe: Probe, content: bytes, odd: bytes) -> None:
    probe.check("/v1/chat/completions", content)
    good = orjson.dumps(CHAT)
    probe.check("/v1/chat/completions", good[: len(content) % len(good)])
    probe.check("/v1/completions", good[:-1] + b',"n":' + odd + b"}")


@given(body=BODIES, chat=st.booleans())
@SHORT
def test_bad_fields(probe: Probe, body: Any, *, chat: bool) -> None:
    check_fields(probe, body, chat=chat)


@given(content=st.binary(max_size=400), odd=ODD_JSON)
@SHORT
def test_bad_bytes(probe: Probe, content: bytes, odd: bytes) -> None:
    check_bytes(probe, content, odd)


@pytest.mark.soak
@given(body=BODIES, chat=st.booleans())
@LONG
def test_bad_fields_for_long(probe: Probe, body: Any, *, chat: bool) -> None:
    check_fields(probe, body, chat=chat)


@pytest.mark.soak
@given(content=st.binary(max_size=4_000), odd=ODD_JSON)
@LONG
def test_bad_bytes_for_long(probe: Probe, content: bytes, odd: bytes) -> None:
    check_bytes(probe, content, odd)


# -- on the socket: whatever the bytes, one refusal or a close

PIECES = st.sampled_from(
    [
        b"GET / HTTP/1.1\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\n",
        b"Host: localhost\r\n",
        b"Content-Length: 5\r\n",
        b"Content-Length: x\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Type: application/json\r\n",
        b"\r\n",
        b"\n",
        b" folded\r\n",
        b"5\r\nabcde\r\n",
        b"0\r\n\r\n",
        b"\x00",
        b"{}",
    ]
)


async def talk_and_check(running: Site, pieces: list[bytes]) -> None:
    answer = await running.talk(b"".join(pieces))
    assert b"HTTP/1.1 5" not in answer.replace(b"HTTP/1.1 501", b"")
    assert not running.service.asks


def check_sockets(examples: settings) -> None:
    """The site lives as long as all examples, so it is made outside of them."""
    short = quick(idle_seconds=0.05, head_seconds=0.05, body_seconds=0.05, linger_seconds=0.05)
    with asyncio.Runner() as runner:
        standing = site(short)
        running = runner.run(standing.__aenter__())

        @given(pieces=st.lists(st.one_of(PIECES, st.binary(max_size=20)), max_size=10))
        @examples
        def check(pieces: list[bytes]) -> None:
            runner.run(talk_and_check(running, pieces))

        check()
        runner.run(standing.__aexit__(None, None, None))


def test_bad_sockets() -> None:
    check_sockets(settings(SHORT, max_examples=60))


@pytest.mark.soak
def test_bad_sockets_for_long() -> None:
    check_sockets(LONG)
