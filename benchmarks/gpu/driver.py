"""Steps in processes of their own: what a step breaks is its own.

    parent ─ names of steps, limits ─▶ child ─ begin, rows, log, end: lines of JSON ─▶ parent

A child runs the steps that it is given, in order. Where it dies, or a step takes longer than it
may, that step has failed and another child goes on behind it; when a part's time is over, what is
left of it was not measured. Steps that time nothing are shared out to several children.
"""

import json
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu.bench import Bench, NotMeasured, Part, Row, Step

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 90.0  # until a child has imported torch and begins, on a cold disk
LOST_STATUS = 3  # of a child whose device is gone

Tell = Callable[..., None]


@dataclass(slots=True)
class Found:
    """What came of a part. rows: by step. logs: what was warned of, each once."""

    rows: dict[str, list[Row]] = field(default_factory=dict[str, list[Row]])
    limits: dict[str, float] = field(default_factory=dict[str, float])
    logs: list[str] = field(default_factory=list[str])
    seconds: float = 0.0


@dataclass(slots=True)
class Drive:
    """One part under way. patience: by how much its time, and each step's, is stretched. ended:
    called with each step's name."""

    part: Part
    arguments: Sequence[str]
    limits: dict[str, float]
    patience: float
    ended: Callable[[str], None]
    found: Found = field(default_factory=Found)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _until: float = 0.0

    def run(self, steps: Sequence[Step], workers: int) -> Found:
        """All steps, by so many children at once."""
        began = time.monotonic()
        self._until = began + self.patience * self.part.seconds
        self.found.rows = {step.name: [] for step in steps}
        queues = [deque(steps[first::workers]) for first in range(workers)]
        threads = [threading.Thread(target=self._work, args=(queue,)) for queue in queues if queue]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.found.seconds = time.monotonic() - began
        return self.found

    def _work(self, queue: deque[Step]) -> None:
        while queue and time.monotonic() < self._until:
            self._run_child(queue)
        while queue:
            step = queue.popleft()
            self._end(step, [Row(name=step.name, note=self._over)])

    @property
    def _over(self) -> str:
        return f"not measured: the {self.part.seconds:.0f} seconds of this part were over"

    def _run_child(self, queue: deque[Step]) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu", "--child", self.part.name]
        child = subprocess.Popen(
            [*command, *self.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": _path(), "PYTHONUNBUFFERED": "1"},
            text=True,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        work = {"steps": [step.name for step in queue], "limits": self.limits | self.found.limits}
        with child.stdin as given:
            given.write(json.dumps(work))
        watch = _Watch(child, self._until)
        watch.allow(START_SECONDS)
        with child.stdout as told:
            begun = self._read(told, queue, watch)
        watch.end()
        status = child.wait()
        if not queue or time.monotonic() >= self._until:
            return
        why = f"took longer than {queue[0].seconds:.0f} s" if watch.ran_out else _ended(status)
        # One that did not even begin will not begin the next time.
        for _ in range(1 if begun else len(queue)):
            step = queue.popleft()
            self._end(step, [Row(name=step.name, note=why, failed=True)])

    def _read(self, lines: IO[str], queue: deque[Step], watch: "_Watch") -> bool:
        """Take what the child tells; whether it began any step."""
        begun, rows = False, list[Row]()
        for line in lines:
            told: dict[str, Any] = json.loads(line)
            if "begin" in told:
                begun, rows = True, []
                watch.allow(self.patience * queue[0].seconds)
            elif "row" in told:
                rows.append(Row(**told["row"]))
            elif "log" in told:
                with self._lock:
                    self.found.logs += [told["log"]] * (told["log"] not in self.found.logs)
            elif "end" in told:
                with self._lock:
                    self.found.limits |= told["limits"]
                self._end(queue.popleft(), rows)
                rows = []
                watch.allow(START_SECONDS)
        if rows:
            self._keep(queue[0], rows)
        return begun

    def _end(self, step: Step, rows: Sequence[Row]) -> None:
        self._keep(step, rows)
        self.ended(step.name)

    def _keep(self, step: Step, rows: Sequence[Row]) -> None:
        with self._lock:
            self.found.rows[step.name] += rows


class _Watch:
    """Ends a child that takes too long."""

    def __init__(self, child: "subprocess.Popen[str]", until: float) -> None:
        self._child, self._until = child, until
        self._timer: threading.Timer | None = None
        self.ran_out = False

    def allow(self, seconds: float) -> None:
        """So long from now, and never past the end of the part."""
        self.end()
        left = max(0.0, min(seconds, self._until - time.monotonic()))
        self._timer = threading.Timer(left, self._kill)
        self._timer.daemon = True
        self._timer.start()

    def end(self) -> None:
        """No longer watched."""
        if self._timer is not None:
            self._timer.cancel()

    def _kill(self) -> None:
        self.ran_out = True
        self._child.kill()


def run_child(part: Part, bench: Bench, given: IO[str], told: IO[str]) -> int:
    """In a child: the steps that `given` names; the exit status."""
    work: dict[str, Any] = json.loads(given.read())
    bench.limits.update(work["limits"])
    wanted = set(work["steps"])

    def tell(**what: Any) -> None:
        print(json.dumps(what), file=told, flush=True)

    logging.getLogger().addHandler(_Telling(tell))
    for step in part.steps(bench.quick):
        if step.name not in wanted:
            continue
        tell(begin=step.name)
        for row, lost in _rows(step, bench):
            tell(row=asdict(row))
            if lost:
                return LOST_STATUS
        tell(end=step.name, limits=bench.limits)
    return 0


def _rows(step: Step, bench: Bench) -> Iterator[tuple[Row, bool]]:
    """A step's rows, and whether the device is gone."""
    try:
        for row in step.run(bench):
            yield row, False
        bench.release()
    except NotMeasured as reason:
        yield Row(name=step.name, note=f"not measured: {reason}"), False
    except Exception as error:
        traceback.print_exc()
        words = f"not measured: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        try:
            bench.release()
            lost = False
        except RuntimeError:
            lost = True
        yield Row(name=step.name, note=words, failed=True), lost


class _Telling(logging.Handler):
    """Warnings to the parent: they say why a kernel is left to torch."""

    def __init__(self, tell: Tell) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        self._tell(log=f"{record.name}: {' '.join(record.getMessage().split())[:400]}")


def _ended(status: int) -> str:
    return "its process ended " + (f"by signal {-status}" if status < 0 else f"with {status}")


def _path() -> str:
    """Where a child finds what this process does, whatever is installed."""
    kept = os.environ.get("PYTHONPATH", "")
    ours = [str(ROOT), str(ROOT / "kernels")]
    return os.pathsep.join([*ours, *([kept] if kept else [])])
