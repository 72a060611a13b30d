"""The admin page at servers of all kinds: with very many pages, restarted, without host memory."""

import base64
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, expect

from tests.web.browser import TabMaker, needs_chromium, tabs
from tests.web.test_admin import asking, chatted, count, device, opened, tile
from tests.wiring.server import Revived, Server, reviving, running

pytestmark = needs_chromium

PAGES_LEAST = 20_000
# Counts what is painted, and how often.
WATCH_PAINTING = """
  window.painted = 0;
  const real = CanvasRenderingContext2D.prototype.fillRect;
  CanvasRenderingContext2D.prototype.fillRect = function (...box) {
    window.painted += 1;
    return real.apply(this, box);
  };
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with tens of thousands of pages."""
    options = ["--threads", "1", "--page-size", "8", "--kv-memory", "420MiB"]
    with running(tmp_path_factory.mktemp("large"), options) as served:
        yield served


@pytest_asyncio.fixture(loop_scope="module")
async def revived(tmp_path: Path) -> AsyncGenerator[Revived]:
    with reviving(tmp_path, ["--threads", "1"]) as server:
        await server.ready()
        yield server


async def cells(url: str) -> list[str]:
    """The state of each page of the device, as the server tells it."""
    async with asking(url, "/admin/cache/pages") as told:
        states, bits = told["states"], told["state_bits"]
        return [states[byte & bits] for byte in base64.b64decode(told["device"]["cells"])]


async def test_very_many_pages(browser: Browser, large: Server) -> None:
    """One canvas, what holds something painted once, and again only when it has changed."""
    await chatted(large.url)
    large.wait_for("idle")
    states = await cells(large.url)
    assert len(states) >= PAGES_LEAST
    async with tabs(browser, large.url) as user:
        await user.context.add_init_script(WATCH_PAINTING)
        tab = await opened(user)
        canvas, words = device(tab.page).locator("canvas"), device(tab.page).locator(".words")
        cached = states.count("cached")
        await expect(count(tab.page, "cached")).to_have_text(str(cached))
        await expect(words).to_have_text(
            f"{cached} kept for later, 0 in use, {len(states) - cached:,} free"
        )
        painted: Any = await canvas.evaluate(
            """(node) => {
              const { data } = node.getContext("2d").getImageData(0, 0, node.width, node.height);
              const colours = new Map();
              for (let place = 0; place < data.length; place += 4) {
                if (data[place + 3] === 0) continue;
                const colour = data.slice(place, place + 3).join();
                colours.set(colour, (colours.get(colour) ?? 0) + 1);
              }
              return [...colours.values()];
            }"""
        )
        side = 16  # pixels: the most, with one between two cells
        assert painted == [(side - 1) ** 2 * cached], "those that hold something, and no free one"
        assert await tab.page.locator("*").count() < 1_500, "a page is no element"
        # What lies under the pointer.
        columns = int(await canvas.evaluate("(node) => node.width")) // side
        drawn = [page for page, state in enumerate(states) if state == "cached"]
        for place in (0, cached // 2, cached - 1):
            page, left, top = drawn[place], side * (place % columns), side * (place // columns)
            await canvas.hover(position={"x": left + 1, "y": top + 1})
            await expect(words).to_have_text(f"Page {page}: {states[page]}")
        await tab.page.mouse.move(0, 0)
        # Only what has changed is painted anew, however many there are.
        await tab.evaluate("() => { window.painted = 0; }")
        await chatted(large.url)
        large.wait_for("idle")
        now = (await cells(large.url)).count("cached")
        assert now > cached
        await expect(count(tab.page, "cached")).to_have_text(str(now))
        again = await tab.evaluate("() => window.painted")
        assert now - cached <= again < PAGES_LEAST / 10


async def test_a_server_that_is_killed_and_started_again(
    browser: Browser, revived: Revived
) -> None:
    """The live view goes on by itself, with the new process's numbers."""
    async with tabs(browser, revived.server.url) as user:
        tab = await opened(user)
        page = tab.page
        await tab.evaluate("() => { window.same = true; }")
        note = tile(page, "Tokens found").locator(".note")
        await chatted(user.url)
        before: Any = revived.server.cache()["cache"]["query_tokens"]
        await expect(note).to_contain_text(f"of {before:,} since the start")
        revived.kill()
        trouble = page.get_by_role("alert")
        await expect(trouble).to_contain_text("Trying again…")
        revived.spawn()
        await revived.ready()
        await expect(trouble).to_have_count(0)
        for _ in range(3):
            await chatted(user.url)
        state: Any = revived.server.wait_for("idle")
        after = state["cache"]["query_tokens"]
        assert after != before
        await expect(note).to_contain_text(f"of {after:,} since the start")
        await expect(count(page, "cached")).to_have_text(str(state["cache"]["pages"]["cached"]))
        # A chart goes on too: some second since then had tokens.
        plot = page.get_by_role("slider", name="Tokens", exact=True)
        await expect(plot).to_have_attribute("aria-valuetext", "now: of prompts 0, generated 0")
        await plot.focus()
        spoken: set[str] = set()
        for _ in range(20):
            await page.keyboard.press("ArrowLeft")
            spoken.add(await plot.get_attribute("aria-valuetext") or "")
        assert any(not each.endswith("generated 0") for each in spoken), spoken
        assert await tab.evaluate("() => window.same"), "the page was loaded anew"


async def test_without_host_memory(user: TabMaker, server: Server) -> None:
    """What is not there is said once, and takes no room."""
    name = await chatted(user.url)
    server.wait_for("idle")
    tab = await opened(user)
    page = tab.page
    await expect(tile(page, "Host memory").locator(".value")).to_have_text("none")
    row = page.locator(f'li[data-id="{name}"]')
    await expect(row.locator(".pages small")).to_contain_text("device")
    await expect(row.locator(".pages small")).not_to_contain_text("host")
    await expect(page.get_by_role("region", name="Device")).to_be_visible()
    await expect(page.get_by_role("region", name="Host memory")).to_have_count(0)
    await expect(page.get_by_role("slider", name="Queue", exact=True)).to_be_visible()
    await expect(page.get_by_role("slider", name="Host memory", exact=True)).to_have_count(0)
    text = await page.locator("main").inner_text()
    assert "NaN" not in text
    assert "undefined" not in text
