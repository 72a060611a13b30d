"""One deadline for every test that awaits, over its whole body.

Theory of operation: a test runs in a task of its own, so a timeout around a fixture's `yield`
does not reach what the test itself awaits, and one await that nobody answers would hang all tests
behind it. Here the test's function is wrapped before it is called. A test that is late fails by
its name, with the line where it waited, and the next one runs. Long runs are exempt.
"""

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import pytest

# Some ten times what the longest test takes on two busy cores.
SECONDS_MAX = 600.0

AsyncTest = Callable[..., Coroutine[Any, Any, None]]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Wrap what awaits."""
    if (
        isinstance(item, pytest.Function)
        and inspect.iscoroutinefunction(item.obj)
        and item.get_closest_marker("soak") is None
    ):
        item.obj = within(item.obj, SECONDS_MAX, item.nodeid)
    yield


def within(test: AsyncTest, seconds: float, name: str) -> AsyncTest:
    """The test, failing by its name if it is not over in time."""

    @functools.wraps(test)
    async def bounded(*arguments: Any, **fixtures: Any) -> None:
        life = asyncio.timeout(seconds)
        try:
            async with life:
                await test(*arguments, **fixtures)
        except TimeoutError as error:
            if not life.expired():
                raise
            raise AssertionError(f"{name} hung: it was not over after {seconds} s") from error

    return bounded
