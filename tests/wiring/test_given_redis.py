"""A server of conversations that is given: what it must be, and what is told at start.

Real processes; TLS is a proxy's. How a whole chatserve lives with one is in
`test_live_redis_faults.py`; here is how it begins.
"""

import argparse
import logging
import re
import signal
import socket
import ssl
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from chatserve import session_keeping
from chatserve.errors import StartError
from chatserve.session_keeping import session_store
from chatserve.settings import Settings, add_options, read_settings
from tests.chat.store.turns import OWNER, conversation, exchange
from tests.wiring.given_redis import (
    DATABASE,
    PASSWORD,
    USER,
    GivenRedis,
    GivenSite,
    TcpWay,
    make_certificate,
)
from tests.wiring.server import completed, free_port, launched

PROCESS_SECONDS_MAX = 120.0


@dataclass(frozen=True, slots=True)
class Given:
    """A server, and the certificates that a client may trust or not."""

    redis: GivenRedis
    certificate: Path
    context: ssl.SSLContext
    elsewhere: Path
    context_elsewhere: ssl.SSLContext


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Generator[Given]:
    folder = tmp_path_factory.mktemp("given")
    redis = GivenRedis(folder / "redis")
    redis.start()
    yield Given(redis, *make_certificate(folder), *make_certificate(folder, "elsewhere.test"))
    redis.kill()


@asynccontextmanager
async def reached(
    given: Given, *, tls: bool = True, elsewhere: bool = False
) -> AsyncGenerator[TcpWay]:
    """The server on a port."""
    context = given.context_elsewhere if elsewhere else given.context
    async with TcpWay(given.redis.path, context if tls else None) as way:
        yield way


def settings(folder: Path, url: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_options(parser)
    arguments = ["--redis-url", url, "--data-dir", str(folder)]
    return read_settings(parser.parse_args(arguments), {})


@pytest.mark.parametrize("way", ["unix", "redis", "rediss"])
async def test_one_that_will_do_keeps_conversations_in_its_database(
    given: Given, tmp_path: Path, way: str
) -> None:
    async with reached(given, tls=way == "rediss") as proxy:
        url = f"{way}://{USER}:{PASSWORD}@localhost:{proxy.port}/{DATABASE}"
        if way == "rediss":
            url += f"?ssl_ca_certs={given.certificate}"
        if way == "unix":
            url = f"unix://{USER}:{PASSWORD}@{given.redis.path}?db={DATABASE}"
        given.redis.command("FLUSHALL")
        async with session_store(settings(tmp_path, url)) as store:
            await store.create(conversation())
            assert await exchange(store, "a") == "c.a"
            assert [each.id for each in (await store.list(OWNER, search="a")).conversations]
            assert await store.running() == ()
            assert store.statistics().durable
        assert b"cs:{c}:meta" in list(given.redis.command("KEYS", "*"))  # type: ignore[call-overload]
        given.redis.command("SWAPDB", "0", str(DATABASE))
        assert given.redis.command("DBSIZE") == 0, "no other database has anything"
    assert not (tmp_path / "redis").exists(), "no server of our own"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis://{user}:wrong-word@localhost:{plain}/0", "refuses the name or password"),
        ("redis://nobody:{password}@localhost:{plain}/0", "refuses the name or password"),
        ("redis://{user}:{password}@localhost:{plain}/99", "DB index is out of range"),
        ("rediss://{user}:{password}@localhost:{tls}/0", "is not trusted: self-signed"),
        (
            "rediss://{user}:{password}@localhost:{other}/0?ssl_ca_certs={elsewhere}",
            "is not trusted: Hostname mismatch",
        ),
        (
            "rediss://{user}:{password}@localhost:{tls}/0?ssl_ca_certs=/nowhere/ca.pem",
            "certificates cannot be read",
        ),
    ],
    ids=["password", "user", "database", "unknown", "another's", "no file"],
)
async def test_what_will_not_mend_itself_is_told_at_once(
    given: Given, tmp_path: Path, caplog: pytest.LogCaptureFixture, url: str, told: str
) -> None:
    caplog.set_level(logging.DEBUG)
    async with (
        reached(given, tls=False) as plain,
        reached(given) as tls,
        reached(given, elsewhere=True) as other,
    ):
        whole = url.format(
            user=USER, password=PASSWORD, plain=plain.port, tls=tls.port, other=other.port,
            elsewhere=given.elsewhere,
        )  # fmt: skip
        message = await _refused(tmp_path, whole)
    assert told in message
    said = message + caplog.text
    assert PASSWORD not in said
    assert "wrong-word" not in said


@pytest.mark.parametrize(
    ("fault", "cure", "told"),
    [
        ("ACL SETUSER chats -evalsha", "ACL SETUSER chats +evalsha", "evalsha"),
        ("ACL SETUSER chats -info", "ACL SETUSER chats +info", "info"),
        ("ACL SETUSER chats resetkeys ~other:*", "ACL SETUSER chats resetkeys ~cs:*", "key"),
    ],
    ids=["command", "INFO", "keys"],
)
async def test_rights_that_are_missing_are_told_at_once(
    given: Given, tmp_path: Path, fault: str, cure: str, told: str
) -> None:
    given.redis.command(*fault.split())
    try:
        message = await _refused(tmp_path, f"unix://{USER}:{PASSWORD}@{given.redis.path}")
    finally:
        given.redis.command(*cure.split())
    assert "does not let its user do what is needed" in message
    assert told in message.lower()


async def test_a_server_without_a_command_of_ours_is_refused(tmp_path: Path) -> None:
    redis = GivenRedis(tmp_path / "redis", "--rename-command", "EVALSHA", "")
    redis.start()
    try:
        message = await _refused(tmp_path, f"unix://{redis.path}")
    finally:
        redis.kill()
    assert "unknown command" in message
    assert "EVALSHA" in message


async def test_a_server_that_may_lose_things_is_warned_of(
    given: Given, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"unix://{USER}:{PASSWORD}@{given.redis.path}"
    async with session_store(settings(tmp_path, url)):
        assert not caplog.records
    given.redis.command("CONFIG", "SET", "appendonly", "no")
    given.redis.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        async with session_store(settings(tmp_path, url)) as store:
            assert not store.statistics().durable
    finally:
        given.redis.command("CONFIG", "SET", "appendonly", "yes")
        given.redis.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 2
    assert "noeviction" in warnings[0]
    assert "appendonly is off" in warnings[1]


async def test_one_that_never_comes_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_keeping, "FIRST_ANSWER_TRIES", 3)
    monkeypatch.setattr(session_keeping, "FIRST_ANSWER_PAUSE_SECONDS", 0.01)
    port = free_port()
    url = f"redis://{USER}:{PASSWORD}@localhost:{port}"
    assert await _refused(tmp_path, url) == f"--redis-url: localhost:{port} does not answer."


async def _refused(folder: Path, url: str) -> str:
    with pytest.raises(StartError) as refusal:
        async with session_store(settings(folder, url)):
            pass
    return str(refusal.value)


def test_a_whole_server_that_is_refused_ends_with_one_line(given: Given, tmp_path: Path) -> None:
    url = f"unix://{USER}:wrong-word@{given.redis.path}"
    options = ["--port", "0", "--data-dir", str(tmp_path), "--redis-url", url]
    ended = completed("serve", *options, seconds_max=PROCESS_SECONDS_MAX)
    assert ended.returncode == 2
    assert "wrong-word" not in ended.stdout + ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
    assert line.endswith("refuses the name or password.")


def test_a_server_that_is_told_to_stop_does_not_wait_for_one_that_is_silent(
    tmp_path: Path,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, says nothing
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        with launched(tmp_path, ["--port", str(free_port()), "--redis-url", url]) as (process, at):
            until = time.monotonic() + PROCESS_SECONDS_MAX
            while not _answers(f"{at}/health"):
                assert process.poll() is None, (tmp_path / "server.log").read_text()
                assert time.monotonic() < until
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            # Whoever waited to its end would say that Redis does not answer, and end with 2.
            assert process.wait(PROCESS_SECONDS_MAX) == 0


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


async def test_one_that_comes_later_is_waited_for(site: GivenSite) -> None:
    """It was started after its chatserve had asked for it (`given_redis.py`)."""
    log = site.server.log.read_text()
    asked = log.index("does not answer")
    assert asked < log.index("answers again") < log.index("is ready after")
    assert not re.search(f"{PASSWORD}|{USER}:", log)
    async with site.client("ada") as client:
        conversation = await client.new()
    keys = site.redis.command("KEYS", f"cs:{{{conversation}}}:*")
    assert keys, f"in database {DATABASE}"
