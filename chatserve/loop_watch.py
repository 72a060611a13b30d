"""LoopWatch: how late the event loop is, and what the process holds.

A loop that is late delivers every stream late, and nobody but the loop itself can tell: a task
asks to be woken every tick and books by how much it was late. Monotonic clock only.
"""

import asyncio
import contextlib
import os
import threading
from pathlib import Path

from chatserve.api.exposition import Family, Histogram, Sample, histogram

TICK_SECONDS = 0.02
_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class LoopWatch:
    """Runs as a task (`run`); `families` gives its metrics."""

    def __init__(self) -> None:
        self.lag = Histogram(_BOUNDS)

    async def run(self) -> None:
        """Measure until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            self.lag.observe(max(0.0, loop.time() - due))

    def families(self) -> list[Family]:
        """Metrics of the process, for a scrape on the event loop."""
        meanings = {
            "chatserve_event_loop_tasks": ("Tasks alive on the event loop.", _tasks()),
            "process_threads": ("Threads of the process.", threading.active_count()),
            "process_open_fds": ("Open descriptors.", _descriptors()),
            "process_resident_memory_bytes": ("Resident memory.", _resident_bytes()),
        }
        gauges = [
            Family(name, "gauge", meaning, (Sample(float(value)),))
            for name, (meaning, value) in meanings.items()
            if value is not None
        ]
        lag = histogram("chatserve_event_loop_lag_seconds", "How late the loop is.", self.lag)
        return [lag, *gauges]


def _tasks() -> int:
    return len(asyncio.all_tasks())


def _descriptors() -> int | None:
    with contextlib.suppress(OSError):
        return len(os.listdir("/proc/self/fd"))
    return None


def _resident_bytes() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return None
