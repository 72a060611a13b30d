"""Which event loops the tests of this floor run on.

A server runs on uvloop where there is one, and the two loops' transports differ in when they
pause, flush and notice an end. So what is about sockets is tested on both.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
import uvloop

_ON_BOTH = ("test_socket", "test_sign_out")


def pytest_asyncio_loop_factories(
    config: pytest.Config,
    item: pytest.Item,
) -> Mapping[str, Any]:
    """By name; a single one is not shown in a test's name."""
    if item.path.name.startswith(_ON_BOTH):
        return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}
