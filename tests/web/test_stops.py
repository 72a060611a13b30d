"""Stop is kept: before the server has the turn, while it is away, until it has heard of it."""

import asyncio
from typing import Any

from playwright.async_api import Route, expect

from tests.api.fake_conversations import FakeChatReply
from tests.api.harness import Site, until
from tests.web.browser import WITHOUT_SOCKETS, Tab, TabMaker, asked, needs_chromium
from tests.web.test_many_tabs import begun
from tests.web.test_reach import FINAL, file_of, imported
from tests.web.test_words_kept import problems, refused

pytestmark = needs_chromium


class Lost:
    """Requests for a turn that wait, and are lost, or their answers are."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.arrived, self.go = asyncio.Event(), asyncio.Event()

    async def lose(self, route: Route) -> None:
        self.bodies.append(route.request.post_data_json)
        self.arrived.set()
        await self.go.wait()
        await route.abort()


async def stopped_on_its_way(tab: Tab, turns: Lost) -> None:
    """Say something, and stop it while its request is under way; then the network goes."""
    await tab.page.route("**/turns", turns.lose)
    await tab.say("two")
    await asyncio.wait_for(turns.arrived.wait(), 20)
    await tab.button("Stop").click()
    await expect(tab.page.get_by_text("Stopping…")).to_be_visible()


async def test_a_stop_on_the_way_ends_the_tries_when_the_network_goes(
    scripted: Site, reader: TabMaker
) -> None:
    tab = await reader.open(await imported(reader.url, file_of("one", "uno", final=FINAL)))
    turns = Lost()
    await stopped_on_its_way(tab, turns)
    turns.go.set()
    await expect(problems(tab)).to_contain_text("Not sent.")
    await expect(tab.button("Stop")).to_have_count(0)
    assert len(turns.bodies) == 1
    await tab.page.unroute("**/turns")
    await problems(tab).get_by_role("button", name="Edit").click()
    await expect(tab.message).to_have_value("two")
    assert scripted.conversations.sent == []


async def test_a_stop_waits_a_little_for_a_server_that_says_nothing(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    name = await imported(reader.url, file_of("one", "uno", final=FINAL))
    tab = await reader.blank()
    await tab.page.clock.install()
    await tab.open(name)
    arrived = asyncio.Event()
    await tab.page.route("**/turns", lambda _: arrived.set())  # and no answer
    await tab.say("two")
    await asyncio.wait_for(arrived.wait(), 20)
    await tab.button("Stop").click()
    await tab.page.clock.fast_forward(2_000)
    await expect(tab.page.get_by_text("Stopping…")).to_be_visible()
    await tab.page.clock.fast_forward(3_000)
    await expect(problems(tab)).to_contain_text("Not sent.")
    await tab.page.unroute("**/turns")
    await problems(tab).get_by_role("button", name="Try again").click()
    await asked(replies)
    assert [each.content for each in scripted.conversations.sent] == ["two"]


async def test_a_message_that_was_taken_back_and_had_arrived_is_stopped(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.open(await imported(reader.url, file_of("one", "uno", final=FINAL)))
    turns = Lost()
    await stopped_on_its_way(tab, turns)
    url = f"/api/conversations/{tab.conversation}/turns"
    async with scripted.client() as client, client.stream("POST", url, json=turns.bodies[0]):
        await asked(replies)
    turns.go.set()
    await until(lambda: scripted.conversations.stopping > 0)
    await expect(tab.receipts).to_have_count(2)
    await expect(tab.own).to_have_text(["one", "two"])
    await expect(problems(tab)).to_have_count(0)
    assert len(turns.bodies) == 1
    await tab.page.reload()
    await expect(tab.own).to_have_text(["one", "two"])


async def test_a_stop_while_the_server_is_away_is_asked_for_again(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    await reader.context.add_init_script(WITHOUT_SOCKETS)
    tab = await reader.blank()
    await begun(reader, tab, replies)
    tries: list[str] = []

    async def lose(route: Route) -> None:
        tries.append(route.request.method)
        if len(tries) < 3:
            await route.abort()
        else:
            await route.continue_()

    await tab.page.route("**/api/replies/*", lose)
    await tab.button("Stop").click()
    await expect(tab.receipts).to_have_count(2)
    assert tries == ["DELETE"] * 3
    assert scripted.conversations.stopping == 1


async def test_a_stop_waits_as_it_is_told_and_ends_with_the_reply(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    await reader.context.add_init_script(WITHOUT_SOCKETS)
    tab = await reader.blank()
    await tab.page.clock.install()
    reply = await begun(reader, tab, replies)
    tries: list[str] = []

    async def refuse(route: Route) -> None:
        tries.append(route.request.method)
        await route.fulfill(**refused(503, "Not now."), headers={"Retry-After": "30"})

    await tab.page.route("**/api/replies/*", refuse)
    await tab.button("Stop").click()
    await until(lambda: len(tries) == 1)
    # The answer is here once one that was asked for after it is.
    await tab.evaluate("() => fetch('/api/session').then(() => undefined)")
    await tab.page.clock.fast_forward(28_000)
    await tab.evaluate("() => fetch('/api/session').then(() => undefined)")
    assert len(tries) == 1
    await tab.page.clock.fast_forward(3_000)
    await until(lambda: len(tries) == 2)
    # It ends by itself.
    reply.finish(data=FINAL)
    scripted.conversations.keep(reply)
    await expect(tab.receipts).to_have_count(2)
    await tab.evaluate("() => fetch('/api/session').then(() => undefined)")
    assert len(tries) == 2
    assert scripted.conversations.stopping == 0
