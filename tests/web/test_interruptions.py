"""A reply is the server's: reloads, lost networks, restarts and other tabs do not hurt it."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest_asyncio
from playwright.async_api import Browser, expect

from tests.web.browser import (
    LONG,
    WITHOUT_SOCKETS,
    Tab,
    TabMaker,
    long_conversation,
    needs_chromium,
    tabs,
)
from tests.wiring.server import Revived, Server, reviving

pytestmark = needs_chromium

TOKENS = 1_500  # of each reply, so that nothing of one can be missing


@pytest_asyncio.fixture(loop_scope="module")
async def revived(tmp_path: Path) -> AsyncGenerator[Revived]:
    with reviving(tmp_path, ["--threads", "1"]) as server:
        await server.ready()
        yield server


async def begun(tab: Tab) -> None:
    """Ask the question in a new conversation, and see the answer begin."""
    await tab.open(await long_conversation(tab.url, TOKENS))
    await tab.say(LONG)
    await expect(tab.replies).to_contain_text("1, 2")


async def whole(tab: Tab) -> None:
    """The answer ends, has no gap, and is what the server keeps."""
    await expect(tab.receipts).to_have_count(1)
    shown = await tab.evaluate("() => document.querySelector('.step.assistant .prose').textContent")
    turns = await kept(tab)
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    assert turns[1]["final"]["usage"]["completion_tokens"] == TOKENS
    assert words(shown) == words(turns[1]["content"])


async def kept(tab: Tab) -> list[dict[str, Any]]:
    async with httpx.AsyncClient(base_url=tab.url, timeout=20) as client:
        return (await client.get(f"/api/conversations/{tab.conversation}")).json()["turns"]


def words(text: str) -> list[str]:
    """Markdown may drop marks and lines' ends, never a number or a word."""
    return "".join(each if each.isalnum() else " " for each in text).split()


async def test_a_reload_in_the_middle(user: TabMaker) -> None:
    tab = await user.blank()
    await begun(tab)
    await tab.page.reload()
    await expect(tab.button("Stop")).to_be_visible()
    await whole(tab)


async def test_a_reload_before_the_turn_was_acknowledged_loses_nothing(user: TabMaker) -> None:
    tab = await user.blank()
    await tab.open(await long_conversation(tab.url, TOKENS))
    await tab.page.route("**/turns", lambda route: route.abort())
    await tab.say(LONG)
    await expect(tab.page.get_by_text("Trying again…")).to_be_visible()
    await tab.page.unroute("**/turns")
    await tab.page.reload()
    await whole(tab)


async def test_what_is_typed_and_not_sent_outlives_a_reload(user: TabMaker) -> None:
    tab = await user.open()
    await tab.message.fill("half a thought")
    await tab.page.reload()
    await expect(tab.message).to_have_value("half a thought")
    await tab.button("New chat").first.click()
    await tab.ask("Hello!")
    await expect(tab.message).to_have_value("")


async def test_a_network_that_is_lost_for_a_while(user: TabMaker) -> None:
    tab = await user.blank()
    await begun(tab)
    # Playwright's `offline` leaves open streams alone: every stream that is open is cut here.
    lost = asyncio.Event()

    async def refuse(route: Any) -> None:
        lost.set()
        await route.abort("internetdisconnected")

    await user.context.set_offline(True)
    await tab.page.route("**/api/**", refuse)
    await tab.evaluate("() => window.stop()")
    await expect(tab.page.get_by_text("Trying again…")).to_be_visible()
    await asyncio.wait_for(lost.wait(), 20)
    await tab.page.unroute("**/api/**")
    await user.context.set_offline(False)
    await whole(tab)


async def test_a_server_that_is_killed_and_started_again(
    browser: Browser, revived: Revived
) -> None:
    async with tabs(browser, revived.server.url) as user:
        tab = await user.blank()
        await begun(tab)
        await expect(tab.replies).to_contain_text("5, 6")
        revived.kill()
        await expect(tab.page.get_by_text("Trying again…")).to_be_visible()
        shown = await tab.replies.inner_text()
        assert "5, 6" in shown
        revived.spawn()
        await revived.ready()
        await whole(tab)


async def test_a_stop_while_nothing_answers_gives_the_text_back(user: TabMaker) -> None:
    tab = await user.open()
    await tab.ask("Hello!")
    await tab.page.route("**/turns", lambda route: route.abort())
    await tab.say("Say the word moon.")
    await expect(tab.page.get_by_text("Trying again…")).to_be_visible()
    await tab.button("Stop").click()
    await expect(tab.page.get_by_role("alert")).to_contain_text("Not sent.")
    await tab.page.unroute("**/turns")
    await tab.button("Try again").click()
    await expect(tab.receipts).to_have_count(2)
    assert [turn["content"] for turn in await kept(tab)][2] == "Say the word moon."


async def test_two_tabs_see_the_same_reply(user: TabMaker) -> None:
    first = await user.blank()
    await begun(first)
    second = await user.open(first.conversation)
    await expect(second.replies).to_contain_text("1, 2")
    await whole(second)
    await whole(first)
    # What one tab says the other shows, and answers to it, without being asked to.
    await second.say("Say the word moon.")
    await expect(first.own.last).to_have_text("Say the word moon.")
    await expect(first.receipts).to_have_count(2)
    assert await first.replies.last.inner_text() == await second.replies.last.inner_text()
    await second.menu(second.rows.first, "Delete")
    await second.page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    await expect(first.page.get_by_text("This conversation was deleted.")).to_be_visible()


async def test_two_tabs_without_a_socket(browser: Browser, server: Server) -> None:
    """Proxies that know no WebSockets: the page works, and looks for news by itself."""
    async with tabs(browser, server.url) as user:
        await user.context.add_init_script(WITHOUT_SOCKETS)
        first = await user.blank()
        await begun(first)
        await whole(first)
        second = await user.open(first.conversation)
        await second.ask("Say the word moon.")
        await first.evaluate("() => document.dispatchEvent(new Event('visibilitychange'))")
        await expect(first.own.last).to_have_text("Say the word moon.")
        await expect(first.receipts).to_have_count(2)


async def test_a_reply_goes_on_while_one_is_elsewhere(user: TabMaker) -> None:
    tab = await user.blank()
    await begun(tab)
    name = tab.conversation
    await tab.page.keyboard.press("Control+Shift+O")
    await expect(tab.page.get_by_text("What shall we talk about?")).to_be_visible()
    await expect(tab.page.locator("nav .running")).to_have_count(1)
    await tab.page.go_back()
    await expect(tab.own).to_have_text(LONG)
    assert tab.conversation == name
    await whole(tab)
    await expect(tab.page.locator("nav .running")).to_have_count(0)
