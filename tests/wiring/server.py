"""A real chatserve process for tests: the demonstration model, a free port, a data folder.

`running` is one process, ended with SIGTERM. `reviving` is one data folder and one port whose
process may be killed and started again, as often as a test likes; what it leaves is ended.
`completed` is a process that is expected to end by itself.

Processes come from the fork server (tests/fork_server.py), which has imported what they need.
`fresh` is for tests of what comes before or after: the imports and how long they take, the seed of
hash(), the end of the interpreter. Then it is `python -m chatserve`, executed.
"""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.fork_server import ForkedProcess, can_fork, fork_server

START_SECONDS_MAX = 120.0
MODEL = "chatserve-demonstration"
# Sampling of a reply that goes on with text past its own end: the special tokens are out of the
# question, for a model that says one of them again and again says nothing.
ENDLESS = {"ignore_eos": True, "logit_bias": {"0": -100, "1": -100, "2": -100}}

Process = subprocess.Popen[str] | ForkedProcess


@dataclass
class Server:
    """One process; `figures` reads its counters."""

    process: Process
    url: str
    key: str | None = None
    log: Path = field(default_factory=Path)

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}

    def cache(self) -> dict[str, dict[str, int]]:
        answer = httpx.get(self.url + "/admin/cache", headers=self.headers, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def metric(self, name: str) -> float:
        text = httpx.get(self.url + "/metrics", headers=self.headers, timeout=30).text
        (value,) = re.findall(rf"^{name} ([0-9.e+-]+)$", text, re.MULTILINE)
        return float(value)

    def wait_for(self, condition: str, seconds: float = 30.0) -> dict[str, dict[str, int]]:
        """Poll until the server is idle or has done something; the caller's assertion says what.

        condition 'idle': nothing runs, waits or is in flight, and no page has an owner.
        """
        assert condition == "idle"
        deadline = time.monotonic() + seconds
        while True:
            state = self.cache()
            engine, pages = state["engine"], state["cache"]["pages"]
            busy = [engine[name] for name in ("running", "waiting", "following", "in_flight")]
            owned = [pages[name] for name in ("open", "sealed", "loading", "leaving")]  # type: ignore[index]
            if not any(busy) and not any(owned):
                return state
            assert time.monotonic() < deadline, f"not idle: {busy} {owned}"
            time.sleep(0.02)


@contextmanager
def launched(
    folder: Path, options: Sequence[str] = (), *, fresh: bool = False
) -> Generator[tuple[Process, str]]:
    """Start `chatserve serve` and end it with SIGTERM. Gives the process, and its URL if the
    options name a port."""
    port = options[options.index("--port") + 1]
    process = _spawned(folder / "data", options, folder / "server.log", fresh=fresh)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        _end(process)


def _spawned(data: Path, options: Sequence[str], log: Path, *, fresh: bool) -> Process:
    with log.open("w") as file:
        words = ["serve", *options, "--data-dir", str(data)]
        return _started(words, stderr=file.fileno(), fresh=fresh)


def _started(
    words: Sequence[str], *, stdout: int | None = None, stderr: int, fresh: bool
) -> Process:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if not fresh and can_fork():
        return fork_server().start(words, environment, stdout=stdout, stderr=stderr)
    return subprocess.Popen(
        [sys.executable, "-m", "chatserve", *words],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        text=True,
        env=environment,
    )


def completed(
    *words: str, seconds_max: float = 60.0, fresh: bool = False
) -> "subprocess.CompletedProcess[str]":
    """`chatserve WORDS`, its status and all that it wrote. Raises TimeoutExpired where it has not
    ended by then; it is killed."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = _started(words, stdout=out.fileno(), stderr=errors.fileno(), fresh=fresh)
        try:
            status = process.wait(seconds_max)
        finally:
            process.kill()
            process.wait()
        out.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(words, status, out.read(), errors.read())


def _end(process: Process) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def running(
    folder: Path, options: Sequence[str] = (), *, key: str | None = None, fresh: bool = False
) -> Generator[Server]:
    """`launched` on a free port, and ready."""
    log = folder / "server.log"
    with launched(folder, ["--port", "0", *options], fresh=fresh) as (process, _):
        yield Server(process, _wait_until_ready(process, log), key, log)


class Revived:
    """One data folder and one port; `server` is the process that has them now, or had them last.

    Each start has a log of its own: `server-1.log`, `server-2.log`, … fresh: of the next start.
    """

    def __init__(self, folder: Path, options: Sequence[str], *, fresh: bool = False) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.port = free_port()
        self.starts = 0
        self._options = ["--port", str(self.port), *options]
        self.fresh = fresh
        self.spawn()

    def spawn(self, *more: str) -> None:
        """Start a process; it is not ready yet. more: options of this start alone."""
        self.starts += 1
        log = self.folder / f"server-{self.starts}.log"
        process = _spawned(self.data, [*self._options, *more], log, fresh=self.fresh)
        self.server = Server(process, f"http://127.0.0.1:{self.port}", log=log)
        self._spawned_at = time.monotonic()

    @property
    def announced(self) -> bool:
        """It has said that it is ready."""
        return _announced(self.server.log) is not None

    async def ready(self) -> float:
        """Wait until it is; the seconds since it was started."""
        while not self.announced:
            assert self.server.process.poll() is None, self.server.log.read_text()
            seconds = time.monotonic() - self._spawned_at
            assert seconds < START_SECONDS_MAX, self.server.log.read_text()
            await asyncio.sleep(0.02)
        return time.monotonic() - self._spawned_at

    def kill(self) -> None:
        """kill -9."""
        self.server.process.kill()
        self.server.process.wait()

    async def terminated(self, seconds_max: float) -> int:
        """Wait for the end that a signal asked for; the exit status."""
        return await asyncio.to_thread(self.server.process.wait, seconds_max)

    def redis_pid(self) -> int:
        """The process that keeps the conversations, as the data folder has it."""
        record = json.loads((self.data / "redis" / "server.json").read_text())
        return int(record["pid"])

    def redis_lives(self) -> bool:
        """Whether that process is there; its number may be another's by now."""
        with suppress(OSError, ValueError, KeyError):
            place = Path(f"/proc/{self.redis_pid()}/cwd").resolve()
            return place == (self.data / "redis").resolve()
        return False

    def logs(self) -> str:
        """What all processes have said."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("server-*.log")))

    def end(self) -> None:
        """End the process and whatever a killed one has left beside it."""
        _end(self.server.process)
        if self.redis_lives():
            os.kill(self.redis_pid(), signal.SIGKILL)


@contextmanager
def reviving(
    folder: Path, options: Sequence[str] = (), *, fresh: bool = False
) -> Generator[Revived]:
    """A server that can be killed and started again. The first process is being started."""
    revived = Revived(folder, options, fresh=fresh)
    try:
        yield revived
    finally:
        revived.end()


def free_port() -> int:
    """A port of the loopback device that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_ready(process: Process, log: Path) -> str:
    """The URL that the server announces when it is ready."""
    deadline = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < deadline:
        announced = _announced(log)
        if announced:
            return announced
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError("the server did not become ready:\n" + log.read_text())


def _announced(log: Path) -> str | None:
    found = re.search(r"chat page +(http://\S+)/\n", log.read_text())
    return None if found is None else found[1]


def events(lines: Sequence[str]) -> list[dict[str, object]]:
    """The JSON events among the lines of an SSE body."""
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
