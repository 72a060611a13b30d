"""Which processes were started with something in their command that only a test's have."""

from contextlib import suppress
from pathlib import Path

from benchmarks.peer_process import processes


def pids_with(mark: str) -> list[int]:
    """Those that run."""
    found: list[int] = []
    for pid, _ in processes():
        with suppress(OSError):
            if mark in Path(f"/proc/{pid}/cmdline").read_text(errors="replace"):
                found.append(pid)
    return found
