"""The Triton kernels, compiled for processors that users have. No GPU is needed for that, only
Triton's own compiler; in the interpreter nothing shows what a processor has no room for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Of an A100, of consumer cards since then, and of an H100: compute capability, and the bytes of
# shared memory that a program may have.
PROCESSORS = {80: 163 << 10, 120: 99 << 10, 90: 227 << 10}
SECONDS_MAX = 600


@pytest.mark.soak
@pytest.mark.parametrize("capability", PROCESSORS)
def test_kernels_compile_and_find_room(capability: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiling", str(capability)],
        env={**kept, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    names = {name for name, *_ in found}
    assert {"attend", "join", "append", "append_rounded", "copy", "weighted_sum"} <= names
    assert {"rotate", "norm", "gate", "adjust", "survey", "weigh", "gather", "choose"} <= names
    for name, shared, spilled, *what in found:
        assert int(shared) <= PROCESSORS[capability], (name, shared, what)
        # What does not fit into registers goes to slow memory: some words, and no array of results.
        assert int(spilled) <= 160, (name, spilled, what)
