"""What one user saw and typed is not there for the next one of the same browser."""

import json
import re
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Browser, ConsoleMessage, Locator, expect

from chatserve.api.keys import key_ring
from chatserve.api.session import COOKIE_NAME
from tests.api.fake_conversations import FakeChatReply
from tests.api.harness import Site, site
from tests.web.browser import WITHOUT_SOCKETS, Tab, TabMaker, needs_chromium, tabs

pytestmark = needs_chromium

KEYS = """
[[keys]]
name = "ann"
key = "key-of-ann"
[[keys]]
name = "bob"
key = "key-of-bob"
"""
SECRETS = re.compile("moon|half a thought|once more|in another tab")
SOON_MS = 8_000  # a page that hears nothing looks for news every 20 s
TITLE = "What is the moon?"
# All that a tab shows or keeps, as one text.
ALL_OF_IT = """() => [document.documentElement.outerHTML, document.title, location.href,
  ...[...document.querySelectorAll("textarea, input")].map((each) => each.value),
  JSON.stringify([{ ...localStorage }, { ...sessionStorage }])].join("\\n")"""


@pytest_asyncio.fixture(loop_scope="module")
async def shared(tmp_path: Path) -> AsyncGenerator[Site]:
    """A server with two users."""
    (tmp_path / "keys.toml").write_text(KEYS)
    async with site(keys=key_ring(key_file=tmp_path / "keys.toml")) as running_site:
        yield running_site


@pytest_asyncio.fixture(loop_scope="module")
async def visitors(browser: Browser, shared: Site) -> AsyncGenerator[TabMaker]:
    """A browser that more than one person uses."""
    async with tabs(browser, shared.url) as maker:
        yield maker


def door(tab: Tab) -> Locator:
    return tab.page.get_by_role("dialog", name="Sign in")


async def come_in(tab: Tab, key: str) -> None:
    await expect(door(tab)).to_be_visible()
    await door(tab).get_by_label("API key").fill(key)
    await door(tab).get_by_label("API key").press("Enter")
    await inside(tab)


async def inside(tab: Tab) -> None:
    await expect(tab.page.locator("header .model")).to_be_visible()
    await expect(door(tab)).to_be_hidden()


async def outside(tab: Tab) -> None:
    """At the door, and nothing of whoever was inside is there."""
    await expect(door(tab)).to_be_visible()
    await nothing_of_ann(tab)


async def nothing_of_ann(tab: Tab) -> None:
    for each in (tab.own, tab.replies, tab.rows):
        await expect(each).to_have_count(0)
    found = SECRETS.search(await tab.evaluate(ALL_OF_IT))
    assert found is None, found


def answering(shared: Site) -> list[FakeChatReply]:
    """Each message is answered at once."""
    replies: list[FakeChatReply] = []

    def answer(reply: FakeChatReply) -> None:
        replies.append(reply)
        reply.say("It is the moon.")
        reply.finish()
        shared.conversations.keep(reply)

    shared.conversations.on_send = answer
    return replies


async def two_tabs_of_ann(visitors: TabMaker, shared: Site) -> tuple[Tab, Tab]:
    """One at a conversation, one at a new one; something is typed in both."""
    answering(shared)
    first = await visitors.blank()
    await first.page.goto(visitors.url)
    await come_in(first, "key-of-ann")
    await first.ask(TITLE)
    await first.message.fill("half a thought")
    second = await visitors.open()
    await expect(second.rows).to_have_text([TITLE])
    await second.message.fill("in another tab")
    return first, second


@pytest.mark.parametrize("sockets", [True, False], ids=["sockets", "no-sockets"])
async def test_nothing_is_left_for_the_next_user(
    visitors: TabMaker, shared: Site, *, sockets: bool
) -> None:
    if not sockets:
        await visitors.context.add_init_script(WITHOUT_SOCKETS)
    first, second = await two_tabs_of_ann(visitors, shared)
    theirs = first.conversation
    await first.button("Sign out").click()
    for tab in (second, first):
        await outside(tab)
        assert tab.conversation == ""
    await come_in(first, "key-of-bob")
    await inside(second)  # by itself
    for tab in (first, second):
        await expect(tab.page.get_by_text("Your conversations will be here.")).to_be_visible()
        await expect(tab.message).to_have_value("")
        await nothing_of_ann(tab)
    # Who has the address has nothing else.
    await second.open(theirs)
    await expect(second.page.get_by_role("alert")).to_have_text("There is no such conversation.")
    await expect(second.page.locator(".step")).to_have_count(0)
    await expect(second.page.locator("header h1")).to_have_text("New chat")
    # Nor has whoever asks the browser to go back.
    await first.page.go_back()
    await expect(first.page.locator(".step")).to_have_count(0)


async def test_a_key_that_counts_no_more_locks_all_tabs(visitors: TabMaker, shared: Site) -> None:
    first, second = await two_tabs_of_ann(visitors, shared)
    await visitors.context.clear_cookies(name=COOKIE_NAME)
    await first.message.fill("once more")
    await first.message.press("Enter")
    for tab in (first, second):
        await expect(door(tab)).to_be_visible()
        for each in (tab.own, tab.replies, tab.rows):
            await expect(each).to_have_count(0)
        assert not SECRETS.search(await tab.evaluate("() => document.documentElement.outerHTML"))
    # Whose it was finds it again, and what was under way goes out.
    await come_in(first, "key-of-ann")
    await expect(first.own).to_have_text([TITLE, "once more"])
    await inside(second)
    await expect(second.message).to_have_value("in another tab")
    assert [each.content for each in shared.conversations.sent] == [TITLE, "once more"]


async def test_a_page_that_heard_nothing_looks_who_is_here(
    visitors: TabMaker, shared: Site
) -> None:
    # One that the browser had put aside.
    first, second = await two_tabs_of_ann(visitors, shared)
    await visitors.context.clear_cookies(name=COOKIE_NAME)
    await first.evaluate(
        "() => dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))"
    )
    await expect(door(first)).to_be_visible(timeout=SOON_MS)
    await expect(second.own).to_have_count(0)
    # One whose socket is not let in any more, as after a restart with other keys.
    await come_in(first, "key-of-ann")
    await expect(first.own).to_have_text(TITLE)
    await visitors.context.clear_cookies(name=COOKIE_NAME)
    shared.conversations.break_changes(RuntimeError("for the sockets"))
    await expect(door(first)).to_be_visible(timeout=SOON_MS)
    await expect(first.own).to_have_count(0)


async def test_a_sign_out_that_did_not_arrive_is_told(visitors: TabMaker, shared: Site) -> None:
    first, _ = await two_tabs_of_ann(visitors, shared)
    await first.page.route("**/api/session", lambda route: route.abort())
    await first.button("Sign out").click()
    await expect(first.page.locator(".notice")).to_have_text("The server cannot be reached.")
    await expect(first.own).to_have_text(TITLE)
    await first.page.unroute("**/api/session")
    await first.button("Sign out").click()
    await outside(first)


async def test_somebody_elses_sign_in_takes_what_was_typed(
    visitors: TabMaker, shared: Site
) -> None:
    first, second = await two_tabs_of_ann(visitors, shared)
    await visitors.context.clear_cookies(name=COOKIE_NAME)
    await first.page.reload()
    await come_in(first, "key-of-bob")
    await inside(second)
    for tab in (first, second):
        await expect(tab.message).to_have_value("")
        await expect(tab.page.get_by_text("Your conversations will be here.")).to_be_visible()
        await nothing_of_ann(tab)
        assert tab.conversation == "", "the address was hers"


@pytest.mark.parametrize("path", ["", "/admin"])
async def test_the_door_stays_shut(visitors: TabMaker, path: str) -> None:
    tab = await visitors.blank()
    await tab.page.goto(visitors.url + path)
    for _ in range(3):  # Chromium asks a page at the first only
        await expect(door(tab)).to_be_visible()
        await tab.page.keyboard.press("Escape")
    await expect(door(tab)).to_be_visible()
    await expect(door(tab).get_by_label("API key")).to_be_focused()


async def test_a_tab_that_nobody_told_asks_who_is_here(visitors: TabMaker, shared: Site) -> None:
    """A tab that a browser had thrown away has only what it kept."""
    first, _ = await two_tabs_of_ann(visitors, shared)
    kept = await first.evaluate("() => Object.entries(sessionStorage)")
    await first.button("Sign out").click()
    await come_in(first, "key-of-bob")
    restored = await visitors.blank()
    await restored.page.add_init_script(
        f"for (const each of {json.dumps(kept)}) sessionStorage.setItem(...each);"
    )
    await restored.open()
    await expect(restored.message).to_have_value("")
    await nothing_of_ann(restored)


async def test_a_sign_out_is_heard_at_the_door(visitors: TabMaker, shared: Site) -> None:
    """What waits there for its writer is not to wait any more."""
    first, second = await two_tabs_of_ann(visitors, shared)
    await visitors.context.clear_cookies(name=COOKIE_NAME)
    # The other tab cannot ask who is here, so it stays as it is.
    await second.page.route(
        "**/api/session",
        lambda route: route.abort() if route.request.method == "GET" else route.continue_(),
    )
    await first.page.reload()
    await expect(door(first)).to_be_visible()
    assert "half a thought" in await first.evaluate(ALL_OF_IT)
    await second.button("Sign out").click()
    await first.page.wait_for_function(f"() => !({ALL_OF_IT})().includes('half a thought')")
    await outside(first)


async def test_a_sign_out_elsewhere_closes_the_socket_and_the_page(
    visitors: TabMaker, shared: Site
) -> None:
    """The close code alone says so: whoever ends the session tells no tab, and no tab asks."""
    first, second = await two_tabs_of_ann(visitors, shared)
    (cookie,) = await visitors.context.cookies()
    async with shared.client(cookies={COOKIE_NAME: cookie.get("value", "")}) as client:
        assert (await client.delete("/api/session")).status_code == 204
    for tab in (first, second):
        await expect(door(tab)).to_be_visible(timeout=SOON_MS)
        await outside(tab)


async def test_what_needs_a_key_is_not_asked_before_it_is_known(visitors: TabMaker) -> None:
    tab = await visitors.blank()
    said: list[str] = []

    def hear(message: ConsoleMessage) -> None:
        said.append(message.text)

    tab.page.on("console", hear)
    await tab.page.goto(visitors.url)
    await expect(door(tab)).to_be_visible()
    await come_in(tab, "key-of-ann")
    await expect(tab.page.get_by_text("Your conversations will be here.")).to_be_visible()
    assert said == []
