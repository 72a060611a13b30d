"""Our own Redis or Valkey: a process beside ours that keeps conversations in the data folder.

It may not know what is kept. The server outlives a kill -9 of ours, so the next start must find it.
What tells a living server from a dead one is a lock on `server.lock`: we take it, the server
inherits the descriptor, we close ours; the kernel frees it when the server's last process is gone.

    lock free    ─▶ no server lives: remove its socket, start one, hand the lock on
    lock held    ─▶ one lives: it answers, from this folder                 ─▶ adopted
                    it does not answer in time, and its process is known    ─▶ killed, as above
                    anything else                                           ─▶ StartError

    <data folder>/redis/   server.lock   server.json (who writes here, where it listens, its pid)
                           server.log    server.sock   appendonlydir/ (the server's)

With `appendfsync always` an answered write is on disk, so killing a server loses nothing that was
acknowledged. While it is watched a dead server is started again; calls meanwhile fail.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast
from urllib.parse import quote

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from chatserve.errors import StartError
from chatserve.redis_binary import (
    Binary,
    Record,
    Writer,
    choose,
    find_binaries,
    read_record,
    write_record,
)

_log = logging.getLogger(__name__)

SOCKET_BYTES_MAX = 100  # a socket's path; the kernels' limits are 104 and 108
ANSWER_SECONDS_MAX = 1.0  # for one question
ADOPT_SECONDS_MAX = 5.0  # for a living server to answer, before it counts as hung
START_SECONDS_MAX = 20.0  # to begin to answer; reading what it wrote before is not counted
LOAD_SECONDS_MAX = 600.0  # to read what it wrote before
STOP_SECONDS_MAX = 5.0  # for each of: SHUTDOWN, SIGTERM, SIGKILL
LOOK_SECONDS = 0.1  # between looks at a process
RESTART_PAUSE_SECONDS = 0.05  # before a dead server is started again; doubled each time
RESTART_PAUSE_SECONDS_MAX = 5.0
STEADY_SECONDS = 30.0  # a server that lived so long begins with a short pause again
LOG_BYTES_MAX = 1 << 20  # a longer log is begun anew at a start
LOG_TAIL_BYTES = 600  # shown where a server did not start

OPTIONS = (
    *("--port", "0", "--unixsocketperm", "700", "--dir", ".", "--daemonize", "no"),
    *("--appendonly", "yes", "--appendfsync", "always", "--save", "", "--databases", "1"),
    *("--maxmemory", "0", "--maxmemory-policy", "noeviction", "--logfile", ""),
    # So that whoever looks for a deleted text in the files would find it if it were there.
    *("--rdbcompression", "no"),
)


@asynccontextmanager
async def own_server(data_folder: Path) -> AsyncGenerator["OwnServer | None"]:
    """Start or adopt the server of a data folder (whose lock the caller holds), watch it, and stop
    it at the end of the block. None = there is no binary here, and nothing was ever kept.

    Raises StartError.
    """
    folder = data_folder / "redis"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except OSError as error:
        raise StartError(f"The folder {folder} cannot be used: {error}.") from error
    record = read_record(folder / "server.json")
    binaries = await asyncio.to_thread(find_binaries)
    server = OwnServer(folder.resolve(), record)
    if not await server.adopt():
        binary = choose(binaries, None if record is None else record.wrote)
        if binary is None:
            yield None
            return
        await server.start(binary)
    # No TaskGroup: it would wrap up the errors of the block.
    watching = asyncio.create_task(server.watch(binaries))
    try:
        yield server
    finally:
        watching.cancel()
        await asyncio.wait({watching})
        await server.stop()
        if not watching.cancelled():
            watching.result()


class OwnServer:
    """One folder's server. `pid` is that of the process which serves now, or served last."""

    def __init__(self, folder: Path, record: Record | None) -> None:
        self._folder = folder
        self._lock_path = folder / "server.lock"
        self.path = _socket_path(folder, record)
        self.pid = 0 if record is None else record.pid
        self.adopted = False
        self._process: subprocess.Popen[bytes] | None = None
        self._wrote = None if record is None else record.wrote

    @property
    def url(self) -> str:
        """As RedisLink takes it."""
        return f"unix://{quote(str(self.path))}"

    async def adopt(self) -> bool:
        """Take over a server that lives; True if there is one. One that hangs is killed. Raises
        StartError where that cannot be."""
        deadline = time.monotonic() + ADOPT_SECONDS_MAX
        while self._lives():
            info = await self._ask("INFO", "server")
            where = await self._ask("CONFIG GET", "dir")
            if info is not None and where is not None:
                self._take_over(info, where)
                return await self._answers()  # these two it answers while it loads, too
            if time.monotonic() > deadline:
                await self._kill_hung()
            await asyncio.sleep(LOOK_SECONDS)
        return False

    async def start(self, binary: Binary) -> None:
        """Start a process; it answers when this returns. Raises StartError."""
        _log.info("starting %s (%s)", binary.path, binary.writer)
        # Written first: its files are never without the name of who wrote them, and whoever
        # starts next knows where it listens.
        self._remember(binary.writer)
        self._process = self._spawn(binary)
        self.pid, self.adopted = self._process.pid, False
        try:
            self._remember(binary.writer)
            if not await self._answers():
                raise StartError(f"{binary.path} ended at its start: {self._log_tail()}")
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise

    async def watch(self, binaries: tuple[Binary, ...]) -> None:
        """Until cancelled: when the server's process is gone, start one again."""
        pause, began = RESTART_PAUSE_SECONDS, time.monotonic()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if self._serves():
                continue
            _log.error("the server of conversations (process %d) has ended", self.pid)
            if time.monotonic() - began > STEADY_SECONDS:
                pause = RESTART_PAUSE_SECONDS
            await asyncio.sleep(pause)
            pause = min(2 * pause, RESTART_PAUSE_SECONDS_MAX)
            try:
                binary = choose(binaries, self._wrote)
                if binary is None:
                    raise StartError("there is no binary of it")
                await self.start(binary)
            except StartError as error:
                _log.error("it could not be started again: %s", error)
            else:
                _log.warning("it was started again as process %d", self.pid)
                began = time.monotonic()

    async def stop(self) -> None:
        """End the process: asked, told, killed."""
        if self._lives():
            await self._ask("SHUTDOWN")
        for force in (None, signal.SIGTERM, signal.SIGKILL):
            if force is not None and self._lives():
                _log.warning("the server of conversations does not end: %s", force.name)
                self._signal(force)
            if await self._gone_within(STOP_SECONDS_MAX):
                break
        self.path.unlink(missing_ok=True)
        if self.path.parent != self._folder:
            with contextlib.suppress(OSError):
                self.path.parent.rmdir()

    # Inside ----------------------------------------------------------------------------------

    def _serves(self) -> bool:
        """Whether there is nothing to do. A look that fails has seen nothing."""
        try:
            if self._lives():
                if not self.path.exists():
                    # Somebody tidied the temporary folder: nobody can reach it any more.
                    _log.error("the socket of the server of conversations is gone: starting anew")
                    self._signal(signal.SIGTERM)
                return True
        except OSError as error:
            _log.error("the server of conversations cannot be looked at: %s", error)
            return True
        return False

    def _lives(self) -> bool:
        """Whether a server has this folder's lock."""
        if self._process is not None and self._process.poll() is None:
            return True
        descriptor = self._locked()
        if descriptor is None:
            return True
        os.close(descriptor)
        return False

    def _locked(self) -> int | None:
        """The lock's descriptor, None where a server has it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self._lock_path, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    def _spawn(self, binary: Binary) -> "subprocess.Popen[bytes]":
        """Takes a millisecond, and must not be cancelled half-way: not in a thread."""
        lock = self._locked()
        if lock is None:
            raise StartError(f"Another process serves {self._folder}.")
        log = self._folder / "server.log"
        try:
            if log.exists() and log.stat().st_size > LOG_BYTES_MAX:
                log.unlink()
            self.path.parent.mkdir(exist_ok=True, mode=0o700)
            if not _is_ours(self.path.parent):
                raise StartError(f"The folder {self.path.parent} is open to others.")
            self.path.unlink(missing_ok=True)
            with log.open("ab") as output:
                return subprocess.Popen(
                    [binary.path, *OPTIONS, "--unixsocket", str(self.path)],
                    cwd=self._folder,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(lock,),
                    start_new_session=True,  # Ctrl-C is for us
                )
        except OSError as error:
            raise StartError(f"{binary.path} cannot be started: {error}.") from error
        finally:
            os.close(lock)

    async def _answers(self) -> bool:
        """Wait until it answers; False = it has ended. Raises StartError after too long a time."""
        began = time.monotonic()
        loading = False
        while self._lives():
            with contextlib.suppress(OSError):
                answer = await _ping(self.path)
                if answer.startswith(b"+PONG"):
                    return True
                loading = loading or answer.startswith(b"-LOADING")
            if time.monotonic() - began > (LOAD_SECONDS_MAX if loading else START_SECONDS_MAX):
                raise StartError(f"Process {self.pid} does not answer: {self._log_tail()}")
            await asyncio.sleep(LOOK_SECONDS / 5)
        return False

    def _remember(self, wrote: Writer) -> None:
        self._wrote = wrote
        try:
            record = Record(wrote, str(self.path), self.pid)
            write_record(self._folder / "server.json", record)
        except OSError as error:
            raise StartError(f"The folder {self._folder} cannot be written: {error}.") from error

    def _take_over(self, info: object, where: object) -> None:
        """A server answers on our socket: check that it is ours."""
        table = cast("dict[str, object]", info)
        folder = cast("dict[str, str]", where).get("dir", "")
        if not folder or Path(folder).resolve() != self._folder:
            raise StartError(f"{self.path} belongs to a server of another folder, {folder}.")
        kind = "valkey" if "valkey_version" in table else "redis"
        version = str(table.get("valkey_version") or table.get("redis_version"))
        self.pid, self.adopted = int(str(table["process_id"])), True
        self._remember(Writer(kind, version))
        _log.info("the server of conversations (process %d) still lives: adopted", self.pid)

    async def _kill_hung(self) -> None:
        """It has the lock and does not answer."""
        if not _works_in(self.pid, self._folder):
            raise StartError(
                f"A server that does not answer uses {self._folder}: end it "
                f"(its last known process is {self.pid}), then start again."
            )
        _log.warning("the server of conversations (process %d) does not answer: killed", self.pid)
        self._signal(signal.SIGKILL)
        if not await self._gone_within(STOP_SECONDS_MAX):
            raise StartError(f"Process {self.pid}, which uses {self._folder}, cannot be ended.")

    async def _gone_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self._lives():
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(LOOK_SECONDS / 5)
        return True

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    async def _ask(self, *question: str) -> object | None:
        """One question on a connection of its own; None = no answer."""
        try:
            async with _client(self.path) as client:
                return cast("object", await client.execute_command(*question))
        except (RedisError, OSError):
            return None

    def _log_tail(self) -> str:
        try:
            text = (self._folder / "server.log").read_bytes()[-LOG_TAIL_BYTES:]
        except OSError:
            return "it wrote no log."
        return text.decode("utf-8", "replace").strip() or "it wrote no log."


async def _ping(path: Path) -> bytes:
    """The first line of the answer. Raises OSError.

    By hand: the client library forgets to close a connection to a server that is just starting.
    """
    async with asyncio.timeout(ANSWER_SECONDS_MAX):
        reader, writer = await asyncio.open_unix_connection(path)
        try:
            writer.write(b"PING\r\n")
            return await reader.readline()
        finally:
            writer.close()


def _client(path: Path) -> Redis:
    return Redis(
        unix_socket_path=str(path),
        socket_timeout=ANSWER_SECONDS_MAX,
        socket_connect_timeout=ANSWER_SECONDS_MAX,
        protocol=2,
        driver_info=None,
        decode_responses=True,
        retry=Retry(NoBackoff(), 0),
    )


def _socket_path(folder: Path, record: Record | None) -> Path:
    """In the folder; where that is too long for a socket, in one under the temporary folder."""
    path = folder / "server.sock"
    if len(os.fsencode(path)) <= SOCKET_BYTES_MAX:
        return path
    if record is not None:
        recorded = Path(record.socket)
        if _is_ours(recorded.parent):
            return recorded
    return Path(tempfile.gettempdir()) / f"chatserve-{secrets.token_hex(8)}" / "server.sock"


def _is_ours(folder: Path) -> bool:
    """A folder that nobody else can enter."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return folder.is_dir() and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _works_in(pid: int, folder: Path) -> bool:
    """Whether a process has this working folder, as the folder's server has. Linux knows."""
    try:
        return pid > 0 and Path(os.readlink(f"/proc/{pid}/cwd")) == folder
    except OSError:
        return False
