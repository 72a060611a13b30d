"""Texts that are being changed, and settings that are not saved, outlive a reload and a detour."""

import pytest
from playwright.async_api import Locator, expect

from tests.api.fake_conversations import FakeChatReply
from tests.api.harness import Site
from tests.web.browser import WITHOUT_SOCKETS, Tab, TabMaker, arrived, asked, needs_chromium
from tests.web.test_reach import FINAL, file_of, imported

pytestmark = needs_chromium

THOUGHT = "a text of much thought"
PROMPT = "Your name is Ophelia. You speak of flowers."


async def elsewhere_and_back(tab: Tab, other: str, name: str) -> None:
    """Another conversation, a new one, and this one again, without a load of the page."""
    for place in (other, "", name):
        await tab.evaluate("(place) => { location.hash = place; }", place)
        await expect(tab.page.locator("nav li.current")).to_have_count(1 if place else 0)


def editor(tab: Tab) -> Locator:
    return tab.page.get_by_role("textbox", name="Edit your message")


def dialog(tab: Tab) -> Locator:
    return tab.page.get_by_role("dialog")


async def settings(tab: Tab) -> Locator:
    await tab.button("Settings of this conversation").click()
    await expect(dialog(tab)).to_be_visible()
    return dialog(tab).get_by_label("System prompt")


@pytest.mark.parametrize("way", ["reload", "detour"])
async def test_a_text_that_is_being_changed_is_there_again(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply], way: str
) -> None:
    name = await imported(scripted.url, file_of("one", "uno", "two", "due", final=FINAL))
    other = await imported(scripted.url, file_of("x", "y", final=FINAL))
    tab = await reader.open(name)
    await tab.button("Edit your message").first.click()
    await editor(tab).fill(THOUGHT)
    if way == "reload":
        await tab.page.reload()
    else:
        await elsewhere_and_back(tab, other, name)
    await expect(editor(tab)).to_have_value(THOUGHT)
    await expect(tab.own).to_have_text(["two"])
    await editor(tab).press("Enter")
    await expect(tab.own).to_have_text([THOUGHT])
    sent = await arrived(scripted.conversations, THOUGHT)
    assert (sent.content, sent.parent) == (THOUGHT, None)
    await asked(replies)
    replies[0].finish(data=FINAL)
    scripted.conversations.keep(replies[0])
    await expect(tab.receipts).to_have_count(1)
    await tab.page.reload()
    await expect(tab.own).to_have_text([THOUGHT])
    await expect(editor(tab)).to_have_count(0)


async def test_escape_closes_a_change_and_cancel_gives_it_up(
    scripted: Site, reader: TabMaker
) -> None:
    name = await imported(scripted.url, file_of("one", "uno", final=FINAL))
    tab = await reader.open(name)
    edit = tab.button("Edit your message")
    await edit.click()
    await editor(tab).fill(THOUGHT)
    await editor(tab).press("Escape")
    await expect(tab.own).to_have_text("one")
    await tab.page.reload()
    await expect(tab.own).to_have_text("one")
    await edit.click()
    await expect(editor(tab)).to_have_value(THOUGHT)
    await expect(editor(tab)).to_be_focused()
    await tab.button("Cancel").click()
    await edit.click()
    await expect(editor(tab)).to_have_value("one")


async def test_settings_of_a_chat_that_is_not_made_yet_stay(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    other = await imported(scripted.url, file_of("x", "y", final=FINAL))
    tab = await reader.open()
    await (await settings(tab)).fill(PROMPT)
    await dialog(tab).get_by_label("Temperature").fill("0.25")
    await dialog(tab).get_by_role("button", name="Save").click()
    await expect(dialog(tab)).to_have_count(0)
    await elsewhere_and_back(tab, other, "")
    await tab.page.reload()
    await expect(await settings(tab)).to_have_value(PROMPT)
    await expect(dialog(tab).get_by_label("Temperature")).to_have_value("0.25")
    await tab.page.keyboard.press("Escape")
    await tab.say("Who are you?")
    await expect(tab.own).to_have_text("Who are you?")
    await asked(replies)
    made = scripted.conversations.known[replies[0].conversation]
    assert made.system == PROMPT
    replies[0].finish(data=FINAL)
    scripted.conversations.keep(replies[0])
    await expect(tab.receipts).to_have_count(1)
    # They belong to that one, not to the next.
    await tab.button("New chat").first.click()
    await expect(await settings(tab)).to_have_value("")


@pytest.mark.parametrize("fresh", [True, False], ids=["new", "known"])
async def test_a_dialog_that_is_left_keeps_what_was_typed(
    scripted: Site, reader: TabMaker, fresh: bool
) -> None:
    name = "" if fresh else await imported(scripted.url, file_of("one", "uno", final=FINAL))
    tab = await reader.open(name)
    await (await settings(tab)).fill(PROMPT)
    await dialog(tab).get_by_label("Longest reply").fill("7")
    await tab.page.keyboard.press("Escape")
    await expect(tab.page.locator(".notice")).to_contain_text("is not saved")
    await tab.page.reload()
    prompt = await settings(tab)
    await expect(prompt).to_have_value(PROMPT)
    await expect(dialog(tab).get_by_label("Longest reply")).to_have_value("7")
    await expect(dialog(tab).get_by_text("Not saved yet")).to_be_visible()
    await tab.page.reload()  # with the dialog open
    await expect(await settings(tab)).to_have_value(PROMPT)
    await dialog(tab).get_by_role("button", name="Discard").click()
    await expect(dialog(tab)).to_have_count(0)
    await expect(await settings(tab)).to_have_value("")
    await expect(dialog(tab).get_by_text("Not saved yet")).to_have_count(0)
    await dialog(tab).get_by_role("button", name="Cancel").click()
    await expect(tab.page.locator(".notice")).to_have_count(0)


async def test_what_was_typed_for_a_new_chat_goes_with_it(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.open()
    await (await settings(tab)).fill(PROMPT)
    await tab.page.keyboard.press("Escape")
    await tab.say("Who are you?")
    await expect(tab.button("Stop")).to_be_visible()
    await expect(await settings(tab)).to_have_value(PROMPT)
    await dialog(tab).get_by_role("button", name="Save").click()
    await expect(dialog(tab)).to_have_count(0)
    await asked(replies)
    assert scripted.conversations.known[replies[0].conversation].system == PROMPT
    await tab.button("New chat").first.click()
    await expect(await settings(tab)).to_have_value("")


async def test_each_text_that_is_being_changed_is_kept(scripted: Site, reader: TabMaker) -> None:
    name = await imported(scripted.url, file_of("one", "uno", "two", "due", final=FINAL))
    tab = await reader.open(name)
    edit = tab.button("Edit your message")
    await edit.first.click()
    await editor(tab).fill(THOUGHT)
    await edit.last.click()
    await expect(editor(tab)).to_have_value("two")
    await expect(editor(tab)).to_be_focused()
    await edit.first.click()
    await expect(editor(tab)).to_have_value(THOUGHT)
    await expect(editor(tab)).to_be_focused()
    await edit.last.click()
    await editor(tab).fill("another one")
    await tab.page.reload()
    await expect(editor(tab)).to_have_value("another one")  # which was the last
    await editor(tab).press("Escape")
    await edit.first.click()
    await expect(editor(tab)).to_have_value(THOUGHT)
    await tab.button("Cancel").click()
    await edit.first.click()
    await expect(editor(tab)).to_have_value("one")
    await edit.last.click()
    await expect(editor(tab)).to_have_value("another one")


async def test_an_untouched_change_ends_as_one_looks_elsewhere(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    """Of a conversation that is followed meanwhile, too."""
    name = await imported(scripted.url, file_of("one", "uno", final=FINAL))
    other = await imported(scripted.url, file_of("x", "y", final=FINAL))
    tab = await reader.open(name)
    await tab.button("Edit your message").click()
    await expect(editor(tab)).to_be_focused()
    body = {"id": "other", "content": "two"}
    url = f"/api/conversations/{name}/turns"
    async with scripted.client() as client, client.stream("POST", url, json=body):
        await expect(tab.button("Stop")).to_be_visible()
        await elsewhere_and_back(tab, other, name)
        await expect(tab.own).to_have_text(["one", "two"])
        await expect(editor(tab)).to_have_count(0)
        await expect(tab.message).to_be_focused()
        await asked(replies)
        replies[0].finish(data=FINAL)
        scripted.conversations.keep(replies[0])


@pytest.mark.parametrize("way", ["here", "elsewhere", "unseen"])
async def test_nothing_is_kept_of_a_conversation_that_is_deleted(
    scripted: Site, reader: TabMaker, way: str
) -> None:
    name = await imported(scripted.url, file_of("one", "uno", final=FINAL))
    if way == "here":  # where no news of it come
        await reader.context.add_init_script(WITHOUT_SOCKETS)
    tab = await reader.open(name)
    await tab.message.fill(THOUGHT)
    await tab.button("Edit your message").click()
    await editor(tab).fill(THOUGHT)
    await (await settings(tab)).fill(THOUGHT)
    await tab.page.keyboard.press("Escape")
    kept = "() => Object.values({ ...sessionStorage }).join().split('much thought').length - 1"
    assert await tab.evaluate(kept) == 3
    if way == "here":
        await tab.menu(tab.rows.first, "Delete")
        await dialog(tab).get_by_role("button", name="Delete").click()
    else:
        if way == "unseen":
            await tab.button("New chat").first.click()
            await expect(tab.own).to_have_count(0)
        async with scripted.client() as client:
            await client.delete(f"/api/conversations/{name}")
        if way == "elsewhere":
            # As long as one looks at it, one may copy it.
            await expect(tab.page.get_by_role("alert")).to_be_visible()
            await expect(editor(tab)).to_have_value(THOUGHT)
            await tab.button("New chat").first.click()
    await expect(tab.rows).to_have_count(0)
    await tab.page.wait_for_function(f"() => ({kept})() === 0")
    await expect(tab.message).to_have_value("")
