"""What several files of tests have in common."""

import os
from collections.abc import Generator

import pytest
import torch

# Triton reads its switch when kernels are defined, and others may have loaded it long before:
# without a GPU these run in a process of their own (`test_interpreted.py`).
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    collect_ignore_glob = ["test_gpu_*.py"]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Generator[int]:
    """Torch has so many."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def two_threads() -> Generator[None]:
    """Torch has two."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
