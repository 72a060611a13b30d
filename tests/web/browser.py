"""A Chromium for tests of the page, and what its users do there.

Theory of operation: one browser a module, one context a test, so that cookies and storage are a
test's own. A `Tab` fails its test when anything in it threw, or broke the content policy; what a
test breaks on purpose (a server that is away) it names beforehand.
"""

import os
import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from playwright.async_api import (
    Browser,
    BrowserContext,
    Locator,
    Page,
    ViewportSize,
    expect,
)

from benchmarks.browser import chromium as started
from benchmarks.browser import chromium_path
from chatserve.api.chat_collaborators import TurnAsk
from tests.api.fake_conversations import FakeChatReply, FakeConversations
from tests.api.harness import until
from tests.wiring.server import ENDLESS

CHROMIUM = chromium_path()
PATIENCE_MS = 20_000
WIDE: ViewportSize = {"width": 1200, "height": 800}
PHONE: ViewportSize = {"width": 390, "height": 760}

expect.set_options(timeout=PATIENCE_MS)

needs_chromium = [
    pytest.mark.browser,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(
        CHROMIUM is None and os.environ.get("CI") != "true", reason="there is no Chromium"
    ),
]


@asynccontextmanager
async def chromium() -> AsyncGenerator[Browser]:
    """A browser."""
    assert CHROMIUM is not None, "CI has no Chromium"
    async with started() as browser:
        yield browser


# Behind a proxy that knows none.
WITHOUT_SOCKETS = """window.WebSocket = class extends EventTarget {
  static OPEN = 1;
  readyState = 0;
  constructor() {
    super();
    setTimeout(() => this.dispatchEvent(new CloseEvent("close", { code: 1006 })), 5);
  }
  close() {}
}"""

LONG = "Count from 1 to 80."


async def long_conversation(url: str, tokens: int) -> str:
    """A new conversation whose replies have so many tokens, whatever the model means; its id. To
    `LONG` they begin with `1, 2, 3`."""
    settings = ENDLESS | {"temperature": 0.0, "max_tokens": tokens}
    async with httpx.AsyncClient(base_url=url, timeout=20) as client:
        made = await client.post("/api/conversations", json={"settings": settings})
        made.raise_for_status()
        return made.json()["id"]


async def asked(replies: Sequence[FakeChatReply], count: int = 1) -> None:
    """Wait until the server was asked for so many replies: the page says Stop before that."""
    await until(lambda: len(replies) >= count)


async def arrived(conversations: FakeConversations, content: str | None) -> TurnAsk:
    """The turn with this content, once the server has got it: the page shows it before that."""
    await until(lambda: [each.content for each in conversations.sent][-1:] == [content])
    return conversations.sent[-1]


class Tab:
    """One tab at a server's page. `page` is Playwright's."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.complaints: list[str] = []
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: self._hear(message.text))
        page.on("dialog", lambda dialog: self.complaints.append(f"a dialog: {dialog.message}"))

    def _hear(self, text: str) -> None:
        if re.search(r"Content.Security|Refused to", text):
            self.complaints.append(text)

    # -- going there

    async def open(self, conversation: str = "") -> "Tab":
        """Load the page, at a conversation or a new one, and wait until it knows the model."""
        await self.page.goto(f"{self.url}/#{conversation}" if conversation else f"{self.url}/")
        await expect(self.page.locator("header .model")).to_be_visible()
        return self

    # -- what is there

    @property
    def message(self) -> Locator:
        """The field at the bottom."""
        return self.page.get_by_label("Message", exact=True)

    @property
    def own(self) -> Locator:
        """What the user said, as shown."""
        return self.page.locator(".step.user .text")

    @property
    def replies(self) -> Locator:
        """What was answered, as shown."""
        return self.page.locator(".step.assistant .prose")

    @property
    def receipts(self) -> Locator:
        """The bars under the replies that are over."""
        return self.page.locator(".step.assistant .summary")

    @property
    def rows(self) -> Locator:
        """The list of conversations."""
        return self.page.locator("nav li a")

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    @property
    def conversation(self) -> str:
        """The id of the one that is open."""
        return self.page.url.partition("#")[2]

    # -- what users do

    async def say(self, text: str) -> None:
        """Type and send."""
        await self.message.fill(text)
        await expect(self.button("Send")).to_be_enabled()
        await self.message.press("Enter")

    async def ask(self, text: str) -> str:
        """Say something and wait until the answer is over; the answer."""
        before = await self.receipts.count()
        await self.say(text)
        await expect(self.receipts).to_have_count(before + 1)
        return await self.replies.last.inner_text()

    async def menu(self, row: Locator, action: str) -> None:
        """Do something with a conversation of the list."""
        item = row.locator("xpath=..")
        await item.hover()
        await item.get_by_role("button").click()
        await self.page.get_by_role("menuitem", name=action).click()

    async def all_messages(self) -> None:
        """Scroll up until the first message is there."""
        await expect(self.page.locator(".step").first).to_be_visible()
        await self.evaluate(
            """async () => {
              while (document.querySelector(".earlier")) {
                document.querySelector(".scroller").scrollTop = 0;
                await new Promise(requestAnimationFrame);
              }
            }"""
        )

    async def evaluate(self, script: str, argument: object = None) -> Any:
        return await self.page.evaluate(script, argument)


@asynccontextmanager
async def tabs(browser: Browser, url: str, **options: Any) -> AsyncGenerator["TabMaker"]:
    """A context whose tabs are checked at the end."""
    context = await browser.new_context(**{"viewport": WIDE, **options})
    maker = TabMaker(context, url)
    try:
        yield maker
    finally:
        await context.close()
    complaints = [each for tab in maker.made for each in tab.complaints]
    assert not complaints, complaints


class TabMaker:
    """Opens tabs of one user."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.context = context
        self.url = url
        self.made: list[Tab] = []

    async def blank(self) -> Tab:
        """A tab that is nowhere yet."""
        tab = Tab(await self.context.new_page(), self.url)
        self.made.append(tab)
        return tab

    async def open(self, conversation: str = "") -> Tab:
        """A tab at the page."""
        return await (await self.blank()).open(conversation)
