"""The tests of the Triton kernels where there is no GPU: in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
FILES = sorted(str(path.relative_to(TESTS)) for path in TESTS.rglob("test_gpu_*.py"))
SECONDS_MAX = 600  # ten times what the longest takes on a busy core


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU")
@pytest.mark.parametrize("name", FILES)
def test_kernels_in_tritons_interpreter(name: str) -> None:
    pytest.importorskip("triton")
    # What this process was told by its own pytest is not for the other one.
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider")
    done = subprocess.run(
        [*command, str(TESTS / name)],
        env={**kept, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=TESTS.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert done.returncode == 0, done.stdout
