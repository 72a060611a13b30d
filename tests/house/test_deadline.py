"""A test that waits for ever fails by its name, and those behind it run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deadline import within

ROOT = Path(__file__).parents[2]
SECONDS_MAX = 60.0

HANGING = """
import asyncio

import pytest


@pytest.fixture
async def life():
    async with asyncio.timeout(5):  # of another task than the test's
        yield


async def test_that_hangs(life):
    await asyncio.Event().wait()


@pytest.mark.soak
async def test_that_is_long():
    await asyncio.sleep(0.2)


async def test_behind():
    pass
"""


def test_a_hang_ends_by_its_name_and_the_next_test_runs(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "from tests import deadline\n"
        "from tests.deadline import pytest_runtest_call\n"
        "deadline.SECONDS_MAX = 0.1\n"
    )
    (tmp_path / "test_hanging.py").write_text(HANGING)
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\nmarkers =\n    soak: x\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:valkey", "-ra", "."],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert "1 failed, 2 passed" in run.stdout
    assert "test_hanging.py::test_that_hangs hung" in run.stdout
    assert "await asyncio.Event().wait()" in run.stdout, "where it waited"


async def test_a_tests_own_timeout_is_its_own() -> None:
    async def late() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        await within(late, SECONDS_MAX, "late")()


async def test_every_test_here_runs_within_the_deadline(request: pytest.FixtureRequest) -> None:
    assert hasattr(request.node.obj, "__wrapped__") or hasattr(request.function, "__wrapped__")
