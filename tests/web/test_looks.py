"""How the chat page looks and reads: headings, names, edges, words, in wide and narrow windows."""

import re
from typing import Any

import pytest
from playwright.async_api import Browser, ViewportSize, expect

from tests.api.fake_conversations import FakeChatReply
from tests.api.harness import Site
from tests.web.browser import PHONE, Tab, TabMaker, asked, needs_chromium, tabs
from tests.web.test_reach import AXE, FINAL, file_of, imported
from tests.web.test_words_kept import refused

pytestmark = needs_chromium

REPLY = """# One

## Two

### Three

#### Four

##### Five

###### Six

```python
print(1)
```

```python
print(2)
```

```
3
```

| the language | is it stable? | time |
|---|---|---|
| JavaScript | since 2019 | O(n log n) |
"""
SMALL: ViewportSize = {"width": 320, "height": 640}
MEDIUM: ViewportSize = {"width": 900, "height": 640}
# The least contrast that the edge of a field must have (WCAG 2.2, 1.4.11).
EDGE_CONTRAST = 3.0


def luminance(colour: str) -> float:
    """Of `rgb(…)`."""
    parts = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (
        each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


async def shown(user: TabMaker) -> Tab:
    tab = await user.open(await imported(user.url, file_of("Hello", REPLY, final=FINAL)))
    await expect(tab.receipts).to_have_count(1)
    return tab


async def test_headings_of_a_reply_stand_under_the_pages_own(reader: TabMaker) -> None:
    tab = await shown(reader)
    found: list[list[str]] = await tab.replies.locator("h1, h2, h3, h4, h5, h6").evaluate_all(
        """(all) => all.map((each) =>
             [each.tagName, each.innerText, getComputedStyle(each).fontSize])"""
    )
    assert found == [
        ["H2", "One", "22.4px"],
        ["H3", "Two", "19.2px"],
        ["H4", "Three", "16.96px"],
        ["H5", "Four", "16px"],
        ["H6", "Five", "16px"],
        ["H6", "Six", "16px"],
    ]
    await expect(tab.page.get_by_role("heading", level=1)).to_have_count(1)


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed: npm ci in web/")
async def test_landmarks_have_names_of_their_own(reader: TabMaker) -> None:
    tab = await reader.blank()
    await tab.page.add_init_script(path=AXE)
    await tab.open(await imported(reader.url, file_of("Hello", REPLY, final=FINAL)))
    await expect(tab.page.get_by_role("group", name="Code, python", exact=True)).to_have_count(2)
    await expect(tab.page.get_by_role("group", name="Code", exact=True)).to_have_count(1)
    rules = ["landmark-unique", "heading-order", "page-has-heading-one"]
    found: dict[str, Any] = await tab.evaluate("(rules) => axe.run({ runOnly: rules })", rules)
    assert {each["id"] for each in found["passes"]} == set(rules), found["violations"]


async def test_a_long_title_leaves_room_for_the_models_name(
    browser: Browser, scripted: Site
) -> None:
    name = await imported(scripted.url, file_of("Hello", "Hi", final=FINAL))
    async with scripted.client() as client:
        title = {"title": "A title of many words " * 8}
        await client.patch(f"/api/conversations/{name}", json=title)
    for size in (SMALL, PHONE, MEDIUM):
        async with tabs(browser, scripted.url, viewport=size) as user:
            tab = await user.open(name)
            await expect(tab.page.locator("header h1")).to_contain_text("A title of many")
            whole = await tab.page.locator("header .model").evaluate(
                "(each) => each.clientWidth > 0 && each.scrollWidth <= each.clientWidth"
            )
            assert whole, size
            wide = await tab.evaluate("() => document.documentElement.scrollWidth")
            assert wide <= size["width"]


async def test_the_composer_has_an_edge_in_the_dark(reader: TabMaker) -> None:
    tab = await reader.blank()
    await tab.page.emulate_media(color_scheme="dark")
    await tab.open()
    await tab.button("New chat").first.focus()
    edge, page = await tab.evaluate(
        """() => [getComputedStyle(document.querySelector(".composer")).borderTopColor,
                  getComputedStyle(document.body).backgroundColor]"""
    )
    contrast = (luminance(edge) + 0.05) / (luminance(page) + 0.05)
    assert contrast >= EDGE_CONTRAST


async def test_a_notice_has_the_width_of_a_small_window(browser: Browser, scripted: Site) -> None:
    async with tabs(browser, scripted.url, viewport=SMALL) as maker:
        tab = await maker.open()
        words = "The server has no room for another conversation now. " * 2
        refusal = refused(409, words.strip())
        await tab.page.route("**/api/conversations", lambda route: route.fulfill(**refusal))
        await tab.say("go")
        notice = await tab.page.locator(".notice").bounding_box()
        assert notice is not None
        assert notice["width"] == pytest.approx(SMALL["width"] - 32, abs=2)


async def test_a_small_window_cuts_no_word_of_a_table(browser: Browser, scripted: Site) -> None:
    async with tabs(browser, scripted.url, viewport=SMALL) as user:
        tab = await shown(user)
        tall: list[str] = await tab.replies.locator("th, td").evaluate_all(
            """(all) => all.flatMap((cell) => {
              const [text, range] = [cell.firstChild, document.createRange()];
              return [...text.data.matchAll(/\\S+/g)].filter(({ index, 0: word }) => {
                range.setStart(text, index);
                range.setEnd(text, index + word.length);
                return range.getClientRects().length > 1;
              }).map(([word]) => word);
            })"""
        )
        assert tall == [], "these are cut"
        wide = await tab.page.locator(".scroller").evaluate("(each) => each.scrollWidth")
        assert wide <= SMALL["width"]


async def test_code_stays_in_its_box_while_the_next_words_come(
    scripted: Site, reader: TabMaker, replies: list[FakeChatReply]
) -> None:
    tab = await reader.open()
    await tab.say("go")
    await expect(tab.button("Stop")).to_be_visible()
    code = tab.replies.locator(".code pre")
    parts = {"As here:\n\n```bash\nls\n": "ls", "```\n\nIt lists": "It lists", " all.": "all."}
    for part, seen in parts.items():
        await asked(replies)
        replies[0].say(part)
        await expect(tab.replies).to_contain_text(seen)
        await expect(code).to_have_text("ls")
        await expect(tab.replies.locator("pre")).to_have_count(1)
    replies[0].finish(data=FINAL)
    scripted.conversations.keep(replies[0])
    await expect(tab.receipts).to_have_count(1)
    await expect(code).to_have_text("ls")


async def test_code_within_a_list_has_a_box_too(reader: TabMaker) -> None:
    text = "1. First:\n\n   ```bash\n   ls -l\n   ```\n\n2. Then no more.\n"
    tab = await reader.open(await imported(reader.url, file_of("Hello", text, final=FINAL)))
    box = tab.replies.locator("li pre")
    await expect(box).to_have_text(re.compile("ls -l"))
    await expect(box).to_have_css("border-top-style", "solid")
    await expect(box).to_have_css("overflow-x", "auto")
