"""TextThreads: an executor like the standard library's, but for its end."""

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import CancelledError

import pytest

from chatserve.chat.text_threads import TextThreads

DEADLINE_SECONDS = 30.0  # only a test that fails waits as long


def test_results_and_errors_come_back():
    threads = TextThreads(2)
    try:
        assert threads.submit(divmod, 7, 2).result(DEADLINE_SECONDS) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            threads.submit(divmod, 7, 0).result(DEADLINE_SECONDS)
        assert list(threads.map(abs, (-1, 2), timeout=DEADLINE_SECONDS)) == [1, 2]
    finally:
        threads.shutdown()


async def test_a_loop_waits_for_them():
    with TextThreads(1) as threads:
        named = asyncio.get_running_loop().run_in_executor(threads, threading.current_thread)
        assert (await named).daemon


def test_what_has_not_begun_is_cancelled_and_what_runs_is_not_waited_for():
    threads = TextThreads(1, end_seconds=0.0)
    begun, go_on = threading.Event(), threading.Event()

    def work() -> bool:
        begun.set()
        return go_on.wait(DEADLINE_SECONDS)

    running, queued = threads.submit(work), threads.submit(work)
    assert begun.wait(DEADLINE_SECONDS)
    threads.shutdown()
    threads.shutdown()
    assert not running.done()
    with pytest.raises(CancelledError):
        queued.result(DEADLINE_SECONDS)
    with pytest.raises(RuntimeError):
        threads.submit(work)
    go_on.set()
    assert running.result(DEADLINE_SECONDS)


def test_what_is_queued_can_be_run_to_its_end():
    threads = TextThreads(1)
    go_on = threading.Event()
    futures = [threads.submit(go_on.wait, DEADLINE_SECONDS) for _ in range(3)]
    threads.shutdown(wait=False, cancel_futures=False)
    go_on.set()
    assert all(each.result(DEADLINE_SECONDS) for each in futures)


def test_a_shutdown_sees_the_threads_end():
    before = threading.active_count()
    threads = TextThreads(3, end_seconds=DEADLINE_SECONDS)
    assert threading.active_count() == before + 3
    threads.shutdown()
    assert threading.active_count() == before


def test_a_process_ends_while_a_thread_is_busy():
    program = (
        "import threading\n"
        "from chatserve.chat.text_threads import TextThreads\n"
        "threads, begun = TextThreads(1, end_seconds=0.0), threading.Event()\n"
        "threads.submit(lambda: (begun.set(), threading.Event().wait()))\n"
        "begun.wait()\n"
        "threads.shutdown()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], timeout=DEADLINE_SECONDS, check=False)
    assert ended.returncode == 0
