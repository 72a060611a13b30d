"""The admin page, at the real server: shared prefixes as a tree, and a conversation forgotten."""

import re
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Locator, Page, Route, expect

from tests.web.browser import PHONE, TabMaker, needs_chromium, tabs
from tests.web.test_admin import act, asking, chatted, kept, opened
from tests.web.test_reach import AXE, serious
from tests.wiring.server import Server, running

pytestmark = needs_chromium

SETTINGS = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}
SYSTEM = "You are kind and count well, and you never say less than what was asked for. " * 5
LONG = "Tell me all that you know of pages, and of what is kept of them, in the order of time. " * 3


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ["--threads", "1", "--kv-memory", "16MiB"]
    with running(tmp_path_factory.mktemp("prefixes"), options) as served:
        yield served


@pytest_asyncio.fixture(loop_scope="module")
async def admin(browser: Browser, fresh: Server) -> AsyncGenerator[TabMaker]:
    async with tabs(browser, fresh.url) as maker:
        yield maker


async def talk(url: str, system: str, *contents: str) -> str:
    """A conversation, over; its id."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        body = {"system": system, "settings": SETTINGS}
        made = (await client.post("/api/conversations", json=body)).json()["id"]
        for number, content in enumerate(contents):
            turn = {"id": f"turn-{number}", "content": content}
            answer = await client.post(f"/api/conversations/{made}/turns", json=turn)
            assert "event: done" in answer.text, answer.text
        return made


def shared(page: Page) -> Locator:
    return page.get_by_role("region", name="Shared prefixes")


def items(page: Page) -> Locator:
    return shared(page).get_by_role("treeitem")


async def test_shared_prefixes_are_a_tree_with_the_servers_numbers(
    admin: TabMaker, fresh: Server
) -> None:
    tab = await opened(admin)
    page = tab.page
    await expect(shared(page)).to_contain_text("Nothing is shared yet.")
    for content in ("Hello!", LONG, f"{LONG} Now.", "What is a page?"):
        await talk(admin.url, SYSTEM, content, "And then?")
    await talk(admin.url, f"Another one. {SYSTEM}", "Hello!")
    await talk(admin.url, f"Another one. {SYSTEM}", "What is a page?")
    await kept(fresh)
    async with asking(admin.url, "/admin/cache/prefixes?limit=40") as told:
        prefixes: list[dict[str, Any]] = told["prefixes"]
    roots = [each for each in prefixes if each["above"] is None]
    assert len(roots) == 2
    assert len(prefixes) >= 4
    await expect(items(page)).to_have_count(len(prefixes))
    await expect(shared(page)).to_contain_text(f"{told['saved_tokens']:,} tokens found here")
    # Each is told as the server tells it, under what it continues, and begins where that ends.
    by_page = {each["page"]: each for each in prefixes}
    ends: dict[int, float] = {}
    path: list[int] = []
    tokens = 0.0
    for at in range(len(prefixes)):
        item = items(page).nth(at)
        each = by_page.pop(int(await item.get_attribute("data-page") or ""))
        level = int(await item.get_attribute("aria-level") or "")
        del path[level - 1 :]
        above = None if each["above"] is None else prefixes[each["above"]]["page"]
        assert (path[-1] if path else None) == above
        path.append(each["page"])
        words = await item.get_attribute("title") or ""
        assert f"{each['tokens']:,} tokens in " in words
        assert f"{each['saved_tokens']:,} tokens saved" in words
        await expect(item.locator(".saved")).to_have_text(f"{each['saved_tokens']:,}")
        box: dict[str, float] = await item.locator(".bar").evaluate(
            "(bar) => ({ left: bar.getBoundingClientRect().left,"
            " right: bar.getBoundingClientRect().right })"
        )
        ends[each["page"]] = box["right"]
        if above is not None:
            assert box["left"] == pytest.approx(ends[above], abs=1.0)
        width = (box["right"] - box["left"]) / each["tokens"]
        tokens = tokens or width
        assert width == pytest.approx(tokens, rel=0.02), "as long as its tokens"
    assert not by_page


async def told(page: Page, at: int) -> None:
    """Wait until the words above the tree are those of its row at this place: of one moment, as
    copies are made and numbers change while somebody looks."""
    await page.wait_for_function(
        """(at) => {
          const title = document.querySelectorAll('[role="treeitem"]')[at]?.title;
          const words = document.querySelector('[aria-labelledby="prefixes"] .words');
          return title && words.textContent === title;
        }""",
        arg=at,
    )


async def test_numbers_are_told_under_the_pointer_and_by_keys(
    admin: TabMaker, fresh: Server
) -> None:
    for content in ("Hello!", LONG, f"{LONG} Now."):
        await talk(admin.url, f"By keys. {SYSTEM}", content)
    await kept(fresh)
    tab = await opened(admin)
    page = tab.page
    await expect(items(page).nth(2)).to_be_visible()
    words = shared(page).locator(".words")
    await expect(words).to_contain_text("Point at one")
    for at in (1, 0):
        await items(page).nth(at).hover()
        await told(page, at)
    await page.mouse.move(0, 0)
    await expect(words).to_contain_text("Point at one")
    await items(page).first.focus()
    last = await items(page).count() - 1
    for key, at in (("ArrowDown", 1), ("End", last), ("ArrowUp", last - 1), ("Home", 0)):
        await page.keyboard.press(key)
        await expect(items(page).nth(at)).to_be_focused()
        await told(page, at)
    # To the right is what continues it, to the left what it continues; one stop for Tab.
    deep = page.locator('[role="treeitem"][aria-level="2"]').first
    await deep.focus()
    await page.keyboard.press("ArrowLeft")
    await expect(page.locator('[role="treeitem"][aria-level="1"]:focus')).to_have_count(1)
    await page.keyboard.press("ArrowRight")
    await expect(deep).to_be_focused()
    assert await items(page).and_(page.locator('[tabindex="0"]')).count() == 1


async def test_rows_have_names_that_stay(admin: TabMaker) -> None:
    for content in ("Hello!", "What is a page?"):
        await talk(admin.url, f"By name. {SYSTEM}", content)
    async with httpx.AsyncClient(base_url=admin.url, timeout=30) as client:
        made = await client.post("/admin/prompts", json={"name": "shop", "text": f"S. {SYSTEM}"})
        assert made.is_success, made.text
    for content in ("Hello!", "What is a page?"):
        await talk(admin.url, f"S. {SYSTEM}", content)
    async with asking(admin.url, "/admin/cache/prefixes?limit=40") as found:
        prefixes: list[dict[str, Any]] = found["prefixes"]
    tab = await opened(admin)
    own = [each for each in prefixes if each["above"] is None and not each["public"]]
    public = [each for each in prefixes if each["public"]]
    assert own
    assert public
    for each, name in [(each, each["label"]) for each in own] + [(public[0], "shop")]:
        row = shared(tab.page).locator(f'[data-page="{each["page"]}"]')
        await expect(row.locator(".owner code")).to_have_text(name)
        await expect(row).to_have_attribute("title", re.compile(f"^(local|public) {name}: "))
    await expect(shared(tab.page).locator(".columns")).to_contain_text("tokens × times found")


def prefix(page: int, saved: int) -> dict[str, Any]:
    """As the server tells it."""
    return {
        "above": None, "page": page, "label": f"{page:06x}", "prompts": [], "owner": "local",
        "public": False, "pages": 4, "tokens": 64, "owners": 0, "hits": saved // 64,
        "hits_least": saved // 64, "saved_tokens": saved, "saved_tokens_under": saved,
        "branches": 0, "copies": {"host": 0, "disk": 4, "none": 0},
    }  # fmt: skip


async def test_a_row_that_moves_keeps_the_focus(admin: TabMaker) -> None:
    """Which one saves most changes while somebody goes through them with the keys."""
    rows = [prefix(1, 640), prefix(2, 320), prefix(3, 64)]

    async def answer(route: Route) -> None:
        body = {"shared_tokens": 192, "saved_tokens": 1024, "more": False, "prefixes": rows}
        await route.fulfill(json=body)

    tab = await admin.blank()
    await tab.page.route("**/admin/cache/prefixes?*", answer)
    await tab.page.goto(f"{admin.url}/admin")
    await expect(items(tab.page)).to_have_count(3)
    last = tab.page.locator('[data-page="3"]')
    await last.focus()
    rows.insert(0, prefix(3, 1280))
    del rows[-1]
    # The page looks anew when somebody comes back to it.
    await tab.page.wait_for_function(
        """() => {
          document.dispatchEvent(new Event("visibilitychange"));
          return document.querySelector('[role="treeitem"]').dataset.page === "3";
        }"""
    )
    await expect(last).to_be_focused()
    await tab.page.keyboard.press("ArrowDown")
    await expect(tab.page.locator('[data-page="1"]')).to_be_focused()


async def test_what_an_admin_forgets_is_gone_for_its_owner(admin: TabMaker) -> None:
    name, other = await chatted(admin.url), await chatted(admin.url)
    owner = await admin.blank()
    await owner.page.goto(f"{admin.url}/#{name}")
    entries = [owner.page.locator(f'a[href="#{each}"]') for each in (name, other)]
    for entry in entries:
        await expect(entry).to_have_count(1)
    await expect(owner.page.get_by_text("Count from 1 to 80.").first).to_be_visible()
    tab = await opened(admin)
    row = tab.page.locator(f'li[data-id="{name}"]')
    await expect(row).to_be_visible()
    await tab.button(f"Actions for {name}").click()
    await tab.page.get_by_role("menuitem", name="Forget…").click()
    dialog = tab.page.get_by_role("dialog")
    await expect(dialog).to_contain_text("This cannot be undone.")
    await dialog.get_by_role("button", name="Cancel").click()
    async with asking(admin.url, f"/api/conversations/{name}") as told:
        assert told["id"] == name, "nothing was done"
    await act(tab, name, "Forget…", "Forget for good")
    await expect(tab.page.locator(".notice")).to_contain_text("Forgotten: nothing of it is kept")
    await expect(row).to_have_count(0)
    await expect(tab.page.locator(f'li[data-id="{other}"]')).to_be_visible()
    async with asking(admin.url, f"/api/conversations/{name}") as told:
        assert told["error"]["code"] == "not_found"
    await expect(owner.page.get_by_text("This conversation was deleted.")).to_be_visible()
    await expect(entries[0]).to_have_count(0)
    await expect(entries[1]).to_have_count(1)


async def test_it_fits_a_phone(browser: Browser, fresh: Server) -> None:
    await talk(fresh.url, SYSTEM, "Hello!", "And then?")
    phone = {"viewport": PHONE, "has_touch": True, "is_mobile": True}
    async with tabs(browser, fresh.url, **phone) as maker:
        tab = await opened(maker)
        await expect(items(tab.page).first).to_be_visible()
        wide = await tab.evaluate(
            """() => [document.documentElement, document.querySelector(".page")]
              .map((each) => each.scrollWidth)"""
        )
        assert max(wide) <= PHONE["width"], wide


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed: npm ci in web/")
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing_serious(admin: TabMaker, scheme: Any) -> None:
    await talk(admin.url, SYSTEM, "Hello!", "And then?")
    tab = await admin.blank()
    await tab.page.emulate_media(color_scheme=scheme)
    await tab.page.add_init_script(path=AXE)
    await tab.page.goto(f"{admin.url}/admin")
    await expect(items(tab.page).first).to_be_visible()
    await items(tab.page).first.focus()
    await serious(tab, "the tree")
