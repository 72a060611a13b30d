"""`chatserve chat` as a person has it: a real process on a real terminal, a real socket."""

import json
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from chatserve.chat.conversations.reply_events import ReplyProgress
from tests.api.fake_conversations import FakeChatReply
from tests.api.harness import Site, site, soon, until
from tests.client.cutting_proxy import cutting_proxy
from tests.terminal.pseudo_terminal import (
    PASTE_BEGINS,
    PASTE_ENDS,
    PseudoTerminal,
    terminal,
)

READY = "Ctrl-D leaves"
RECEIPT = "4 cached, 1 computed"


@pytest.fixture
async def served() -> AsyncGenerator[Site]:
    async with site() as running:
        yield running


@pytest.fixture
async def shown(served: Site, tmp_path: Path) -> AsyncGenerator[PseudoTerminal]:
    async with terminal(served.url, tmp_path) as made:
        await made.shows(READY)
        await made.asks()
        yield made


async def newest(served: Site, count: int) -> FakeChatReply:
    await until(lambda: len(served.conversations.replies) == count)
    return list(served.conversations.replies.values())[-1]


def finish(served: Site, reply: FakeChatReply) -> None:
    reply.finish()
    served.conversations.keep(reply)


async def test_a_message_is_answered_in_markdown_with_a_receipt(
    served: Site, shown: PseudoTerminal
) -> None:
    served.conversations.on_send = lambda reply: reply.progress.append(
        ReplyProgress(queued=0, prompt_tokens=2_048, computed=512)
    )
    shown.type("hello\r")
    reply = await newest(served, 1)
    await shown.shows("reading: 512 of 2,048 tokens")
    reply.say("# Pages\n\nA **page** is")
    await shown.shows("A page is")
    reply.say(" a run.\n\n- one\n- two\n")
    finish(served, reply)
    await shown.shows(f"{RECEIPT} · first token 250 ms · 2 tokens, 1/s")
    assert "•one" in shown.text
    assert "**" not in shown.text
    await shown.asks()
    shown.type("\x04")
    assert await shown.ends() == 0


async def test_ctrl_c_stops_the_reply_and_ctrl_d_leaves(
    served: Site, shown: PseudoTerminal
) -> None:
    shown.type("hello\r")
    reply = await newest(served, 1)
    reply.say("so far")
    await shown.shows("so far")
    shown.type("\x03")
    place = await shown.shows("stop_requested")
    await shown.asks()
    assert reply.final is not None
    shown.type("half a line\x03")
    place = await shown.shows("(Ctrl-D or /quit leaves)", after=place)
    await shown.asks()
    shown.type("/quit\r")
    assert await shown.ends() == 0
    assert len(served.conversations.sent) == 1


async def test_ctrl_d_in_mid_reply_leaves_at_its_end(served: Site, shown: PseudoTerminal) -> None:
    shown.type("hello\r")
    reply = await newest(served, 1)
    reply.say("so far")
    await shown.shows("so far")
    shown.type("\x04")
    reply.say(" and more")
    await shown.shows("and more")
    finish(served, reply)
    assert await shown.ends() == 0


async def test_a_second_ctrl_c_leaves_the_reply_to_the_server(served: Site, tmp_path: Path) -> None:
    async with cutting_proxy(served.port) as proxy, terminal(proxy.url, tmp_path) as shown:
        await shown.shows(READY)
        await shown.asks()
        shown.type("hello\r")
        reply = await newest(served, 1)
        reply.say("one")
        await shown.shows("one")
        proxy.refusing = True  # so that the stop cannot arrive
        proxy.cut_all()
        await shown.shows("Trying again")
        shown.type("\x03")
        await shown.shows("(stopping")
        shown.type("\x03")
        await shown.shows("goes on at the server")
        await shown.asks()
        proxy.refusing = False
        shown.type("/history\r")
        await shown.shows("you 1")
        assert reply.final is None


async def test_slash_stop_and_what_is_typed_ahead(served: Site, shown: PseudoTerminal) -> None:
    shown.type("hello\r")
    reply = await newest(served, 1)
    reply.say("first")
    place = await shown.shows("first")
    shown.type("and then?\n")
    shown.type("/stop\n")
    await soon(reply.left)
    place = await shown.shows("and then?", after=place)  # in the next line, to be sent or not
    shown.type("\r")
    await newest(served, 2)
    assert served.conversations.sent[-1].content == "and then?"


async def test_a_paste_of_many_lines_is_one_message(served: Site, shown: PseudoTerminal) -> None:
    shown.type(f"{PASTE_BEGINS}one\ntwo\n\nthree{PASTE_ENDS}")
    await shown.shows("three")
    shown.type("\x1b\rfour\r")
    await newest(served, 1)
    assert served.conversations.sent[-1].content == "one\ntwo\n\nthree\nfour"


async def test_lines_are_remembered_between_runs_and_are_their_owners_alone(
    served: Site, tmp_path: Path
) -> None:
    served.conversations.on_send = lambda reply: finish(served, reply)
    for run in (1, 2):
        async with terminal(served.url, tmp_path) as shown:
            await shown.shows(READY)
            await shown.asks()
            shown.type("\x1b[A" if run == 2 else "remember me")
            place = await shown.shows("remember me")
            shown.type("\r")
            await newest(served, run)
            await shown.shows(RECEIPT, after=place)
            await shown.asks()
            shown.type("\x04")
            assert await shown.ends() == 0
    assert [turn.content for turn in served.conversations.sent] == ["remember me"] * 2
    kept = tmp_path / "chatserve" / "chat_history"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert [json.loads(line) for line in kept.read_text().splitlines()] == ["remember me"]


async def test_an_edit_begins_with_the_old_text_and_shows_its_place(
    served: Site, shown: PseudoTerminal
) -> None:
    def answer(reply: FakeChatReply) -> None:
        reply.say("answer")
        finish(served, reply)

    served.conversations.on_send = answer
    shown.type("hello\r")
    place = await shown.shows(RECEIPT)
    await shown.asks()
    shown.type("/edit\r")
    place = await shown.shows("edit> hello", after=place)
    shown.type(" there\r")
    place = await shown.shows(RECEIPT, after=place)
    await shown.shows("(2/2)", after=place)
    turn = served.conversations.sent[-1]
    assert (turn.content, turn.parent, turn.at_leaf) == ("hello there", None, False)


async def test_a_models_escape_sequences_do_not_reach_the_terminal(
    served: Site, shown: PseudoTerminal
) -> None:
    attack = "\x1b]0;owned\x07 \x1b[31mred \x9b31m c1 \x1b]8;;http://evil\x07link \x08\x7f end"
    hostile = f"{attack}\n\n```\n{attack}\n```\n\n[text](http://evil/{attack}) &#27;[2J &#x202e;x"

    def answer(reply: FakeChatReply) -> None:
        reply.say(hostile)
        finish(served, reply)

    served.conversations.on_send = answer
    before = len(shown.raw)
    shown.type("hello\r")
    await shown.shows(RECEIPT)
    drawn = shown.raw[before:]
    assert b"\x1b]" not in drawn, "an operating system command"
    assert b"\x1b[31mred" not in drawn
    assert b"\x07" not in drawn
    assert b"\x1b[2J" not in drawn
    assert not {0x9B, 0x202E} & {ord(each) for each in drawn.decode()}
    assert "\u241b]0;owned\u2407" in shown.text


async def test_a_lost_connection_is_told_and_the_reply_goes_on(
    served: Site, tmp_path: Path
) -> None:
    async with cutting_proxy(served.port) as proxy, terminal(proxy.url, tmp_path) as shown:
        await shown.shows(READY)
        await shown.asks()
        shown.type("hello\r")
        reply = await newest(served, 1)
        reply.say("one")
        await shown.shows("one")
        proxy.refusing = True
        proxy.cut_all()
        await shown.shows("Trying again")
        proxy.refusing = False
        reply.say(" two")
        finish(served, reply)
        await shown.shows("one two")
        await shown.shows(RECEIPT)
