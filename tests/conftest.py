"""What holds for all tests."""

from tests.deadline import pytest_runtest_call

__all__ = ["pytest_runtest_call"]
