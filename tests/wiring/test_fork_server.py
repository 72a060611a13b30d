"""A forked process is what an executed one is, and none outlives pytest."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fork_server import ROOT, ForkedProcess, can_fork, fork_server

pytestmark = pytest.mark.skipif(not can_fork(), reason="servers are executed here")
END_SECONDS_MAX = 60.0
SEEN = "CHATSERVE_SEEN_BY_A_CHILD"

# Prints what a process can see of its own making, as JSON.
PROBE = """
import atexit, json, os, signal, sys, threading
import torch
atexit.register(print, "at the end")
threads = torch.get_num_threads()
tasks = len(os.listdir("/proc/self/task"))
torch.set_num_threads(2)
square = torch.arange(512 * 512, dtype=torch.float32).reshape(512, 512) / 512**2
product = float((square @ square).sum())
print(json.dumps({
    "name": __name__,
    "arguments": sys.argv,
    "folder": os.getcwd(),
    "path": sys.path,
    "flags": list(sys.flags),
    "environment": dict(os.environ),
    "group": os.getpgrp(),
    "session": os.getsid(0),
    "handlers": {each.name: str(signal.getsignal(each)) for each in signal.Signals},
    "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    "files": [os.readlink(f"/proc/self/fd/{each}") for each in range(3)],
    "open": sum(os.path.exists(f"/proc/self/fd/{each}") for each in range(3, 256)),
    "threads": threads,
    "more threads": len(os.listdir("/proc/self/task")) - tasks,
    "python threads": [each.name for each in threading.enumerate()],
    "product": product,
    "main": sys.modules["__main__"].__file__,
}))
sys.stdout.flush()
threading.Thread(target=lambda: print("a thread", file=sys.stderr)).start()
sys.exit(int(sys.argv[1]))
"""
DRAWS = """
import random, sys, tempfile, uuid
import numpy, torch
print(random.random(), numpy.random.random(), torch.rand(1).item(), torch.initial_seed())
print(tempfile.mktemp(), uuid.uuid4())
"""


def start(folder: Path, module: str, *words: str, out: Path) -> ForkedProcess:
    with out.open("w") as file, out.with_suffix(".err").open("w") as errors:
        return fork_server().start(
            words, _environment(), stdout=file.fileno(), stderr=errors.fileno(),
            module=module, folder=folder,
        )  # fmt: skip


def _environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", SEEN: "a value"}


def test_a_forked_process_sees_what_an_executed_one_sees(tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    out = tmp_path / "out"
    with out.open("w") as file, (tmp_path / "executed.err").open("w") as errors:
        status = subprocess.run(
            [sys.executable, "-m", "probe", "7"],
            cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=file, stderr=errors, check=False,
            # As the command line has it, before it imports torch.
            env={"OMP_WAIT_POLICY": "PASSIVE"} | _environment(),
        ).returncode  # fmt: skip
    executed, *executed_last = out.read_text().splitlines()
    assert status == 7
    process = start(tmp_path, "probe", "7", out=out)
    assert process.wait(END_SECONDS_MAX) == 7
    forked, *forked_last = out.read_text().splitlines()
    assert forked_last == executed_last == ["at the end"]
    assert out.with_suffix(".err").read_text() == "a thread\n"
    seen, wanted = json.loads(forked), json.loads(executed)
    wanted["files"] = [each.replace("executed.err", "out.err") for each in wanted["files"]]
    wanted["environment"].setdefault("OMP_WAIT_POLICY", "PASSIVE")
    seen["environment"].setdefault("OMP_WAIT_POLICY", "PASSIVE")
    assert seen == wanted
    assert seen["environment"][SEEN] == "a value"
    assert seen["handlers"]["SIGTERM"] == str(signal.SIG_DFL)
    assert seen["more threads"] >= 1, "OpenMP's threads do not start after a fork"


def test_no_two_draw_the_same(tmp_path: Path) -> None:
    (tmp_path / "draws.py").write_text(DRAWS)
    outs = [tmp_path / f"out-{number}" for number in range(2)]
    for out in outs:
        assert start(tmp_path, "draws", out=out).wait(END_SECONDS_MAX) == 0
    first, second = (out.read_text().split() for out in outs)
    assert len(first) == 6
    assert not set(first) & set(second)


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        ("raise SystemExit('one line')", 1, "one line\n"),
        ("raise SystemExit", 0, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
        ("1 / 0", 1, "ZeroDivisionError"),
    ],
)
def test_how_it_ended_is_told(tmp_path: Path, program: str, status: int, said: str) -> None:
    (tmp_path / "ends.py").write_text(program)
    out = tmp_path / "out"
    process = start(tmp_path, "ends", out=out)
    assert process.wait(END_SECONDS_MAX) == process.poll() == process.returncode == status
    errors = out.with_suffix(".err").read_text()
    assert said in errors
    assert bool(errors) == bool(said)
    process.kill()  # nobody is hit
    assert not Path(f"/proc/{process.pid}").exists(), "it was not reaped"


def test_signals_and_waits_are_those_of_a_process(tmp_path: Path) -> None:
    (tmp_path / "sleeps.py").write_text("import time\ntime.sleep(600)\n")
    process = start(tmp_path, "sleeps", out=tmp_path / "out")
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGCONT)
    process.terminate()
    assert process.wait(END_SECONDS_MAX) == -signal.SIGTERM


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "PYTHONHASHSEED", "HF_HUB_OFFLINE"])
def test_what_is_read_at_import_is_not_taken_silently(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        fork_server().start([], _environment() | {name: "3"}, folder=tmp_path)


# A pytest of its own: starts what sleeps, says who that is, and waits to be killed.
DIES = """
import os, signal, sys, time
from pathlib import Path
from tests.fork_server import ForkServer
server = ForkServer(os.environ, imported=["json"])
started = [server.start([], os.environ, module="sleeps", folder=Path(sys.argv[1]))
           for _ in range(2)]
started[1].send_signal(signal.SIGSTOP)
print(server.pid, *(each.pid for each in started), flush=True)
if sys.argv[2] == "kill":
    time.sleep(600)
server.close()
"""


@pytest.mark.parametrize("who", ["pytest ends", "kill", "kill the fork server"])
def test_no_process_outlives_pytest(tmp_path: Path, who: str) -> None:
    (tmp_path / "sleeps.py").write_text("import time\ntime.sleep(600)\n")
    command = [sys.executable, "-c", DIES, str(tmp_path), who.split()[0]]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as dying:
        assert dying.stdout is not None
        # Opened before anything is killed; if pytest has ended of itself, they may be gone.
        numbers = [int(each) for each in dying.stdout.readline().split()]
        assert len(numbers) == 3
        watched: list[int] = []
        for number in numbers:
            try:
                watched.append(os.pidfd_open(number))
            except ProcessLookupError:
                assert who == "pytest ends"
        if who == "kill":
            dying.kill()
        elif who == "kill the fork server":
            os.kill(numbers[0], signal.SIGKILL)
            os.kill(numbers[2], signal.SIGCONT)  # a stopped process takes its signal later
        deadline = time.monotonic() + END_SECONDS_MAX
        for each in watched:
            ended = select.poll()
            ended.register(each, select.POLLIN)
            assert ended.poll(max(0.0, deadline - time.monotonic()) * 1_000), "it has stayed"
            os.close(each)
        dying.kill()
