"""What somebody has typed is never lost: not to news, to another tab, to a refusal, to a click."""

import asyncio
import json
import re
from typing import Any

import pytest
from playwright.async_api import Locator, Page, Route, expect

from chatserve.errors import Busy, Conflict, Unavailable
from tests.api.fake_conversations import FakeChatReply
from tests.api.harness import Site
from tests.web.browser import LONG, Tab, TabMaker, arrived, asked, long_conversation, needs_chromium
from tests.web.test_interruptions import kept
from tests.web.test_reach import FINAL, file_of, imported
from tests.web.test_shown import until

pytestmark = needs_chromium


class Held:
    """Requests of one kind that wait until they are let go, with an answer or as they are."""

    def __init__(self, page: Page, pattern: str, method: str = "POST") -> None:
        self._page, self._pattern, self._method = page, pattern, method
        self._go = asyncio.Event()
        self.arrived = asyncio.Event()
        self.answer: dict[str, Any] | None = None

    async def __aenter__(self) -> "Held":
        await self._page.route(self._pattern, self._hold)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.let_go()
        await self._page.unroute(self._pattern)

    def let_go(self) -> None:
        self._go.set()

    async def _hold(self, route: Any) -> None:
        if route.request.method != self._method:
            await route.continue_()
            return
        self.arrived.set()
        await self._go.wait()
        if self.answer is None:
            await route.continue_()
        else:
            await route.fulfill(**self.answer)


def refused(status: int, message: str) -> dict[str, Any]:
    return {"status": status, "json": {"error": {"message": message, "code": "busy"}}}


def problems(tab: Tab) -> Locator:
    return tab.page.get_by_role("alert")


async def test_news_leave_the_text_alone_that_is_being_changed(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    name = await imported(scripted.url, file_of("one", "uno", "two", "due", final=FINAL))
    tab = await reader.open(name)
    await tab.button("Edit your message").first.click()
    editor = tab.page.get_by_role("textbox", name="Edit your message")
    await editor.fill("a text of much thought")
    async with scripted.client() as client:
        await client.patch(f"/api/conversations/{name}", json={"title": "Renamed elsewhere"})
        await expect(tab.page.locator("header h1")).to_have_text("Renamed elsewhere")
        await expect(editor).to_have_value("a text of much thought")
        # Another branch is begun elsewhere; this one stays in sight.
        body = {"id": "other", "content": "three", "parent": None}
        async with client.stream("POST", f"/api/conversations/{name}/turns", json=body):
            await expect(tab.rows.first).to_have_attribute("aria-current", "page")
            await asked(replies)
            replies[0].say("tre")
            replies[0].finish(data=FINAL)
            scripted.conversations.keep(replies[0])
        await client.patch(f"/api/conversations/{name}", json={"title": "And once more"})
    await expect(tab.page.locator("header h1")).to_have_text("And once more")
    await expect(editor).to_have_value("a text of much thought")
    await editor.press("Enter")
    await expect(tab.own).to_have_text("a text of much thought")
    sent = await arrived(scripted.conversations, "a text of much thought")
    assert (sent.content, sent.parent) == ("a text of much thought", None)


async def test_a_reply_above_the_text_that_is_being_changed_waits_its_turn(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    name = await imported(scripted.url, file_of("one", "uno", "two", "due", final=FINAL))
    tab = await reader.open(name)
    await tab.button("Edit your message").last.click()
    editor = tab.page.get_by_role("textbox", name="Edit your message")
    await editor.fill("a text of much thought")
    # Elsewhere the first message is answered once more.
    body = {"id": "other", "parent": "t0"}
    url = f"/api/conversations/{name}/turns"
    async with scripted.client() as client, client.stream("POST", url, json=body):
        await client.patch(f"/api/conversations/{name}", json={"title": "Renamed elsewhere"})
        await expect(tab.page.locator("header h1")).to_have_text("Renamed elsewhere")
        await expect(editor).to_have_value("a text of much thought")
        await expect(tab.own).to_have_text("one")
        await asked(replies)
        replies[0].finish(data=FINAL)
        scripted.conversations.keep(replies[0])
    await editor.press("Enter")
    await expect(tab.own).to_have_text(["one", "a text of much thought"])
    sent = await arrived(scripted.conversations, "a text of much thought")
    assert (sent.content, sent.parent) == ("a text of much thought", "t1")


async def test_a_change_that_is_sent_while_another_reply_runs_is_kept(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    name = await imported(scripted.url, file_of("one", "uno", final=FINAL))
    tab = await reader.open(name)
    await tab.button("Edit your message").click()
    editor = tab.page.get_by_role("textbox", name="Edit your message")
    await editor.fill("a text of much thought")
    body = {"id": "other", "content": "two"}
    url = f"/api/conversations/{name}/turns"
    async with scripted.client() as client, client.stream("POST", url, json=body):
        await expect(tab.button("Stop")).to_be_visible()
        await editor.press("Enter")
        await expect(problems(tab)).to_contain_text("Not sent. Another reply is running.")
        await expect(tab.own).to_have_text(["one", "two", "a text of much thought"])
        await asked(replies)
        replies[0].finish(data=FINAL)
        scripted.conversations.keep(replies[0])
    await tab.button("Try again").click()
    await expect(tab.own).to_have_text("a text of much thought")
    sent = await arrived(scripted.conversations, "a text of much thought")
    assert (sent.content, sent.parent, sent.at_leaf) == ("a text of much thought", None, False)


async def test_two_tabs_that_speak_at_once_lose_no_word(user: TabMaker) -> None:
    name = await long_conversation(user.url, 2_000)
    loser, winner = await user.open(name), await user.open(name)
    async with Held(loser.page, "**/turns") as turn:
        await loser.say("Say the word moon.")
        await asyncio.wait_for(turn.arrived.wait(), 20)
        await winner.say(LONG)
        await expect(winner.replies).to_contain_text("1, 2")
        turn.let_go()
        await expect(problems(loser)).to_contain_text("Not sent.")
    for _ in range(2):
        await expect(loser.own).to_have_text([LONG, "Say the word moon."])
        await expect(loser.button("Stop")).to_be_visible()
        await expect(loser.button("Try again")).to_be_disabled()
        await loser.page.reload()
    await expect(problems(loser)).to_contain_text("Not sent.")
    await winner.button("Stop").click()
    await loser.button("Try again").click()
    await expect(loser.replies).to_have_count(2)
    await expect(problems(loser)).to_have_count(0)
    await loser.button("Stop").click()
    await expect(loser.receipts).to_have_count(2)
    said = [t["content"] for t in await kept(loser) if t["role"] == "user"]
    assert said == [LONG, "Say the word moon."]


@pytest.mark.parametrize(
    "refusal",
    [Busy("The queue is full.", retry_after=1.0), Conflict("Not now.")],
    ids=["429", "409"],
)
async def test_a_refused_message_can_be_taken_back(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply], refusal: Exception
) -> None:
    tab = await reader.open(await imported(scripted.url, file_of("one", "uno", final=FINAL)))
    scripted.conversations.refusal = refusal
    for text in ("two", "three"):
        await tab.say(text)
        await expect(problems(tab).last).to_contain_text(f"Not sent. {refusal}")
        await expect(tab.own.last).to_have_text(text)
    scripted.conversations.refusal = None
    await tab.page.reload()
    await expect(tab.own).to_have_text(["one", "two", "three"])
    await tab.message.fill("typed since")
    await problems(tab).last.get_by_role("button", name="Edit").click()
    await expect(tab.message).to_have_value("three\ntyped since")
    await expect(tab.message).to_be_focused()
    await expect(tab.own).to_have_text(["one", "two"])
    await problems(tab).get_by_role("button", name="Try again").click()
    await expect(tab.button("Stop")).to_be_visible()
    await arrived(scripted.conversations, "two")
    await asked(replies)
    replies[0].finish(data=FINAL)
    scripted.conversations.keep(replies[0])
    await expect(problems(tab)).to_have_count(0)
    await expect(tab.receipts).to_have_count(2)
    await expect(tab.message).to_have_value("three\ntyped since")


async def test_what_is_typed_while_a_conversation_is_made_stays(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.open()
    async with Held(tab.page, "**/api/conversations") as made:
        await tab.say("first")
        await expect(tab.own).to_have_text("first")
        await expect(tab.message).to_have_value("")
        await tab.message.press_sequentially("typed since")
        # Whoever reloads now has both; so has a tab that a browser restores after a crash.
        storage = await tab.evaluate("() => Object.entries(sessionStorage)")
        restored = await reader.blank()
        await restored.page.add_init_script(
            f"for (const each of {json.dumps(storage)}) sessionStorage.setItem(...each);"
        )
        await restored.open()
        await expect(restored.message).to_have_value("first\ntyped since")
        await restored.page.close()
        await tab.page.reload()
        await expect(tab.message).to_have_value("first\ntyped since")
        made.answer = refused(409, "Not now.")
        made.arrived.clear()
        await tab.message.fill("first")
        await tab.message.press("Enter")
        await asyncio.wait_for(made.arrived.wait(), 20)
        await tab.message.press_sequentially("typed since")
        made.let_go()
        await expect(tab.page.locator(".notice")).to_have_text("Not now.")
        await expect(tab.message).to_have_value("first\ntyped since")
        await expect(tab.own).to_have_count(0)
    async with Held(tab.page, "**/api/conversations") as made:
        await tab.message.press("Enter")
        await asyncio.wait_for(made.arrived.wait(), 20)
        await tab.message.press_sequentially("and more")
        made.let_go()
        await expect(tab.button("Stop")).to_be_visible()
    await expect(tab.message).to_have_value("and more")
    await asked(replies)
    replies[0].finish(data=FINAL)
    scripted.conversations.keep(replies[0])
    await tab.page.reload()
    await expect(tab.own).to_have_text("first\ntyped since")
    await expect(tab.message).to_have_value("and more")
    await tab.page.keyboard.press("Control+Shift+O")
    await expect(tab.message).to_have_value("")


async def test_what_is_typed_before_it_is_known_who_is_here_stays(reader: TabMaker) -> None:
    tab = await reader.open()
    await tab.message.fill("half a thought")
    async with Held(tab.page, "**/api/session", "GET") as told:
        await tab.page.reload()
        await asyncio.wait_for(told.arrived.wait(), 20)
        await expect(tab.message).to_have_value("")
        await tab.message.press_sequentially("typed early")
        told.let_go()
        await expect(tab.message).to_have_value("half a thought\ntyped early")
    await tab.page.reload()
    await expect(tab.message).to_have_value("half a thought\ntyped early")


async def test_a_first_message_is_asked_for_again_and_made_once(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    """Its answer is lost, or the server is between two processes: as a turn it waits."""
    tab = await reader.open()
    asked: list[Any] = []

    async def made_and_lost(route: Route) -> None:
        if route.request.method != "POST":
            await route.continue_()
            return
        asked.append(route.request.post_data_json)
        if len(asked) == 1:
            await route.fetch()
        if len(asked) < 3:
            await route.fulfill(
                **refused(503, "The server is loading."), headers={"Retry-After": "1"}
            )
        else:
            await route.continue_()

    await tab.page.route("**/api/conversations", made_and_lost)
    await tab.say("first")
    await expect(problems(tab)).to_have_text("The server is loading. Trying again…")
    await expect(tab.own).to_have_text("first")
    await until(tab, lambda: bool(replies))
    await expect(problems(tab)).to_have_count(0)
    assert len(asked) == 3
    assert all(each == asked[0] for each in asked)
    assert [each.title for each in scripted.conversations.known.values()] == ["first"]
    assert [each.content for each in scripted.conversations.sent] == ["first"]


async def test_a_stop_while_a_conversation_is_made_gives_the_text_back(
    scripted: Site, reader: TabMaker
) -> None:
    tab = await reader.open()
    arrived = asyncio.Event()
    await tab.page.route("**/api/conversations", lambda _: arrived.set())  # and no answer
    await tab.say("first")
    await asyncio.wait_for(arrived.wait(), 20)
    await tab.message.press_sequentially("typed since")
    await tab.button("Stop").click()
    await expect(tab.message).to_have_value("first\ntyped since")
    await tab.page.unroute("**/api/conversations")
    # So it does while it waits for another try.
    scripted.conversations.refusal = Unavailable("Not now.", retry_after=60.0)
    await tab.message.press("Enter")
    await expect(problems(tab)).to_have_text("Not now. Trying again…")
    await tab.button("Stop").click()
    await expect(tab.message).to_have_value("first\ntyped since")
    await expect(tab.own).to_have_count(0)
    await expect(problems(tab)).to_have_count(0)
    assert scripted.conversations.sent == []


async def test_one_may_leave_while_a_conversation_is_made(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    there = await imported(scripted.url, file_of("one", "uno", final=FINAL))
    tab = await reader.open()
    async with Held(tab.page, "**/api/conversations") as made:
        await tab.say("a new thought")
        await asyncio.wait_for(made.arrived.wait(), 20)
        await tab.rows.first.click()
        await expect(tab.own).to_have_text("one")
        made.let_go()
        await expect(tab.rows).to_have_text([re.compile("a new thought"), "Imported"])
    await expect(tab.page.locator("nav .running")).to_have_count(1)
    assert tab.conversation == there
    await tab.rows.first.click()
    await expect(tab.own).to_have_text("a new thought")
    await asked(replies)
    assert tab.conversation == replies[0].conversation
    replies[0].say("followed all the while")
    replies[0].finish(data=FINAL)
    scripted.conversations.keep(replies[0])
    await expect(tab.replies).to_have_text("followed all the while")
    await tab.rows.last.click()
    await expect(tab.own).to_have_text("one")


async def test_first_messages_that_wait_are_all_there_after_a_reload(
    scripted: Site, reader: TabMaker
) -> None:
    tab = await reader.open()
    arrived = asyncio.Event()
    await tab.page.route("**/api/conversations", lambda _: arrived.set())  # and no answer
    for text in ("a first one", "a second one"):
        arrived.clear()
        await tab.say(text)
        await asyncio.wait_for(arrived.wait(), 20)
        await tab.message.fill(f"after {text}")
        await tab.button("New chat").first.click()
        await expect(tab.own).to_have_count(0)
        await expect(tab.message).to_have_value("")
    await tab.message.fill("a third one")
    await tab.page.reload()
    await expect(tab.message).to_have_value(re.compile("third"))
    text = await tab.message.input_value()
    # No order is promised between the two that waited.
    halves = [f"a {each} one\nafter a {each} one" for each in ("first", "second")]
    assert text in ["\n".join([*each, "a third one"]) for each in (halves, halves[::-1])]
    # They are the next one's from now on, and nobody else's.
    await tab.page.reload()
    await expect(tab.message).to_have_value(text)
    assert scripted.conversations.known == {}


@pytest.mark.parametrize("place", ["new", "known"])
async def test_a_first_message_is_given_back_to_who_is_elsewhere(
    scripted: Site, reader: TabMaker, place: str
) -> None:
    await imported(scripted.url, file_of("one", "uno", final=FINAL))
    tab = await reader.open()
    async with Held(tab.page, "**/api/conversations") as made:
        await tab.say("a new thought")
        await asyncio.wait_for(made.arrived.wait(), 20)
        await tab.message.fill("and more")
        if place == "new":
            await tab.button("New chat").first.click()
            await expect(tab.own).to_have_count(0)
        else:
            await tab.rows.first.click()
            await expect(tab.own).to_have_text("one")
        await tab.message.fill("typed since")
        made.answer = refused(409, "Not now.")
        made.let_go()
        await expect(tab.page.locator(".notice")).to_have_text("Not now.")
    if place == "known":
        await expect(tab.message).to_have_value("typed since")
        await tab.button("New chat").first.click()
        await expect(tab.message).to_have_value("a new thought\nand more")
    else:
        await expect(tab.message).to_have_value("a new thought\nand more\ntyped since")
        await tab.page.reload()
        await expect(tab.message).to_have_value("a new thought\nand more\ntyped since")
    assert scripted.conversations.sent == []


async def test_a_card_is_said_beside_what_is_typed(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.open()
    await tab.message.fill("half a thought")
    card = tab.page.locator(".welcome ul button").first
    text = await card.locator("span").inner_text()
    await card.click()
    await expect(tab.own).to_have_text(text)
    await expect(tab.button("Stop")).to_be_visible()
    await expect(tab.message).to_have_value("half a thought")
    await tab.page.reload()
    await expect(tab.message).to_have_value("half a thought")
    assert [each.content for each in scripted.conversations.sent] == [text]
    assert len(replies) == 1
