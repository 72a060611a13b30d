"""Pictures of both pages for the documentation: `python -m benchmarks.screenshots`, or
`make screenshots`.

A server of its own with the demonstration model, little memory and four keys: an admin's with a few
conversations, a user's with some, a user's with none, an operator's. All that is said in the
pictures was said by that model. The admin page is looked at while several people chat at once, for
long enough that its charts have something to show. Nothing in a picture names the machine or a path
of it.
"""

import argparse
import asyncio
import itertools
import sys
import tempfile
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Literal

import httpx
from playwright.async_api import Browser, Page

from benchmarks.browser import chromium
from benchmarks.server_process import ServerProcess, server_process, wait_until_ready

PICTURES = Path(__file__).parents[1] / "docs" / "screenshots"
PICTURES_TAKEN = (
    *("chat-sign-in", "chat-first-visit", "chat-light", "chat-dark", "chat-receipt", "chat-phone"),
    "chat-streaming",
    *("admin-light", "admin-dark", "admin-phone", "admin-prefixes"),
)
PICTURE_BYTES_MAX = 300_000
PICTURES_BYTES_MAX = 2_000_000

OPTIONS = ("--threads", "1", "--kv-memory", "10MiB", "--host-memory", "5MiB")
DISK = ("--disk-capacity", "64MiB")
KEYS = """
[[keys]]
name = "operator"
key = "key-of-the-operator"
role = "admin"
[[keys]]
name = "ann"
key = "key-of-ann"
role = "admin"
[[keys]]
name = "ben"
key = "key-of-ben"
[[keys]]
name = "new"
key = "key-of-somebody-new"
"""
OPERATOR, ANN, BEN, NEW = (
    "key-of-the-operator",
    "key-of-ann",
    "key-of-ben",
    "key-of-somebody-new",
)
CHATTING = (ANN, ANN, BEN, BEN)  # who is at work while the admin page is looked at
CHATTING_SECONDS = 70.0
CROWD = 64  # chatting while a reply is looked at: it is over in a second where it is alone
SETTINGS = {"temperature": 0.0, "max_tokens": 300}

WIDE = {"width": 1280, "height": 860}
TALL = {"width": 1280, "height": 1240}
PHONE = {"width": 390, "height": 844}
PATIENCE_MS = 60_000.0

Scheme = Literal["light", "dark"]

ASKED_LAST = "How do I load a real model?"
OTHERS = (
    ("Will my chat survive a restart?",),
    ("Is my chat private?",),
    ("My name is Marisol and I live in Porto.", "What is my name?", "And where do I live?"),
    ("What happens when memory is full?",),
    ("What is the receipt?", "Tell me more."),
)
SYSTEMS = (
    "You are the assistant of a small shop that sells maps, globes and compasses. " * 3,
    "You are a patient librarian. You answer questions about chatserve, and keep to it. " * 3,
)
QUESTIONS = (
    "What is a page?",
    "What is a prefix cache?",
    "And in short?",
    "What happens when I regenerate a reply?",
    "How do I load a real model?",
    "Tell me more.",
    "Count from 1 to 20.",
    "What is the receipt?",
    "What happens when memory is full?",
)


class Person:
    """Somebody with a key, at the API."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._asks = itertools.count()

    async def conversation(self, system: str | None = None) -> str:
        """A new one; its id."""
        body: dict[str, object] = {"settings": SETTINGS}
        made = await self._client.post("/api/conversations", json=body | {"system": system})
        made.raise_for_status()
        return str(made.json()["id"])

    async def say(self, conversation: str, content: str) -> None:
        """Say something at its leaf, and hear the reply to its end."""
        await self._send(conversation, {"content": content})

    async def instead(self, conversation: str, content: str) -> None:
        """Say something else in the place of the first message."""
        await self._send(conversation, {"content": content, "parent": None})

    async def again(self, conversation: str) -> None:
        """Have the last message answered once more."""
        tree = (await self._client.get(f"/api/conversations/{conversation}")).json()
        asked = [turn["id"] for turn in tree["turns"] if turn["role"] == "user"]
        await self._send(conversation, {"parent": asked[-1]})

    async def _send(self, conversation: str, turn: Mapping[str, object]) -> None:
        path = f"/api/conversations/{conversation}/turns"
        answer = await self._client.post(path, json={"id": f"ask-{next(self._asks)}", **turn})
        answer.raise_for_status()
        assert "\nevent: done\n" in answer.text, answer.text


async def photograph(folder: Path) -> None:
    """All pictures, into this folder. Raises FileNotFoundError where there is no Chromium."""
    with server() as served:
        async with chromium() as browser, person(served, ANN) as ann:
            pictured = await conversations(ann)
            await of_the_chat(browser, served, pictured, folder)
            await of_the_admin_page(browser, served, folder)


def weigh(folder: Path) -> None:
    """Tell the sizes. Raises ValueError where they are too large for a repository."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.png"))}
    for name, size in sizes.items():
        print(f"{size / 1000:6.0f} kB  {name}")
    if max(sizes.values()) > PICTURE_BYTES_MAX or sum(sizes.values()) > PICTURES_BYTES_MAX:
        raise ValueError("a picture is too large, or all are")


async def conversations(ann: Person) -> str:
    """Some, with one that has two questions at its beginning and two answers at its end; its id."""
    for questions in OTHERS:
        name = await ann.conversation()
        for question in questions:
            await ann.say(name, question)
    name = await ann.conversation(SYSTEMS[1])
    await ann.say(name, "What is a prefix cache?")
    await ann.instead(name, "What is a prefix cache, exactly?")
    await ann.say(name, "How do I use it from Python?")
    await ann.again(name)
    return name


async def of_the_chat(browser: Browser, served: ServerProcess, name: str, folder: Path) -> None:
    """The chat page: a door, a first visit, a conversation in all its looks."""
    async with opened(browser, served, "/", None, WIDE) as page:
        await page.get_by_role("dialog").wait_for()
        await picture(page, folder, "chat-sign-in")
    async with opened(browser, served, "/", NEW, WIDE) as page:
        await page.get_by_text("Watch it stream").wait_for()
        await picture(page, folder, "chat-first-visit")
    for scheme in ("light", "dark"):
        async with opened(browser, served, f"/#{name}", ANN, WIDE, scheme) as page:
            await conversation_is_drawn(page)
            await picture(page, folder, f"chat-{scheme}")
            if scheme == "light":
                await page.locator(".step.assistant .summary").last.hover()
                await page.get_by_role("tooltip").wait_for()
                await picture(page, folder, "chat-receipt")
    async with opened(browser, served, f"/#{name}", ANN, PHONE) as page:
        await conversation_is_drawn(page)
        await picture(page, folder, "chat-phone")
    await of_a_reply_that_comes(browser, served, name, folder)


async def of_a_reply_that_comes(
    browser: Browser, served: ServerProcess, name: str, folder: Path
) -> None:
    """With its pace. Others chat too, so that it takes long enough to be looked at."""
    async with (
        opened(browser, served, f"/#{name}", ANN, WIDE) as page,
        asyncio.TaskGroup() as group,
    ):
        await conversation_is_drawn(page)
        chatting = [group.create_task(chats(served, BEN)) for _ in range(CROWD)]
        await page.get_by_label("Message", exact=True).fill(ASKED_LAST)
        await page.get_by_role("button", name="Send", exact=True).click()
        coming = page.locator('.reply[aria-busy="true"] .figures:not(:empty)')
        await coming.wait_for()
        await picture(page, folder, "chat-streaming")
        assert await coming.is_visible(), "it was over before its picture was taken"
        for task in chatting:
            task.cancel()


async def conversation_is_drawn(page: Page) -> None:
    """Its colours too."""
    await page.locator("pre .hljs-keyword").first.wait_for()
    await page.locator("nav li a, header .model").first.wait_for()


async def of_the_admin_page(browser: Browser, served: ServerProcess, folder: Path) -> None:
    """The admin page, while people chat."""
    async with (
        opened(browser, served, "/admin", OPERATOR, TALL) as light,
        opened(browser, served, "/admin", OPERATOR, TALL, "dark") as dark,
        opened(browser, served, "/admin", OPERATOR, PHONE) as phone,
        asyncio.TaskGroup() as group,
    ):
        chatting = [group.create_task(chats(served, key)) for key in CHATTING]
        await asyncio.sleep(CHATTING_SECONDS)
        for name, page in (("light", light), ("dark", dark), ("phone", phone)):
            await page.bring_to_front()
            await page.locator("li[data-id]").first.wait_for()
            # A moment at which somebody's pages are in use.
            await page.locator('canvas[aria-label*=" shared"][aria-label*=" open"]').wait_for()
            await picture(page, folder, f"admin-{name}")
        await light.get_by_role("heading", name="Shared prefixes").evaluate(
            """(heading) => {
              heading.scrollIntoView();
              document.querySelector(".page").scrollTop -= 80;  // from below the page's head
            }"""
        )
        await picture(light, folder, "admin-prefixes")
        for task in chatting:
            task.cancel()


async def chats(served: ServerProcess, key: str) -> None:
    """Short conversations, one after the other, and now and then an old one, until cancelled."""
    names: list[str] = []
    async with person(served, key) as somebody:
        for number in itertools.count():
            names.append(await somebody.conversation(SYSTEMS[number % len(SYSTEMS)]))
            for place in range(4):
                await somebody.say(names[-1], QUESTIONS[(4 * number + place) % len(QUESTIONS)])
            if number % 2:
                await somebody.say(names[number // 2], "And in short?")


async def picture(page: Page, folder: Path, name: str) -> None:
    """What is seen once nothing moves any more."""
    assert name in PICTURES_TAKEN
    await page.evaluate("() => document.fonts.ready")
    await page.evaluate(
        "() => new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(go)))"
    )
    await page.screenshot(path=folder / f"{name}.png", animations="disabled", caret="hide")


@contextmanager
def server() -> Generator[ServerProcess]:
    """A server with the keys, ready."""
    with tempfile.TemporaryDirectory(prefix="chatserve-pictures-") as own:
        keys = Path(own, "keys.toml")
        keys.write_text(KEYS)
        keys.chmod(0o600)
        options: Sequence[str] = (*OPTIONS, *DISK, "--api-key-file", str(keys))
        with server_process(options) as served:
            wait_until_ready(served)
            yield served


@asynccontextmanager
async def person(served: ServerProcess, key: str) -> AsyncGenerator[Person]:
    """Somebody with this key."""
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=served.url, headers=headers, timeout=120) as client:
        yield Person(client)


@asynccontextmanager
async def opened(
    browser: Browser,
    served: ServerProcess,
    path: str,
    key: str | None,
    size: Mapping[str, int],
    scheme: Scheme = "light",
) -> AsyncGenerator[Page]:
    """A page in a browser that knows nothing, signed in where there is a key."""
    narrow = size is PHONE
    context = await browser.new_context(
        viewport={"width": size["width"], "height": size["height"]},
        device_scale_factor=2 if narrow else 1.0 if size is TALL else 1.25,
        is_mobile=narrow,
        has_touch=narrow,
        color_scheme=scheme,
        locale="en-GB",
        timezone_id="UTC",
    )
    try:
        page = await context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        if key is not None:
            # As the sign-in does it; the cookie is the context's.
            await page.goto(served.url)
            door = page.get_by_role("dialog")
            await door.get_by_label("API key").fill(key)
            await door.get_by_label("API key").press("Enter")
            await door.wait_for(state="hidden")
        await page.goto(served.url + path)
        await page.reload()  # where only the part behind # is new, nothing was loaded
        yield page
    finally:
        await context.close()


def main() -> int:
    """Take them all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=PICTURES, help="where they go")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    asyncio.run(photograph(folder))
    weigh(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
