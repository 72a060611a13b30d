"""Model text and titles are untrusted: nothing in them runs or loads anything."""

import asyncio
from typing import Any

import httpx
import pytest
from playwright.async_api import Request, expect

from tests.api.fake_conversations import FakeChatReply
from tests.api.harness import Site
from tests.web.browser import Tab, TabMaker, asked, needs_chromium
from tests.web.payloads import PAYLOADS

pytestmark = needs_chromium

# What markdown makes, and what the page itself puts around it.
ALLOWED = {
    *("a", "p", "br", "hr", "em", "strong", "del", "code", "pre", "blockquote", "span", "sup"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li"),
    *("table", "thead", "tbody", "tr", "th", "td", "div", "button", "svg", "path"),
}
LOOK = """() => {
  const found = [];
  for (const prose of document.querySelectorAll(".prose, .user .text, nav li a, header h1")) {
    for (const node of prose.querySelectorAll("*")) {
      found.push([node.localName, node.getAttributeNames().filter((name) => name !== "class"),
        node.getAttribute("href"), node.getAttribute("target"), node.getAttribute("rel")]);
    }
  }
  return found;
}"""


def foreign(tab: Tab) -> list[str]:
    """Requests to anybody else, as they come."""
    seen: list[str] = []

    def note(request: Request) -> None:
        if not request.url.startswith((tab.url, "data:image/svg+xml")):
            seen.append(request.url)

    tab.page.on("request", note)
    return seen


async def harmless(tab: Tab) -> None:
    """Nothing ran, and what is there is markdown's."""
    await tab.page.mouse.move(500, 300)
    assert await tab.evaluate("() => window.hits") == 0
    for name, attributes, href, target, rel in await tab.evaluate(LOOK):
        assert name in ALLOWED, name
        assert not [each for each in attributes if each.startswith(("on", "style", "src"))]
        if name == "a" and href is not None:
            assert href.startswith(("https://", "http://", "mailto:")), href
            assert target == "_blank"
            assert set(rel.split()) >= {"noopener", "noreferrer"}
    assert await tab.page.locator("#app").count() == 1
    assert await tab.page.locator("main img, main iframe, nav img").count() == 0


async def armed(user: TabMaker) -> Tab:
    tab = await user.blank()
    await tab.page.add_init_script("window.hits = 0; window.hit = () => { window.hits += 1; };")
    return tab


def file_of(texts: tuple[str, ...]) -> dict[str, Any]:
    """A conversation whose every turn is a payload."""
    turns: list[dict[str, Any]] = []
    for place, text in enumerate(texts):
        parent = f"t{2 * place - 1}" if place else None
        turns.append({"id": f"t{2 * place}", "parent": parent, "role": "user", "content": text})
        answer = {"id": f"t{2 * place + 1}", "parent": f"t{2 * place}", "role": "assistant"}
        turns.append(answer | {"content": text})
    return {
        "format": "chatserve.conversation",
        "version": 1,
        "title": "<img src=x onerror=hit()><b>bold</b>",
        "turns": turns,
        "leaf": turns[-1]["id"],
    }


async def test_there_are_enough_of_them() -> None:
    assert len(set(PAYLOADS)) >= 50


async def test_the_arms_are_live(user: TabMaker) -> None:
    """What counts as a hit is counted: a payload put into a page without a policy hits."""
    page = await user.context.new_page()
    await page.set_content(
        "<script>window.hits = 0; window.hit = () => { window.hits += 1; }</script>"
    )
    await page.evaluate("(text) => { document.body.innerHTML = text; }", PAYLOADS[3])
    await page.wait_for_function("() => window.hits === 1")


async def test_nothing_runs_that_was_said_before(user: TabMaker) -> None:
    tab = await armed(user)
    seen = foreign(tab)
    async with httpx.AsyncClient(base_url=tab.url, timeout=20) as client:
        made = await client.post("/api/conversations/import", json=file_of(PAYLOADS))
        assert made.status_code == 201, made.text
    await tab.open(made.json()["id"])
    await tab.all_messages()
    await expect(tab.own).to_have_count(len(PAYLOADS))
    await harmless(tab)
    # What a user said is shown as it was said; the title too.
    said = await tab.evaluate(
        "() => [...document.querySelectorAll('.step.user .text')].map((each) => each.textContent)"
    )
    assert said == list(PAYLOADS)
    await expect(tab.page.locator("header h1")).to_have_text("<img src=x onerror=hit()><b>bold</b>")
    assert seen == []


async def test_nothing_runs_while_it_streams(scripted: Site, reader: TabMaker) -> None:
    """Cut anywhere: a half of a payload may close what another half has opened."""
    text = "\n\n".join(PAYLOADS)
    replies: list[FakeChatReply] = []
    scripted.conversations.on_send = replies.append
    tab = await armed(reader)
    seen = foreign(tab)
    await tab.open()
    await tab.say("go")
    await asked(replies)
    (reply,) = replies
    step = 97
    for place in range(0, len(text), step):
        reply.say(text[place : place + step])
        await asyncio.sleep(0)
        await tab.evaluate("() => new Promise(requestAnimationFrame)")
    reply.finish()
    scripted.conversations.keep(reply)
    await expect(tab.receipts).to_have_count(1)
    await harmless(tab)
    assert seen == []


@pytest.mark.parametrize("text", ["<img src=x onerror=hit()>", "a]b\x1b[31m</title><script>hit()"])
async def test_errors_are_text_too(scripted: Site, reader: TabMaker, text: str) -> None:
    def fail(reply: FakeChatReply) -> None:
        reply.finish("failed", {"code": "internal_error", "message": text, "retry_after": None})

    scripted.conversations.on_send = fail
    tab = await armed(reader)
    await tab.open()
    await tab.say("go")
    await expect(tab.page.get_by_role("alert")).to_contain_text(text[:8])
    await harmless(tab)


async def test_code_is_coloured_and_still_text(user: TabMaker) -> None:
    tab = await armed(user)
    code = 'def f():\n    return "</code><img src=x onerror=hit()>"  # <script>hit()</script>'
    async with httpx.AsyncClient(base_url=tab.url, timeout=20) as client:
        file = file_of((f"```python\n{code}\n```",))
        made = await client.post("/api/conversations/import", json=file)
    await tab.open(made.json()["id"])
    await expect(tab.page.locator("pre .hljs-keyword").first).to_have_text("def")
    assert await tab.page.locator("pre code").inner_text() == code
    await harmless(tab)
    await user.context.grant_permissions(["clipboard-read", "clipboard-write"])
    await tab.button("Copy the code").click()
    assert await tab.evaluate("() => navigator.clipboard.readText()") == code
