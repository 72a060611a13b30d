"""The store's own file layer over real files, of which some calls fail when a test says so.

A *plan* is a list of faults, each waiting for its turn: when the one at the head has happened, the
next one's turn comes; the last one is what the test is about, and may stay for good. From then on
the disk is *held*: whoever opens a file there waits until the test lets go. The store's probe
begins by opening files, so what it is going to undo can be looked at before.
"""

import errno
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prefix_store.files import Files, LocalFiles

CALLS = frozenset(
    name for name, member in vars(Files).items() if callable(member) and not name.startswith("_")
)
HELD_SECONDS_MAX = 60.0


@dataclass(frozen=True, slots=True)
class Fault:
    """This call fails, with this code, from its `after`-th occurrence on.

    call: a method of `Files`; "any" is each of them. for_good: all that follow fail as well.
    """

    call: str
    code: int = errno.EIO
    for_good: bool = False
    after: int = 0

    def concerns(self, call: str) -> bool:
        """Whether it is this call that fails."""
        return self.call in (call, "any")


class FaultyDisk:
    """What a test knows of the disk under a server. Any thread.

    happened: the last fault of the plan has. first_at: when, by the monotonic clock. times: how
    often it has. seen: all calls that were ever made.
    """

    def __init__(self) -> None:
        self.happened = threading.Event()
        self.first_at = 0.0
        self.times = 0
        self.what = ""
        self.seen: Counter[str] = Counter()
        self._plan: list[Fault] = []
        self._passed = 0
        self._let_go = threading.Event()
        self._let_go.set()
        self._lock = threading.Lock()

    def files(self) -> "FaultyFiles":
        """The file layer for a store."""
        return FaultyFiles(self)

    def plan(self, faults: Sequence[Fault], *, held: bool = True) -> None:
        """From now on, these fail in turn. held: as the module says."""
        assert all(fault.call in CALLS | {"any"} for fault in faults)
        with self._lock:
            self.happened.clear()
            self.times, self.what = 0, ""
            self._passed = 0
            self._plan = list(faults)
            if held:
                self._let_go.clear()

    def let_go(self) -> None:
        """Whoever is held goes on."""
        self._let_go.set()

    def repair(self) -> None:
        """Nothing fails any more."""
        with self._lock:
            self._plan = []
        self._let_go.set()

    def before(self, call: str) -> None:
        """A call is about to be made. Raises OSError where it is to fail."""
        if call == "open" and self.happened.is_set():
            assert self._let_go.wait(HELD_SECONDS_MAX), "the disk was held for ever"
        with self._lock:
            self.seen[call] += 1
            if not self._plan or not self._plan[0].concerns(call):
                return
            fault = self._plan[0]
            self._passed += 1
            if self._passed <= fault.after:
                return
            if len(self._plan) == 1:
                self.times += 1
                self.what = self.what or call
                if not self.happened.is_set():
                    self.first_at = time.monotonic()
                    self.happened.set()
            if not fault.for_good:
                del self._plan[0]
                self._passed = 0
        raise OSError(fault.code, os.strerror(fault.code))


class FaultyFiles:
    """Implements `prefix_store.files.Files`."""

    def __init__(self, disk: FaultyDisk) -> None:
        self._disk = disk
        self._real = LocalFiles()

    def close(self, descriptor: int) -> None:
        """As the kernel: whatever it says, the descriptor is gone."""
        self._real.close(descriptor)
        self._disk.before("close")

    def __getattr__(self, call: str) -> Callable[..., Any]:
        real: Callable[..., Any] = getattr(self._real, call)

        def act(*arguments: Any, **named: Any) -> Any:
            self._disk.before(call)
            return real(*arguments, **named)

        return act
