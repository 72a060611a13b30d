"""TextThreads: the executor for text work, which the end of the process does not wait for.

It may not know what it runs. The standard library's pool is joined by the interpreter at its exit,
so that one long text would hold up a server that has been told to end. These threads are daemons:
what still runs then is left to itself, its result is nobody's. `shutdown` gives them a moment all
the same, since most are over within it and a thread that comes back into an interpreter being torn
down is a risk.

    submit ─▶ queue ─▶ worker: run ─▶ Future          shutdown: queued ones cancelled, workers end
"""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

END_SECONDS = 1.0  # that a shutdown waits at most for what still runs

_Work = Callable[[], None]


class TextThreads(Executor):
    """A pool of a fixed size. For any thread."""

    def __init__(self, count: int, *, end_seconds: float = END_SECONDS) -> None:
        assert count > 0
        self._end_seconds = end_seconds
        self._lock = threading.Lock()
        self._closed = False
        # Whoever waits is bounded by the callers' crowd. None = end.
        self._queue: queue.SimpleQueue[tuple[Future[Any], _Work] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"chatserve-text-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Raises RuntimeError after `shutdown`, as the standard library's executors do."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._lock:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._queue.put((future, run))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = True) -> None:
        """Take nothing more, cancel what has not begun. Waits, a moment at most, if `wait`.

        Idempotent. cancel_futures: False = what is queued is still run.
        """
        with self._lock:
            if not self._closed:
                self._closed = True
                for _ in self._threads:
                    self._queue.put(None)
            if cancel_futures:
                self._cancel_queued()
        deadline = time.monotonic() + self._end_seconds
        for thread in self._threads if wait else ():
            thread.join(max(0.0, deadline - time.monotonic()))

    def _cancel_queued(self) -> None:
        ends = 0
        while True:
            try:
                taken = self._queue.get_nowait()
            except queue.Empty:
                break
            if taken is None:
                ends += 1
            else:
                taken[0].cancel()
        for _ in range(ends):
            self._queue.put(None)

    def _work(self) -> None:
        while (taken := self._queue.get()) is not None:
            future, run = taken
            if future.set_running_or_notify_cancel():
                run()
            del taken, future, run  # a thread that waits holds no text
