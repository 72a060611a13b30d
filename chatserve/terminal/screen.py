"""Screens: what the chat shows, on a terminal or into a file. They may not know the client's calls.

    PlainScreen   stdout is no terminal: replies as plain text, as they come; all else on stderr
    RichScreen    a terminal: markdown, progress, the receipt

Everything that came from the server is cleaned here, whatever it is.
"""

import sys
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.text import Text

from chatserve.client import ReplyEvent, ReplyProgress, ReplyWaiting, TextDelta, TextSnapshot
from chatserve.terminal.clean_text import clean, clean_line
from chatserve.terminal.markdown_view import Block, MarkdownView
from chatserve.terminal.receipt_line import progress_line

# On a terminal at most so many drawings a second; the text merges meanwhile.
FRAME_SECONDS = 1 / 16


class ReplyView(Protocol):
    """A reply on a screen, inside a `with` block."""

    def take(self, event: ReplyEvent) -> None:
        """Show what has happened."""
        ...


class Screen(Protocol):
    """Where the chat shows things."""

    frame_seconds: float

    def reply(self) -> AbstractContextManager[ReplyView]:
        """Show a reply for as long as the block lasts."""
        ...

    def said(self, heading: str, text: str, *, own: bool) -> None:
        """Show a turn that was said before."""
        ...

    def note(self, text: str) -> None:
        """Lines about something."""
        ...

    def trouble(self, text: str) -> None:
        """One line about what went wrong."""
        ...


class PlainScreen:
    """Two files."""

    frame_seconds = 0.0

    def __init__(self, out: TextIO, notes: TextIO) -> None:
        self._out = out
        self._notes = notes

    @contextmanager
    def reply(self) -> Generator[ReplyView]:
        view = _PlainView(self._out, self._notes)
        try:
            yield view
        finally:
            view.finish()

    def said(self, heading: str, text: str, *, own: bool) -> None:
        self.note(f"{heading}\n{text}\n")

    def note(self, text: str) -> None:
        print(clean(text), file=self._notes, flush=True)

    def trouble(self, text: str) -> None:
        print(f"chatserve: {clean_line(text)}", file=self._notes, flush=True)


class _PlainView:
    def __init__(self, out: TextIO, notes: TextIO) -> None:
        self._out = out
        self._notes = notes
        self._shown = ""
        self._echo = ""

    def take(self, event: ReplyEvent) -> None:
        match event:
            case TextDelta(text=text):
                self._write(text)
            case TextSnapshot(text=text):
                self._echo, self._shown = self._shown, ""
                self._write(text)
            case ReplyWaiting(reason=str(reason)):
                print(f"({clean_line(reason)})", file=self._notes, flush=True)
            case _:
                pass

    def finish(self) -> None:
        if self._echo and not self._echo.startswith(self._shown):
            self._say_again()
        if self._shown and not self._shown.endswith("\n"):
            self._out.write("\n")
        self._out.flush()

    def _write(self, text: str) -> None:
        self._shown += text
        if not self._echo:
            self._out.write(clean(text))
        elif self._shown.startswith(self._echo):
            self._out.write(clean(self._shown[len(self._echo) :]))
            self._echo = ""
        elif not self._echo.startswith(self._shown):
            self._say_again()
        self._out.flush()

    def _say_again(self) -> None:
        print("(the server lost a part: the reply from its beginning)", file=self._notes)
        self._echo = ""
        self._out.write("\n" + clean(self._shown))


class RichScreen:
    """A terminal."""

    frame_seconds = FRAME_SECONDS

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def reply(self) -> Generator[ReplyView]:
        self._console.print()
        with MarkdownView(self._console) as view:
            yield _RichView(view)

    def said(self, heading: str, text: str, *, own: bool) -> None:
        self._console.print(Text(clean_line(heading), style="bold cyan" if own else "bold"))
        self._console.print(Text(clean(text)) if own else Block(text))
        self._console.print()

    def note(self, text: str) -> None:
        self._console.print(Text(clean(text), style="dim"))

    def trouble(self, text: str) -> None:
        self._console.print(Text(clean_line(text), style="red"))


class _RichView:
    def __init__(self, view: MarkdownView) -> None:
        self._view = view
        self._text = ""

    def take(self, event: ReplyEvent) -> None:
        match event:
            case ReplyProgress():
                self._view.show_status(progress_line(event))
            case ReplyWaiting(reason=None):
                pass
            case ReplyWaiting(reason=reason):
                self._view.show_status(f"Trying again: {reason}")
            case TextDelta(text=text):
                self._text += clean(text)
                self._view.show(self._text)
            case TextSnapshot(text=text):
                replaced = not clean(text).startswith(self._text)
                self._text = clean(text)
                self._view.show(self._text, replaced=replaced)


def screen_for(out: TextIO) -> Screen:
    """A terminal's screen, or a file's."""
    if out.isatty():
        return RichScreen(Console(file=out, markup=False, emoji=False, highlight=False))
    return PlainScreen(out, sys.stderr)
