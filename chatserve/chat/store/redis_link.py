"""RedisLink: commands to one Redis or Valkey server, and every way in which that fails.

It may not know conversations. Theory of operation: all commands of a call go out in one trip, and
the call has CALL_SECONDS_MAX for everything: waiting for a connection (`redis_connections.py`),
resending on another one after a reset (twice, after jittered pauses). What does not work out is
Unavailable; that a write was lost is then no more certain than that it was done.

    closed ── a call is not answered ──▶ open ── the pause is over, a call comes ──▶ probing
       ▲                                  ▲                                              │
       └───────── it is answered ─────────┼──────────────────────────────────────────────┤
                                          └────────────── it is not ─────────────────────┘

While open, calls are refused at once; of the callers of a returning server one goes first. Errors
that a server answers with (read-only, out of memory, a key of a wrong type) refuse their own call
only. At a start, what will not mend itself (a password, a certificate) is told from what may.
"""

import asyncio
import logging
import random
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from redis.asyncio import ConnectionPool, Redis, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    NoPermissionError,
    NoScriptError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from chatserve.chat.store.redis_connections import (
    CONNECT_SECONDS_MAX,
    Argument,
    Command,
    Connections,
)
from chatserve.errors import SettingsError, StartError, Unavailable

_log = logging.getLogger(__name__)

CALL_SECONDS_MAX = 0.9  # asked for is an answer, or a refusal, within a second
# Before each try on a fresh connection, after a reset; half of it random.
RETRY_PAUSES_SECONDS = (0.02, 0.04)
PAUSE_SECONDS = 0.1  # refused at once after a failure; doubled each time, half of it random
PAUSE_SECONDS_MAX = 0.8  # so that a server that is back is found within two seconds
RETRY_AFTER_SECONDS = 1.0  # what those who are refused are told
LOGGED_EVERY_SECONDS = 10.0  # of the same refusal
VERSION_MIN = (6, 2)
WRONG_TYPE = "WRONGTYPE"  # of a key, as the server says it


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """What a server says of itself."""

    kind: str
    version: str
    durable: bool
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkStatistics:
    """Calls so far; seconds_total: waited for them."""

    available: bool
    calls: int
    failures: int
    seconds_total: float


@cache
def script_texts() -> Mapping[str, str]:
    """Every script with the prelude before it, by its file's name."""
    folder = files("chatserve.chat.store") / "redis_scripts"
    texts = {entry.name: entry.read_text("utf-8") for entry in folder.iterdir()}
    prelude = texts.pop("prelude.lua")
    return {name.removesuffix(".lua"): prelude + text for name, text in texts.items()}


class RedisLink:
    """A client with a bounded pool of connections. An async context manager."""

    def __init__(
        self,
        url: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """url: redis://, rediss:// or unix://. Connects at the first call. Raises SettingsError."""
        self.place = place_of(url)
        maker = _maker(url)
        self._connections = Connections(maker.make_connection, clock)
        # register_script talks to nobody: it knows the digest by which scripts are called.
        client = Redis.from_pool(maker)
        self._scripts = {
            name: client.register_script(text) for name, text in script_texts().items()
        }
        self._clock = clock
        self._draw = draw
        self._open_until: float | None = None
        self._failures_in_row = 0
        self._logged: tuple[str, float] = ("", 0.0)
        self._calls = 0
        self._failures = 0
        self._seconds = 0.0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._connections.close()

    def script(self, name: str, keys: Sequence[str], arguments: Sequence[Argument]) -> Command:
        """The command that runs a script of ours."""
        return ("EVALSHA", self._scripts[name].sha, len(keys), *keys, *arguments)

    async def run(
        self, commands: Sequence[Command], *, optional: int = 0, excused: Sequence[str] = ()
    ) -> list[object]:
        """Their answers, in order. Raises Unavailable.

        The errors of the first `optional` commands matter to nobody, and those that say one of the
        `excused` things are given back among the answers.
        """
        assert commands
        self._calls += 1
        began = self._clock()
        try:
            self._admit(began)
            answers = await self._answers(commands)
            for answer in answers[optional:]:
                if isinstance(answer, Exception) and not any(
                    thing in str(answer) for thing in excused
                ):
                    self.tell(answer)
                    refusal = _unavailable()
                    refusal.__cause__ = answer
                    raise refusal
        except BaseException as error:
            self._failures += isinstance(error, Unavailable)
            raise
        finally:
            self._seconds += self._clock() - began
        return answers

    async def facts(self, *trials: Command) -> ServerFacts:
        """Ask who is there, and try some commands. Raises StartError for a server that will not
        do, Unavailable for one that may do later."""
        try:
            answer, *_ = await self.run([("INFO",), *trials])
        except Unavailable as error:
            lasting = _lasting_fault(error)
            if lasting is not None:
                raise StartError(f"--redis-url: {self.place} {lasting}") from None
            raise
        return _facts(self.place, info_of(answer))

    def tell(self, error: Exception) -> None:
        """Log that the server answered with an error; the same one now and then only."""
        kind, now = str(error)[:40], self._clock()
        if self._logged[0] != kind or now >= self._logged[1] + LOGGED_EVERY_SECONDS:
            self._logged = kind, now
            _log.error(
                "the session store at %s answers with an error: %s", self.place, _reason_of(error)
            )

    def statistics(self) -> LinkStatistics:
        """A frozen picture."""
        return LinkStatistics(
            available=self._open_until is None,
            calls=self._calls,
            failures=self._failures,
            seconds_total=self._seconds,
        )

    # Inside ----------------------------------------------------------------------------------

    def _admit(self, now: float) -> None:
        """While open, let one caller through when the pause is over."""
        if self._open_until is None:
            return
        if now < self._open_until:
            raise _unavailable()
        self._open_until = now + CALL_SECONDS_MAX

    async def _answers(self, commands: Sequence[Command]) -> list[object]:
        try:
            async with asyncio.timeout(CALL_SECONDS_MAX):
                answers = await self._exchange(commands)
                if any(isinstance(answer, NoScriptError) for answer in answers):
                    # A server that was restarted, or told to forget them. All that ran before is
                    # done again: each command of ours may be.
                    loads = [("SCRIPT", "LOAD", text) for text in script_texts().values()]
                    answers = await self._exchange([*loads, *commands])
                    answers = answers[len(loads) :]
        except (RedisError, OSError, TimeoutError) as error:
            raise self._failed(error) from error
        if self._open_until is not None:
            self._open_until, self._failures_in_row = None, 0
            _log.warning("the session store at %s answers again", self.place)
        return answers

    async def _exchange(self, commands: Sequence[Command]) -> list[object]:
        """Once more on another connection where one turns out to be cut."""
        for pause in RETRY_PAUSES_SECONDS:
            try:
                return await self._connections.exchange(commands)
            except TimeoutError:
                raise
            except (RedisConnectionError, OSError):
                await asyncio.sleep(pause * (1 + self._draw()) / 2)
        return await self._connections.exchange(commands)

    def _failed(self, error: Exception) -> Unavailable:
        """Nobody answered. Many calls in flight may find the same: that is one failure."""
        now = self._clock()
        if self._open_until is None or self._failures_in_row == 0:
            _log.warning(
                "the session store at %s does not answer: %s", self.place, _reason_of(error)
            )
            self._failures_in_row = 0
        pause = min(PAUSE_SECONDS * 2**self._failures_in_row, PAUSE_SECONDS_MAX)
        self._open_until = now + pause * (1 + self._draw()) / 2
        self._failures_in_row = min(self._failures_in_row + 1, 10)
        return _unavailable()


class _TlsConnection(SSLConnection):
    """With the one context of all connections: making one reads every certificate that the machine
    trusts, and would hold the loop for a tenth of a second at each connection."""

    def __init__(self, *, context_of: SSLConnection, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ssl_context = context_of.ssl_context


def place_of(url: str) -> str:
    """A server's URL without what is secret in it. Raises SettingsError."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise SettingsError("--redis-url is no URL.") from None
    if parts.scheme == "unix":
        return parts.path
    if parts.scheme not in ("redis", "rediss"):
        raise SettingsError("--redis-url begins with redis://, rediss:// or unix://.")
    return f"{host or 'localhost'}:{port or 6379}"


def _maker(url: str) -> ConnectionPool:
    """Only makes connections; who has them is no matter of its."""
    try:
        pool = ConnectionPool.from_url(
            url,
            # Our own deadlines end waits. With a timeout here the client sends through
            # asyncio.wait_for, which on Python 3.11 may swallow a cancellation.
            socket_timeout=None,
            socket_connect_timeout=CONNECT_SECONDS_MAX,
            retry=Retry(NoBackoff(), 0),
            # A new connection makes no trips but those that its URL asks for.
            protocol=2,
            driver_info=None,
        )
    except (ValueError, TypeError):  # its message holds the URL
        raise SettingsError("--redis-url holds an option that is not understood.") from None
    pool.connection_kwargs["decode_responses"] = False
    if pool.connection_class is SSLConnection:
        _share_context(pool)
    return pool


def _share_context(pool: ConnectionPool) -> None:
    first = SSLConnection(**pool.connection_kwargs)
    try:
        first.ssl_context.get()
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"--redis-url: its certificates cannot be read: {type(error).__name__}."
        ) from None
    pool.connection_class = _TlsConnection
    pool.connection_kwargs["context_of"] = first


def _unavailable() -> Unavailable:
    return Unavailable("The store of conversations is away.", retry_after=RETRY_AFTER_SECONDS)


def _lasting_fault(error: BaseException | None) -> str | None:
    """What will not mend itself, of a failure that the client has wrapped up."""
    while error is not None:
        text = str(error)[:200]
        if isinstance(error, NoPermissionError):
            return f"does not let its user do what is needed: {text}"
        if isinstance(error, AuthenticationError) or "AUTH" in text:
            return "refuses the name or password."
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"has a certificate that is not trusted: {error.verify_message}."
        if isinstance(error, ResponseError):
            return f"answers: {text}"
        error = error.__cause__ or error.__context__
    return None


def _reason_of(error: BaseException) -> str:
    text = str(error) or f"nothing within {CALL_SECONDS_MAX} s"
    return f"{type(error).__name__}: {text[:200]}"


def info_of(answer: object) -> dict[str, str]:
    """What INFO says, by name."""
    text = answer.decode("utf-8", "replace") if isinstance(answer, bytes) else ""
    pairs = (line.partition(":") for line in text.splitlines() if not line.startswith("#"))
    return {name: value for name, _, value in pairs}


def _facts(place: str, info: Mapping[str, str]) -> ServerFacts:
    kind = "valkey" if "valkey_version" in info else "redis"
    version = info.get("valkey_version") or info.get("redis_version", "")
    if version_of(info.get("redis_version", "")) < VERSION_MIN:
        least = ".".join(map(str, VERSION_MIN))
        raise StartError(f"--redis-url: {place} is {kind} {version}; at least {least} is needed.")
    if info.get("redis_mode") == "cluster":
        raise StartError(f"--redis-url: {place} is part of a cluster: one server is needed.")
    warnings: list[str] = []
    policy, durable = info.get("maxmemory_policy", ""), info.get("aof_enabled") == "1"
    if policy != "noeviction":
        warnings.append(
            f"{place} may evict conversations when its memory is full: maxmemory-policy is "
            f"'{policy}', not 'noeviction'"
        )
    if not durable:
        warnings.append(f"{place} loses acknowledged turns in a crash: appendonly is off")
    return ServerFacts(kind=kind, version=version, durable=durable, warnings=tuple(warnings))


def version_of(text: str) -> tuple[int, ...]:
    """'7.0.15' as (7, 0, 15); () where it is no version."""
    parts = text.split(".")
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else ()
