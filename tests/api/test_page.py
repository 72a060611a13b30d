"""The minimal page, in a real Chromium."""

import os
import shutil
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from playwright.async_api import Page, async_playwright, expect

from chatserve.api.keys import key_ring
from chatserve.chat.values import Ask, ChatPrompt, Delta, Failed, ReplyEvent, SampleEnd
from chatserve.errors import StepFault
from tests.api.harness import Site, done, echo, site, soon

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
KEY = "a-key-0123456789"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None and os.environ.get("CI") != "true", reason="there is no Chromium"
    ),
]


@pytest.fixture
async def served() -> AsyncGenerator[Site]:
    async with site() as running:
        yield running


@pytest.fixture
async def page() -> AsyncGenerator[Page]:
    """A page that fails its test when anything breaks the content policy or throws."""
    assert CHROMIUM is not None, "CI has no Chromium"
    complaints: list[str] = []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        opened = await browser.new_page(viewport={"width": 900, "height": 700})
        opened.set_default_timeout(10_000)
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.on(
            "console",
            lambda message: complaints.append(message.text) if "Content" in message.text else None,
        )
        yield opened
        await browser.close()
    assert complaints == []


def slowly(ask: Ask) -> list[ReplyEvent]:
    return [Delta(sample=0, seq=4, text="half")]


async def say(page: Page, text: str) -> None:
    await page.get_by_label("Message").fill(text)
    await expect(page.get_by_role("button", name="Send")).to_be_enabled()
    await page.get_by_label("Message").press("Enter")


async def test_a_chat_streams_and_shows_its_figures(served: Site, page: Page) -> None:
    await page.goto(served.url)
    await expect(page.get_by_text("tiny/model")).to_be_visible()
    await expect(page.get_by_role("button", name="Send")).to_be_disabled()
    await say(page, "one two three")
    reply = page.locator(".turn.assistant .text")
    await expect(reply).to_have_text("one two three")
    await expect(page.locator(".figures")).to_have_text(
        "2.0 tokens/s · first token after 0.25 s · 6 of 10 prompt tokens cached"
    )
    await say(page, "and four")
    await expect(reply.nth(1)).to_have_text("and four")
    prompt = served.service.asks[1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert [(each.role, each.content) for each in prompt.messages] == [
        ("user", "one two three"),
        ("assistant", "one two three"),
        ("user", "and four"),
    ]
    await page.get_by_role("button", name="New chat").click()
    await expect(page.locator(".turn")).to_have_count(0)


async def test_model_text_is_text(served: Site, page: Page) -> None:
    await page.goto(served.url)
    text = "<img src=x onerror=alert(1)><b>bold</b>\u2028\r\ndata: [DONE]\n\nevent: x"
    served.service.script = lambda ask: [
        *(
            Delta(sample=0, seq=index + 1, text=character)
            for index, character in enumerate(text + "é\U0001f600")
        ),
        SampleEnd(sample=0, finish_reason="stop"),
        done(ask),
    ]
    await say(page, "<i>me</i>")
    await expect(page.locator(".figures")).to_be_visible()
    assert await page.locator(".turn.assistant .text").text_content() == text + "é\U0001f600"
    assert await page.locator(".turn.user .text").text_content() == "<i>me</i>"
    assert await page.locator("#log img, #log b, #log i").count() == 0


@pytest.mark.parametrize("how", ["button", "key"])
async def test_stop_ends_the_reply_and_keeps_its_text(served: Site, page: Page, how: str) -> None:
    served.service.script = slowly
    await page.goto(served.url)
    await say(page, "go")
    await expect(page.locator(".turn.assistant .text")).to_have_text("half")
    if how == "button":
        await page.get_by_role("button", name="Stop").click()
    else:
        await page.keyboard.press("Escape")
    reply = await served.service.replies.get()
    await soon(reply.left)
    await expect(page.get_by_text("Stopped.").first).to_be_visible()
    served.service.script = echo
    await say(page, "again")
    await expect(page.locator(".figures").nth(1)).to_contain_text("cached")
    prompt = served.service.asks[1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert [each.content for each in prompt.messages] == ["go", "half", "again"]


async def test_errors_are_shown_and_can_be_tried_again(served: Site, page: Page) -> None:
    served.service.script = lambda ask: [Failed(StepFault("A step failed."))]
    await page.goto(served.url)
    await say(page, "one two")
    await expect(page.locator(".problem").first).to_contain_text("A step failed.")
    served.service.script = echo
    await page.get_by_role("button", name="Try again").click()
    await expect(page.locator(".turn.assistant .text")).to_have_text("one two")
    await expect(page.locator(".problem:visible")).to_have_count(0)


async def test_signing_in_exchanges_the_key_for_a_cookie(page: Page) -> None:
    async with site(keys=key_ring(api_key=KEY)) as running:
        await page.goto(running.url)
        door = page.get_by_role("dialog")
        await expect(door).to_be_visible()
        await door.get_by_label("API key").fill("wrong-key")
        await door.get_by_role("button", name="Sign in").click()
        await expect(door.get_by_role("alert")).to_have_text("The API key is wrong.")
        await door.get_by_label("API key").fill(KEY)
        await door.get_by_label("API key").press("Enter")
        await expect(door).to_be_hidden()
        await say(page, "hello")
        await expect(page.locator(".turn.assistant .text")).to_have_text("hello")
        assert await page.evaluate("document.cookie") == ""
        await page.reload()
        await expect(page.get_by_text("tiny/model")).to_be_visible()
        await expect(door).to_be_hidden()


async def test_it_fits_and_can_be_read(served: Site, page: Page, tmp_path: Path) -> None:
    await page.goto(served.url)
    await expect(page.get_by_text("tiny/model")).to_be_visible()
    await page.screenshot(path=tmp_path / "empty.png")
    await say(
        page, "Tell me in a few sentences how the lighthouse on the northern cape works. " * 3
    )
    await expect(page.locator(".figures")).to_be_visible()
    await say(page, "x" * 300)
    await expect(page.locator(".figures")).to_have_count(2)
    served.service.script = lambda ask: [Failed(StepFault("A step of the engine failed."))]
    await say(page, "And then?")
    await expect(page.locator(".problem").first).to_be_visible()
    for width in (360, 900):
        await page.set_viewport_size({"width": width, "height": 700})
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)
            await page.screenshot(path=tmp_path / f"{scheme}-{width}.png")
            for part in (".user .text", ".assistant .text", ".figures", ".model", ".problem"):
                assert await contrast(page, part) >= 4.5, (part, scheme)


async def contrast(page: Page, selector: str) -> float:
    """The ratio of WCAG 2 between an element's text and the nearest opaque background."""
    return await page.evaluate(
        """(selector) => {
          const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
          const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
            .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
          let node = document.querySelector(selector);
          const front = light(rgb(getComputedStyle(node).color));
          let back = [0, 0, 0, 0];
          for (; node && (back[3] === 0); node = node.parentElement) {
            const value = rgb(getComputedStyle(node).backgroundColor);
            back = value.length === 3 ? [...value, 1] : value;
          }
          const behind = light(back);
          return (Math.max(front, behind) + 0.05) / (Math.min(front, behind) + 0.05);
        }""",
        selector,
    )
