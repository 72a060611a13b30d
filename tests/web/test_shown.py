"""What the page makes of what a server says: places in a queue, receipts, cuts, faults, keys."""

import asyncio
import re
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import orjson
import pytest
import pytest_asyncio
from playwright.async_api import Browser, WebSocket, expect

from chatserve.api.keys import key_ring
from chatserve.chat.conversations.reply_events import ReplyProgress
from chatserve.errors import Busy
from tests.api.fake_conversations import DONE, FakeChatReply
from tests.api.harness import Site, site
from tests.web.browser import Tab, TabMaker, arrived, asked, needs_chromium, tabs

pytestmark = needs_chromium

KEY = "a-key-0123456789"
FINAL: dict[str, Any] = {
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 12_345, "completion_tokens": 101, "total_tokens": 12_446},
    "receipt": {
        "device": 10_000,
        "host": 1_000,
        "disk": 345,
        "computed": 1_000,
        "saved": 3.25,
        "miss": {"position": 11_345, "reason": "evicted"},
        "left_out": 0,
    },
    "timings": {"to_first_token": 0.5, "total": 4.5},
}


def finished(scripted: Site, reply: FakeChatReply, final: dict[str, Any]) -> None:
    reply.finish(data=final)
    scripted.conversations.keep(reply)


async def test_the_queue_and_the_prompt_are_shown_until_the_first_word(
    scripted: Site, reader: TabMaker
) -> None:
    progress = ReplyProgress(queued=2, prompt_tokens=0, computed=0)
    asked: list[FakeChatReply] = []

    def queue(reply: FakeChatReply) -> None:
        reply.progress = [progress]
        asked.append(reply)

    scripted.conversations.on_send = queue
    tab = await reader.open()
    await tab.say("go")
    await expect(tab.page.get_by_text("2 requests are ahead")).to_be_visible()
    (reply,) = asked
    # The same as a viewer who comes back sees it: further on.
    reply.progress = [ReplyProgress(queued=0, prompt_tokens=8_000, computed=2_000)]
    await tab.page.reload()
    await expect(tab.page.get_by_text("Reading 2,000 of 8,000 tokens")).to_be_visible()
    bar = tab.page.get_by_role("progressbar", name="Prompt read")
    assert await bar.get_attribute("value") == "0.25"
    reply.say("first")
    await expect(tab.replies).to_have_text("first")
    await expect(bar).to_have_count(0)
    finished(scripted, reply, FINAL)
    await expect(tab.receipts).to_have_count(1)


async def test_a_receipt_in_numbers(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.open()
    await tab.say("go")
    await expect(tab.button("Stop")).to_be_visible()
    await asked(replies)
    replies[0].say("all of it")
    finished(scripted, replies[0], FINAL)
    figures = tab.page.locator(".figures")
    await expect(figures).to_contain_text("91 % reused")
    await expect(figures).to_contain_text("3.25 s saved")
    await expect(figures).to_contain_text("25 tokens/s")
    await expect(figures).to_contain_text("0.50 s to first token")
    widths = await tab.page.locator(".bar > span").evaluate_all(
        "(parts) => parts.map((each) => [each.className.split(' ')[0],"
        " each.getBoundingClientRect().width])"
    )
    assert [name for name, _ in widths] == ["device", "host", "disk", "computed"]
    assert widths[0][1] > 5 * widths[1][1] > 5 * widths[2][1]
    await tab.receipts.hover()
    details = tab.page.get_by_role("tooltip")
    for text in (
        "12,345 prompt tokens",
        "10,000",
        "brought up from host memory",
        "345",
        "From token 11,345 on it had been evicted.",
        "101 tokens in 4.50 s",
    ):
        await expect(details).to_contain_text(text)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0004, "0.4 ms"),
        (0.0043, "4.3 ms"),
        (0.00994, "9.9 ms"),
        (0.0123, "12 ms"),
        (0.0994, "99 ms"),
        (0.0996, "0.10 s"),
        (9.99, "9.99 s"),
        (12.34, "12.3 s"),
        (119.7, "2 min 0 s"),
    ],
)
async def test_times_to_three_digits_at_the_most(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply], value: float, shown: str
) -> None:
    """A step of 12 ms is no hundredth of a second."""
    tab = await reader.open()
    await tab.say("go")
    await expect(tab.button("Stop")).to_be_visible()
    timings = {"to_first_token": value, "total": value + 1.0}
    await asked(replies)
    finished(scripted, replies[0], FINAL | {"timings": timings})
    await expect(tab.page.locator(".figures")).to_contain_text(f" {shown} to first token")


async def test_a_receipt_is_seen_whole(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    """Messages that are far away are not painted, nor what hangs out of them: not so this one."""
    tab = await reader.open()
    for number in range(8):
        await tab.say("go")
        await expect(tab.button("Stop")).to_be_visible()
        await asked(replies, number + 1)
        replies[number].say("short")
        finished(scripted, replies[number], FINAL)
        await expect(tab.receipts).to_have_count(number + 1)
    await tab.receipts.nth(2).hover()
    details = tab.page.get_by_role("tooltip")
    await expect(details).to_be_visible()
    top = await details.evaluate(
        """(node) => {
          const box = node.getBoundingClientRect();
          const shown = document.elementFromPoint(box.x + box.width / 2, box.y + 6);
          return node.contains(shown);
        }"""
    )
    assert top, "its upper edge is cut off"


async def test_only_the_last_block_is_drawn_anew(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.open()
    await tab.say("go")
    await expect(tab.button("Stop")).to_be_visible()
    await asked(replies)
    (reply,) = replies
    reply.say("# One\n\nTwo **bold\n\n```py\nx = 1\n```\n\n- a\n- b\n\nlast")
    await expect(tab.replies).to_contain_text("last")
    count = await tab.evaluate(
        """() => {
          const blocks = [...document.querySelectorAll(".step.assistant .prose > *")];
          blocks.forEach((each, place) => { each.firstElementChild.place = place; });
          return blocks.length;
        }"""
    )
    assert count == 4, "a list may go on, so it is drawn with what comes after it"
    reply.say(" words, and `more")
    await expect(tab.replies.locator("code").last).to_have_text("more")
    marked = await tab.evaluate(
        """() => [...document.querySelectorAll(".step.assistant .prose > *")]
          .map((each) => each.firstElementChild.place ?? null)"""
    )
    assert marked == [0, 1, 2, None]
    finished(scripted, reply, FINAL)
    await expect(tab.receipts).to_have_count(1)


async def test_where_the_context_was_cut(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.open()
    for number in range(3):
        await tab.say(f"question {number}")
        await asked(replies, number + 1)
        replies[-1].say(f"answer {number}")
        cut = 2 if number == 2 else 0
        finished(scripted, replies[-1], FINAL | {"receipt": FINAL["receipt"] | {"left_out": cut}})
        await expect(tab.receipts).to_have_count(number + 1)
        assert await tab.page.locator(".cut").count() == (number == 2)
    order = await tab.page.locator("ol > li").all_inner_texts()
    place = next(at for at, text in enumerate(order) if "no longer sees" in text)
    assert "answer 0" in order[place - 1]
    assert "question 1" in order[place + 1]


async def test_a_failed_reply_says_why_and_can_be_tried_again(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.open()
    await tab.say("go")
    await expect(tab.button("Stop")).to_be_visible()
    await asked(replies)
    replies[0].say("half an ans")
    replies[0].finish(
        "failed", {"code": "step_fault", "message": "A step failed.", "retry_after": None}
    )
    problem = tab.page.get_by_role("alert")
    await expect(problem).to_contain_text("A step failed.")
    await expect(tab.replies).to_have_text("half an ans")
    await problem.get_by_role("button", name="Try again").click()
    await expect(tab.button("Stop")).to_be_visible()
    await asked(replies, 2)
    assert scripted.conversations.sent[1].content is None
    assert scripted.conversations.sent[1].parent == replies[0].turn
    replies[1].say("a whole answer")
    finished(scripted, replies[1], FINAL)
    await expect(tab.replies).to_have_text("a whole answer")
    await expect(problem).to_have_count(0)


async def test_a_full_server_keeps_nothing_and_can_be_asked_again(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.open()
    await tab.say("one")
    await expect(tab.button("Stop")).to_be_visible()
    await asked(replies)
    replies[0].say("fine")
    finished(scripted, replies[0], FINAL)
    await expect(tab.receipts).to_have_count(1)
    scripted.conversations.refusal = Busy("The queue is full.", retry_after=1.0)
    await tab.say("two")
    problem = tab.page.get_by_role("alert")
    await expect(problem).to_contain_text("The queue is full.")
    await expect(tab.own.last).to_have_text("two")
    scripted.conversations.refusal = None
    await problem.get_by_role("button", name="Try again").click()
    await expect(tab.button("Stop")).to_be_visible()
    await asked(replies, 2)
    # The same id: whatever became of the first try, it is one turn.
    assert {each.ask for each in scripted.conversations.sent[1:]} == {
        scripted.conversations.sent[1].ask
    }
    replies[1].say("fine too")
    finished(scripted, replies[1], FINAL)
    await expect(tab.receipts).to_have_count(2)


async def test_after_a_message_without_an_answer_one_can_go_on(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.open()
    await tab.say("too long")
    await expect(tab.button("Stop")).to_be_visible()
    await asked(replies)
    replies[0].finish(
        "failed", {"code": "too_long", "message": "It does not fit.", "retry_after": 0}
    )
    await expect(tab.page.get_by_role("alert")).to_contain_text("It does not fit.")
    await tab.say("shorter")
    assert (await arrived(scripted.conversations, "shorter")).parent is None
    await expect(tab.own).to_have_text(["shorter"])
    await expect(tab.page.locator(".place")).to_have_text("2/2")
    await asked(replies, 2)
    finished(scripted, replies[1], FINAL)
    await expect(tab.button("Send")).to_be_visible()


async def test_text_that_a_crash_lost_is_replaced(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.open()
    await tab.say("go")
    await expect(tab.button("Stop")).to_be_visible()
    await asked(replies)
    (reply,) = replies
    reply.say("one two three \U0001f600 lost")
    await expect(tab.replies).to_contain_text("lost")
    reply.go_away()
    await expect(tab.page.get_by_text("Trying again…")).to_be_visible()
    reply.crash(4)
    reply.going_away = False
    reply.say("\U0001f600 said otherwise")
    await expect(tab.replies).to_have_text("one \U0001f600 said otherwise")
    reply.say(", and on")
    finished(scripted, reply, FINAL)
    await expect(tab.replies).to_have_text("one \U0001f600 said otherwise, and on")


async def test_reasoning_is_folded(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.open()
    await tab.say("go")
    await expect(tab.button("Stop")).to_be_visible()
    await asked(replies)
    replies[0].say("<thi")
    replies[0].say("nk>Let me see.")
    await expect(tab.page.locator("summary")).to_have_text("Reasoning…")
    await expect(tab.page.get_by_text("Let me see.", exact=True)).to_be_hidden()
    replies[0].say("</think>\n\nYes.")
    finished(scripted, replies[0], FINAL)
    await expect(tab.replies).to_have_text("Yes.")
    await tab.page.locator("summary").click()
    await expect(tab.page.get_by_text("Let me see.", exact=True)).to_be_visible()


@pytest_asyncio.fixture(loop_scope="module")
async def locked() -> AsyncGenerator[Site]:
    async with site(keys=key_ring(api_key=KEY)) as running_site:
        yield running_site


async def test_signing_in_exchanges_the_key_for_a_cookie(browser: Browser, locked: Site) -> None:

    def answer(reply: FakeChatReply) -> None:
        reply.say("hello")
        finished(locked, reply, DONE)

    locked.conversations.on_send = answer
    async with tabs(browser, locked.url) as user:
        tab = await user.blank()
        page = tab.page
        await page.goto(locked.url)
        door = page.get_by_role("dialog")
        await expect(door).to_be_visible()
        await expect(door.get_by_label("API key")).to_be_focused()
        await page.keyboard.press("Escape")
        await expect(door).to_be_visible()
        await door.get_by_label("API key").fill("wrong-key")
        await door.get_by_role("button", name="Sign in").click()
        await expect(door.get_by_role("alert")).to_have_text("The API key is wrong.")
        await door.get_by_label("API key").fill(KEY)
        await door.get_by_label("API key").press("Enter")
        await expect(door).to_be_hidden()
        await tab.say("hello")
        await expect(tab.replies).to_have_text("hello")
        cookies = await user.context.cookies()
        assert [(each.get("httpOnly"), each.get("sameSite")) for each in cookies] == [
            (True, "Strict")
        ]
        kept = await tab.evaluate(
            "() => document.cookie + JSON.stringify([{ ...localStorage }, { ...sessionStorage }])"
        )
        assert KEY not in kept
        await page.reload()
        await expect(page.get_by_text("tiny/model").first).to_be_visible()
        await expect(door).to_be_hidden()
        await tab.button("Sign out").click()
        await expect(door).to_be_visible()
        await expect(tab.rows).to_have_count(0)


async def test_what_is_typed_goes_ahead_only_if_one_likes(reader: TabMaker, scripted: Site) -> None:
    frames: list[dict[str, Any]] = []

    def listen(socket: WebSocket) -> None:
        socket.on("framesent", lambda payload: frames.append(orjson.loads(payload)))

    tab = await reader.blank()
    tab.page.on("websocket", listen)
    await tab.open()
    await until(tab, lambda: any(each["type"] == "focus" for each in frames))
    await tab.message.press_sequentially("Hello there")
    await until(tab, lambda: any(each.get("text") == "Hello there" for each in frames))
    assert {each["type"] for each in frames} <= {"focus", "draft", "ping"}
    frames.clear()
    await tab.button("Preferences").click()
    switch = tab.page.get_by_role("switch", name=re.compile("read along"))
    await switch.uncheck()
    await tab.page.keyboard.press("Escape")
    await tab.message.press_sequentially(", secret")
    await tab.page.reload()
    await expect(tab.message).to_have_value("Hello there, secret")
    await tab.message.press_sequentially("!")
    await until(tab, lambda: any(each["type"] == "focus" for each in frames))
    # A draft would have gone out in a quarter of a second; a frame of another kind is the later.
    await tab.evaluate("() => new Promise((go) => setTimeout(go, 300))")
    assert not [each for each in frames if each["type"] == "draft"]
    assert scripted.conversations.sent == []


async def until(tab: Tab, condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await tab.evaluate("() => new Promise(requestAnimationFrame)")


async def test_a_title_without_a_reload(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    async with scripted.client() as client:
        made = await client.post("/api/conversations", json={})
    tab = await reader.open(made.json()["id"])
    await tab.say("go")
    await expect(tab.button("Stop")).to_be_visible()
    known = scripted.conversations.known
    known[tab.conversation] = replace(known[tab.conversation], title="Found by itself")
    await asked(replies)
    finished(scripted, replies[0], FINAL)
    await expect(tab.page.locator("header h1")).to_have_text("Found by itself")
    await expect(tab.page).to_have_title("Found by itself · chatserve")
