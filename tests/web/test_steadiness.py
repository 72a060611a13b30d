"""Focus, dialogs, titles, choices and streams stay what they should be, whatever comes between."""

import json
import re
from typing import Any

from playwright.async_api import Browser, Route, WebSocket, expect

from chatserve.chat.conversations.outcome import title_of
from tests.api.fake_conversations import FakeChatReply
from tests.api.harness import Site
from tests.web.browser import Tab, TabMaker, asked, needs_chromium, tabs
from tests.web.test_reach import FINAL, file_of, imported
from tests.web.test_shown import until

pytestmark = needs_chromium

DARK = "rgb(22, 24, 27)"


def finished(scripted: Site, reply: FakeChatReply) -> None:
    reply.finish(data=FINAL)
    scripted.conversations.keep(reply)


async def test_preferences_count_in_all_open_tabs(reader: TabMaker) -> None:
    frames: list[dict[str, Any]] = []

    def listen(socket: WebSocket) -> None:
        socket.on("framesent", lambda payload: frames.append(json.loads(payload)))

    first = await reader.open()
    second = await reader.blank()
    second.page.on("websocket", listen)
    await second.page.clock.install(time="2030-01-01T00:00:00")
    await second.open()
    # A draft waits for a quarter of a second, which does not pass before the switch is off.
    await second.page.clock.pause_at("2030-01-01T00:30:00")
    await second.message.fill("secret")
    await first.page.bring_to_front()
    await first.button("Preferences").click()
    switch = first.page.get_by_role("switch", name=re.compile("read along"))
    await switch.press(" ")
    await expect(switch).not_to_be_checked()
    await first.page.get_by_role("radio", name="Dark").check()
    ahead = second.page.get_by_text("the server reads along")
    await expect(second.page.locator("body")).to_have_css("background-color", DARK)
    await expect(ahead).to_have_count(0)
    await second.message.press_sequentially(" too")
    await second.page.clock.run_for(2_000)
    assert not [each for each in frames if each["type"] == "draft"]
    await switch.press(" ")
    await expect(ahead).to_have_count(1)
    await second.message.press_sequentially("!")
    await second.page.clock.run_for(2_000)
    await until(second, lambda: any(each.get("text") == "secret too!" for each in frames))
    assert [each.get("text") for each in frames if each["type"] == "draft"] == ["secret too!"]


async def test_the_focus_stays_where_it_was(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.open(await imported(scripted.url, file_of("one", "uno", final=FINAL)))
    keys = tab.page.keyboard
    await tab.button("Regenerate").focus()
    await keys.press("Enter")
    await expect(tab.button("Stop")).to_be_visible()
    # The button is away while the reply runs: its message stands in for it.
    await expect(tab.page.locator(".step").nth(1)).to_be_focused()
    await asked(replies)
    replies[0].say("eins")
    finished(scripted, replies[0])
    await expect(tab.button("Regenerate")).to_be_focused()
    place = tab.page.locator(".place")
    await expect(place).to_have_text("2/2")
    await tab.button("Previous version").focus()
    await keys.press("Enter")
    await expect(place).to_have_text("1/2")
    await expect(tab.button("Next version")).to_be_focused()
    await keys.press("Enter")
    await expect(place).to_have_text("2/2")
    await expect(tab.button("Previous version")).to_be_focused()
    # With three versions it is the same button again.
    await tab.button("Regenerate").focus()
    await keys.press("Enter")
    await expect(tab.button("Stop")).to_be_visible()
    await asked(replies, 2)
    finished(scripted, replies[1])
    await expect(place).to_have_text("3/3")
    await tab.button("Previous version").focus()
    await keys.press("Enter")
    await expect(place).to_have_text("2/3")
    await expect(tab.button("Previous version")).to_be_focused()
    # A click beside everything is not undone by news.
    await tab.page.mouse.click(600, 500)
    async with scripted.client() as client:
        await client.patch(f"/api/conversations/{tab.conversation}", json={"title": "News"})
    await expect(tab.page.locator("header h1")).to_have_text("News")
    await expect(tab.button("Previous version")).not_to_be_focused()
    for key, title in (("Enter", "Mine"), ("Escape", "Mine")):
        await tab.menu(tab.rows.first, "Rename")
        await keys.type("Mine")
        await keys.press(key)
        await expect(tab.rows.first).to_be_focused()
        await expect(tab.page.locator("header h1")).to_have_text(title)


async def test_a_row_that_moves_keeps_the_focus(scripted: Site, reader: TabMaker) -> None:
    for text in ("one", "two", "three"):
        await imported(scripted.url, file_of(text) | {"title": text})
    tab = await reader.open()
    await expect(tab.rows).to_have_text(["three", "two", "one"])
    await tab.rows.last.focus()
    known = scripted.conversations.known
    known["c1"] = known.pop("c1")
    async with scripted.client() as client:
        await client.patch("/api/conversations/c1", json={"title": "on top"})
    await expect(tab.rows.first).to_have_text("on top")
    await expect(tab.rows.first).to_be_focused()


async def test_a_dialog_belongs_to_what_is_behind_it(scripted: Site, reader: TabMaker) -> None:
    first = await imported(scripted.url, file_of("one", "uno", final=FINAL))
    second = await imported(scripted.url, file_of("two", "due", final=FINAL))
    tab = await reader.open(first)
    await tab.open(second)
    await expect(tab.own).to_have_text("two")
    await tab.button("Settings of this conversation").click()
    dialog = tab.page.get_by_role("dialog")
    await dialog.get_by_label("System prompt").fill("Be brief.")
    for keys in ("Control+Shift+O", "Control+k", "Control+b"):
        await tab.page.keyboard.press(keys)
    await expect(dialog).to_be_visible()
    assert tab.conversation == second
    await expect(tab.page.get_by_label("Search conversations")).not_to_be_focused()
    await expect(tab.page.locator("nav")).to_have_count(1)
    await dialog.get_by_role("button", name="Save").click()
    await expect(dialog).to_have_count(0)
    known = scripted.conversations.known
    assert (known[first].system, known[second].system) == (None, "Be brief.")
    # The browser's own way back is not ours to switch off: the dialog goes with its conversation.
    await tab.button("Settings of this conversation").click()
    await expect(dialog).to_be_visible()
    await tab.page.go_back()
    await expect(tab.own).to_have_text("one")
    await expect(dialog).to_have_count(0)


async def test_a_branch_chosen_without_a_network_is_told_when_it_is_back(
    scripted: Site, reader: TabMaker
) -> None:
    file = file_of("one", "uno", "two")
    file["turns"][2] = {"id": "t2", "parent": "t0", "role": "assistant", "content": "eins"}
    tab = await reader.open(await imported(scripted.url, file))
    await expect(tab.replies).to_have_text("eins")
    await reader.context.set_offline(True)
    await tab.button("Previous version").click()
    await expect(tab.replies).to_have_text("uno")
    await expect(tab.page.get_by_role("alert")).to_contain_text("cannot be reached")
    # It is chosen for somebody who goes elsewhere and comes back, too.
    await tab.button("New chat").first.click()
    await expect(tab.page.get_by_text("What shall we talk about?")).to_be_visible()
    await tab.page.go_back()
    await expect(tab.replies).to_have_text("uno")
    await tab.button("New chat").first.click()
    await reader.context.set_offline(False)
    await until(tab, lambda: "uno" in shown_last(scripted))
    await tab.page.go_back()
    await expect(tab.replies).to_have_text("uno")
    await expect(tab.page.get_by_role("alert")).to_have_count(0)


def shown_last(scripted: Site) -> list[str]:
    """The last turn of each conversation's branch, as the server keeps it."""
    kept = scripted.conversations
    return [kept.turns[name][each.leaf or ""].text for name, each in kept.known.items()]


TITLES = (
    "Where do birds sleep?",
    "  \n\t\n  Hello,\t there \u200b friend\x0bsecond line",
    "A question of sixty characters and more, so that it is cut where a word of it ends",
    "x" * 80,
    "\U0001f600" * 61,
    "a" * 30 + " " + "b" * 40,
    "a" * 29 + " " + "b" * 40,
    "soft\u00adhyphen, no\u00a0break, \ufeffmark, line\u2028end",
)


async def test_a_conversation_is_named_at_once(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.open()
    for text in TITLES:
        replies.clear()
        await tab.button("New chat").first.click()
        await tab.say(text)
        await expect(tab.button("Stop")).to_be_visible()
        await until(tab, lambda: bool(replies))
        title = title_of(text.strip())
        # No reply has ended, so that no title has come from the server. Exactly, blanks and all.
        await tab.page.wait_for_function(
            """(title) => ["header h1", "nav li a"].every(
                (place) => document.querySelector(place)?.textContent.trim() === title)""",
            arg=title,
        )
        finished(scripted, replies[0])
        await expect(tab.button("Send")).to_be_visible()


async def test_other_tabs_have_the_name_too(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab, other = await reader.open(), await reader.open()
    await tab.say(TITLES[0])
    await until(tab, lambda: bool(replies))
    # The reply is under way: the server would name it at its end.
    await expect(other.rows).to_have_text([TITLES[0]])


async def test_what_is_not_there_any_more_shows_nothing_of_itself(
    scripted: Site, reader: TabMaker
) -> None:
    """No news told of it: the look after a lost network finds that out."""
    name = await imported(scripted.url, file_of("one", "uno", final=FINAL))
    tab = await reader.open(name)
    await expect(tab.own).to_have_text("one")
    del scripted.conversations.known[name]
    await tab.evaluate("() => window.dispatchEvent(new Event('online'))")
    await expect(tab.page.get_by_role("alert")).to_have_text("There is no such conversation.")
    await expect(tab.page.locator(".step")).to_have_count(0)
    await expect(tab.page.locator("header h1")).to_have_text("New chat")


async def test_nothing_can_be_done_with_what_was_deleted_elsewhere(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    name = await imported(scripted.url, file_of("one", "uno", final=FINAL))
    tab = await reader.open(name)
    await tab.button("Regenerate").click()
    await expect(tab.button("Stop")).to_be_visible()
    await asked(replies)
    finished(scripted, replies[0])
    await tab.message.fill("more")
    for button in ("Edit your message", "Regenerate", "Previous version", "Send"):
        await expect(tab.button(button)).to_be_enabled()
    async with scripted.client() as client:
        await client.delete(f"/api/conversations/{name}")
    await expect(tab.page.get_by_role("alert")).to_have_text("This conversation was deleted.")
    for button in ("Edit your message", "Regenerate", "Previous version", "Send"):
        await expect(tab.button(button)).to_be_disabled()
    await expect(tab.button("Regenerate")).to_have_attribute(
        "title", "This conversation was deleted."
    )


async def test_a_gap_in_a_reply_is_mended_and_never_shown(scripted: Site, reader: TabMaker) -> None:
    tab = await reader.open(await imported(scripted.url, file_of("one", "uno", final=FINAL)))
    asked: list[str | None] = []

    def event(kind: str, cursor: str, data: dict[str, Any]) -> str:
        head = f"id: {cursor}\n" if cursor else ""
        return f"event: {kind}\n{head}data: {json.dumps(data)}\n\n"

    accepted = event("accepted", "", {"turn": "t9", "reply": "r9"})
    done = event("done", "1-13", FINAL)

    async def broken(route: Route) -> None:
        missing = event("delta", "1-3", {"text": "abc"}) + event("delta", "1-12", {"text": "jkl"})
        await stream(route, accepted + missing)

    async def whole(route: Route) -> None:
        asked.append(route.request.headers.get("last-event-id"))
        await stream(route, accepted + event("delta", "1-12", {"text": "abcdefghijkl"}) + done)

    async def stream(route: Route, body: str) -> None:
        await route.fulfill(body=body, content_type="text/event-stream")

    await tab.page.route("**/turns", broken)
    await tab.page.route("**/api/replies/**", whole)
    await tab.evaluate(
        """() => {
          window.seen = new Set();
          new MutationObserver(() => window.seen.add(
            [...document.querySelectorAll(".step.assistant .prose")].at(-1)?.textContent.trim()))
            .observe(document.body, { subtree: true, childList: true, characterData: true });
        }"""
    )
    await tab.say("two")
    await expect(tab.replies.last).to_have_text("abcdefghijkl")
    assert asked == [None]
    assert "abcjkl" not in await tab.evaluate("() => [...window.seen]")


async def test_a_stream_that_falls_silent_is_opened_anew(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    name = await imported(scripted.url, file_of("one", "uno", final=FINAL))
    tab = await reader.blank()
    await tab.page.clock.install()
    await tab.open(name)
    await tab.say("two")
    await asked(replies)
    (reply,) = replies
    reply.say("first ")
    await expect(tab.replies.last).to_have_text("first")
    opened: list[str] = []
    tab.page.on("request", lambda request: opened.append(request.url))

    def again() -> int:
        return sum("/events" in url for url in opened)

    # The server says something every 15 s; what passes here are the page's seconds alone.
    await tab.page.clock.fast_forward(35_000)
    reply.say("second ")
    await expect(tab.replies.last).to_have_text("first second")
    await tab.page.clock.fast_forward(35_000)
    reply.say("third ")
    await expect(tab.replies.last).to_have_text("first second third")
    assert again() == 0, "whoever is heard is not left"
    async with tab.page.expect_request("**/events"):
        await tab.page.clock.fast_forward(45_000)
        await tab.page.clock.run_for(11_000)
    reply.say("last")
    finished(scripted, reply)
    await expect(tab.replies.last).to_have_text("first second third last")
    assert again() == 1


COMPOSED = """(node, key) => {
  const event = new KeyboardEvent("keydown",
    { key, isComposing: true, bubbles: true, cancelable: true });
  return node.dispatchEvent(event);
}"""


async def test_enter_belongs_to_the_input_method_while_it_composes(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.open(await imported(scripted.url, file_of("one", "uno", final=FINAL)))
    await tab.message.fill("にほん")
    await tab.button("Edit your message").click()
    editor = tab.page.get_by_role("textbox", name="Edit your message")
    await editor.fill("ひと")
    for field in (editor, tab.message):
        assert await field.evaluate(COMPOSED, "Enter"), "the page took it"
    await expect(tab.message).to_have_value("にほん")
    await expect(editor).to_have_value("ひと")
    assert scripted.conversations.sent == []
    await tab.message.press("Enter")
    await expect(tab.button("Stop")).to_be_visible()
    assert [each.content for each in scripted.conversations.sent] == ["にほん"]
    await asked(replies)
    # Escape takes back what is composed, and not the reply.
    await tab.message.fill("もじ")
    assert await tab.message.evaluate(COMPOSED, "Escape")
    replies[0].say("due")
    await expect(tab.replies.last).to_have_text("due")
    await expect(tab.button("Stop")).to_be_enabled()
    assert scripted.conversations.stopping == 0
    finished(scripted, replies[0])
    await tab.menu(tab.rows.first, "Rename")
    title = tab.page.get_by_label("Title", exact=True)
    await title.fill("ひと")
    assert await title.evaluate(COMPOSED, "Enter")
    await expect(title).to_be_focused()


async def test_copying_where_the_browser_gives_no_clipboard(
    browser: Browser, scripted: Site
) -> None:
    """Plain http from another machine."""
    name = await imported(scripted.url, file_of("one", "uno **due**", final=FINAL))
    async with tabs(browser, "http://chat.example") as reader:

        async def forward(route: Route) -> None:
            url = route.request.url.replace(reader.url, scripted.url)
            await route.fulfill(response=await route.fetch(url=url))

        await reader.context.route("http://chat.example/**", forward)
        tab = await reader.open(name)
        assert await tab.evaluate("() => [isSecureContext, typeof navigator.clipboard]") == [
            False,
            "undefined",
        ]
        await copied(tab, "Copy the reply", "uno **due**")
        await copied(tab, "Copy your message", "one")


async def copied(tab: Tab, button: str, text: str) -> None:
    await tab.button(button).focus()
    await tab.page.keyboard.press("Enter")
    await expect(tab.page.get_by_role("status")).to_have_text("Copied.")
    await expect(tab.button(button)).to_be_focused()
    await tab.message.fill("")
    await tab.message.press("Control+v")
    await expect(tab.message).to_have_value(text)


async def test_a_turn_whose_news_comes_before_its_acknowledgement_is_shown_once(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    """Whoever saves settings asks for the conversation first, while a reply runs too."""
    name = await imported(scripted.url, file_of("one", "uno", final=FINAL))
    tab = await reader.open(name)
    await tab.page.route("**/turns", lambda route: route.abort())
    await tab.say("two")
    await expect(tab.page.get_by_text("Trying again…")).to_be_visible()
    await tab.page.unroute("**/turns")

    async def send(route: Route) -> None:
        await route.fulfill(response=await route.fetch())  # when the reply has ended

    await tab.page.route("**/turns", send)
    await tab.page.reload()
    await until(tab, lambda: bool(replies))
    async with scripted.client() as client:
        await client.patch(f"/api/conversations/{name}", json={"title": "Taken"})
    await tab.button("Settings of this conversation").click()
    dialog = tab.page.get_by_role("dialog")
    await dialog.get_by_label("Top k").fill("7")
    await dialog.get_by_role("button", name="Save").click()
    await expect(dialog).to_have_count(0)
    await expect(tab.page.locator("header h1")).to_have_text("Taken")
    await expect(tab.own).to_have_text(["one", "two"])
    replies[0].say("due")
    finished(scripted, replies[0])
    await expect(tab.replies).to_have_text(["uno", "due"])
    await expect(tab.own).to_have_text(["one", "two"])
