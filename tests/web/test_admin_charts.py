"""The admin page's charts: a scale for what there is, and none where there is nothing."""

import json
from collections.abc import Mapping
from typing import Any

from playwright.async_api import Locator, Route, expect

from tests.web.browser import Tab, TabMaker, needs_chromium
from tests.web.test_admin import opened, tile
from tests.wiring.server import Server

pytestmark = needs_chromium

PAGES = 137_517  # of a device with as much memory as servers have that nobody told of a limit
REST = {"at": 1_000.0, "seconds": 1.0, "device_pages": PAGES, "device_free_pages": PAGES}
REST |= {f"device_{each}_pages": 0 for each in ("sealed", "open", "loading", "leaving", "cached")}
REST |= {"disk_bytes": 0, "running": 0, "waiting": 0, "query_tokens_a_second": 0.0}


async def watched(user: TabMaker, *samples: Mapping[str, float]) -> Tab:
    """The page at a server that tells these samples, a second apart, and no more."""
    rows = [{**each, "at": 1_000.0 + place} for place, each in enumerate(samples)]
    history = {"columns": list(REST), "rows": [[row[name] for name in REST] for row in rows]}

    async def tell(route: Route) -> None:
        body = f"event: history\ndata: {json.dumps(history)}\n\n"
        await route.fulfill(body=body, content_type="text/event-stream")

    await user.context.route("**/admin/cache/events", tell)
    return await opened(user)


def chart(tab: Tab, title: str) -> Locator:
    return tab.page.get_by_role("figure", name=title, exact=True)


async def test_a_few_pages_of_a_large_memory_are_seen(user: TabMaker, server: Server) -> None:
    used = REST | {"device_cached_pages": 240, "device_sealed_pages": 60}
    tab = await watched(user, used, used, used)
    memory = chart(tab, "Device memory")
    await expect(memory.locator(".top")).to_have_text("500 of 137,517")
    heights: list[Any] = await memory.locator(".area").evaluate_all(
        "(all) => all.map((each) => each.getBBox().height)"
    )
    assert max(heights) > 40, heights


async def test_a_memory_that_is_nearly_full_has_its_own_end(user: TabMaker, server: Server) -> None:
    used = REST | {"device_cached_pages": PAGES - 10}
    tab = await watched(user, used, used)
    await expect(chart(tab, "Device memory").locator(".top")).to_have_text("137,517")


async def test_nothing_is_said_of_a_scale_where_nothing_is(user: TabMaker, server: Server) -> None:
    tab = await watched(user, REST, REST, REST)
    for title in ("Device memory", "Disk", "Queue", "Prompt tokens"):
        await expect(chart(tab, title).locator(".plot")).to_be_visible()
        await expect(chart(tab, title).locator(".top")).to_have_count(0)


async def test_one_page_is_told_as_one(user: TabMaker, server: Server) -> None:
    tab = await watched(user, REST | {"device_cached_pages": 1})
    await expect(tile(tab.page, "Device").locator(".value")).to_have_text("1 page")
