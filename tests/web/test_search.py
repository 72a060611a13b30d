"""A search of the list ends when something is opened or made: what one does is seen in the list."""

import asyncio

from playwright.async_api import Locator, expect

from tests.api.fake_conversations import FakeChatReply
from tests.api.harness import Site
from tests.web.browser import Tab, TabMaker, asked, needs_chromium
from tests.web.test_late_answers import Late
from tests.web.test_reach import FINAL, file_of, imported
from tests.web.test_settings_kept import patched
from tests.web.test_words_kept import Held

pytestmark = needs_chromium

TITLES = ["About stars", "About ships", "About bread"]


async def titled(scripted: Site) -> list[str]:
    """A conversation of each title; their ids."""
    names = [await imported(scripted.url, file_of("one", "uno", final=FINAL)) for _ in TITLES]
    async with scripted.client() as client:
        for name, title in zip(names, TITLES, strict=True):
            await client.patch(f"/api/conversations/{name}", json={"title": title})
    return names


def search(tab: Tab) -> Locator:
    return tab.page.get_by_label("Search conversations")


async def narrowed(tab: Tab) -> None:
    await search(tab).fill("ships")
    await expect(tab.rows).to_have_text(["About ships"])


async def test_a_hit_that_is_opened_is_seen_among_the_others(
    scripted: Site, reader: TabMaker
) -> None:
    names = await titled(scripted)
    tab = await reader.open(names[0])
    for way in ("Enter", "click"):
        await narrowed(tab)
        if way == "Enter":
            await search(tab).press("Enter")
        else:
            await tab.rows.click()
        await expect(tab.page.locator("header h1")).to_have_text("About ships")
        await expect(search(tab)).to_have_value("")
        await expect(tab.rows).to_have_count(3)
        await expect(tab.page.locator("nav li.current")).to_have_text("About ships")
        await tab.rows.get_by_text("About stars").click()
        await expect(tab.page.locator("header h1")).to_have_text("About stars")


async def test_enter_opens_what_was_searched_for_and_not_what_was_listed(
    scripted: Site, reader: TabMaker
) -> None:
    names = await titled(scripted)
    tab = await reader.open(names[0])
    await expect(tab.rows.first).to_have_text("About bread")
    async with Held(tab.page, "**/api/conversations?*ships*", "GET") as answer:
        await search(tab).fill("ships")
        await search(tab).press("Enter")
        await asyncio.wait_for(answer.arrived.wait(), 20)
        await expect(tab.page.locator("header h1")).to_have_text("About stars")
        answer.let_go()
        await expect(tab.page.locator("header h1")).to_have_text("About ships")
    await expect(tab.rows).to_have_count(3)
    # Where nothing is found nothing is opened.
    await search(tab).fill("nowhere")
    await search(tab).press("Enter")
    await expect(tab.rows).to_have_count(0)
    await expect(tab.page.locator("header h1")).to_have_text("About ships")


async def test_enter_twice_asks_once(scripted: Site, reader: TabMaker) -> None:
    names = await titled(scripted)
    tab = await reader.open(names[0])
    await expect(tab.rows.first).to_have_text("About bread")
    async with Late(tab, "?*ships*") as answers:
        await search(tab).fill("ships")
        await search(tab).press("Enter")
        await answers.asked()
        await search(tab).press("Enter")
        await answers.let_go(0)
        await expect(tab.page.locator("header h1")).to_have_text("About ships")
        await expect(tab.rows).to_have_count(3)
        assert answers.count == 1
    await tab.page.go_back()
    await expect(tab.page.locator("header h1")).to_have_text("About stars")


async def test_enter_waits_for_the_list_that_news_ask_for(scripted: Site, reader: TabMaker) -> None:
    names = await titled(scripted)
    tab = await reader.open(names[0])
    await expect(tab.rows.first).to_have_text("About bread")
    async with Late(tab, "?*ships*") as answers:
        await search(tab).fill("ships")
        await search(tab).press("Enter")
        await answers.asked()
        await patched(scripted, names[2], title="About butter")
        await answers.asked(2)
        await answers.let_go(0)
        await expect(tab.page.locator("header h1")).to_have_text("About stars")
        assert tab.conversation == names[0]
        await answers.let_go(1)
        await expect(tab.page.locator("header h1")).to_have_text("About ships")
        assert answers.count == 2


async def test_enter_asks_again_after_a_list_that_failed(scripted: Site, reader: TabMaker) -> None:
    names = await titled(scripted)
    tab = await reader.open(names[0])
    await expect(tab.rows.first).to_have_text("About bread")
    async with Late(tab, "?*ships*") as answers:
        await search(tab).fill("ships")
        await search(tab).press("Enter")
        await answers.asked()
        await answers.let_go(0, lost=True)
        await expect(tab.page.locator("nav")).to_contain_text("cannot be reached")
        assert tab.conversation == names[0]
        await search(tab).press("Enter")
        await answers.asked(2)
        await answers.let_go(1)
        await expect(tab.page.locator("header h1")).to_have_text("About ships")


async def test_a_search_does_not_hide_what_is_begun(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    await titled(scripted)
    tab = await reader.open()
    await narrowed(tab)
    await tab.button("New chat").click()
    await tab.say("Something else")
    await expect(tab.rows).to_have_count(4)
    await expect(tab.page.locator("nav li.current")).to_have_text("Something else")
    await asked(replies)
    replies[0].finish(data=FINAL)
    scripted.conversations.keep(replies[0])
    await expect(tab.receipts).to_have_count(1)
    await expect(tab.rows).to_have_count(4)
    await expect(search(tab)).to_have_value("")


async def test_a_search_goes_on_while_hits_are_deleted(scripted: Site, reader: TabMaker) -> None:
    names = await titled(scripted)
    tab = await reader.open(names[1])
    await search(tab).fill("About s")
    await expect(tab.rows).to_have_count(2)
    await tab.menu(tab.rows.get_by_text("About ships"), "Delete")
    await tab.page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    await expect(tab.page.get_by_text("What shall we talk about?")).to_be_visible()
    await expect(tab.rows).to_have_text(["About stars"])
    await expect(search(tab)).to_have_value("About s")


async def test_more_of_a_search_that_has_ended_is_not_listed(
    scripted: Site, reader: TabMaker
) -> None:
    titles = [f"{'ships' if number % 2 else 'stars'} {number}" for number in range(100)]
    async with scripted.client() as client:
        for title in titles:
            await client.post("/api/conversations", json={"title": title})
    latest = titles[::-1]
    tab = await reader.open()
    await search(tab).fill("ships")
    await expect(tab.rows).to_have_text([title for title in latest if "ships" in title][:40])
    async with Held(tab.page, "**/api/conversations?*after=*", "GET") as more:
        await tab.evaluate("() => document.querySelector('nav .list').scrollTo(0, 1e6)")
        await asyncio.wait_for(more.arrived.wait(), 20)
        await tab.evaluate("() => document.querySelector('nav .list').scrollTo(0, 0)")
        await search(tab).fill("")
        await expect(tab.rows).to_have_text(latest[:40])
        async with tab.page.expect_response("**/api/conversations?*search=ships*") as answer:
            more.let_go()
        await (await answer.value).finished()
        await tab.evaluate("() => fetch('/api/session').then(() => undefined)")
        await expect(tab.rows).to_have_text(latest[:40])
    await tab.evaluate("() => document.querySelector('nav .list').scrollTo(0, 1e6)")
    await expect(tab.rows).to_have_text(latest[:80])
