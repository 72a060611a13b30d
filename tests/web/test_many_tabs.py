"""A reply that several tabs look at: each sees all of it, and keeps none from the server."""

import asyncio
import json
from typing import Any

from playwright.async_api import Request, WebSocket, expect

from tests.api.fake_conversations import FakeChatReply
from tests.api.harness import Site, until
from tests.web.browser import WITHOUT_SOCKETS, Tab, TabMaker, asked, needs_chromium
from tests.web.test_reach import FINAL, file_of, imported

pytestmark = needs_chromium

TABS = 7  # a browser has six connections to a server for all of them
SOON_MS = 5_000  # a request that has to wait for a free connection waits for the reply's end


def frames_of(tab: Tab) -> list[dict[str, Any]]:
    """What it says through its socket, as it comes."""
    said: list[dict[str, Any]] = []

    def listen(socket: WebSocket) -> None:
        socket.on("framesent", lambda payload: said.append(json.loads(payload)))

    tab.page.on("websocket", listen)
    return said


def requests_of(tab: Tab, part: str) -> list[str]:
    """The requests for a reply by HTTP, as they come."""
    asked: list[str] = []

    def note(request: Request) -> None:
        if part in request.url:
            asked.append(f"{request.method} {request.url}")

    tab.page.on("request", note)
    return asked


async def begun(reader: TabMaker, tab: Tab, replies: list[FakeChatReply]) -> FakeChatReply:
    """A question in a conversation of some turns, and the beginning of its answer."""
    await tab.open(await imported(reader.url, file_of("one", "uno", final=FINAL)))
    await tab.say("two")
    await expect(tab.button("Stop")).to_be_visible()
    await asked(replies)
    replies[0].say("due")
    await expect(tab.replies.last).to_have_text("due")
    return replies[0]


async def test_the_last_of_seven_tabs_stops_what_all_look_at(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    first = await reader.blank()
    reply = await begun(reader, first, replies)
    watchers = [await reader.blank() for _ in range(TABS - 1)]
    by_http = [requests_of(tab, "/api/replies/") for tab in watchers]
    for tab in watchers:
        await tab.open(first.conversation)
        await expect(tab.replies.last).to_have_text("due")
    reply.say(" e tre")
    for tab in watchers:
        await expect(tab.replies.last).to_have_text("due e tre")
    await watchers[-1].button("Stop").click()
    for tab in (*watchers, first):
        await expect(tab.button("Send")).to_be_visible(timeout=SOON_MS)
        await expect(tab.receipts).to_have_count(2)
    # One that has heard nothing for two seconds, on a machine that stood still, asks by HTTP.
    assert sum(map(bool, by_http)) <= 2
    assert scripted.conversations.stopping == 1
    await until(lambda: reply.viewers == 0)


async def test_a_tab_out_of_sight_lets_its_connection_go(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.blank()
    said = frames_of(tab)
    reply = await begun(reader, tab, replies)
    assert "attach" not in [each["type"] for each in said], "who looks at his own waits for it"
    await tab.evaluate(
        """() => {
          Object.defineProperty(document, "hidden", { get: () => true });
          document.dispatchEvent(new Event("visibilitychange"));
        }"""
    )
    await until(lambda: reply.viewed == 2 and reply.viewers == 1)
    (attached,) = (each for each in said if each["type"] == "attach")
    assert (attached["reply"], attached["after"]) == (reply.id, "1-3")
    reply.say(" e tre")
    await expect(tab.replies.last).to_have_text("due e tre")
    reply.finish(data=FINAL)
    scripted.conversations.keep(reply)
    await expect(tab.receipts).to_have_count(2)


async def test_a_reply_that_is_left_running_lets_its_connection_go(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.blank()
    said = frames_of(tab)
    reply = await begun(reader, tab, replies)
    await tab.button("New chat").first.click()
    await until(lambda: any(each["type"] == "attach" for each in said))
    reply.say(" e tre")
    reply.finish(data=FINAL)
    scripted.conversations.keep(reply)
    await expect(tab.page.locator("nav .running")).to_have_count(0)
    await tab.page.go_back()
    await expect(tab.replies.last).to_have_text("due e tre")


async def test_a_watcher_whose_socket_is_lost_goes_on_by_itself(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    first, second = await reader.blank(), await reader.blank()
    reply = await begun(reader, first, replies)
    said, by_http = frames_of(second), requests_of(second, "/events")
    await second.open(first.conversation)
    await expect(second.replies.last).to_have_text("due")
    assert [each["type"] for each in said if "reply" in each] == ["attach"]
    scripted.conversations.break_changes(RuntimeError("for the sockets"))
    await until(lambda: bool(by_http))
    reply.say(" e tre")
    await expect(second.replies.last).to_have_text("due e tre")
    # It comes back to the socket, and so its connection is free again.
    await until(lambda: [each["type"] for each in said if "reply" in each] == ["attach"] * 2)
    reply.say(" e quattro")
    await expect(second.replies.last).to_have_text("due e tre e quattro")
    reply.finish(data=FINAL)
    scripted.conversations.keep(reply)
    await expect(second.receipts).to_have_count(2)


async def test_a_stop_where_sockets_are_blocked(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    await reader.context.add_init_script(WITHOUT_SOCKETS)
    tab = await reader.blank()
    by_http = requests_of(tab, "/api/replies/")
    reply = await begun(reader, tab, replies)
    await tab.button("Stop").click()
    await expect(tab.receipts).to_have_count(2)
    assert by_http == [f"DELETE {reader.url}/api/replies/{reply.id}"]


async def test_a_stop_that_the_socket_has_lost_is_said_again(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.blank()
    said, by_http = frames_of(tab), requests_of(tab, "/api/replies/")
    await begun(reader, tab, replies)
    scripted.conversations.stop_hold = hold = asyncio.Event()
    await tab.button("Stop").click()
    await until(lambda: any(each["type"] == "stop" for each in said))
    await until(lambda: scripted.conversations.stopping == 1)
    assert by_http == []
    scripted.conversations.break_changes(RuntimeError("for the sockets"))
    await until(lambda: scripted.conversations.stopping == 2)
    hold.set()
    await expect(tab.receipts).to_have_count(2)


async def test_a_stop_before_the_message_is_acknowledged(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.open(await imported(reader.url, file_of("one", "uno", final=FINAL)))
    scripted.conversations.hold = hold = asyncio.Event()
    await tab.say("two")
    await asyncio.wait_for(scripted.conversations.arrived.wait(), 20)
    await tab.button("Stop").click()
    await expect(tab.page.get_by_text("Stopping…")).to_be_visible()
    assert scripted.conversations.stopping == 0
    hold.set()
    await expect(tab.receipts).to_have_count(2)
    assert scripted.conversations.stopping == 1
    await asked(replies)
    assert replies[0].final is not None
