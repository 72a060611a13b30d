"""Markdown whose parts explain each other, though its blocks are drawn apart."""

import pytest
from playwright.async_api import Locator, expect

from tests.api.fake_conversations import FakeChatReply
from tests.api.harness import Site
from tests.web.browser import TabMaker, asked, needs_chromium
from tests.web.test_reach import file_of, imported

pytestmark = needs_chromium

BEFORE = """See [the manual][m], [M][], [m] and [nothing of that kind][none].

- an item with [the
  manual][ M ]

```text
[the manual][m] is text here
```

"""
DEFINED = '[m]: https://example.org/manual "All of it"\n\n'
AGAIN = "[m]: https://example.org/another\n\nOnce more: [the manual][m].\n"
SHOWN = "See the manual, M, m and [nothing of that kind][none]."
MANUAL = "https://example.org/manual"


async def links(prose: Locator) -> list[tuple[str, str]]:
    return await prose.locator("a").evaluate_all(
        "(all) => all.map((each) => [each.innerText.replace(/\\s+/g, ' '), each.href])"
    )


async def test_a_link_whose_address_comes_later(scripted: Site, reader: TabMaker) -> None:
    """Plain text until the address is there, then a link; the first definition counts."""
    replies: list[FakeChatReply] = []
    scripted.conversations.on_send = replies.append
    tab = await reader.open()
    await tab.say("go")
    await expect(tab.button("Stop")).to_be_visible()
    await asked(replies)
    (reply,) = replies
    reply.say(BEFORE)
    first = tab.replies.locator("p").first
    await expect(first).to_have_text(BEFORE.partition("\n")[0])
    assert await links(tab.replies) == []
    # Half an address is none.
    reply.say(DEFINED[:20])
    reply.say(DEFINED[20:])
    reply.say("And")
    await expect(first).to_have_text(SHOWN)
    assert await links(tab.replies) == [
        [name, MANUAL] for name in ("the manual", "M", "m", "the manual")
    ]
    assert await tab.replies.locator("a").first.get_attribute("title") == "All of it"
    await expect(tab.replies.locator("pre")).to_have_text("[the manual][m] is text here")
    reply.say(" more.\n\n" + AGAIN)
    reply.finish()
    scripted.conversations.keep(reply)
    await expect(tab.receipts).to_have_count(1)
    assert await links(tab.replies) == [
        [name, MANUAL] for name in ("the manual", "M", "m", "the manual", "the manual")
    ]
    assert "https://" not in await tab.replies.inner_text(), "definitions are not shown"


async def test_the_same_where_all_is_there_at_once(user: TabMaker) -> None:
    text = BEFORE + DEFINED + AGAIN
    tab = await user.open(await imported(user.url, file_of("a", text)))
    await expect(tab.replies.locator("p").first).to_have_text(SHOWN)
    assert len(await links(tab.replies)) == 5
    assert {address for _, address in await links(tab.replies)} == {MANUAL}


@pytest.mark.parametrize("address", ["javascript:hit()", "data:text/html,x", "/admin"])
async def test_an_address_that_is_no_page_elsewhere_stays_text(
    scripted: Site, reader: TabMaker, address: str
) -> None:
    replies: list[FakeChatReply] = []
    scripted.conversations.on_send = replies.append
    tab = await reader.open()
    await tab.say("go")
    await expect(tab.button("Stop")).to_be_visible()
    await asked(replies)
    (reply,) = replies
    reply.say("Click [here][x].\n\nWords.\n\n")
    await expect(tab.replies.locator("p").first).to_have_text("Click [here][x].")
    reply.say(f"[x]: {address}\n\nThat was it.")
    await expect(tab.replies.locator("p").first).to_have_text("Click here.")
    assert await tab.replies.locator("a[href]").count() == 0
    reply.finish()
    scripted.conversations.keep(reply)
    await expect(tab.receipts).to_have_count(1)
    assert await tab.replies.locator("a[href]").count() == 0
