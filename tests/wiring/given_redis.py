"""A given server of conversations as somebody else runs it: of many databases, for a user with few
rights, behind TLS, on a way that can be made slow. And a chatserve that is given it.

The server itself speaks no TLS everywhere, so a proxy in a thread of its own does; the tests'
loops may come and go. What tests do to the server goes past the proxy, over its Unix socket.
"""

import asyncio
import datetime
import re
import signal
import ssl
import subprocess
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from anyio.from_thread import BlockingPortal, start_blocking_portal
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from redis import Redis
from redis.exceptions import RedisError
from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Subprotocol

from chatserve.redis_binary import find_binaries
from tests.chat.store.redis_process import SlowWay
from tests.wiring.chat_streams import ChatClient
from tests.wiring.server import Server, free_port, launched

START_SECONDS_MAX = 120.0
DATABASE = 3
USER, PASSWORD = "chats", "pass-word"
# All that chatserve asks for.
RIGHTS = "~cs:* +@read +@write +evalsha +script|load +info +ping +select +auth -@dangerous +info"
KEYS = {"ada": "key-of-ada", "bob": "key-of-bob", "operator": "key-of-operator"}


class GivenRedis:
    """The process. Its folder survives it. options: of this one besides."""

    def __init__(self, folder: Path, *options: str) -> None:
        folder.mkdir()
        self._options = options
        self.path = folder / "redis.sock"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """It answers when this returns."""
        binary = str(find_binaries()[0].path)
        options = ["--port", "0", "--unixsocket", str(self.path), "--databases", str(DATABASE + 1)]
        options += ["--appendonly", "yes", "--appendfsync", "always", "--dir", str(self._folder)]
        options += ["--user", USER, "on", f">{PASSWORD}", *RIGHTS.split()]
        options += self._options
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen([binary, *options], stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS_MAX
        while True:
            try:
                self.command("PING")
                return
            except (RedisError, OSError):
                assert self._process.poll() is None, (self._folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """kill -9, and it is gone."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def command(self, *words: str | int) -> object:
        """As its owner."""
        with Redis(unix_socket_path=str(self.path), db=DATABASE) as client:
            return client.execute_command(*words)


class TcpWay(SlowWay):
    """The proxy, on a TCP port. context: of its TLS."""

    def __init__(self, target: Path, context: ssl.SSLContext | None) -> None:
        super().__init__(Path(), target)
        self.port = free_port()
        self._context = context

    async def __aenter__(self) -> "TcpWay":
        self._server = await asyncio.start_server(
            self._carry, "127.0.0.1", self.port, ssl=self._context
        )
        return self


@dataclass
class GivenSite:
    """A chatserve with two users and an operator, its Redis, and the way between them."""

    server: Server
    redis: GivenRedis
    way: TcpWay
    portal: BlockingPortal

    def client(self, name: str) -> ChatClient:
        """As one of KEYS."""
        return ChatClient(self.server.url, KEYS[name])

    @asynccontextmanager
    async def socket(self, name: str) -> AsyncGenerator[ClientConnection]:
        """A WebSocket, as one of KEYS."""
        address = self.server.url.replace("http://", "ws://") + "/api/socket"
        headers = {"Authorization": f"Bearer {KEYS[name]}"}
        protocols = [Subprotocol("chatserve.v1")]
        async with connect(address, additional_headers=headers, subprotocols=protocols) as socket:
            yield socket

    def reset(self) -> None:
        """Cut all connections to Redis."""
        self.portal.call(self.way.reset)

    def lag(self) -> dict[float, int]:
        """How many ticks of the event loop were at the most so late, by bound in seconds."""
        text = httpx.get(self.server.url + "/metrics", headers=self.server.headers, timeout=30).text
        pattern = r'^chatserve_event_loop_lag_seconds_bucket\{le="([^"]+)"\} (\d+)'
        return {float(le): int(n) for le, n in re.findall(pattern, text, re.MULTILINE)}


@contextmanager
def given_site(folder: Path) -> Generator[GivenSite]:
    """The chatserve is started before its Redis."""
    certificate, context = make_certificate(folder)
    redis = GivenRedis(folder / "redis")
    way = TcpWay(redis.path, context)
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(way):
        try:
            url = f"rediss://{USER}:{PASSWORD}@localhost:{way.port}/{DATABASE}"
            url += f"?ssl_ca_certs={certificate}"
            with _started_before(redis, folder, url) as server:
                yield GivenSite(server, redis, way, portal)
        finally:
            redis.kill()


@contextmanager
def _started_before(redis: GivenRedis, folder: Path, url: str) -> Generator[Server]:
    tables = [
        f'[[keys]]\nname = "{name}"\nkey = "{key}"\n'
        + ('role = "admin"\n' if name == "operator" else "")
        for name, key in KEYS.items()
    ]
    (folder / "keys.toml").write_text("\n".join(tables))
    options = ["--port", str(free_port()), "--redis-url", url, "--threads", "1"]
    options += ["--shutdown-timeout", "5"]
    options += ["--api-key-file", str(folder / "keys.toml")]
    log = folder / "server.log"
    with launched(folder, options) as (process, address):
        server = Server(process, address, KEYS["operator"], log)
        _wait(server, lambda: "does not answer" in log.read_text())
        redis.start()
        _wait(server, lambda: _is_ready(address))
        yield server


def _wait(server: Server, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS_MAX
    while not condition():
        assert server.process.poll() is None, server.log.read_text()
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.02)


def _is_ready(address: str) -> bool:
    try:
        return httpx.get(address + "/ready").status_code == 200
    except httpx.TransportError:
        return False


def make_certificate(folder: Path, name: str = "localhost") -> tuple[Path, ssl.SSLContext]:
    """A certificate that signs itself, and a server's context with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / f"{name}.crt", folder / f"{name}.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*paths)
    return paths[0], context
