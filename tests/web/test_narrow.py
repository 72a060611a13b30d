"""A narrow window: the list is a drawer over the chat, which takes the focus and gives it back."""

import pytest
from playwright.async_api import Browser, ViewportSize, expect

from tests.api.harness import Site
from tests.web.browser import PHONE, WIDE, TabMaker, needs_chromium, tabs
from tests.web.test_reach import FINAL, file_of, imported

pytestmark = needs_chromium


async def test_the_drawer_takes_the_focus_and_gives_it_back(
    browser: Browser, scripted: Site
) -> None:
    await imported(scripted.url, file_of("one", "uno", final=FINAL))
    name = await imported(scripted.url, file_of("two", "due", final=FINAL))
    async with tabs(browser, scripted.url, viewport=PHONE) as user:
        tab = await user.open(name)
        keys, show, hide = (
            tab.page.keyboard,
            tab.button("Show the list"),
            tab.button("Hide the list"),
        )
        await expect(show).to_have_attribute("aria-expanded", "false")
        await show.focus()
        await keys.press("Enter")
        await expect(hide).to_be_focused()
        await expect(hide).to_have_attribute("aria-expanded", "true")
        # What is behind it is out of reach: by Tab, by pointer, and to a screen reader.
        await expect(tab.page.locator("main")).to_have_attribute("inert", "")
        for _ in range(24):
            await keys.press("Tab")
            where = "() => document.activeElement.closest('main') === null"
            assert await tab.evaluate(where), "behind the drawer"
        await hide.focus()
        await keys.press("Escape")
        await expect(tab.page.locator("nav")).to_have_count(0)
        await expect(show).to_be_focused()
        await expect(tab.page.locator("main")).not_to_have_attribute("inert", "")
        await keys.press("Enter")
        await expect(hide).to_be_focused()
        await keys.press("Enter")
        await expect(show).to_be_focused()
        await keys.press("Control+b")
        await expect(hide).to_be_focused()
        # Where a conversation is opened, one can write at once.
        await tab.rows.last.press("Enter")
        await expect(tab.own).to_have_text("one")
        await expect(tab.message).to_be_focused()
        await keys.press("Control+k")
        await expect(tab.page.get_by_label("Search conversations")).to_be_focused()
        await keys.press("Escape")
        await keys.press("Control+b")
        await expect(hide).to_be_focused()
        # A window that grows has both side by side.
        await tab.page.set_viewport_size(WIDE)
        await expect(tab.page.locator("main")).not_to_have_attribute("inert", "")


async def test_a_list_at_the_side_is_hidden_and_shown_by_keys(reader: TabMaker) -> None:
    tab = await reader.open()
    show, hide = tab.button("Show the list"), tab.button("Hide the list")
    await expect(hide).to_have_attribute("aria-expanded", "true")
    await hide.press("Enter")
    await expect(show).to_be_focused()
    await show.press("Enter")
    await expect(hide).to_be_focused()
    await tab.message.focus()
    for count in (0, 1):
        await tab.page.keyboard.press("Control+b")
        await expect(tab.page.locator("nav")).to_have_count(count)
        await expect(tab.message).to_be_focused()
    await tab.page.keyboard.press("Control+k")
    await expect(tab.page.get_by_label("Search conversations")).to_be_focused()
    await tab.message.focus()
    for _ in range(2):
        await tab.page.keyboard.press("Control+b")
    await expect(tab.page.locator("nav")).to_have_count(1)
    await expect(tab.message).to_be_focused()


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
async def test_the_longest_seed_is_seen_whole(
    browser: Browser, scripted: Site, size: ViewportSize
) -> None:
    async with tabs(browser, scripted.url, viewport=size) as reader:
        tab = await reader.open()
        await tab.button("Settings of this conversation").click()
        seed = tab.page.get_by_role("dialog").get_by_label("Seed")
        await seed.fill(str(2**53 - 1))
        lacking = await seed.evaluate(
            """(node) => {
              const { paddingLeft, paddingRight, font, appearance } = getComputedStyle(node);
              const pen = document.createElement("canvas").getContext("2d");
              pen.font = font;
              const text = pen.measureText(node.value).width;
              const room = node.clientWidth - parseFloat(paddingLeft) - parseFloat(paddingRight);
              const arrows = appearance === "textfield" ? 0 : 18;  // shown under the pointer
              return text + arrows - room;
            }"""
        )
        assert lacking <= 0, lacking
