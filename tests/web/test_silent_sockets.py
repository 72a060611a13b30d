"""A socket that is open and passes nothing, or not everything: replies and Stop go by HTTP."""

import json

from playwright.async_api import WebSocketRoute, expect

from tests.api.fake_conversations import FakeChatReply
from tests.api.harness import Site, until
from tests.web.browser import TabMaker, needs_chromium
from tests.web.test_many_tabs import SOON_MS, begun, requests_of
from tests.web.test_reach import FINAL

pytestmark = needs_chromium


class Line:
    """What is between the sockets of a context and the server. `mute`: it passes nothing, without
    a word. `refusing`: attachments are answered with a refusal. `late`: what comes before the
    answer to an attachment, as if it had been on its way from an older one."""

    def __init__(self) -> None:
        self.sockets: list[WebSocketRoute] = []
        self.said: list[str] = []  # by the tabs
        self.mute = False
        self.refusing = False
        self.late: dict[str, str] | None = None

    async def lie_before(self, reader: TabMaker) -> "Line":
        await reader.context.route_web_socket("**/api/socket", self._open)
        return self

    def _open(self, socket: WebSocketRoute) -> None:
        self.sockets.append(socket)
        if self.mute:
            return
        server = socket.connect_to_server()

        def say(text: str | bytes) -> None:
            frame = json.loads(text)
            self.said.append(frame["type"])
            if frame["type"] == "attach" and self.refusing:
                told = {"event": "failed", "message": "Too many.", "request": frame["request"]}
                socket.send(json.dumps(told))
                return
            if frame["type"] == "attach" and self.late is not None:
                socket.send(json.dumps(self.late | {"reply": frame["reply"]}))
            if not self.mute:
                server.send(text)

        def hear(text: str | bytes) -> None:
            if not self.mute:
                socket.send(text)

        socket.on_message(say)
        server.on_message(hear)


async def test_a_socket_that_never_passes_anything_is_not_waited_for(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    line = await Line().lie_before(reader)
    line.mute = True
    tab = await reader.blank()
    reply = await begun(reader, tab, replies)
    await tab.page.reload()
    await expect(tab.replies.last).to_have_text("due", timeout=SOON_MS)
    # Neither does another one that merely opens, nor a look elsewhere and back.
    count = len(line.sockets)
    await line.sockets[-1].close(code=1001)
    await until(lambda: len(line.sockets) > count)
    await tab.evaluate("() => document.dispatchEvent(new Event('visibilitychange'))")
    viewed = reply.viewed
    reply.say(" e tre")
    await expect(tab.replies.last).to_have_text("due e tre", timeout=SOON_MS)
    assert reply.viewed == viewed
    await tab.button("Stop").click()
    await expect(tab.receipts).to_have_count(2, timeout=SOON_MS)
    assert scripted.conversations.stopping == 1


async def test_a_watcher_whose_line_dies_without_a_word_goes_on(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    first, second = await reader.blank(), await reader.blank()
    reply = await begun(reader, first, replies)
    line = await Line().lie_before(reader)
    by_http = requests_of(second, "/events")
    await second.page.clock.install()
    await second.open(first.conversation)
    await expect(second.replies.last).to_have_text("due")
    assert by_http == []
    assert line.said.count("attach") == 1
    line.mute = True
    pings = line.said.count("ping")
    await second.page.clock.fast_forward(2_000)
    await until(lambda: line.said.count("ping") > pings)
    await second.page.clock.fast_forward(2_000)
    await until(lambda: bool(by_http))
    reply.say(" e tre")
    await expect(second.replies.last).to_have_text("due e tre", timeout=SOON_MS)
    # A line that passes something again has it back.
    line.mute = False
    await line.sockets[-1].close(code=1001)
    await until(lambda: line.said.count("attach") == 2)
    reply.say(" e quattro")
    reply.finish(data=FINAL)
    scripted.conversations.keep(reply)
    await expect(second.replies.last).to_have_text("due e tre e quattro")
    assert len(by_http) == 1


async def test_a_stop_into_a_line_that_has_died_goes_by_http(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    line = await Line().lie_before(reader)
    tab = await reader.blank()
    await tab.page.clock.install()
    await begun(reader, tab, replies)
    await expect(tab.rows.first).to_be_visible()
    async with scripted.client() as client:
        await client.patch(f"/api/conversations/{tab.conversation}", json={"title": "Heard"})
    await expect(tab.rows.first).to_contain_text("Heard")  # so the socket passes
    line.mute = True
    now = await tab.evaluate("() => Date.now()")
    await tab.page.clock.pause_at(now / 1000 + 10)
    await tab.button("Stop").click()
    await until(lambda: "stop" in line.said)
    assert scripted.conversations.stopping == 0
    await tab.page.clock.fast_forward(2_000)
    await until(lambda: scripted.conversations.stopping == 1)
    await tab.page.clock.resume()
    await expect(tab.receipts).to_have_count(2)


async def test_what_the_socket_refuses_comes_by_http(
    reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    line = await Line().lie_before(reader)
    line.refusing = True
    first, second = await reader.blank(), await reader.blank()
    reply = await begun(reader, first, replies)
    await second.open(first.conversation)
    await until(lambda: reply.viewers == 2)
    reply.say(" e tre")
    await expect(second.replies.last).to_have_text("due e tre")
    assert line.said.count("attach") == 1


async def test_what_an_older_look_still_says_is_not_taken_for_the_newer_ones(
    reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    line = await Line().lie_before(reader)
    line.late = {"event": "delta", "id": "1-9", "text": " e nove"}
    first, second = await reader.blank(), await reader.blank()
    by_http = requests_of(second, "/events")
    reply = await begun(reader, first, replies)
    await second.open(first.conversation)
    await until(lambda: reply.viewers == 2)
    reply.say(" e tre")
    await expect(second.replies.last).to_have_text("due e tre")
    assert by_http == []
    assert line.said.count("attach") == 1
