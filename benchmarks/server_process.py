"""A chatserve process of our own for a measurement, on a free port of the loopback device."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

START_SECONDS_MAX = 120.0


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """Where it listens, when it was started (by time.monotonic), and its data folder."""

    url: str
    started: float
    pid: int
    data: Path


@contextmanager
def server_process(
    options: Sequence[str] = (),
    *,
    program: Sequence[str] = ("chatserve", "serve"),
    data: Path | None = None,
) -> Generator[ServerProcess]:
    """Start a server with these options in a data folder of its own; end it after.

    data: an existing folder to use instead, which stays. program: a module that takes the options
    of `chatserve serve`, and its first arguments.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="chatserve-bench-") as own:
        folder = own if data is None else str(data)
        command = [sys.executable, "-m", *program, *options]
        command += ["--port", str(port), "--data-dir", folder, "--log-level", "warning"]
        started = time.monotonic()
        process = subprocess.Popen(
            command, stderr=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
        try:
            yield ServerProcess(f"http://127.0.0.1:{port}", started, process.pid, Path(folder))
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def end_left_behind(data: Path) -> None:
    """End the Redis that a server which was killed has left in its data folder."""
    folder = data / "redis"
    with suppress(OSError, ValueError, KeyError):
        pid = int(json.loads((folder / "server.json").read_text())["pid"])
        if Path(f"/proc/{pid}/cwd").resolve() == folder.resolve():
            os.kill(pid, signal.SIGTERM)


def wait_until_ready(server: ServerProcess) -> None:
    """Return when `/ready` is green. Raises TimeoutError."""
    deadline = server.started + START_SECONDS_MAX
    while time.monotonic() < deadline:
        try:
            if httpx.get(server.url + "/ready", timeout=5.0).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    raise TimeoutError("the server did not become ready")
