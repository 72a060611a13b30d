"""What everybody does: talk, stop, edit, regenerate, go through versions."""

import json
import re
from pathlib import Path

import httpx
import pytest
from playwright.async_api import expect

from tests.api.harness import Site
from tests.web.browser import LONG, TabMaker, long_conversation, needs_chromium
from tests.web.test_reach import FINAL, file_of, imported

pytestmark = needs_chromium


async def test_the_first_minute(user: TabMaker) -> None:
    tab = await user.open()
    page = tab.page
    await expect(page.get_by_role("heading", name="What shall we talk about?")).to_be_visible()
    await expect(page.get_by_text("demonstration model that comes with chatserve")).to_be_visible()
    await expect(page.get_by_text("chatserve serve ~/models/")).to_be_visible()
    prompts = page.locator(".welcome ul button")
    await expect(prompts).to_have_count(3)
    await prompts.first.click()
    await expect(tab.receipts).to_have_count(1)
    await expect(tab.own).to_have_text(await tab.own.inner_text())
    assert "Marisol" in await tab.own.inner_text()
    assert await tab.replies.inner_text()
    await expect(tab.rows.first).to_have_attribute("aria-current", "page")
    # Its title came with the first answer.
    await expect(page.locator("header h1")).to_contain_text("My name is Marisol")
    assert tab.conversation


async def test_the_second_turn_reuses_the_first_and_says_so(user: TabMaker) -> None:
    tab = await user.open()
    await tab.ask("My name is Winifred.")
    answer = await tab.ask("What is my name?")
    assert "Winifred" in answer
    figures = tab.page.locator(".figures").last
    await expect(figures).to_contain_text(re.compile(r"[1-9]\d? % reused"))
    await expect(figures).to_contain_text("tokens/s")
    await expect(figures).to_contain_text("to first token")
    await tab.receipts.last.hover()
    details = tab.page.get_by_role("tooltip").last
    await expect(details).to_be_visible()
    numbers = [int(text) for text in await details.locator(".tokens").all_inner_texts()]
    final = (await tree(tab.url, tab.conversation))["turns"][-1]["final"]
    told = final["receipt"]
    assert numbers == [told["device"], told["host"], told["disk"], told["computed"]]
    assert sum(numbers) == final["usage"]["prompt_tokens"]


async def test_a_reply_streams_word_by_word(user: TabMaker) -> None:
    tab = await user.open(await long_conversation(user.url, 1_000))
    await tab.evaluate(
        """() => {
          window.lengths = new Set();
          new MutationObserver(() => {
            const prose = document.querySelector(".step.assistant .prose");
            if (prose) window.lengths.add(prose.textContent.length);
          }).observe(document.body, { subtree: true, childList: true, characterData: true });
        }"""
    )
    await tab.ask(LONG)
    lengths = await tab.evaluate("() => [...window.lengths]")
    assert len(lengths) > 10
    assert lengths == sorted(lengths)


async def test_stop_keeps_what_was_said(user: TabMaker) -> None:
    for how in ("button", "key"):
        tab = await user.open(await long_conversation(user.url, 2_000))
        await tab.say(LONG)
        await expect(tab.replies).to_contain_text("1, 2")
        await expect(tab.button("Send")).to_be_hidden()
        if how == "button":
            await tab.button("Stop").click()
        else:
            await tab.page.keyboard.press("Escape")
        await expect(tab.page.get_by_text("stopped")).to_be_visible()
        shown = await tab.replies.inner_text()
        kept = (await tree(tab.url, tab.conversation))["turns"][-1]
        assert kept["content"].strip() == shown.strip()
        assert kept["final"]["finish_reason"] == "abort"
        # Nothing is left running, so the next one can follow.
        await tab.say("What is 6 + 7?")
        await expect(tab.replies).to_have_count(2)
        await tab.button("Stop").click()
        await expect(tab.receipts).to_have_count(2)


async def test_an_edit_makes_a_branch_and_both_stay(user: TabMaker) -> None:
    tab = await user.open()
    await tab.ask("Say the word umbrella.")
    await tab.ask("Say the word moon.")
    await tab.button("Edit your message").last.click()
    editor = tab.page.get_by_role("textbox", name="Edit your message")
    await expect(editor).to_have_value("Say the word moon.")
    await editor.fill("Say the word marble.")
    await editor.press("Enter")
    await expect(tab.own.last).to_have_text("Say the word marble.")
    await expect(tab.receipts).to_have_count(2)
    await expect(tab.page.locator(".place")).to_have_text("2/2")
    await tab.button("Previous version").click()
    await expect(tab.own.last).to_have_text("Say the word moon.")
    await expect(tab.page.locator(".place")).to_have_text("1/2")
    await expect(tab.button("Previous version")).to_be_disabled()
    # The server knows which one is shown, so a reload shows it too.
    moon = next(
        turn["id"]
        for turn in (await tree(tab.url, tab.conversation))["turns"]
        if turn["content"] == "Say the word moon."
    )
    await tab.page.reload()
    await expect(tab.own.last).to_have_text("Say the word moon.")
    found = await tree(tab.url, tab.conversation)
    parents = {turn["id"]: turn["parent"] for turn in found["turns"]}
    assert parents[found["leaf"]] == moon
    await tab.button("Next version").click()
    await expect(tab.own.last).to_have_text("Say the word marble.")


async def test_the_first_message_can_be_edited_too(user: TabMaker) -> None:
    tab = await user.open()
    await tab.ask("Say the word moon.")
    await tab.button("Edit your message").click()
    await tab.page.locator(".editor textarea").fill("Say the word lamp.")
    await tab.page.locator(".editor").get_by_role("button", name="Send").click()
    await expect(tab.page.locator(".place")).to_have_text("2/2")
    await expect(tab.receipts).to_have_count(1)
    roots = [t for t in (await tree(tab.url, tab.conversation))["turns"] if t["parent"] is None]
    assert [turn["content"] for turn in roots] == ["Say the word moon.", "Say the word lamp."]


async def test_regenerating_gives_another_version(user: TabMaker) -> None:
    tab = await user.open()
    await tab.ask("Tell me one joke")
    await tab.button("Regenerate").click()
    place = tab.page.locator(".place")
    await expect(place).to_have_text("2/2")
    await expect(tab.receipts).to_have_count(1)
    await tab.button("Regenerate").click()
    await expect(place).to_have_text("3/3")
    await expect(tab.receipts).to_have_count(1)
    await tab.button("Previous version").click()
    await expect(place).to_have_text("2/3")
    answers = [t for t in (await tree(tab.url, tab.conversation))["turns"] if t["role"] != "user"]
    assert len(answers) == 3
    assert len({turn["parent"] for turn in answers}) == 1


async def test_system_prompt_and_settings_belong_to_the_conversation(user: TabMaker) -> None:
    tab = await user.open()
    page = tab.page
    await tab.button("Settings of this conversation").click()
    dialog = page.get_by_role("dialog")
    await dialog.get_by_label("System prompt").fill("Your name is Ophelia.")
    await dialog.get_by_label("Temperature").fill("0.25")
    await dialog.get_by_label("Longest reply").fill("7")
    await dialog.get_by_label("Stop at").fill("eleven")
    await dialog.get_by_role("button", name="Save").click()
    await expect(dialog).to_be_hidden()
    await tab.ask(LONG)
    await expect(page.get_by_text("cut at the length limit")).to_be_visible()
    kept = await tree(tab.url, tab.conversation)
    assert kept["system"] == "Your name is Ophelia."
    assert kept["settings"] == {"temperature": 0.25, "max_tokens": 7, "stop": ["eleven"]}
    assert kept["turns"][-1]["final"]["usage"]["completion_tokens"] == 7
    # Changed later, and kept as changed; another conversation has none of it.
    await page.reload()
    await tab.button("Settings of this conversation").click()
    await expect(dialog.get_by_label("System prompt")).to_have_value("Your name is Ophelia.")
    await dialog.get_by_label("Longest reply").fill("")
    await dialog.get_by_role("button", name="Save").click()
    await expect(dialog).to_be_hidden()
    changed = await tree(tab.url, tab.conversation)
    assert changed["settings"] == {"temperature": 0.25, "stop": ["eleven"]}
    await tab.button("New chat").first.click()
    await tab.button("Settings of this conversation").click()
    await expect(dialog.get_by_label("System prompt")).to_have_value("")


async def test_a_refused_setting_says_why(user: TabMaker) -> None:
    tab = await user.open()
    await tab.ask("Hello!")
    await tab.evaluate(
        """(id) => fetch(`/api/conversations/${id}`, {
          method: "PATCH", headers: { "Content-Type": "application/json" },
          body: JSON.stringify({ settings: { min_tokens: 9 } }),
        })""",
        tab.conversation,
    )
    await tab.page.reload()
    await tab.button("Settings of this conversation").click()
    dialog = tab.page.get_by_role("dialog")
    await dialog.get_by_label("Longest reply").fill("3")
    await dialog.get_by_role("button", name="Save").click()
    await expect(dialog.get_by_role("alert")).to_contain_text("min_tokens is greater")


async def test_export_and_import_give_the_same_conversation(user: TabMaker, tmp_path: Path) -> None:
    tab = await user.open()
    await tab.ask("Say the word umbrella.")
    await tab.button("Regenerate").click()
    await expect(tab.page.locator(".place")).to_have_text("2/2")
    await expect(tab.receipts).to_have_count(1)
    async with tab.page.expect_download() as started:
        await tab.menu(tab.rows.first, "Export")
    path = tmp_path / "exported.json"
    await (await started.value).save_as(path)
    file = json.loads(path.read_text())
    assert file["format"] == "chatserve.conversation"
    assert len(file["turns"]) == 3
    before = tab.conversation
    await tab.page.get_by_label("File to import").set_input_files(path)
    await expect(tab.page.get_by_text("Imported.").first).to_be_visible()
    assert tab.conversation not in ("", before)
    await expect(tab.own).to_have_text("Say the word umbrella.")
    await expect(tab.page.locator(".place")).to_have_text("2/2")
    path.write_text('{"format": "of somebody else"}')
    await tab.page.get_by_label("File to import").set_input_files(path)
    await expect(tab.page.get_by_text("The file was not imported").first).to_be_visible()


@pytest.mark.parametrize(
    ("title", "file"),
    [("Count from 1 to 80.", "Count from 1 to 80.json"), (" ... ", "conversation.json")],
)
async def test_an_exported_file_is_named_after_the_title(
    scripted: Site, reader: TabMaker, title: str, file: str
) -> None:
    await imported(scripted.url, file_of("one", "uno", final=FINAL) | {"title": title})
    tab = await reader.open()
    async with tab.page.expect_download() as started:
        await tab.menu(tab.rows.first, "Export")
    assert (await started.value).suggested_filename == file


async def test_the_list_is_searched_renamed_and_deleted_from(user: TabMaker) -> None:
    tab = await user.open()
    for word in ("xylophone", "wheelbarrow"):
        await tab.button("New chat").first.click()
        await tab.ask(f"Say the word {word}.")
        await expect(tab.rows.first).to_have_text(re.compile(word))
    search = tab.page.get_by_label("Search conversations")
    await search.fill("xylophone")
    await expect(tab.rows).to_have_count(1)
    await search.press("Enter")
    await expect(tab.own).to_have_text("Say the word xylophone.")
    await tab.menu(tab.page.locator("nav li.current a"), "Rename")
    title = tab.page.get_by_label("Title")
    await title.fill("Wood & <b>sound</b>")
    await title.press("Enter")
    await expect(tab.page.locator("header h1")).to_have_text("Wood & <b>sound</b>")
    await search.fill("Wood & <b>")
    await expect(tab.rows).to_have_text(["Wood & <b>sound</b>"])
    gone = tab.conversation
    await tab.menu(tab.rows.first, "Delete")
    confirm = tab.page.get_by_role("dialog")
    await confirm.get_by_role("button", name="Keep it").click()
    await expect(tab.rows).to_have_count(1)
    await tab.menu(tab.rows.first, "Delete")
    await confirm.get_by_role("button", name="Delete").click()
    await expect(tab.page.get_by_text("Nothing found.")).to_be_visible()
    await expect(tab.page).to_have_url(re.compile(r"/#?$"))
    async with httpx.AsyncClient(base_url=tab.url) as client:
        assert (await client.get(f"/api/conversations/{gone}")).status_code == 404
    await search.fill("")
    await expect(tab.rows.first).to_have_text(re.compile("wheelbarrow"))


async def tree(url: str, conversation: str) -> dict[str, object]:
    """What the server has of it."""
    async with httpx.AsyncClient(base_url=url, timeout=20) as client:
        answer = await client.get(f"/api/conversations/{conversation}")
        answer.raise_for_status()
        return answer.json()
