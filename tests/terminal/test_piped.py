"""`chatserve chat` between pipes: what goes in and out, and with which status it ends."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

import pytest

from chatserve.api.keys import key_ring
from tests.api.fake_conversations import FakeChatReply
from tests.api.harness import PATIENCE_SECONDS, Site, free_socket, site
from tests.terminal.pseudo_terminal import command, environment


@dataclass(frozen=True)
class Ended:
    status: int | None
    out: str
    notes: str


async def piped(url: str, folder: Path, said: str, *options: str, key: str = "") -> Ended:
    process = await asyncio.create_subprocess_exec(
        *command(url, *options),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**environment(folder), "CHATSERVE_API_KEY": key},
    )
    async with asyncio.timeout(3 * PATIENCE_SECONDS):
        out, notes = await process.communicate(said.encode())
    return Ended(process.returncode, out.decode(), notes.decode())


@pytest.fixture
async def served() -> AsyncGenerator[Site]:
    async with site() as running:

        def answer(reply: FakeChatReply) -> None:
            reply.say(f"**answer** to {running.conversations.sent[-1].content}\x1b[31m\x9b1m")
            reply.finish()
            running.conversations.keep(reply)

        running.conversations.on_send = answer
        yield running


async def test_each_line_is_answered_in_plain_text(served: Site, tmp_path: Path) -> None:
    ended = await piped(served.url, tmp_path, "one\n\ntwo\r\nlast")
    assert ended.status == 0
    assert ended.out.splitlines() == [
        f"**answer** to {each}\u241b[31m\ufffd1m" for each in ("one", "two", "last")
    ]
    assert "\x1b" not in ended.notes
    assert ended.notes.count("4 cached, 1 computed") == 3
    assert len(served.conversations.known) == 1


async def test_a_known_conversation_goes_on(served: Site, tmp_path: Path) -> None:
    await piped(served.url, tmp_path, "one\n")
    ended = await piped(served.url, tmp_path, "two\n", "--conversation", "c1")
    assert ended.status == 0
    assert "you 1\none" in ended.notes
    assert served.conversations.sent[-1].parent is not None
    absent = await piped(served.url, tmp_path, "two\n", "--conversation", "nobody")
    assert (absent.status, absent.out) == (2, "")
    assert "no such conversation" in absent.notes


async def test_no_server_is_said_in_one_line(tmp_path: Path) -> None:
    with free_socket() as unused:
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        ended = await piped(url, tmp_path, "one\n")
    assert (ended.status, ended.out) == (2, "")
    assert ended.notes.splitlines() == [
        f"chatserve: Nothing answers at {url}: connection refused. "
        "Is a server running? chatserve serve starts one."
    ]


async def test_a_key_comes_from_a_file_or_the_environment(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret-key\n")
    (tmp_path / "broken").write_text("two words\n")
    async with site(keys=key_ring(api_key="secret-key", key_file=None)) as served:
        without = await piped(served.url, tmp_path, "/list\n")
        by_file = await piped(served.url, tmp_path, "/list\n", "--key-file", f"{tmp_path}/key")
        by_name = await piped(served.url, tmp_path, "/list\n", key="secret-key")
        broken = await piped(served.url, tmp_path, "/list\n", "--key-file", f"{tmp_path}/broken")
        absent = await piped(served.url, tmp_path, "/list\n", "--key-file", f"{tmp_path}/none")
    assert without.status == 2
    assert "wants an API key" in without.notes
    assert (by_file.status, by_name.status) == (0, 0)
    assert "(no conversations)" in by_file.notes
    assert (broken.status, absent.status) == (2, 2)
    assert "holds no key" in broken.notes
    assert "two words" not in broken.notes


async def test_a_message_that_was_not_answered_shows_in_the_status(
    served: Site, tmp_path: Path
) -> None:
    data = {"code": "numerical_fault", "message": "NaN", "retry_after": None}
    served.conversations.on_send = lambda reply: (reply.say("so far"), reply.finish("failed", data))
    ended = await piped(served.url, tmp_path, "one\n")
    assert (ended.status, ended.out) == (1, "so far\n")
    assert ended.notes == "chatserve: NaN\n"


async def test_a_wrong_url_is_said(tmp_path: Path) -> None:
    ended = await piped("localhost:8000", tmp_path, "one\n")
    assert ended.status == 2
    assert "http://" in ended.notes
