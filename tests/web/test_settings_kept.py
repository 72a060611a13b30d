"""What is saved of settings is what was changed, and the conversation that was meant has it."""

import asyncio
import re
from typing import Any

import pytest
from playwright.async_api import Route, expect

from tests.api.fake_conversations import FakeChatReply
from tests.api.harness import Site
from tests.web.browser import Tab, TabMaker, asked, needs_chromium
from tests.web.test_changes_kept import PROMPT, dialog, settings
from tests.web.test_reach import FINAL, file_of, imported
from tests.web.test_words_kept import Held, problems, refused

pytestmark = needs_chromium

OTHER = "You are a pirate."


async def patched(site: Site, name: str, **changes: object) -> None:
    """Change a conversation as another tab would."""
    async with site.client() as client:
        (await client.patch(f"/api/conversations/{name}", json=changes)).raise_for_status()


async def save(tab: Tab) -> None:
    await dialog(tab).get_by_role("button", name="Save").click()
    await expect(dialog(tab)).to_have_count(0)


async def test_settings_wait_for_the_conversation(scripted: Site, reader: TabMaker) -> None:
    name = await imported(scripted.url, file_of("one", "uno", final=FINAL))
    # One of them is not shown.
    before = {"temperature": 0.5, "ignore_eos": True}
    await patched(scripted, name, system=OTHER, settings=before)
    tab = await reader.blank()
    async with Held(tab.page, f"**/api/conversations/{name}", "GET") as loaded:
        await tab.open(name)
        await asyncio.wait_for(loaded.arrived.wait(), 20)
        await tab.button("Settings of this conversation").click()
        await expect(dialog(tab).get_by_role("status")).to_have_text("Loading…")
        await expect(dialog(tab).get_by_role("textbox")).to_have_count(0)
        loaded.let_go()
        await expect(dialog(tab).get_by_label("System prompt")).to_have_value(OTHER)
    await dialog(tab).get_by_label("Top k").fill("7")
    await save(tab)
    known = scripted.conversations.known[name]
    assert known.system == OTHER
    assert known.settings == before | {"top_k": 7}
    # What was not loaded at all is told instead.
    await tab.page.goto("about:blank")
    await tab.open("nowhere")
    await tab.button("Settings of this conversation").click()
    await expect(dialog(tab).get_by_role("alert")).to_have_text("There is no such conversation.")


@pytest.mark.parametrize("told", [True, False], ids=["told", "untold"])
async def test_what_another_tab_has_set_stays(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply], *, told: bool
) -> None:
    name = await imported(scripted.url, file_of("one", "uno", final=FINAL))
    tab = await reader.open(name)
    await expect(tab.own).to_have_text("one")
    if not told:  # while a reply runs, news wait for its end
        await tab.say("two")
        await asked(replies)
    await settings(tab)
    await dialog(tab).get_by_label("Top k").fill("7")
    await patched(scripted, name, system=OTHER, settings={"temperature": 0.75})
    if told:
        await expect(dialog(tab).get_by_label("Temperature")).to_have_value("0.75")
        await expect(dialog(tab).get_by_label("System prompt")).to_have_value(OTHER)
    await expect(dialog(tab).get_by_label("Top k")).to_have_value("7")
    await save(tab)
    known = scripted.conversations.known[name]
    assert (known.system, known.settings) == (OTHER, {"temperature": 0.75, "top_k": 7})
    # One that is emptied goes, and nothing else.
    await settings(tab)
    await dialog(tab).get_by_label("Temperature").fill("")
    await save(tab)
    known = scripted.conversations.known[name]
    assert (known.system, known.settings) == (OTHER, {"top_k": 7})


async def test_what_is_typed_during_a_save_is_not_lost(scripted: Site, reader: TabMaker) -> None:
    name = await imported(scripted.url, file_of("one", "uno", final=FINAL))
    tab = await reader.open(name)
    prompt = await settings(tab)
    await prompt.fill(PROMPT[:9])
    async with Held(tab.page, f"**/api/conversations/{name}", "PATCH") as told:
        await dialog(tab).get_by_role("button", name="Save").click()
        await asyncio.wait_for(told.arrived.wait(), 20)
        await prompt.fill(PROMPT)
        async with tab.page.expect_response(lambda it: it.request.method == "PATCH"):
            told.let_go()
    await expect(dialog(tab).get_by_text("Not saved yet")).to_be_visible()
    await tab.page.reload()
    await expect(await settings(tab)).to_have_value(PROMPT)
    assert scripted.conversations.known[name].system == PROMPT[:9]
    await save(tab)
    assert scripted.conversations.known[name].system == PROMPT


@pytest.mark.parametrize("fails", [False, True], ids=["saved", "refused"])
async def test_a_save_goes_on_when_its_dialog_is_left(
    scripted: Site, reader: TabMaker, *, fails: bool
) -> None:
    name = await imported(scripted.url, file_of("one", "uno", final=FINAL))
    tab = await reader.open(name)
    prompt = await settings(tab)
    await prompt.fill(PROMPT)
    unsaved = dialog(tab).get_by_text("Not saved yet")
    await expect(unsaved).to_be_visible()
    notice = tab.page.locator(".notice")
    async with Held(tab.page, f"**/api/conversations/{name}", "PATCH") as told:
        await dialog(tab).get_by_role("button", name="Save").click()
        await asyncio.wait_for(told.arrived.wait(), 20)
        await expect(dialog(tab).get_by_role("status")).to_have_text("Saving…")
        await expect(unsaved).to_have_count(0)
        await expect(dialog(tab).get_by_role("button", name="Save")).to_be_disabled()
        await tab.page.keyboard.press("Escape")
        await expect(dialog(tab)).to_have_count(0)
        await expect(notice).to_have_count(0)
        # It is the same save that is seen by whoever comes back to it.
        await settings(tab)
        await expect(dialog(tab).get_by_role("status")).to_have_text("Saving…")
        await expect(prompt).to_have_value(PROMPT)
        await dialog(tab).get_by_role("button", name="Close").last.click()
        await expect(dialog(tab)).to_have_count(0)
        await tab.button("Preferences").click()
        await expect(dialog(tab)).to_be_visible()
        if fails:
            told.answer = refused(409, "Not now.")
        async with tab.page.expect_response(lambda it: it.request.method == "PATCH") as saved:
            told.let_go()
        await (await saved.value).finished()
        await tab.evaluate("() => fetch('/api/session').then(() => undefined)")
        await expect(dialog(tab).get_by_role("heading", name="Preferences")).to_be_visible()
    if fails:
        await expect(notice).to_have_text("The settings were not saved: Not now.")
    await tab.page.keyboard.press("Escape")
    await expect(await settings(tab)).to_have_value(PROMPT)
    await expect(unsaved).to_have_count(int(fails))
    assert scripted.conversations.known[name].system == (None if fails else PROMPT)


async def test_settings_count_that_are_saved_while_a_conversation_is_made(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    """It may be made already, and the answer lost: so it is asked for again as it was."""
    tab = await reader.open()
    saved = asyncio.Event()
    bodies: list[Any] = []

    async def made_and_lost(route: Route) -> None:
        if route.request.method != "POST":
            await route.continue_()
            return
        bodies.append(route.request.post_data_json)
        if len(bodies) == 1:
            await route.fetch()
            await route.fulfill(**refused(503, "Away."))
        else:
            await saved.wait()
            await route.continue_()

    await tab.page.route("**/api/conversations", made_and_lost)
    await tab.say("Who are you?")
    await expect(problems(tab)).to_have_text("Away. Trying again…")
    await (await settings(tab)).fill(PROMPT)
    await dialog(tab).get_by_label("Temperature").fill("0.25")
    await save(tab)
    saved.set()
    await asked(replies)
    assert bodies[0] == bodies[1]
    (known,) = scripted.conversations.known.values()
    assert (known.system, known.settings) == (PROMPT, {"temperature": 0.25})
    await tab.page.reload()
    await expect(await settings(tab)).to_have_value(PROMPT)


async def test_a_form_stays_open_while_the_conversation_is_made(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.open()
    async with Held(tab.page, "**/api/conversations") as made:
        await tab.say("Who are you?")
        await asyncio.wait_for(made.arrived.wait(), 20)
        await (await settings(tab)).fill(PROMPT[:9])
        made.let_go()
        await asked(replies)
        await expect(tab.page).to_have_url(re.compile("#."))
    prompt = dialog(tab).get_by_label("System prompt")
    await expect(prompt).to_have_value(PROMPT[:9])
    await prompt.fill(PROMPT)
    await save(tab)
    assert scripted.conversations.known[tab.conversation].system == PROMPT
    await expect(await settings(tab)).to_have_value(PROMPT)
    await expect(dialog(tab).get_by_text("Not saved yet")).to_have_count(0)


async def test_settings_wait_until_it_is_known_who_is_here(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.blank()
    async with Held(tab.page, "**/api/session", "GET") as told:
        await tab.page.goto(tab.url)
        await asyncio.wait_for(told.arrived.wait(), 20)
        await tab.button("Settings of this conversation").click()
        await expect(dialog(tab).get_by_role("status")).to_have_text("Loading…")
        told.let_go()
        await dialog(tab).get_by_label("System prompt").fill(PROMPT)
        await save(tab)
    await tab.say("Who are you?")
    await asked(replies)
    assert scripted.conversations.known[replies[0].conversation].system == PROMPT


async def test_two_new_conversations_have_each_its_own_settings(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.open()
    await (await settings(tab)).fill(PROMPT)
    await save(tab)
    async with Held(tab.page, "**/api/conversations") as made:
        await tab.say("Who are you?")
        await asyncio.wait_for(made.arrived.wait(), 20)
        await tab.button("New chat").first.click()
        await expect(tab.own).to_have_count(0)
        prompt = await settings(tab)
        await expect(prompt).to_have_value("")
        await prompt.fill(OTHER)
        await save(tab)
        await settings(tab)
        await dialog(tab).get_by_label("Top k").fill("7")
        await tab.page.keyboard.press("Escape")
        await tab.message.fill("half a thought")
        made.let_go()
        await expect(tab.rows).to_have_count(1)
        await asked(replies)
    first = scripted.conversations.known[replies[0].conversation]
    assert (first.title, first.system) == ("Who are you?", PROMPT)
    await tab.page.reload()
    await expect(tab.message).to_have_value("half a thought")
    await expect(await settings(tab)).to_have_value(OTHER)
    await expect(dialog(tab).get_by_label("Top k")).to_have_value("7")
    await save(tab)
    await tab.message.press("Enter")
    await asked(replies, 2)
    second = scripted.conversations.known[replies[1].conversation]
    assert (second.system, second.settings) == (OTHER, {"top_k": 7})
    # Nothing of either is left for a third one, nor of the second one for the first.
    await tab.button("New chat").first.click()
    await expect(await settings(tab)).to_have_value("")
    await tab.page.keyboard.press("Escape")
    await tab.rows.last.click()
    await expect(tab.own).to_have_text("Who are you?")
    await expect(await settings(tab)).to_have_value(PROMPT)
    await expect(dialog(tab).get_by_text("Not saved yet")).to_have_count(0)
