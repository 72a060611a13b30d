"""A real chatserve process for tests: the demonstration model, a free port, a data folder."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

START_SECONDS_MAX = 120.0
MODEL = "chatserve-demonstration"


@dataclass
class Server:
    """One process; `figures` reads its counters."""

    process: "subprocess.Popen[str]"
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
    folder: Path, options: Sequence[str] = ()
) -> Generator[tuple["subprocess.Popen[str]", str]]:
    """Start `chatserve serve` and end it with SIGTERM. Gives the process, and its URL if the
    options name a port."""
    command = [sys.executable, "-m", "chatserve", "serve", *options]
    command += ["--data-dir", str(folder / "data")]
    port = options[options.index("--port") + 1]
    with (folder / "server.log").open("w") as file:
        process = subprocess.Popen(
            command, stderr=file, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def running(
    folder: Path, options: Sequence[str] = (), *, key: str | None = None
) -> Generator[Server]:
    """`launched` on a free port, and ready."""
    log = folder / "server.log"
    with launched(folder, ["--port", "0", *options]) as (process, _):
        yield Server(process, _wait_until_ready(process, log), key, log)


def free_port() -> int:
    """A port of the loopback device that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_ready(process: "subprocess.Popen[str]", log: Path) -> str:
    """The URL that the server announces when it is ready."""
    deadline = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < deadline:
        text = log.read_text()
        announced = re.search(r"chat page +(http://\S+)/\n", text)
        if announced:
            return announced[1]
        assert process.poll() is None, text
        time.sleep(0.05)
    raise AssertionError("the server did not become ready:\n" + log.read_text())


def events(lines: Sequence[str]) -> list[dict[str, object]]:
    """The JSON events among the lines of an SSE body."""
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
