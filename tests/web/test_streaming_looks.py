"""How a reply looks while it comes: its pace, without motion, from right to left, on a phone."""

import re
from dataclasses import replace

from playwright.async_api import Browser, expect

from tests.api.fake_conversations import FakeChatReply
from tests.api.harness import Site
from tests.web.browser import (
    LONG,
    PHONE,
    Tab,
    TabMaker,
    asked,
    long_conversation,
    needs_chromium,
    tabs,
)
from tests.web.test_reach import FINAL, file_of, imported
from tests.wiring.server import Server

pytestmark = needs_chromium

# The page's clock stands where a test has put it.
STANDING_CLOCK = "window.at = 1000; performance.now = () => window.at;"
MOVING = "() => document.getAnimations().filter((each) => each.playState === 'running').length"


async def hears(tab: Tab, reply: FakeChatReply, at: int, word: str, tokens: int) -> None:
    """The reply says a word at this millisecond, and has so many tokens now."""
    await tab.evaluate("(at) => { window.at = at; }", at)
    reply.say(f"{word} ", tokens)
    await expect(tab.replies).to_contain_text(word)


async def test_the_pace_is_told_twice_a_second(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.blank()
    await tab.page.add_init_script(STANDING_CLOCK)
    await tab.open()
    await tab.say("go")
    await expect(tab.button("Stop")).to_be_visible()
    await asked(replies)
    (reply,) = replies
    figures = tab.page.locator(".step.assistant .figures")
    for at, word, tokens, told in (
        (1_000, "one", 10, ""),
        (1_400, "two", 30, ""),
        (1_500, "three", 60, "100 tokens/s"),
        (1_900, "four", 500, "100 tokens/s"),
        (2_000, "five", 85, "75 tokens/s"),
        (2_500, "six", 85, "50 tokens/s"),
        # Of the last three seconds alone.
        (5_000, "seven", 97, "4.0 tokens/s"),
    ):
        await hears(tab, reply, at, word, tokens)
        await expect(figures).to_have_text(told)
    # What a new connection brings at once says nothing of the pace.
    reply.go_away()
    await expect(tab.page.get_by_text("Trying again…")).to_be_visible()
    await expect(figures).to_have_count(0)
    reply.going_away = False
    reply.say("eight ", 4_000)
    await expect(tab.replies).to_contain_text("eight")
    await expect(figures).to_have_text("")
    await hears(tab, reply, 6_000, "nine", 4_020)
    await expect(figures).to_have_text("20 tokens/s")
    reply.finish(data=FINAL)
    scripted.conversations.keep(reply)
    await expect(tab.receipts).to_have_count(1)
    await expect(figures).to_contain_text("30 tokens/s")


async def test_the_server_tells_the_pace(user: TabMaker) -> None:
    tab = await user.blank()
    await tab.open(await long_conversation(tab.url, 2_000))
    await tab.say(LONG)
    figures = tab.page.locator(".step.assistant .figures")
    await expect(figures).to_have_text(re.compile(r"^[1-9][\d.]* tokens/s$"))
    await expect(tab.button("Stop")).to_be_visible()
    await tab.button("Stop").click()
    await expect(tab.receipts).to_have_count(1)


async def test_nothing_moves_while_replies_stream(
    reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    """Each time it is seen that something would: with motion, at the same moment."""
    tab = await reader.blank()
    await tab.page.emulate_media(reduced_motion="reduce")
    await tab.open()
    await tab.say("go")
    await expect(tab.page.get_by_text("Thinking…")).to_be_visible()
    await still(tab)
    # The one that is elsewhere is marked in the list as long as it runs.
    await tab.page.keyboard.press("Control+Shift+O")
    await expect(tab.page.locator("nav .running")).to_have_count(1)
    await tab.say("go on")
    await expect(tab.button("Stop")).to_be_visible()
    for word in ("one", "two", "three"):
        await asked(replies, 2)
        replies[1].say(f"{word} ")
        await expect(tab.replies).to_contain_text(word)
        await still(tab)


async def still(tab: Tab) -> None:
    assert await tab.evaluate(MOVING) == 0
    await tab.page.emulate_media(reduced_motion="no-preference")
    assert await tab.evaluate(MOVING) > 0, "there is nothing here that could move"
    await tab.page.emulate_media(reduced_motion="reduce")
    assert await tab.evaluate(MOVING) == 0


async def test_right_to_left_from_the_first_words_on(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.open()
    await tab.say("שלום")
    await expect(tab.button("Stop")).to_be_visible()
    await asked(replies)
    (reply,) = replies
    reply.say("شكرا")
    paragraph = tab.replies.locator("p").first
    await expect(paragraph).to_have_text("شكرا")
    await expect(paragraph).to_have_css("direction", "rtl")
    reply.say(
        " 42 GiB، أنا بخير.\n\n1. أولا\n\n> قيل\n\n```py\nx = 1\n```\n\n"
        "| ا | ب |\n|---|---|\n| ١ | ٢ |"
    )
    await expect(tab.replies.locator("td")).to_have_count(2)
    for part in ("ol", "blockquote", "table"):
        await expect(tab.replies.locator(part)).to_have_css("direction", "rtl")
    await expect(tab.replies.locator("pre")).to_have_css("direction", "ltr")
    # The first word stands at the right, the list's numbers too.
    edges = await tab.evaluate(
        """() => {
          const prose = document.querySelector(".step.assistant .prose");
          const text = prose.querySelector("p").firstChild;
          const range = document.createRange();
          range.setStart(text, 0);
          range.setEnd(text, 4);
          const end = prose.getBoundingClientRect().right;
          const item = prose.querySelector("li").getBoundingClientRect();
          return [end - range.getBoundingClientRect().right, end - item.right];
        }"""
    )
    assert abs(edges[0]) < 2
    assert edges[1] > 10, "the numbers have their room at the right"
    # A title in the list begins at the right too.
    known = scripted.conversations.known
    known[tab.conversation] = replace(known[tab.conversation], title="مرحبا chatserve")
    await tab.page.reload()
    await expect(tab.page.locator("nav li a").first).to_have_css("direction", "rtl")


WIDE_TEXTS = (
    "Words, `code_that_has_no_place_to_break_and_goes_on_" + "and_on_" * 20 + "`, and more.",
    "```text\n" + "wide " * 60 + "\n```",
    "| a | b | c | d |\n|---|---|---|---|\n" + "| " + "many words in a cell | " * 4,
    "https://example.org/" + "a" * 300,
)


async def test_replies_stay_within_a_phone(browser: Browser, server: Server) -> None:
    """Each box by itself: what is cut off makes nothing scroll, so scrolling tells little."""
    phone = {"viewport": PHONE, "has_touch": True, "is_mobile": True}
    async with tabs(browser, server.url, **phone) as user:
        for text in WIDE_TEXTS:
            name = await imported(user.url, file_of("a", f"Words.\n\n{text}\n\nMore.", final=FINAL))
            tab = await user.open(name)
            await expect(tab.receipts).to_have_count(1)
            out = await tab.evaluate(
                """() => {
                  const parts = ".reply, .prose, .prose > *, .code, .prose table, .foot, .foot *";
                  return [...document.querySelectorAll(parts)]
                    .map((each) => [each.className || each.localName, each.getBoundingClientRect()])
                    .filter(([, box]) => box.width > 0 && (box.left < 0 || box.right > innerWidth))
                    .map(([name, box]) => [name, box.left, box.right]);
                }"""
            )
            assert out == [], text
