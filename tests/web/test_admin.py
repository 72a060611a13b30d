"""The admin page, at the real server: what it shows, what it does, and to whom."""

import itertools
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Locator, Page, expect

from tests.web.browser import PHONE, Tab, TabMaker, needs_chromium, tabs
from tests.web.test_reach import AXE, serious
from tests.wiring.recall import all_kept
from tests.wiring.server import Server, running

pytestmark = needs_chromium

NUMBERS = itertools.count()
KEYS = """
[[keys]]
name = "root"
key = "key-of-root"
role = "admin"
[[keys]]
name = "ann"
key = "key-of-ann"
"""
OPTIONS = ["--threads", "1", "--kv-memory", "16MiB", "--host-memory", "8MiB"]
SYSTEM = "You are kind and count well, and you never say less than what was asked for. " * 4


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with all tiers and little memory."""
    with running(tmp_path_factory.mktemp("cached"), OPTIONS) as served:
        yield served


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One with keys: of an admin, and of a user."""
    folder = tmp_path_factory.mktemp("locked")
    (folder / "keys.toml").write_text(KEYS)
    options = ["--threads", "1", "--api-key-file", str(folder / "keys.toml")]
    with running(folder, options) as served:
        yield served


@pytest_asyncio.fixture(loop_scope="module")
async def admin(browser: Browser, cached: Server) -> AsyncGenerator[TabMaker]:
    async with tabs(browser, cached.url) as maker:
        yield maker


async def chatted(url: str, tokens: int = 60) -> str:
    """A conversation of some full pages, over; its id."""
    settings = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True}
    number = next(NUMBERS)
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        body = {"system": f"{number} {SYSTEM}", "settings": settings}
        made = (await client.post("/api/conversations", json=body)).json()["id"]
        turn = {"id": f"turn-{number}", "content": "Count from 1 to 80."}
        answer = await client.post(f"/api/conversations/{made}/turns", json=turn)
        assert answer.status_code == 200, answer.text
        assert "finish_reason" in answer.text
        return made


async def kept(server: Server) -> None:
    """Wait until nothing runs, and nothing waits for its copy below: until then its page stays."""
    server.wait_for("idle")
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
        await all_kept(client)


@asynccontextmanager
async def asking(url: str, path: str) -> AsyncGenerator[dict[str, Any]]:
    async with httpx.AsyncClient(base_url=url, timeout=20) as client:
        yield (await client.get(path)).json()


async def opened(maker: TabMaker) -> Tab:
    tab = await maker.blank()
    await tab.page.goto(f"{maker.url}/admin")
    await expect(device(tab.page).locator("canvas")).to_be_visible()
    return tab


def device(page: Page) -> Locator:
    return page.get_by_role("region", name="Device")


def count(page: Page, kind: str) -> Locator:
    """Of the device's pages, as the legend tells."""
    return device(page).locator("dl > div").filter(has_text=kind).locator("dd")


def tile(page: Page, name: str) -> Locator:
    return page.locator(f'[data-tile="{name}"]')


async def act(tab: Tab, conversation: str, name: str, button: str) -> None:
    """Choose an action of a conversation, and confirm it."""
    await tab.button(f"Actions for {conversation}").click()
    await tab.page.get_by_role("menuitem", name=name).click()
    await tab.page.get_by_role("dialog").get_by_role("button", name=button, exact=True).click()
    await expect(tab.page.get_by_role("dialog")).to_have_count(0)


async def test_what_is_shown_moves_while_chats_run(admin: TabMaker, cached: Server) -> None:
    tab = await opened(admin)
    page = tab.page
    await expect(tile(page, "Device").locator(".value")).not_to_have_text("–")
    before: Any = cached.cache()
    name = await chatted(admin.url)
    after: Any = cached.wait_for("idle")
    pages = after["cache"]["pages"]["cached"]
    assert pages > before["cache"]["pages"]["cached"]
    await expect(count(page, "cached")).to_have_text(str(pages))
    await expect(tile(page, "Device").locator(".value")).to_have_text(f"{pages} pages")
    row = page.locator(f'li[data-id="{name}"]')
    await expect(row).to_contain_text("device")
    async with asking(admin.url, "/admin/cache/conversations") as told:
        (found,) = [one["pages"] for one in told["conversations"] if one["id"] == name]
    await expect(row.locator(".pages small")).to_contain_text(f"{found['device']} device")
    found_then, asked_then = (after["cache"][each] for each in ("hit_tokens", "query_tokens"))
    note = tile(page, "Tokens found").locator(".note")
    await expect(note).to_contain_text(f"{found_then:,} of {asked_then:,} since the start")
    await chatted(admin.url)
    asked_now: Any = cached.cache()["cache"]["query_tokens"]
    assert asked_now > asked_then
    await expect(note).to_contain_text(f"of {asked_now:,} since the start")
    # A chart's legend tells what was generated in the second that one points at.
    plot = page.get_by_role("slider", name="Tokens", exact=True)
    await plot.focus()
    spoken: list[str] = []
    for _ in range(30):
        spoken.append(await plot.get_attribute("aria-valuetext") or "")
        await page.keyboard.press("ArrowLeft")
    assert any(not each.endswith("generated 0") and "ago" in each for each in spoken), spoken


async def test_cells_tell_what_they_are_under_the_pointer_and_by_keys(admin: TabMaker) -> None:
    await chatted(admin.url)
    tab = await opened(admin)
    canvas, words = device(tab.page).locator("canvas"), device(tab.page).locator(".words")
    await canvas.hover(position={"x": 2, "y": 2})
    await expect(words).to_have_text("Page 0: cached")
    await canvas.focus()
    await tab.page.keyboard.press("End")
    await expect(words).to_have_text("Page 408: free")
    await expect(canvas).to_have_attribute("aria-valuetext", "Page 408: free")
    # The pointer leaves, as it also does where the page moves under it: the keys' choice stays.
    await tab.page.mouse.move(0, 0)
    await tab.page.keyboard.press("ArrowLeft")
    await expect(words).to_have_text("Page 407: free")
    await tab.page.keyboard.press("Escape")
    await expect(words).to_have_text(re.compile(r"\d+ kept for later, \d+ in use, \d+ free"))
    colours = await canvas.evaluate(
        """(node) => {
          const at = (x, y) => [...node.getContext("2d").getImageData(x, y, 1, 1).data].join();
          return [at(2, 2), at(node.width - 4, node.height / 2)];
        }"""
    )
    assert colours[0] != colours[1], "a cached page looks like a free one"


async def test_a_lease_shows_and_ends(admin: TabMaker) -> None:
    name = await chatted(admin.url)
    tab = await opened(admin)
    await expect(count(tab.page, "leased")).to_have_text("0")
    await act(tab, name, "Lease…", "Set the lease")
    await expect(tab.page.locator(".notice")).to_contain_text("Leased: ")
    await expect(count(tab.page, "leased")).not_to_have_text("0")
    async with httpx.AsyncClient(base_url=admin.url) as client:
        body = {"conversation": name, "seconds": 0}
        ended = (await client.post("/admin/cache/lease", json=body)).json()
    assert ended["pages"] > 0
    await expect(count(tab.page, "leased")).to_have_text("0")


async def test_evict_and_warm_move_a_conversation(admin: TabMaker, cached: Server) -> None:
    name = await chatted(admin.url)
    await kept(cached)
    tab = await opened(admin)
    where = tab.page.locator(f'li[data-id="{name}"] .pages small')
    await expect(where).to_contain_text("device")
    await act(tab, name, "Evict…", "Evict")
    await expect(tab.page.locator(".notice")).to_contain_text("Evicted: ")
    await expect(where).not_to_contain_text("device")
    await act(tab, name, "Warm…", "Warm")
    await expect(tab.page.locator(".notice")).to_contain_text("Warm, its current branch: ")
    await expect(where).to_contain_text("device")


async def test_flush_empties_and_verify_tells(admin: TabMaker, cached: Server) -> None:
    await chatted(admin.url)
    await kept(cached)
    tab = await opened(admin)
    await expect(count(tab.page, "cached")).not_to_have_text("0")
    await tab.button("Flush…").click()
    await tab.button("Cancel").click()
    await expect(count(tab.page, "cached")).not_to_have_text("0")
    await tab.button("Flush…").click()
    await tab.page.get_by_role("dialog").get_by_role("button", name="Flush", exact=True).click()
    await expect(tab.page.locator(".notice")).to_contain_text("Flushed: ")
    await expect(count(tab.page, "cached")).to_have_text("0")
    await tab.button("Verify…").click()
    await tab.page.get_by_label("Pages", exact=True).last.fill("3")
    await tab.page.get_by_role("dialog").get_by_role("button", name="Verify", exact=True).click()
    await expect(tab.page.locator(".notice")).to_contain_text("3 pages of the disk checked")


async def test_a_users_key_is_refused_and_an_admins_opens(browser: Browser, locked: Server) -> None:
    async with tabs(browser, locked.url) as maker:
        tab = await maker.blank()
        page = tab.page
        await page.goto(f"{locked.url}/admin")
        door = page.get_by_role("dialog")
        way = page.get_by_role("link", name="Cache", exact=True)  # from the chat
        await door.get_by_label("API key").fill("key-of-ann")
        await door.get_by_label("API key").press("Enter")
        await expect(page.get_by_text("This page is for admins")).to_be_visible()
        await expect(page.locator("canvas")).to_have_count(0)
        async with page.expect_response("**/api/session") as asked:
            await page.get_by_role("link", name="To the chat").click()
        assert (await (await asked.value).json())["role"] == "user"
        await expect(tab.button("Sign out")).to_be_visible()
        await expect(way).to_have_count(0)
        await page.go_back()
        await tab.button("Sign in with another key").click()
        await door.get_by_label("API key").fill("key-of-root")
        await door.get_by_label("API key").press("Enter")
        await expect(device(page).locator("canvas")).to_be_visible()
        await expect(page.get_by_text("This page is for admins")).to_have_count(0)
        await page.get_by_role("link", name="Chat", exact=True).click()
        await way.click()
        await expect(device(page).locator("canvas")).to_be_visible()
        await tab.button("Sign out").click()
        await expect(door).to_be_visible()
        await expect(page.locator("canvas")).to_have_count(0)


async def test_it_fits_a_phone(browser: Browser, cached: Server) -> None:
    await chatted(cached.url)
    phone = {"viewport": PHONE, "has_touch": True, "is_mobile": True}
    async with tabs(browser, cached.url, **phone) as maker:
        tab = await opened(maker)
        await expect(tab.page.locator("li[data-id]").first).to_be_visible()
        wide = await tab.evaluate(
            """() => [document.documentElement, document.querySelector(".page")]
              .map((each) => each.scrollWidth)"""
        )
        assert max(wide) <= PHONE["width"], wide


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed: npm ci in web/")
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing_serious(admin: TabMaker, scheme: Any) -> None:
    name = await chatted(admin.url)
    tab = await admin.blank()
    await tab.page.emulate_media(color_scheme=scheme)
    await tab.page.add_init_script(path=AXE)
    await tab.page.goto(f"{admin.url}/admin")
    await expect(tab.page.locator(f'li[data-id="{name}"]')).to_be_visible()
    await serious(tab, "the page")
    await tab.button("Verify…").click()
    await serious(tab, "a question")
