"""What holds for all tests."""

import os

import torch

from tests.deadline import pytest_runtest_call

__all__ = ["pytest_runtest_call"]

# Triton reads its switch when kernels are defined, and others may have loaded it long before:
# without a GPU these run in a process of their own (`tests/kernels/test_interpreted.py`).
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    collect_ignore_glob = ["*/test_gpu_*.py"]
