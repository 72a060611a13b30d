"""What the chat page weighs, and whether it stays smooth, in a real Chromium.

    weight     the built page's files, gzip -9 as the server sends them
    paint      first contentful paint of the empty page, median of a few loads without a cache
    idle       frames while nothing happens: what the machine, and others on it, do to them
    stream     a reply of 10,000 tokens of markdown at 100 tokens/s, from a simulated model: the
               time between two frames, tasks of more than 50 ms, and the page's share of a core
    tasks      3,000 tokens of it once more, traced: the page's longest task in CPU time, which
               other processes on the same cores do not lengthen as they do frames
    long       a conversation of 500 turns: until its last message is drawn, while 1,000 tokens
               are streamed into it, and while one scrolls up through all of it

Needs Chromium and playwright. The server, the browser and this process share the machine's cores.
"""

import asyncio
import gzip
import json
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from playwright.async_api import Browser, CDPSession, Page

from benchmarks.browser import chromium
from benchmarks.report import run
from benchmarks.server_process import ServerProcess, server_process, wait_until_ready

ROOT = Path(__file__).parents[1]
BUILT = ROOT / "chatserve" / "api" / "page"
DEMONSTRATION = ROOT / "chatserve" / "demonstration" / "model"
PAINTS = 5
STEP_SECONDS = 0.01
IDLE_SECONDS = 15.0
TOKENS, TOKENS_TRACED, TOKENS_MORE = 10_000, 3_000, 1_000
TURNS = 500
CONTEXT_TOKENS = 16_384
LATE_MS = 50.0
PATIENCE_MS = 300_000.0

TEXT = """## A section about pages

A page is a **fixed run** of token positions, named by a keyed hash of everything before its end, so
that *whatever was computed once* is found again. See `BlockManager` and [the format](https://example.org).

1. The prompt is cut into pages of sixteen tokens.
2. Each full page is named by its `parent` and its tokens.
   - a page that is sealed never changes
   - a page that nobody uses may go
3. The rest is computed.

| tier | what it keeps | how fast |
|---|---|--:|
| device | sealed pages | 1 |
| host | copies of them | 4 |
| disk | all that fits | 20 |

```python
def name_of(parent: bytes, tokens: tuple[int, ...]) -> bytes:
    digest = blake2b(key=KEY, digest_size=32)
    for token in tokens:
        digest.update(token.to_bytes(4, "little"))  # fixed width, so that nothing is ambiguous
    return digest.digest()
```

> What is found need not be computed, and what is not found costs only time.

"""

WATCH = """() => {
  const watch = window.watch = { frames: [], tasks: [], on: true };
  let last = performance.now();
  const step = () => {
    if (!watch.on) return;
    const now = performance.now();
    watch.frames.push(now - last);
    last = now;
    requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) watch.tasks.push(entry.duration);
  }).observe({ entryTypes: ["longtask"] });
}"""
STOP_WATCH = "() => { window.watch.on = false; return window.watch; }"


@dataclass(frozen=True, slots=True)
class Frames:
    """Milliseconds between two frames, over some seconds. late: of more than 50 ms; long_tasks: the
    page's own tasks of more than 50 ms; core: its main thread's part of a core."""

    seconds: float
    count: int
    p50: float
    p99: float
    most: float
    late: int
    long_tasks: int
    core: float

    def __str__(self) -> str:
        return (
            f"{self.count} frames in {self.seconds:.0f} s: p50 {self.p50:.1f} ms, "
            f"p99 {self.p99:.1f} ms, at most {self.most:.1f} ms, {self.late} later than 50 ms, "
            f"{self.long_tasks} long tasks, {self.core:.2f} of a core"
        )


async def measure() -> Mapping[str, object]:
    """All of it."""
    figures: dict[str, object] = {"weight": weight()}
    with speaking_server() as server:
        async with chromium() as browser:
            figures["paint"] = await paint(browser, server)
            figures["idle"] = await idle(browser, server)
            figures["stream"] = await stream(browser, server)
            figures["tasks"] = await tasks(browser, server)
            figures["long"] = await long_conversation(browser, server)
    return figures


def weight() -> dict[str, int]:
    """Bytes by file, and of what the first paint waits for."""
    sizes = {
        path.name: len(gzip.compress(path.read_bytes(), 9))
        for path in sorted(BUILT.rglob("*"))
        if path.suffix in (".html", ".js", ".css")
    }
    index = (BUILT / "index.html").read_text()
    at_once = [name for name in sizes if name == "index.html" or f"/{name}" in index]
    sizes["first paint"] = sum(sizes[name] for name in at_once)
    for name, size in sizes.items():
        print(f"weight: {size / 1000:6.1f} kB  {name}")
    return sizes


async def paint(browser: Browser, server: ServerProcess) -> float:
    """Milliseconds until there is something to see."""
    took: list[float] = []
    for _ in range(PAINTS):
        async with opened(browser, server) as page:
            took.append(
                await page.evaluate(
                    "() => performance.getEntriesByName('first-contentful-paint')[0].startTime"
                )
            )
    median = statistics.median(took)
    print(f"paint:  {median:.0f} ms, median of {PAINTS} (at most {max(took):.0f} ms)")
    return median


async def idle(browser: Browser, server: ServerProcess) -> Mapping[str, object]:
    """The empty page, left alone."""
    async with opened(browser, server) as page:
        watch = await Watch.begun(page)
        await asyncio.sleep(IDLE_SECONDS)
        frames = await watch.ended()
    print(f"idle:   {frames}")
    return asdict(frames)


async def stream(browser: Browser, server: ServerProcess) -> Mapping[str, object]:
    """A long reply, drawn as it comes."""
    name = await made(server, [], TOKENS)
    async with opened(browser, server, name) as page:
        frames = await streamed(page)
        rate = await page.locator(".figures").last.inner_text()
        length = await page.evaluate("() => document.querySelector('.prose').textContent.length")
    told = re.search(r"([\d.]+) tokens/s", rate)
    print(f"stream: {TOKENS} tokens, {length} characters drawn, {told and told[0]}: {frames}")
    return asdict(frames) | {"tokens": TOKENS, "characters": length}


async def tasks(browser: Browser, server: ServerProcess) -> Mapping[str, object]:
    """What the page's main thread does in one go, in milliseconds of CPU time."""
    name = await made(server, [], TOKENS_TRACED)
    async with opened(browser, server, name) as page:
        await browser.start_tracing(
            page=page, categories=["toplevel", "disabled-by-default-devtools.timeline"]
        )
        await streamed(page)
        events: list[dict[str, Any]] = json.loads(await browser.stop_tracing())["traceEvents"]
    mains = {
        (event["pid"], event["tid"])
        for event in events
        if event["name"] == "thread_name" and event["args"]["name"] == "CrRendererMain"
    }
    spent = sorted(
        event["tdur"] / 1_000
        for event in events
        if (event["pid"], event["tid"]) in mains
        and event["name"].endswith("RunTask")
        and "tdur" in event
    )
    p999 = spent[int(0.999 * (len(spent) - 1))]
    print(
        f"tasks:  {TOKENS_TRACED} tokens: {len(spent)} tasks, p99.9 {p999:.1f} ms, "
        f"at most {spent[-1]:.1f} ms of CPU time"
    )
    return {"tokens": TOKENS_TRACED, "count": len(spent), "p999": p999, "most": spent[-1]}


async def long_conversation(browser: Browser, server: ServerProcess) -> Mapping[str, object]:
    """Many turns."""
    turns = [f"Question {n}" if n % 2 == 0 else TEXT for n in range(TURNS)]
    name = await made(server, turns, TOKENS_MORE)
    async with opened(browser, server) as page:
        began = time.monotonic()
        await page.evaluate("(name) => { location.hash = name; }", name)
        await page.locator(".step.assistant").last.wait_for()
        opened_ms = 1000 * (time.monotonic() - began)
        print(f"long:   {TURNS} turns, the last one is there after {opened_ms:.0f} ms")
        frames = await streamed(page)
        print(f"long:   {TOKENS_MORE} tokens more: {frames}")
        watch = await Watch.begun(page)
        await page.evaluate(
            """async () => {
              const scroller = document.querySelector(".scroller");
              while (scroller.scrollTop > 0 || document.querySelector(".earlier")) {
                scroller.scrollTop -= 400;
                await new Promise(requestAnimationFrame);
              }
            }"""
        )
        scrolled = await watch.ended()
        drawn = await page.locator(".step").count()
        print(f"long:   scrolled up through {drawn} messages: {scrolled}")
    return {
        "turns": TURNS,
        "opened_ms": opened_ms,
        "stream": asdict(frames),
        "scroll": asdict(scrolled),
    }


async def streamed(page: Page) -> Frames:
    """Ask, and watch until the reply is over."""
    before = await page.locator(".step.assistant .summary").count()
    watch = await Watch.begun(page)
    await page.get_by_label("Message", exact=True).fill("Go on.")
    await page.get_by_label("Message", exact=True).press("Enter")
    await page.get_by_role("button", name="Stop", exact=True).wait_for()
    await page.get_by_role("button", name="Stop", exact=True).wait_for(state="hidden")
    frames = await watch.ended()
    assert await page.locator(".step.assistant .summary").count() > before, "no reply came"
    return frames


class Watch:
    """A look at a page's frames and tasks for a while."""

    def __init__(self, page: Page, session: CDPSession, busy: float) -> None:
        self._page = page
        self._session = session
        self._busy = busy
        self._began = time.monotonic()

    @classmethod
    async def begun(cls, page: Page) -> "Watch":
        """From now on."""
        session = await page.context.new_cdp_session(page)
        await session.send("Performance.enable")
        await page.evaluate(WATCH)
        return cls(page, session, await busy_seconds(session))

    async def ended(self) -> Frames:
        """What was seen until now."""
        seconds = time.monotonic() - self._began
        busy = await busy_seconds(self._session) - self._busy
        seen: dict[str, list[float]] = await self._page.evaluate(STOP_WATCH)
        await self._session.detach()
        frames = sorted(seen["frames"])
        return Frames(
            seconds=seconds,
            count=len(frames),
            p50=statistics.median(frames),
            p99=frames[int(0.99 * (len(frames) - 1))],
            most=frames[-1],
            late=sum(each > LATE_MS for each in frames),
            long_tasks=len(seen["tasks"]),
            core=busy / seconds,
        )


async def busy_seconds(session: CDPSession) -> float:
    """What the page's main thread has worked."""
    told = await session.send("Performance.getMetrics")
    return next(each["value"] for each in told["metrics"] if each["name"] == "TaskDuration")


async def made(server: ServerProcess, turns: list[str], tokens: int) -> str:
    """A conversation whose replies have so many tokens; its id."""
    listed = [
        {
            "id": f"t{n}",
            "parent": f"t{n - 1}" if n else None,
            "role": "assistant" if n % 2 else "user",
            "content": text,
        }
        for n, text in enumerate(turns)
    ]
    file = {
        "format": "chatserve.conversation",
        "version": 1,
        "settings": {"max_tokens": tokens, "ignore_eos": True},
        "turns": listed,
        "leaf": listed[-1]["id"] if listed else None,
    }
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        answer = await client.post("/api/conversations/import", json=file)
        answer.raise_for_status()
        return str(answer.json()["id"])


@contextmanager
def speaking_server() -> Generator[ServerProcess]:
    """A simulated model that says the text, and has room for it."""
    with tempfile.TemporaryDirectory(prefix="chatserve-bench-") as own:
        folder, says = Path(own, "model"), Path(own, "text.md")
        says.write_text(TEXT)
        shutil.copytree(DEMONSTRATION, folder)
        config = json.loads((folder / "config.json").read_text())
        config["max_position_embeddings"] = CONTEXT_TOKENS
        (folder / "config.json").write_text(json.dumps(config))
        options = ["--step-seconds", str(STEP_SECONDS), "--say", str(says), str(folder)]
        program = ("benchmarks.simulated_server", *options)
        with server_process(("--threads", "1"), program=program) as server:
            wait_until_ready(server)
            yield server


@asynccontextmanager
async def opened(browser: Browser, server: ServerProcess, name: str = "") -> AsyncGenerator[Page]:
    """A tab of a browser that knows nothing, at a conversation or a new one."""
    context = await browser.new_context(viewport={"width": 1200, "height": 800})
    try:
        page = await context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        await page.goto(f"{server.url}/#{name}" if name else server.url)
        await page.locator("header .model").wait_for()
        yield page
    finally:
        await context.close()


if __name__ == "__main__":
    sys.exit(run("benchmarks.page", __doc__, measure))
