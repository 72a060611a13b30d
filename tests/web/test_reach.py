"""For everybody: keys alone, a phone, screen readers, text from right to left, still pictures."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.async_api import Browser, expect

from tests.web.browser import PHONE, Tab, TabMaker, needs_chromium, tabs
from tests.wiring.server import Server

pytestmark = needs_chromium

AXE = Path(__file__).resolve().parents[2] / "web/node_modules/axe-core/axe.min.js"
MARKDOWN = """# A heading

Some **bold** text with `code`, a [link](https://example.org) and a list:

- [x] done
- one more

| a | b |
|---|--:|
| 1 | 2 |

> Said by somebody.

```python
def f(x: int) -> int:
    return x + 1  # a comment
```
"""


def file_of(*turns: str, final: dict[str, Any] | None = None) -> dict[str, Any]:
    """Turns of a user and of the model in turn."""
    made: list[dict[str, Any]] = []
    for place, text in enumerate(turns):
        turn: dict[str, Any] = {
            "id": f"t{place}",
            "parent": f"t{place - 1}" if place else None,
            "role": "assistant" if place % 2 else "user",
            "content": text,
        }
        made.append(turn | ({"final": final} if final and place % 2 else {}))
    head = {"format": "chatserve.conversation", "version": 1, "title": "Imported"}
    return head | {"turns": made, "leaf": made[-1]["id"]}


async def imported(url: str, file: dict[str, Any]) -> str:
    async with httpx.AsyncClient(base_url=url, timeout=20) as client:
        made = await client.post("/api/conversations/import", json=file)
        assert made.status_code == 201, made.text
        return made.json()["id"]


FINAL = {
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 2_000, "completion_tokens": 120},
    "receipt": {"device": 1_000, "host": 400, "disk": 300, "computed": 300, "saved": 1.5},
    "timings": {"to_first_token": 0.5, "total": 4.5},
}


async def test_keys_alone(user: TabMaker) -> None:
    tab = await user.open()
    keys = tab.page.keyboard
    await expect(tab.message).to_be_focused()
    await keys.type("Say the word")
    await keys.press("Shift+Enter")
    await keys.type("moon.")
    assert await tab.message.input_value() == "Say the word\nmoon."
    await keys.press("Enter")
    await expect(tab.receipts).to_have_count(1)
    await expect(tab.message).to_be_focused()
    # The last message, once more.
    await keys.press("ArrowUp")
    await expect(tab.page.get_by_role("textbox", name="Edit your message")).to_be_focused()
    await keys.press("Escape")
    await expect(tab.message).to_be_focused()
    await expect(tab.own).to_have_text("Say the word\nmoon.")
    await keys.press("ArrowUp")
    await keys.press("Control+A")
    await keys.type("Say the word lamp.")
    await keys.press("Enter")
    await expect(tab.page.locator(".place")).to_have_text("2/2")
    await expect(tab.receipts).to_have_count(1)
    # The list, the search, a new one.
    await keys.press("Control+b")
    await expect(tab.page.locator("nav")).to_have_count(0)
    await keys.press("Control+k")
    await expect(tab.page.get_by_label("Search conversations")).to_be_focused()
    await keys.press("Control+Shift+O")
    await expect(tab.page.get_by_text("What shall we talk about?")).to_be_visible()
    await expect(tab.message).to_be_focused()
    await keys.press("Control+k")
    await keys.type("word")
    await expect(tab.rows.first).to_contain_text("Say the word")
    await keys.press("Enter")
    await expect(tab.own).to_have_text("Say the word lamp.")
    # Rename through the menu of the one that is open.
    row = tab.page.locator("nav li.current")
    await row.get_by_role("button").focus()
    await keys.press("Enter")
    await expect(tab.page.get_by_role("menuitem", name="Rename")).to_be_focused()
    await keys.press("ArrowDown")
    await expect(tab.page.get_by_role("menuitem", name="Export")).to_be_focused()
    await keys.press("ArrowUp")
    await keys.press("Enter")
    await keys.press("Control+A")
    await keys.type("By keys")
    await keys.press("Enter")
    await expect(tab.page.locator("header h1")).to_have_text("By keys")
    # Dialogs close with Esc, and give the focus back.
    gear = tab.button("Preferences")
    await gear.focus()
    await keys.press("Enter")
    await expect(tab.page.get_by_role("dialog")).to_be_visible()
    await keys.press("Escape")
    await expect(tab.page.get_by_role("dialog")).to_have_count(0)
    await expect(gear).to_be_focused()


async def test_every_control_is_reached_and_seen_with_tab(reader: TabMaker) -> None:
    tab = await reader.open(await imported(reader.url, file_of("a", MARKDOWN, final=FINAL)))
    await expect(tab.receipts).to_have_count(1)
    seen: set[str] = set()
    for _ in range(40):
        await tab.page.keyboard.press("Tab")
        name, outlined = await tab.evaluate(
            """() => {
              const node = document.activeElement;
              if (node === document.body) return ["", false];
              const style = getComputedStyle(node.closest(".composer") ?? node);
              const shown = style.outlineStyle !== "none" || node.closest(".composer") !== null;
              return [node.getAttribute("aria-label") ?? node.textContent.trim(), shown];
            }"""
        )
        seen.add(name)
        assert outlined or not name, name
    for wanted in (
        "New chat",
        "Search conversations",
        "Import a conversation",
        "Preferences",
        "Settings of this conversation",
        "Edit your message",
        "Copy the code",
        "Copy the reply",
        "Regenerate",
        "85 % reused, 1,700 of 2,000 prompt tokens",
    ):
        assert wanted in seen, (wanted, seen)


async def test_it_fits_a_phone(browser: Browser, server: Server) -> None:
    phone = {"viewport": PHONE, "has_touch": True, "is_mobile": True}
    async with tabs(browser, server.url, **phone) as user:
        tab = await user.open(await imported(server.url, file_of("x" * 300, MARKDOWN, final=FINAL)))
        page = tab.page
        await expect(tab.receipts).to_have_count(1)
        await fits(tab)
        assert await page.locator("nav").count() == 0
        await tab.receipts.tap()
        details = page.get_by_role("tooltip")
        await expect(details).to_be_visible()
        box = await details.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= PHONE["width"]
        await tab.button("Show the list").tap()
        await expect(tab.rows.first).to_be_visible()
        await fits(tab)
        await tab.button("Close the list").tap(position={"x": 380, "y": 300})
        await expect(page.locator("nav")).to_have_count(0)
        await page.locator("header").get_by_role("button", name="New chat").tap()
        await expect(page.get_by_text("What shall we talk about?")).to_be_visible()
        await fits(tab)
        await tab.button("Settings of this conversation").tap()
        await fits(tab)
        await page.get_by_role("dialog").get_by_role("button", name="Save").tap()
        await tab.message.fill("Hello!")
        await tab.button("Send").tap()
        await expect(tab.receipts).to_have_count(1)
        small = await tab.evaluate(
            """() => [...document.querySelectorAll("main button")]
              .filter((each) => each.checkVisibility())
              .map((each) => [each.getAttribute("aria-label"), each.getBoundingClientRect()])
              .filter(([, box]) => Math.min(box.width, box.height) < 24).map(([name]) => name)"""
        )
        assert small == [], "too small for a finger"


async def fits(tab: Tab) -> None:
    wide = await tab.evaluate(
        """() => [document.documentElement.scrollWidth,
          ...[...document.querySelectorAll(".scroller, .state, dialog[open]")]
            .map((each) => each.scrollWidth)]"""
    )
    assert max(wide) <= PHONE["width"], wide


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed: npm ci in web/")
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing_serious(user: TabMaker, scheme: Any) -> None:
    tab = await user.blank()
    await tab.page.emulate_media(color_scheme=scheme)
    await tab.page.add_init_script(path=AXE)
    await tab.open()
    await serious(tab, "empty")
    name = await imported(user.url, file_of("Hello there", MARKDOWN, final=FINAL))
    await tab.open(name)
    await expect(tab.page.locator("pre .hljs-keyword").first).to_be_visible()
    await serious(tab, "a conversation")
    await tab.receipts.focus()
    await expect(tab.page.get_by_role("tooltip")).to_be_visible()
    await serious(tab, "a receipt")
    await tab.button("Edit your message").click()
    await serious(tab, "an edit")
    await tab.page.keyboard.press("Escape")
    for dialog in ("Settings of this conversation", "Preferences"):
        await tab.button(dialog).click()
        await serious(tab, dialog)
        await tab.page.keyboard.press("Escape")
    await tab.page.locator("nav li.current").get_by_role("button").click()
    await expect(tab.page.get_by_role("menuitem", name="Delete")).to_be_visible()
    await serious(tab, "a menu")
    await tab.page.get_by_role("menuitem", name="Delete").click()
    await expect(tab.page.get_by_role("dialog")).to_be_visible()
    await serious(tab, "a question")


async def serious(tab: Tab, where: str) -> None:
    found = await tab.evaluate("() => axe.run({ resultTypes: ['violations'] })")
    assert found["passes"], "axe looked at nothing"
    bad = [
        (each["id"], [node["html"] for node in each["nodes"]], each["nodes"][0]["failureSummary"])
        for each in found["violations"]
        if each["impact"] in ("serious", "critical")
    ]
    assert not bad, (where, json.dumps(bad, indent=1))


async def test_what_streams_is_not_what_is_announced(user: TabMaker) -> None:
    tab = await user.open()
    await tab.evaluate(
        """() => {
          window.said = [];
          const status = document.querySelector("[role=status]");
          new MutationObserver(() => window.said.push(status.textContent))
            .observe(status, { subtree: true, childList: true, characterData: true });
        }"""
    )
    answer = await tab.ask("Spell the word marble")
    await expect(tab.page.get_by_role("status")).to_have_text(f"Reply: {answer}")
    assert await tab.evaluate("() => window.said") == [
        "The reply is under way.",
        f"Reply: {answer}",
    ]
    assert await tab.page.locator("[aria-live] .prose, .prose [aria-live]").count() == 0


async def test_right_to_left(user: TabMaker) -> None:
    file = file_of("مرحبا، كيف حالك؟", "- شكرا، أنا بخير.\n- hello\n\nEnglish again.")
    tab = await user.open(await imported(user.url, file))
    await expect(tab.own).to_have_css("direction", "rtl")
    own = await tab.own.bounding_box()
    column = await tab.page.locator(".column").bounding_box()
    assert own is not None
    assert column is not None
    list_side = await tab.page.locator(".prose ul").evaluate("(n) => getComputedStyle(n).direction")
    assert list_side == "rtl"
    last = tab.page.locator(".prose p").last
    assert await last.evaluate("(n) => getComputedStyle(n).direction") == "ltr"
    await tab.message.fill("שלום")
    await expect(tab.message).to_have_css("direction", "rtl")


async def test_nothing_moves_for_those_who_want_that(user: TabMaker) -> None:
    tab = await user.blank()
    await tab.page.emulate_media(reduced_motion="reduce")
    await tab.open()
    await tab.page.route("**/turns", lambda route: route.abort())
    await tab.say("Hello!")
    await expect(tab.page.get_by_text("Trying again…")).to_be_visible()
    assert await tab.evaluate("() => document.getAnimations().length") == 0
    await tab.page.emulate_media(reduced_motion="no-preference")
    assert await tab.evaluate("() => document.getAnimations().length") > 0


async def test_colours_as_chosen_and_kept(user: TabMaker) -> None:
    tab = await user.open()
    light, dark = "rgb(252, 252, 251)", "rgb(22, 24, 27)"
    body = tab.page.locator("body")
    await expect(body).to_have_css("background-color", light)
    await tab.page.emulate_media(color_scheme="dark")
    await expect(body).to_have_css("background-color", dark)
    await tab.button("Preferences").click()
    await tab.page.get_by_role("radio", name="Light").check()
    await expect(body).to_have_css("background-color", light)
    await tab.page.reload()
    await expect(body).to_have_css("background-color", light)
