"""What reaches a terminal, without one: cleaned text, settled blocks, lines about replies."""

import io
import random
import re
import sys

import pytest
from rich.console import Console

from chatserve.client import Final, Receipt, ReplyProgress, Timings, Usage
from chatserve.client.values import TextDelta, TextSnapshot
from chatserve.terminal.clean_text import clean, clean_line
from chatserve.terminal.markdown_view import (
    BLOCK_CHARACTERS_MAX,
    Block,
    MarkdownView,
    settled_length,
)
from chatserve.terminal.receipt_line import progress_line, receipt_line, tokens_per_second
from chatserve.terminal.screen import PlainScreen

# What the drawing itself may send to a terminal without colours: to a line's begin, up, erase,
# cursor off and on.
OWN_CONTROLS = re.compile(r"\r|\x1b\[(1A|2K|\?25[lh])")
FORBIDDEN = [
    *(chr(code) for code in range(0x20) if chr(code) not in "\n\t"),
    *(chr(code) for code in range(0x7F, 0xA0)),
    *"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c",
    "\ud800",
    "\udfff",
    "\U000e0041",
]
ATTACK = "\x1b[2J\x1b]52;c;ZXZpbA==\x07\x9b31m\u202eevil\u2028\x08\x7f\r"


def test_nothing_that_steers_a_terminal_is_left() -> None:
    assert len(FORBIDDEN) > 70
    for each in FORBIDDEN:
        assert each not in clean(f"a{each}b"), hex(ord(each))
        assert each not in clean_line(f"a{each}b"), hex(ord(each))
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    assert not set(clean(every)) & set(FORBIDDEN)
    assert "\n" not in clean_line("a\nb\u2028c\vd")


def test_text_is_left_as_it_is() -> None:
    text = "a\tb\n é ü \U0001f600 \u0645\u0631 \u05e9 e\u0301 \u200d"
    assert clean(text) == text


def test_piece_by_piece_gives_the_same_as_in_one() -> None:
    text = ATTACK * 10
    dice = random.Random(5)
    pieces, place = [], 0
    while place < len(text):
        step = dice.randrange(1, 4)
        pieces.append(clean(text[place : place + step]))
        place += step
    assert "".join(pieces) == clean(text)


def drawn(text: str, *, step: int = 7) -> str:
    """What a terminal gets of a reply that comes in pieces."""
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=True, color_system=None, width=60, height=12, markup=False
    )
    with MarkdownView(console) as view:
        for place in range(0, len(text) + step, step):
            view.show(clean(text[:place]))
    return out.getvalue()


MARKDOWN = f"""# One {ATTACK}

A paragraph {ATTACK} with `code {ATTACK}` and [a link](http://x/{ATTACK} "t{ATTACK}").

```{ATTACK}
code {ATTACK}
```

| a{ATTACK} | b |
|---|---|
| 1 | 2{ATTACK} |

> quote {ATTACK}

1. one {ATTACK}
2. &#27;[31m &#x9b;31m &#x202e; &#7; &lrm; &rlm;

<b>{ATTACK}</b> <http://auto/{ATTACK}> ![image {ATTACK}](http://y)
"""


def test_markdown_draws_no_control_of_the_texts() -> None:
    shown = OWN_CONTROLS.sub("", drawn(MARKDOWN))
    assert not set(shown) & set(FORBIDDEN)
    assert "evil" in shown


def test_settled_blocks_are_drawn_once_and_whole() -> None:
    blocks = [f"Paragraph {number} has words." for number in range(30)]
    shown = drawn("\n\n".join(blocks))
    tail = OWN_CONTROLS.sub("", shown)
    for block in blocks:
        assert tail.count(f"{block}\n") >= 1
    # Once a block is settled it is not drawn again: what follows it is drawn after it.
    last = [tail.rfind(block) for block in blocks]
    assert last == sorted(last)
    assert len(shown) < 40 * len("\n\n".join(blocks))


@pytest.mark.parametrize(
    ("text", "settled"),
    [
        ("", ""),
        ("one", ""),
        ("one\n\n", ""),
        ("one\n\ntwo", "one\n\n"),
        ("- a\n- b\n\n- c", ""),
        ("- a\n\nafter", "- a\n\n"),
        ("```\na\n\nb", ""),
        ("```\na\n```\nafter", "```\na\n```\n"),
        ("| a |\n|---|\n| 1 |\n", ""),
        ("a\n\n# b\n\nc\n\nd", "a\n\n# b\n\nc\n\n"),
    ],
)
def test_a_block_is_settled_when_the_next_begins(text: str, settled: str) -> None:
    assert text[: settled_length(text)] == settled


@pytest.mark.parametrize(
    "text",
    ["[" * 3_000, ">" * 3_000, "*a_" * 1_000, "- " * 1_500, "x" * (BLOCK_CHARACTERS_MAX + 1)],
)
def test_a_text_that_is_hard_to_draw_is_drawn_all_the_same(text: str) -> None:
    console = Console(file=io.StringIO(), width=60, color_system=None)
    console.print(Block(text, rows_max=5))
    assert drawn(text, step=len(text) // 3)


def test_a_long_last_block_shows_its_end() -> None:
    out = io.StringIO()
    console = Console(file=out, width=60, color_system=None)
    console.print(Block("\n".join(f"    line {n}" for n in range(100)), rows_max=5))
    assert "line 99" in out.getvalue()
    assert "line 90" not in out.getvalue()


def test_a_file_gets_the_text_and_no_control() -> None:
    out, notes = io.StringIO(), io.StringIO()
    with PlainScreen(out, notes).reply() as view:
        view.take(TextDelta(text=f"**one** {ATTACK}"))
        view.take(TextDelta(text=" two"))
        view.take(TextSnapshot(text="**one** "))
        view.take(TextDelta(text=f"{ATTACK} two three"))
    assert out.getvalue() == f"**one** {clean(ATTACK)} two three\n"
    assert not set(out.getvalue()) & set(FORBIDDEN)
    assert notes.getvalue() == ""


def test_a_file_is_told_when_the_text_is_another() -> None:
    out, notes = io.StringIO(), io.StringIO()
    with PlainScreen(out, notes).reply() as view:
        view.take(TextDelta(text="one two"))
        view.take(TextSnapshot(text="one"))
        view.take(TextDelta(text=" three"))
    assert out.getvalue() == "one two\none three\n"
    assert "from its beginning" in notes.getvalue()


def final(**timings: float) -> Final:
    return Final(
        finish_reason="length",
        usage=Usage(prompt_tokens=1_162, completion_tokens=101),
        receipt=Receipt(device=1_000, disk=150, computed=12, left_out=2),
        timings=Timings(**timings),
    )


def test_the_receipts_line_says_what_was_cached_and_how_fast_it_went() -> None:
    assert receipt_line(final(to_first_token=0.0131, total=1.0131)) == (
        "prompt 1,162 tokens: 1,150 cached, 12 computed · 2 old turns left out · "
        "first token 13 ms · 101 tokens, 100/s · length"
    )
    assert "first token 2.50 s" in receipt_line(final(to_first_token=2.5, total=3.0))
    assert tokens_per_second(final(to_first_token=1.0, total=1.0)) is None
    assert "first token" not in receipt_line(final(total=1.0))


def test_progress_is_the_queue_and_then_the_prompt() -> None:
    queued = ReplyProgress(queued=3, prompt_tokens=10, computed=0)
    assert progress_line(queued) == "waiting: 3 before this one"
    reading = ReplyProgress(queued=0, prompt_tokens=2_048, computed=512)
    assert progress_line(reading) == "reading: 512 of 2,048 tokens"
