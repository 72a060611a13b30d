"""The admin page: how it looks where memory is large and windows are small, and what its questions
say while they wait."""

import asyncio
import re
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Route, ViewportSize, expect

from tests.web.browser import PHONE, WIDE, Tab, TabMaker, needs_chromium, tabs
from tests.web.test_admin import act, chatted, count, device, kept, opened
from tests.web.test_admin_prefixes import SYSTEM, talk
from tests.wiring.server import Server, running

pytestmark = needs_chromium

SMALL: ViewportSize = {"width": 320, "height": 640}
# Some 5,900 pages on the device, and 204 in host memory: the first are too many for cells that can
# be seen.
OPTIONS = ["--threads", "1", "--kv-memory", "230MiB", "--host-memory", "8MiB"]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("large"), OPTIONS) as served:
        yield served


@pytest_asyncio.fixture(loop_scope="module")
async def admin(browser: Browser, large: Server) -> AsyncGenerator[TabMaker]:
    async with tabs(browser, large.url) as maker:
        yield maker


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def known(large: Server) -> str:
    """A conversation that nobody forgets."""
    return await chatted(large.url)


@pytest.mark.parametrize("size", [WIDE, PHONE, SMALL], ids=["wide", "phone", "small"])
async def test_the_document_is_as_high_as_its_window(
    browser: Browser, large: Server, size: ViewportSize
) -> None:
    """Whatever is shown to nobody but readers of the screen scrolls with what it belongs to."""
    name = await talk(large.url, SYSTEM, "Hello!", "And then?")
    async with tabs(browser, large.url, viewport=size) as maker:
        tab = await opened(maker)
        await expect(tab.page.locator(f'li[data-id="{name}"]')).to_be_visible()
        await expect(tab.page.get_by_role("treeitem").first).to_be_attached()
        await as_high_as_its_window(tab)
        chat = await maker.open(name)
        await expect(chat.replies).to_have_count(2)
        await as_high_as_its_window(chat)


async def as_high_as_its_window(tab: Tab) -> None:
    """Also once the last hidden text was scrolled to, as readers of the screen do."""
    script = """() => {
      const hidden = [...document.querySelectorAll(".hidden")].at(-1);
      hidden?.scrollIntoView();
      const { scrollHeight, scrollTop } = document.scrollingElement;
      return [scrollHeight - innerHeight, scrollTop];
    }"""
    assert await tab.evaluate(script) == [0, 0]


async def test_nothing_of_a_small_windows_head_or_tiles_is_cut(
    browser: Browser, large: Server
) -> None:
    async with tabs(browser, large.url, viewport=SMALL) as maker:
        script = "localStorage.setItem('chatserve.signed-in', 'yes')"  # then one can sign out
        await maker.context.add_init_script(script)
        tab = await opened(maker)
        await expect(tab.page.locator('[data-tile="At work"] .value')).to_contain_text("running")
        await expect(tab.button("Sign out")).to_be_visible()
        await expect(tab.page.locator("header .model")).not_to_be_empty()
        rows, room, cut = await tab.evaluate(
            """() => {
              const boxes = (names) => names.map((each) =>
                document.querySelector(`header ${each}`).getBoundingClientRect());
              const edges = (...names) => boxes(names).flatMap((box) => [box.left, box.right]);
              const select = document.querySelector("header select");
              const shown = select.offsetWidth;
              select.style.width = "max-content";
              const room = shown - select.offsetWidth;
              const values = [...document.querySelectorAll("[data-tile] .value, header .model")];
              return [[edges("h1", ".model"), edges("nav", "select", "button")], room,
                values.filter((each) => each.scrollWidth > each.clientWidth)
                  .map((each) => each.textContent)];
            }"""
        )
        for edges in rows:
            assert edges == sorted(edges), "one lies over another"
            assert edges[-1] <= SMALL["width"]
        assert room >= 0, "the choice of colours is cut"
        assert cut == []


async def test_free_pages_are_a_bar_where_cells_would_be_specks(
    admin: TabMaker, large: Server
) -> None:
    await chatted(admin.url)
    await kept(large)
    state: Any = large.wait_for("idle")
    pages = state["cache"]["pages"]
    cached, free, total = pages["cached"], pages["free"], pages["total"]
    assert free > 5_000
    tab = await opened(admin)
    map_ = device(tab.page)
    await expect(map_.locator(".words")).to_have_text(
        f"{cached:,} kept for later, 0 in use, {free:,} free"
    )
    await expect(count(tab.page, "free")).to_have_text(f"{free:,}")
    await expect(map_.locator(".scale .free")).to_have_text(f"{free:,} free")
    await expect(map_.locator(".caption")).to_contain_text(f"all {total:,} pages to scale")
    parts: dict[str, float] = await map_.locator(".scale").evaluate(
        """(bar) => Object.fromEntries([...bar.children]
          .map((each) => [each.classList[0], each.offsetWidth / bar.offsetWidth]))"""
    )
    assert set(parts) == {"free", "cached"}
    assert parts["free"] == pytest.approx(free / total, abs=0.01)
    canvas = map_.locator("canvas")
    await expect(canvas).to_have_attribute("aria-valuemax", str(cached - 1))
    # A cell is large enough to be pointed at, and tells which page it is.
    await canvas.hover(position={"x": 20, "y": 12})
    await expect(map_.locator(".words")).to_have_text(re.compile(r"^Page \d+: cached(, leased)?$"))
    await canvas.focus()
    told: list[int] = []
    for key in ["Home", *["ArrowRight"] * (cached - 1), "End"]:
        await tab.page.keyboard.press(key)
        words = await map_.locator(".words").inner_text()
        told.append(int(words.split()[1].rstrip(":")))
    assert told[:-1] == sorted(set(told[:-1])), "each page once, in order"
    assert (len(told[:-1]), told[-1]) == (cached, told[-2])
    # In host memory all have a cell.
    host = tab.page.get_by_role("region", name="Host memory")
    await expect(host.locator(".scale")).to_have_count(0)
    await expect(host.locator(".caption")).to_have_text("One cell a page.")


async def test_cells_of_pages_that_left_are_gone(admin: TabMaker, large: Server) -> None:
    await chatted(admin.url)
    await kept(large)
    tab = await opened(admin)
    canvas = device(tab.page).locator("canvas")
    painted = """(node) => node.getContext("2d").getImageData(0, 0, node.width, node.height).data
      .some((value) => value > 0)"""
    await expect(count(tab.page, "cached")).not_to_have_text("0")
    assert await canvas.evaluate(painted)
    await tab.button("Flush…").click()
    await tab.page.get_by_role("dialog").get_by_role("button", name="Flush", exact=True).click()
    await expect(count(tab.page, "cached")).to_have_text("0")
    assert not await canvas.evaluate(painted)


async def test_a_conversation_is_known_by_the_head_of_its_name(
    browser: Browser, large: Server, known: str
) -> None:
    rights = ["clipboard-read", "clipboard-write"]
    async with tabs(browser, large.url, permissions=rights) as maker:
        tab = await opened(maker)
        code = tab.page.locator(f'li[data-id="{known}"] code')
        await expect(code).to_have_text(f"{known[:8]}…")
        await expect(code).to_have_attribute("title", known)
        await tab.button(f"Copy {known}").click()
        await expect(tab.page.locator(".notice")).to_have_text(f"Copied: {known}")
        assert await tab.evaluate("() => navigator.clipboard.readText()") == known


async def test_a_question_closes_when_its_action_is_over(admin: TabMaker) -> None:
    """However long it takes to look at what came of it."""
    name = await chatted(admin.url)
    tab = await opened(admin)
    await expect(tab.page.locator(f'li[data-id="{name}"]')).to_be_visible()
    go = asyncio.Event()

    async def hold(route: Route) -> None:
        await go.wait()
        await route.continue_()

    await tab.page.route("**/admin/cache/pages", hold)
    try:
        await act(tab, name, "Forget…", "Forget for good")
        await expect(tab.page.locator(".notice")).to_contain_text("Forgotten:")
    finally:
        go.set()
    await expect(tab.page.locator(f'li[data-id="{name}"]')).to_have_count(0)
    await tab.page.unroute_all(behavior="wait")


async def test_a_question_says_that_it_waits_and_why_it_failed(admin: TabMaker) -> None:
    name = await chatted(admin.url)
    tab = await opened(admin)
    go = asyncio.Event()

    async def fail(route: Route) -> None:
        await go.wait()
        error = {"message": "The store cannot be reached.", "code": "unavailable"}
        await route.fulfill(status=503, json={"error": error})

    await tab.page.route("**/admin/cache/forget", fail)
    await tab.button(f"Actions for {name}").click()
    await tab.page.get_by_role("menuitem", name="Forget…").click()
    dialog = tab.page.get_by_role("dialog")
    button = dialog.get_by_role("button", name="Forget for good")
    await button.click()
    await expect(dialog.get_by_role("status")).to_have_text("At work…")
    await expect(button).to_be_disabled()
    go.set()
    await expect(dialog.get_by_role("alert")).to_contain_text("The store cannot be reached.")
    await expect(dialog.get_by_role("status")).to_have_count(0)
    await tab.page.unroute_all(behavior="wait")
    await button.click()
    await expect(dialog).to_have_count(0)
    await expect(tab.page.locator(f'li[data-id="{name}"]')).to_have_count(0)


@pytest.mark.parametrize("reached", [False, True], ids=["before", "after"])
async def test_what_a_busy_store_did_not_forget_in_time_is_asked_for_again(
    admin: TabMaker, *, reached: bool
) -> None:
    """Whether the deletion was begun or not when the server told that it could not be done yet."""
    name = await chatted(admin.url)
    tab = await opened(admin)
    asked: list[int] = []

    async def fail_once(route: Route) -> None:
        asked.append(1)
        if len(asked) > 1:
            await route.continue_()
            return
        if reached:
            assert (await route.fetch()).ok
        error = {"message": "The store does not answer.", "code": "unavailable"}
        await route.fulfill(status=503, json={"error": error})

    await tab.page.route("**/admin/cache/forget", fail_once)
    await act(tab, name, "Forget…", "Forget for good")
    await expect(tab.page.locator(".notice")).to_have_text("Forgotten: nothing of it is kept.")
    assert len(asked) == 2
    await expect(tab.page.locator(f'li[data-id="{name}"]')).to_have_count(0)


async def test_what_stays_is_told_by_place(admin: TabMaker, known: str) -> None:
    tab = await opened(admin)
    counts = {"pages": 1, "host_pages": 0, "pages_stayed": 10, "host_pages_stayed": 7}

    async def answer(route: Route) -> None:
        await route.fulfill(json=counts)

    await tab.page.route("**/admin/cache/evict", answer)
    await act(tab, known, "Evict…", "Evict")
    await expect(tab.page.locator(".notice")).to_have_text(
        "Evicted: 1 page left the device, 0 host memory. 10 pages stayed on the device, 7 in host"
        " memory: in use, shared, or without a copy on disk."
    )


async def test_no_two_lines_of_a_chart_have_one_colour(admin: TabMaker) -> None:
    tab = await opened(admin)
    charts = tab.page.locator("figure")
    await expect(charts.filter(has_text="Evictions").locator(".swatch")).to_have_count(5)
    colours: list[list[str]] = await charts.evaluate_all(
        """(figures) => figures.map((figure) => [...figure.querySelectorAll(".swatch")]
          .map((each) => getComputedStyle(each).backgroundColor))"""
    )
    assert all(len(set(each)) == len(each) for each in colours), colours
    evictions = await charts.filter(has_text="Evictions").locator("dt").all()
    (named,) = [each for each in evictions if "by name" in await each.inner_text()]
    green = await tab.page.locator('[data-tile="Device"] .bar > span').evaluate(
        "(each) => getComputedStyle(each).backgroundColor"
    )
    own = await named.locator(".swatch").evaluate(
        "(each) => getComputedStyle(each).backgroundColor"
    )
    assert own != green
