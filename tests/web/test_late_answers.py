"""An answer that is late takes nothing away of what was said and heard since it was asked for."""

import asyncio
from dataclasses import replace

from playwright.async_api import Request, Route, expect

from tests.api.fake_conversations import FakeChatReply
from tests.api.harness import Site, until
from tests.web.browser import Tab, TabMaker, asked, needs_chromium
from tests.web.test_changes_kept import dialog, settings
from tests.web.test_reach import FINAL, file_of, imported
from tests.web.test_settings_kept import patched
from tests.web.test_steadiness import finished

pytestmark = needs_chromium


class Late:
    """Answers about conversations: what each says is settled when it is asked for, and it comes,
    or is lost, when it is let go. where: the end of the address."""

    def __init__(self, tab: Tab, where: str) -> None:
        self._page, self._pattern = tab.page, f"**/api/conversations{where}"
        self._gates: list[asyncio.Event] = []
        self._lost: set[int] = set()
        self._begun = self._over = 0
        self._ended = False

    async def __aenter__(self) -> "Late":
        await self._page.route(self._pattern, self._hold)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ended = True
        for gate in self._gates:
            gate.set()
        # The route stays: whatever is on its way through it would be let go twice.
        await until(lambda: self._over == self._begun)

    async def asked(self, count: int = 1) -> None:
        """Wait until so many were asked for."""
        await until(lambda: len(self._gates) >= count)

    @property
    def count(self) -> int:
        return len(self._gates)

    async def let_go(self, place: int, *, lost: bool = False) -> None:
        """Its answer is here, and what the page makes of it."""
        if lost:
            self._lost.add(place)
        self._gates[place].set()
        await self._page.evaluate("() => fetch('/api/session').then(() => undefined)")

    async def _hold(self, route: Route) -> None:
        if route.request.method != "GET" or self._ended:
            await route.continue_()
            return
        self._begun += 1
        answer = await route.fetch()
        gate = asyncio.Event()
        self._gates.append(gate)
        place = len(self._gates) - 1
        if self._ended:
            gate.set()
        await gate.wait()
        if place in self._lost:
            await route.abort()
        else:
            await route.fulfill(response=answer)
        self._over += 1


async def watched(tab: Tab) -> None:
    """Note whenever a message goes away."""
    await tab.evaluate(
        """() => {
          window.most = window.lost = 0;
          new MutationObserver(() => {
            const now = document.querySelectorAll(".step.user").length;
            window.most = Math.max(window.most, now);
            if (now < window.most) window.lost += 1;
          }).observe(document.body, { subtree: true, childList: true });
        }"""
    )


async def test_a_late_load_takes_no_message_away(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    name = await imported(scripted.url, file_of("one", "uno", final=FINAL))
    tab = await reader.open(name)
    await expect(tab.own).to_have_text("one")
    await watched(tab)
    async with Late(tab, f"/{name}") as loads:
        await tab.say("two")
        await asked(replies)
        finished(scripted, replies[0])
        await loads.asked()
        await tab.say("three")
        await asked(replies, 2)
        replies[1].say("tre")
        await expect(tab.replies.last).to_have_text("tre")
        finished(scripted, replies[1])
        await expect(tab.receipts).to_have_count(3)
        await loads.let_go(0)
        await tab.say("four")
        await asked(replies, 3)
        assert scripted.conversations.sent[-1].parent == replies[1].id
        await loads.asked(2)
        finished(scripted, replies[2])
        await expect(tab.receipts).to_have_count(4)
        await loads.let_go(1)
    await expect(tab.receipts).to_have_count(4)
    await expect(tab.own).to_have_text(["one", "two", "three", "four"])
    assert await tab.evaluate("() => window.lost") == 0


async def test_a_late_load_leaves_the_reply_that_is_coming(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    name = await imported(scripted.url, file_of("one", "uno", final=FINAL))
    tab = await reader.open(name)
    await expect(tab.own).to_have_text("one")
    await watched(tab)
    async with Late(tab, f"/{name}") as loads:
        await patched(scripted, name, title="News")
        await loads.asked()
        await tab.say("two")
        await asked(replies)
        replies[0].say("due")
        await expect(tab.replies).to_have_text(["uno", "due"])
        await loads.let_go(0)
        await loads.asked(2)
        await expect(tab.own).to_have_text(["one", "two"])
        await expect(tab.replies).to_have_text(["uno", "due"])
        await loads.let_go(1)
        await expect(tab.page.locator("header h1")).to_have_text("News")
        replies[0].say(" e tre")
        await expect(tab.replies).to_have_text(["uno", "due e tre"])
        assert await tab.evaluate("() => window.lost") == 0


async def test_a_load_that_fails_late_is_asked_for_again(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    name = await imported(scripted.url, file_of("one", "uno", final=FINAL))
    tab = await reader.open(name)
    await expect(tab.own).to_have_text("one")
    async with Late(tab, f"/{name}") as loads:
        await patched(scripted, name, title="News")
        await loads.asked()
        await tab.say("two")
        await asked(replies)
        replies[0].say("due")
        await expect(tab.replies).to_have_text(["uno", "due"])
        await loads.let_go(0, lost=True)
        await loads.asked(2)
        await expect(tab.page.get_by_role("alert")).to_have_count(0)
        await loads.let_go(1)
        await expect(tab.page.locator("header h1")).to_have_text("News")


async def test_a_late_load_leaves_what_was_saved_since(scripted: Site, reader: TabMaker) -> None:
    name = await imported(scripted.url, file_of("one", "uno", final=FINAL))
    tab = await reader.open(name)
    await expect(tab.own).to_have_text("one")
    async with Late(tab, f"/{name}") as loads:
        # What is loaded for the save is asked for after what is under way.
        await patched(scripted, name, title="News")
        await loads.asked()
        await settings(tab)
        await dialog(tab).get_by_label("Top k").fill("7")
        await dialog(tab).get_by_role("button", name="Save").click()
        await patched(scripted, name, settings={"temperature": 0.5})
        await loads.let_go(0)
        await loads.asked(2)
        await loads.let_go(1)
        await expect(dialog(tab)).to_have_count(0)
    await expect(tab.page.locator("header h1")).to_have_text("News")
    assert scripted.conversations.known[name].settings == {"temperature": 0.5, "top_k": 7}


async def test_a_late_load_does_not_bring_back_what_was_deleted(
    scripted: Site, reader: TabMaker
) -> None:
    name = await imported(scripted.url, file_of("one", "uno", final=FINAL))
    tab = await reader.open(name)
    await expect(tab.own).to_have_text("one")
    alert = tab.page.get_by_role("alert")
    async with Late(tab, f"/{name}") as loads:
        await patched(scripted, name, title="News")
        await loads.asked()
        async with scripted.client() as client:
            await client.delete(f"/api/conversations/{name}")
        await expect(alert).to_have_text("This conversation was deleted.")
        await loads.let_go(0)
        await expect(alert).to_have_text("This conversation was deleted.")
        await expect(tab.own).to_have_text("one")
        assert loads.count == 1


async def test_a_conversation_is_loaded_once_as_it_is_opened(
    scripted: Site, reader: TabMaker
) -> None:
    name = await imported(scripted.url, file_of("one", "uno", final=FINAL))
    tab = await reader.blank()
    lists: list[str] = []
    loads: list[str] = []

    def note(request: Request) -> None:
        if f"/api/conversations/{name}" in request.url:
            loads.append(request.url)

    tab.page.on("request", note)
    tab.page.on("requestfinished", lambda request: lists.append(request.url))
    await tab.open(name)
    await expect(tab.own).to_have_text("one")
    # It is asked what there is as the page begins, and when news can be heard.
    await until(lambda: sum("/api/conversations?" in url for url in lists) == 2)
    await tab.evaluate("() => fetch('/api/session').then(() => undefined)")
    assert len(loads) == 1
    # What has changed before that is loaded, where no news told of it.
    known = scripted.conversations.known
    known[name] = replace(known[name], title="Unheard", revision=9)
    await tab.evaluate("() => window.dispatchEvent(new Event('online'))")
    await expect(tab.page.locator("header h1")).to_have_text("Unheard")
    assert len(loads) == 2


async def test_a_late_load_leaves_the_branch_that_was_chosen_since(
    scripted: Site, reader: TabMaker
) -> None:
    file = file_of("one", "uno", "two")
    file["turns"][2] = {"id": "t2", "parent": "t0", "role": "assistant", "content": "eins"}
    name = await imported(scripted.url, file)
    tab = await reader.open(name)
    await expect(tab.replies).to_have_text("eins")
    async with Late(tab, f"/{name}") as loads:
        await patched(scripted, name, title="News")
        await loads.asked()
        async with tab.page.expect_response(lambda it: it.request.method == "PATCH") as told:
            await tab.button("Previous version").click()
        await (await told.value).finished()
        await loads.let_go(0)
        await loads.asked(2)
        await expect(tab.replies).to_have_text("uno")
        await loads.let_go(1)
        await expect(tab.page.locator("header h1")).to_have_text("News")
        await expect(tab.replies).to_have_text("uno")
