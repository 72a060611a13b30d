"""A server that is started by a command line, whatever it is: waited for, weighed, and ended.

It runs in a session of its own with its log in a file, and counts with all processes that it
starts.  Its memory is the sum of their proportional set sizes (`Pss` of smaps_rollup, so that what
they share counts once), sampled every few seconds and at the end; the largest sum is kept, or the
most that any one of them ever had, if that is more.  At the end it is told to end (SIGTERM), and
what does not, or was left below it, is ended too.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from benchmarks.openai_load import served_model

SAMPLE_SECONDS = 5.0  # a sample costs some 20 ms for each GiB
LOOK_SECONDS = 0.02  # between two looks whether it answers
ANSWER_SECONDS_MAX = 10.0  # for one of these looks
END_SECONDS_MAX = 60.0
LEFT_SECONDS_MAX = 5.0  # for what its end has left running, and once more when it is killed
LOG_LINES = 12
ENV_OPTIONS = ("-u", "-C")  # of env, with a word of their own
# In front of a path: not a part of another one, of an address, or what a placeholder stands for.
PATH_BEFORE_NAME = re.compile(r"(?<![\w.}/~])~?/(?!/)(?:[^/\s:=,'\"]+/)*")

Process = tuple[int, int]  # its number, and when it began: a number may be another's later


class PeerError(Exception):
    """A server did not do what it should; the message shows the end of its log."""


def read_command(command: str) -> tuple[str, list[str]]:
    """What to call a server, and its command as a shell would split it. A first word that ends in
    a colon is the name. Raises ValueError where it cannot be split, or has no place for the port.
    """
    words = shlex.split(command)
    name = words.pop(0)[:-1] if words and words[0].endswith(":") else name_of(words)
    if not any("{port}" in word for word in words):
        raise ValueError(f"a server's command needs {{port}}: {shown(words)}")
    return name, words


def name_of(words: Sequence[str]) -> str:
    """The program that is started, or the module that Python runs."""
    rest = list(words)
    if rest and Path(rest[0]).name == "env":
        del rest[0]
        while rest and (rest[0].startswith("-") or "=" in rest[0]):
            del rest[: 2 if rest[0] in ENV_OPTIONS else 1]
    program = Path(rest[0]).name if rest else "peer"
    if program.startswith("python") and "-m" in rest[:-1]:
        return rest[rest.index("-m") + 1]
    return program


def shown(words: Sequence[str]) -> str:
    """The command with no path in it that begins at a root."""
    bare = [PATH_BEFORE_NAME.sub("", word) for word in words]
    return " ".join(word if re.fullmatch(r"\S+", word) else shlex.quote(word) for word in bare)


class PeerProcess:
    """One start of a server. started: by time.monotonic, 0 before; port: 0 before."""

    def __init__(
        self,
        name: str,
        words: Sequence[str],
        places: Mapping[str, str],
        *,
        log: Path,
    ) -> None:
        """places: what {model}, {data} and the like in the words stand for; {port} is ours."""
        self.name = name
        self._words = words
        self._places = dict(places)
        self._log = log
        self._seen: set[Process] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self.started = 0.0
        self.port = 0
        self.peak_bytes = 0  # the most memory that was seen, of all its processes together
        self._over = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def start(self) -> None:
        """Once. Raises PeerError where there is no such program."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._places["port"] = str(self.port)
        command = [self._filled(word) for word in self._words]
        self.started = time.monotonic()
        with self._log.open("ab") as log, signals_later():
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"HF_HUB_OFFLINE": "1"},
                    start_new_session=True,  # a Ctrl-C is for us, who end it
                )
            except OSError as error:
                raise PeerError(f"{self.name} cannot be started: {error.strerror}") from None
        self._sampler.start()

    def end(self) -> None:
        """End it and all that it has started, if it runs."""
        process = self._process
        if process is None or self._over.is_set():
            return
        self._over.set()
        if self._sampler.ident is not None:  # a signal may have come before it was started
            self._sampler.join()
        self._weigh(process.pid)
        process.terminate()
        try:
            process.wait(END_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._seen |= {each for each in processes() if session_of(each[0]) == process.pid}
        self._end_those_left()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def wait_until_it_answers(self, seconds_max: float) -> str:
        """The name of the model that it serves. Raises PeerError where it ends, or is late."""
        deadline = self.started + seconds_max
        while (left := deadline - time.monotonic()) > 0:
            if self._status() is not None:
                raise self.failure("ended before it answered")
            answer_seconds = min(left, ANSWER_SECONDS_MAX)
            name = served_model(self.url, self._places["model"], answer_seconds)
            if name is not None:
                return name
            time.sleep(LOOK_SECONDS)
        raise self.failure(f"did not answer within {seconds_max:g} s")

    def failure(self, what: str) -> PeerError:
        """An error that says what it did, its status where it has ended, and its last words."""
        status = self._status()
        ended = "" if status is None else f" (status {status})"
        lines = self._log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        last = "\n".join(f"    {line}" for line in lines) or "    nothing"
        return PeerError(f"{self.name}: it {what}{ended}; the last lines of its log:\n{last}")

    def _filled(self, word: str) -> str:
        """Not str.format: a command may hold braces of its own, such as JSON's."""
        for place, value in self._places.items():
            word = word.replace(f"{{{place}}}", value)
        return word

    def _status(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def _sample(self) -> None:
        assert self._process is not None
        while not self._over.wait(SAMPLE_SECONDS):
            self._weigh(self._process.pid)

    def _weigh(self, pid: int) -> None:
        tree = descendants(pid)
        self._seen |= tree
        together = sum(resident_bytes(each) for each, _ in tree)
        alone = max((most_resident_bytes(each) for each, _ in tree), default=0)
        self.peak_bytes = max(self.peak_bytes, together, alone)

    def _end_those_left(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            left = self._seen & processes()
            for pid, _ in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline = time.monotonic() + LEFT_SECONDS_MAX
            while self._seen & processes() and time.monotonic() < deadline:
                time.sleep(LOOK_SECONDS)


@contextmanager
def signals_later() -> Generator[None]:
    """Signals that tell us to end come behind this: a process that has been started must be known
    first, or nobody ends it. Python gives them to its main thread; in others nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def keep(number: int, _: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, keep) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


# /proc ----------------------------------------------------------------------------------------


def _state(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, which may hold anything; [] for nobody, and for
    who has ended and was not asked for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in "ZX" else fields


def processes() -> set[Process]:
    """All that run."""
    found: set[Process] = set()
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and (fields := _state(int(entry))):
            found.add((int(entry), int(fields[19])))
    return found


def session_of(pid: int) -> int | None:
    """Whose session it is in."""
    fields = _state(pid)
    return int(fields[3]) if fields else None


def descendants(root: int) -> set[Process]:
    """A process and all that it and those have started, as far as they run."""
    children: dict[int, list[Process]] = {}
    found: set[Process] = set()
    for pid, began in processes():
        if fields := _state(pid):
            children.setdefault(int(fields[1]), []).append((pid, began))
            if pid == root:
                found.add((pid, began))
    waiting = list(found)
    while waiting:
        below = children.get(waiting.pop()[0], [])
        found.update(below)
        waiting += below
    return found


def resident_bytes(pid: int) -> int:
    """Its proportional set size; 0 for who has ended or is not ours to weigh."""
    return _told(pid, "smaps_rollup", "Pss")


def most_resident_bytes(pid: int) -> int:
    """The largest resident set that it ever had; 0 as in `resident_bytes`."""
    return _told(pid, "status", "VmHWM")


def _told(pid: int, file: str, name: str) -> int:
    try:
        text = Path(f"/proc/{pid}/{file}").read_text()
    except OSError:
        return 0
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0
