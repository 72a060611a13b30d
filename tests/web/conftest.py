"""One Chromium a module, one real server for all that need no server of their own."""

from collections.abc import AsyncGenerator, Iterator

import pytest
import pytest_asyncio
from playwright.async_api import Browser

from tests.api.fake_conversations import FakeChatReply
from tests.api.harness import Site, site
from tests.web.browser import TabMaker, chromium, tabs
from tests.wiring.server import Server, running


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def browser() -> AsyncGenerator[Browser]:
    async with chromium() as opened:
        yield opened


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demonstration model."""
    with running(tmp_path_factory.mktemp("served"), ["--threads", "1"]) as served:
        yield served


@pytest_asyncio.fixture(loop_scope="module")
async def user(browser: Browser, server: Server) -> AsyncGenerator[TabMaker]:
    """Somebody at the real server, with a browser that knows nothing yet."""
    async with tabs(browser, server.url) as maker:
        yield maker


@pytest_asyncio.fixture(loop_scope="module")
async def scripted() -> AsyncGenerator[Site]:
    """The API floor alone: replies say what a test tells them to."""
    async with site() as running_site:
        yield running_site


@pytest_asyncio.fixture(loop_scope="module")
async def reader(browser: Browser, scripted: Site) -> AsyncGenerator[TabMaker]:
    """Somebody at the scripted one."""
    async with tabs(browser, scripted.url) as maker:
        yield maker


@pytest.fixture
def replies(scripted: Site) -> list[FakeChatReply]:
    """The replies that were asked for, as they come."""
    asked: list[FakeChatReply] = []
    scripted.conversations.on_send = asked.append
    return asked
