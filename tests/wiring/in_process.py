"""The whole server inside the tests' own process: every part of it real, in a thread of its own.

For tests that put something of their own under it (a disk that fails), or start it so often that a
process each would take too long. What a process is, and how one dies, they cannot test.
"""

import signal
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import httpx

from chatserve.api.keys import key_ring
from chatserve.lifespan import Serving
from tests.wiring.test_settings import read

START_SECONDS_MAX = 120.0
END_SECONDS_MAX = 60.0


class Living:
    """One server between its start and its end. url: where it listens."""

    def __init__(self, folder: Path, options: tuple[str, ...]) -> None:
        self.data = folder / "data"
        settings = read(["--data-dir", str(self.data), "--threads", "1", *options])
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._answered = threading.Event()  # ready, or ended before it was
        self._error: BaseException | None = None
        self._status: int | None = None
        self._serving = Serving(
            settings,
            key_ring(key_file=settings.api_key_file),
            port=port,
            announce=lambda url, model, seconds: self._answered.set(),
        )
        self._thread = threading.Thread(target=self._run, name="server under test")

    def start(self) -> None:
        """Wait until it is ready."""
        self._thread.start()
        assert self._answered.wait(START_SECONDS_MAX), "the server did not become ready"
        assert self._thread.is_alive(), f"the server ended: {self._status}, {self._error!r}"

    def end(self) -> None:
        """What SIGTERM does: drain, keep the rest, close the store. Asserts that it ends well."""
        # The handler only counts; the loop's next tick acts.
        self._serving._server.handle_exit(signal.SIGTERM, None)
        self._thread.join(END_SECONDS_MAX)
        self._listener.close()
        assert not self._thread.is_alive(), "the server does not end"
        assert self._error is None, repr(self._error)
        assert self._status == 0

    @property
    def others_known(self) -> bool:
        """Whether it has read which pages of other models are on its disk, and there are some."""
        assembly = self._serving._assembly
        return assembly is not None and assembly.kept is not None and bool(assembly.kept.others)

    def client(self, key: str | None = None) -> httpx.AsyncClient:
        """For whoever has this API key."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=60)

    def _run(self) -> None:
        try:
            self._status = self._serving.run(self._listener)
        except BaseException as error:
            self._error = error
        finally:
            self._answered.set()


@contextmanager
def living(folder: Path, *options: str) -> Generator[Living]:
    """A server on a free port and a data folder in `folder`, ready; at the end it is told to stop,
    as by SIGTERM, and has stopped."""
    server = Living(folder, options)
    server.start()
    try:
        yield server
    finally:
        server.end()
