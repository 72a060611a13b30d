"""Every command of the chat against the real app, on a real socket; lines and screen are lists."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Generator
from pathlib import Path

import pytest

from chatserve.client import ChatClient, Conversation, ReplyEvent, TextDelta
from chatserve.errors import Busy, Conflict
from chatserve.terminal.chat import Chat
from chatserve.terminal.commands import HELP, Command, CommandError, Message, count, parsed
from tests.api.fake_conversations import FakeChatReply
from tests.api.harness import Site, site, soon


class Lines:
    """What is typed, and what each line began with."""

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)
        self.defaults: list[str] = []
        self.interrupt: Callable[[], None] = lambda: None
        self.on_typing: Callable[[str], None] = lambda text: None

    async def line(self, prompt: str, default: str = "") -> str:
        self.defaults.append(default)
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    @contextlib.contextmanager
    def while_replying(self, on_stop: Callable[[], None]) -> Generator[None]:
        yield

    @contextlib.contextmanager
    def while_waiting(self, on_interrupt: Callable[[], None]) -> Generator[None]:
        self.interrupt = on_interrupt
        yield


class Paper:
    """A screen that keeps what it was shown."""

    frame_seconds = 0.0

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.troubles: list[str] = []
        self.turns: list[tuple[str, str]] = []
        self.replies: list[str] = []

    @contextlib.contextmanager
    def reply(self) -> Generator["Paper"]:
        self.replies.append("")
        yield self

    def take(self, event: ReplyEvent) -> None:
        if isinstance(event, TextDelta):
            self.replies[-1] += event.text

    def said(self, heading: str, text: str, *, own: bool) -> None:
        self.turns.append((heading, text))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def trouble(self, text: str) -> None:
        self.troubles.append(text)


@pytest.fixture
async def served() -> AsyncGenerator[Site]:
    async with site() as running:
        numbers = iter(range(1, 1_000))

        def answer(reply: FakeChatReply) -> None:
            reply.say(f"answer {next(numbers)}")
            reply.finish()
            running.conversations.keep(reply)

        running.conversations.on_send = answer
        yield running


async def chatted(served: Site, *lines: str) -> tuple[Paper, Lines, Chat]:
    paper, typed = Paper(), Lines(*lines)
    async with ChatClient(served.url) as client:
        chat = Chat(client, paper, typed)
        await chat.run()
    assert not typed.lines or "/quit" in lines
    return paper, typed, chat


async def test_a_conversation_begins_with_its_first_message(served: Site) -> None:
    paper, _, chat = await chatted(
        served, "/system Be brief.", "/new  A title ", "/system Be brief.", "", "hello", "more"
    )
    (known,) = served.conversations.known.values()
    assert (known.title, known.system) == ("A title", "Be brief.")
    first, second = served.conversations.sent
    assert (first.content, first.parent) == ("hello", None)
    assert second.parent is not None
    assert paper.replies == ["answer 1", "answer 2"]
    assert sum("4 cached, 1 computed" in note for note in paper.notes) == 2
    assert not chat.failed


async def test_an_edit_and_another_answer_are_branches(served: Site) -> None:
    paper, typed, _ = await chatted(
        served, "one", "two", "/edit 1", "one, edited", "/regen", "/branch 1", "/history", "three"
    )
    assert "one" in typed.defaults
    one, two, edited, regenerated, three = served.conversations.sent
    assert (edited.content, edited.parent) == ("one, edited", None)
    assert (regenerated.content, regenerated.parent) == (None, edited.ask)
    assert "(2/2)" in paper.notes  # of the message
    assert "(2/2) (2/2)" in paper.notes  # and of its answer
    shown = [
        ("you 1 (1/2)", "one"),
        ("chatserve", "answer 1"),
        ("you 2", "two"),
        ("chatserve", "answer 2"),
    ]
    assert paper.turns == shown * 2, "after /branch, and by /history"
    assert two.parent is not None
    assert (three.content, three.parent) == ("three", list(served.conversations.replies)[1])
    assert one.parent is None


async def test_conversations_are_listed_opened_renamed_and_deleted(served: Site) -> None:
    await chatted(served, "/new first", "x", "/new second", "y")
    paper, _, _ = await chatted(
        served,
        "/list",
        "/open 2",
        "/title renamed",
        "/list RENAMED",
        "/open 1",
        "/delete",
        "n",
        "/delete",
        "y",
        "/history",
    )
    listing = next(note for note in paper.notes if "second" in note)
    assert [row.split()[0] for row in listing.splitlines()] == ["1", "2"]
    assert listing.index("second") < listing.index("first")
    assert paper.turns == [("you 1", "x"), ("chatserve", "answer 1")] * 2
    assert [each.title for each in served.conversations.known.values()] == ["second"]
    assert paper.troubles == ["There is no conversation yet: say something, or /open one."]


async def test_a_file_is_written_once_and_read_again(served: Site, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    paper, _, _ = await chatted(
        served, "hello", f"/export {file}", f"/export {file}", "/new", f"/import {file}"
    )
    assert json.loads(file.read_text())["turns"][0]["content"] == "hello"
    assert paper.turns == [("you 1", "hello"), ("chatserve", "answer 1")]
    assert paper.troubles == [f"{file}: File exists"]
    assert len(served.conversations.known) == 2


async def test_what_is_wrong_is_said_and_the_chat_goes_on(served: Site, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("[1")
    paper, _, chat = await chatted(
        served,
        "/nonsense",
        "/open",
        "/open nobody",
        "/title",
        "/export",
        "/import",
        f"/import {tmp_path}/broken.json",
        f"/import {tmp_path}/absent.json",
        "hello",
        "/edit 2",
        "/edit x",
        "/branch",
        "/branch 2",
        "/stop",
        "//slash",
    )
    assert len(paper.troubles) == 13
    assert "no /nonsense" in paper.troubles[0]
    assert "404" not in paper.troubles[2], "people are told in words"
    assert served.conversations.sent[-1].content == "/slash"
    assert chat.failed


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (Busy("Full.", retry_after=3.0), "Full. Try again in 3 s."),
        (Conflict("Not now."), "Not now."),
    ],
)
async def test_a_refused_message_can_be_sent_again(
    served: Site, refusal: Exception, words: str
) -> None:
    class Mending(Paper):
        def trouble(self, text: str) -> None:
            super().trouble(text)
            served.conversations.refusal = None

    paper = Mending()
    async with ChatClient(served.url) as client:
        chat = Chat(client, paper, Lines("hello", "hello"))
        await chat.open((await client.create()).id)
        served.conversations.refusal = refusal
        await chat.run()
    assert paper.troubles == [words]
    assert paper.replies == ["", "answer 1"]


async def test_ctrl_c_in_a_command_leaves_the_chat_going_on(served: Site) -> None:
    paper, lines = Paper(), Lines("/list", "/help")
    waiting = asyncio.Event()

    class Slow(ChatClient):
        async def conversations(self, *, search: str | None = None) -> AsyncGenerator[Conversation]:
            waiting.set()
            await asyncio.Event().wait()
            raise AssertionError
            yield  # pyright: ignore[reportUnreachable]

    async with Slow(served.url) as client, asyncio.TaskGroup() as group:
        running = group.create_task(Chat(client, paper, lines).run())
        await soon(waiting)
        lines.interrupt()
        lines.interrupt()
        await running
    assert paper.notes == ["(interrupted)", HELP]


async def test_what_is_typed_is_a_draft_where_the_message_will_be(served: Site) -> None:
    drafts: list[tuple[object, ...]] = []

    class Watched(ChatClient):
        def draft(self, conversation: object, parent: str | None, text: str) -> None:
            drafts.append((parent, text))

    async with Watched(served.url) as client:
        lines = Lines("hello")
        chat = Chat(client, Paper(), lines)
        chat.typing("before there is a conversation")
        await chat.run()
        chat.typing("/title not a message")
        chat.typing("")
        chat.typing("he")
        chat.typing("")
    leaf = next(iter(served.conversations.replies))
    assert drafts == [(leaf, "he"), (leaf, "")]


def test_lines_are_messages_and_commands() -> None:
    assert parsed("  \n ") is None
    assert parsed("two\nlines\n") == Message("two\nlines")
    assert parsed(" /open  3 ") == Command("open", "3")
    assert parsed("//x") == Message("/x")
    with pytest.raises(CommandError):
        parsed("/")
    with pytest.raises(CommandError):
        count("0", 3, "message")
    with pytest.raises(CommandError):
        count("²", 3, "message")
    assert count("3", 3, "message") == 3


@pytest.mark.parametrize(
    "name", ["new", "list", "open", "edit", "regen", "stop", "system", "title", "delete", "export"]
)
def test_every_command_is_in_the_help(name: str) -> None:
    assert f"/{name}" in HELP
    assert parsed(f"/{name}") == Command(name, "")
