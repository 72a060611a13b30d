"""Server processes for tests that do not import for themselves: one process has, and is forked.

Theory of operation. Most of a server's start is its imports: five seconds of work. Here a process
beside pytest (`python -m tests.fork_server`) imports all that a server imports, once, and then
forks a child for each order; the child runs the module that `python -m` would run. Each server is
a process of its own as before: its number, signals, descriptors, environment, and end.

    pytest ── orders, with the child's stdin, stdout and stderr ──▶ fork server ──fork──▶ servers
      └────────────── signals and the wait for an end, by pidfd ────────────────────────────▲

A child that has ended stays a zombie until pytest asks for its status, so its number is nobody
else's meanwhile. When the orders' socket closes, however pytest has ended, the fork server tells
what still runs to end (SIGTERM), and ends; when the fork server dies the kernel tells it.

What a fork cannot give: what is read at import (the environment of Python, of torch and its
libraries; see FIXED_PREFIXES), the seed of hash(), and the time before the imports. Whoever
tests these has to execute Python anew. Only a process of one thread is forked, in which nothing was
computed with torch: OpenMP's threads would be missing in the child.
"""

import atexit
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The command line, and all that a server imports from there to its first reply.
IMPORTED = (
    "chatserve.cli",
    "chatserve.lifespan",
    "chatserve.assembly",
    "chatserve.demonstration",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
    "cryptography.hazmat.primitives.ciphers.aead",
    "transformers.models.qwen3.modeling_qwen3",
    "encodings.idna",
)
# Variables that are read at import, or when a library is loaded.
FIXED_PREFIXES = (
    *("PYTHON", "LD_", "LC_", "LANG", "MALLOC_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_"),
    *("DNNL_", "ONEDNN_", "ATEN_", "TORCH", "PYTORCH", "CUDA_", "TRITON_", "HF_", "TRANSFORMERS_"),
)
# Set by torch itself in a process that comes to need a folder for what it compiles, such as ours.
NOT_FIXED = frozenset({"TORCHINDUCTOR_CACHE_DIR"})
MESSAGE_BYTES_MAX = 1 << 20
PR_SET_PDEATHSIG = 1
END_SECONDS_MAX = 30.0


@dataclass(frozen=True, slots=True)
class Order:
    """`python -m MODULE ARGUMENTS` in a folder, with an environment."""

    module: str
    arguments: Sequence[str]
    folder: str
    environment: Mapping[str, str]


# The side of the tests -------------------------------------------------------------------------


def can_fork() -> bool:
    """Whether servers may be forked here. Not on a machine with a GPU: what CUDA has begun before
    a fork is lost after it."""
    return sys.platform == "linux" and shutil.which("nvidia-smi") is None


class ForkedProcess:
    """A child of the fork server, as subprocess.Popen would show it."""

    def __init__(self, server: "ForkServer", order: Order, pid: int) -> None:
        self.args = [order.module, *order.arguments]
        self.pid = pid
        self.returncode: int | None = None
        self._server = server
        self._lock = threading.Lock()
        self._pidfd = os.pidfd_open(pid)  # a zombie at the worst: its number is still its own

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            os.close(self._pidfd)

    def poll(self) -> int | None:
        """The exit status, None while it runs; -N = ended by signal N."""
        return self._status(0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once it has ended. timeout: seconds. Raises TimeoutExpired."""
        status = self._status(timeout)
        if status is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return status

    def send_signal(self, number: int) -> None:
        """Nothing happens where it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _status(self, seconds: float | None) -> int | None:
        if self.returncode is not None:
            return self.returncode
        ended = select.poll()
        ended.register(self._pidfd, select.POLLIN)
        if not ended.poll(None if seconds is None else seconds * 1_000):
            return None
        with self._lock:
            if self.returncode is None:
                self.returncode = self._server.reap(self.pid)
        return self.returncode


class ForkServer:
    """The process, and the socket for orders. It imports while the first order waits."""

    def __init__(self, environment: Mapping[str, str], imported: Sequence[str] = IMPORTED) -> None:
        """environment: what the variables of FIXED_PREFIXES will be for all children."""
        self._environment = dict(environment)
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fork_server", str(theirs.fileno()), *imported],
                cwd=ROOT,
                # As the command line has it, before it imports torch. numpy's own threads would
                # begin at import; a server computes nothing with them.
                env={"OMP_WAIT_POLICY": "PASSIVE", **environment, "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        stdout: int | None = None,
        stderr: int | None = None,
        module: str = "chatserve",
        folder: Path | None = None,
    ) -> ForkedProcess:
        """`python -m MODULE ARGUMENTS`, with nothing to read. stdout, stderr: descriptors, None =
        ours. folder: to run in, None = ours.

        Raises ValueError where the environment differs in what is fixed, RuntimeError where no
        child could be made.
        """
        names = self._environment.keys() | environment.keys()
        changed = sorted(
            name
            for name in names
            if name.startswith(FIXED_PREFIXES)
            and name not in NOT_FIXED
            and self._environment.get(name) != environment.get(name)
        )
        if changed:
            raise ValueError(f"read at import, so Python has to be executed anew: {changed}")
        order = Order(module, list(arguments), str(folder or Path.cwd()), dict(environment))
        with open(os.devnull) as nothing:
            descriptors = [
                nothing.fileno(),
                1 if stdout is None else stdout,
                2 if stderr is None else stderr,
            ]
            return ForkedProcess(self, order, self._ask(asdict(order), descriptors))

    def reap(self, pid: int) -> int:
        """The status of a child that has ended."""
        return self._ask({"reap": pid}, [])

    def close(self) -> None:
        """End it, and what still runs."""
        self._socket.close()
        self._process.wait(END_SECONDS_MAX)

    def _ask(self, question: Mapping[str, object], descriptors: Sequence[int]) -> int:
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(question).encode()], descriptors)
            answer = self._socket.recv(MESSAGE_BYTES_MAX)
        if not answer:
            raise RuntimeError(f"the fork server has ended: {self._process.wait()}")
        told = json.loads(answer)
        if isinstance(told, str):
            raise RuntimeError(told)
        return told


@functools.cache
def fork_server() -> ForkServer:
    """The one of this pytest."""
    made = ForkServer(os.environ | {"HF_HUB_OFFLINE": "1"})
    atexit.register(made.close)
    return made


# The side of the fork server -------------------------------------------------------------------


def main(descriptor: int, imported: Sequence[str]) -> None:
    """Import, then fork until the socket closes. In a child: run what was ordered."""
    control = socket.socket(fileno=descriptor)
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # pytest decides when this ends
    for name in imported:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a child's collections leave alone, and do not copy, what it shares
    order = _fork_on_order(control)
    if order is None:
        os._exit(0)  # to take the interpreter down takes a second
    signal.signal(signal.SIGINT, interrupt)
    os._exit(_run(order))


def _fork_on_order(control: socket.socket) -> Order | None:
    """The order in a child, None here when the tests are over."""
    running: set[int] = set()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, MESSAGE_BYTES_MAX, 3)
        if not message:
            break
        question = json.loads(message)
        if "reap" in question:
            pid = question["reap"]
            running.discard(pid)
            answer: int | str = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        elif len(os.listdir("/proc/self/task")) != 1:
            answer = "the fork server has threads: an import began them"
        else:
            ours = os.getpid()
            answer = os.fork()
            if answer == 0:
                control.close()
                _take_over(descriptors, ours)
                return Order(**question)
            running.add(answer)
        for each in descriptors:
            os.close(each)
        control.send(json.dumps(answer).encode())
    for pid in running:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGCONT)
    return None


def _take_over(descriptors: Sequence[int], parent: int) -> None:
    """stdin, stdout and stderr, and to end when the fork server does."""
    for number, each in enumerate(descriptors):
        os.dup2(each, number)
        os.close(each)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _run(order: Order) -> int:
    """As `python -m` does, up to where the interpreter is taken down; the exit status."""
    os.environ.clear()
    os.environ.update(order.environment)
    os.chdir(order.folder)
    sys.path[0] = order.folder
    sys.argv[1:] = order.arguments
    # Python's own dice are thrown anew by a fork; of these each process has its own seed, too.
    if "numpy.random" in sys.modules:
        importlib.import_module("numpy.random").seed()
    if "torch" in sys.modules:
        importlib.import_module("torch").default_generator.seed()
    status = 0
    try:
        runpy.run_module(order.module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, int):
            status = end.code
        elif end.code is not None:
            print(end.code, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    # What the interpreter does first: wait for threads, call what is registered, write what is
    # buffered. The rest, a second of taking every module apart, is left out.
    threading._shutdown()  # pyright: ignore
    atexit._run_exitfuncs()  # pyright: ignore
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
