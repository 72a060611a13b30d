"""Markdown as it comes: settled blocks are printed once, the last block is drawn again.

It may not know replies. Theory of operation: CommonMark's top-level blocks only change at their
end, so all but the last one are settled as soon as another begins. The last one is drawn in a
region that is erased for the next drawing, cut to the window's height, and printed whole when it is
settled. What is drawn is cleaned after rendering once more, because markdown has spellings
for characters (`&#x202e;`) that the text itself does not show.
"""

from collections.abc import Iterable
from typing import Self

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from chatserve.terminal.clean_text import clean, clean_line

# A block that is longer is shown as it is written: rendering takes time that grows with it.
BLOCK_CHARACTERS_MAX = 20_000
_ROWS_BELOW = 2  # of the window that the drawn block leaves free

_BLOCKS = MarkdownIt().enable("table")


def settled_length(text: str) -> int:
    """Characters of the blocks that no further text can change."""
    if len(text) > BLOCK_CHARACTERS_MAX:
        return text.rfind("\n") + 1
    starts = [
        token.map[0]
        for token in _BLOCKS.parse(text)
        if token.level == 0 and token.map is not None and token.nesting >= 0
    ]
    if len(starts) < 2:
        return 0
    return sum(len(line) + 1 for line in text.split("\n")[: starts[-1]])


class Block:
    """A renderable: markdown, cleaned, at most so many rows of its end."""

    def __init__(self, text: str, *, rows_max: int | None = None) -> None:
        self._text = clean(text)
        self._rows_max = rows_max

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        plain = len(self._text) > BLOCK_CHARACTERS_MAX
        content: RenderableType = Text(self._text) if plain else _markdown(self._text)
        try:
            lines = console.render_lines(content, options, pad=False)
        except (RecursionError, ValueError):  # what the renderer cannot do
            lines = console.render_lines(Text(self._text), options, pad=False)
        if self._rows_max is not None:
            lines = lines[-self._rows_max :]
        for line in lines:
            yield from _without_padding(list(_cleaned(line)))
            yield Segment.line()


def _markdown(text: str) -> Markdown:
    # A link's address is shown: what a terminal would open is what one sees.
    return Markdown(text, hyperlinks=False)


def _cleaned(segments: Iterable[Segment]) -> Iterable[Segment]:
    for segment in segments:
        if segment.control is None:
            yield Segment(clean(segment.text).replace("\n", " "), segment.style)


def _without_padding(line: list[Segment]) -> Iterable[Segment]:
    """Who copies a line does not want the spaces to the window's edge; a coloured edge stays."""
    while line and not line[-1].text.strip(" ") and not _has_background(line[-1]):
        line.pop()
    if line and not _has_background(line[-1]):
        line[-1] = Segment(line[-1].text.rstrip(" "), line[-1].style)
    return line


def _has_background(segment: Segment) -> bool:
    return segment.style is not None and segment.style.bgcolor is not None


class MarkdownView:
    """A growing text on a terminal, inside a `with` block; the rest is printed at its end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self._text = ""
        self._settled = 0
        self._begun = False

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        rest = self._text[self._settled :]
        self._live.update(Text(""))
        self._live.stop()
        if rest.strip():
            self._print(rest)

    def show_status(self, status: str) -> None:
        """A line below the last block."""
        self._draw(status)

    def show(self, text: str, *, replaced: bool = False) -> None:
        """The whole text so far; replaced: it does not begin as what was shown."""
        if replaced:
            self._print_line("(the server lost a part: the reply from its beginning)")
            self._settled, self._begun = 0, False
        self._text = text
        length = settled_length(text[self._settled :])
        if length:
            self._print(text[self._settled : self._settled + length])
            self._settled += length
        self._draw("")

    def _print(self, text: str) -> None:
        if self._begun:
            self._console.print()
        self._begun = True
        self._console.print(Block(text.strip("\n")), end="")

    def _print_line(self, line: str) -> None:
        self._console.print(Text(line, style="dim"))

    def _draw(self, status: str) -> None:
        rows = max(1, self._console.height - _ROWS_BELOW)
        rest = self._text[self._settled :].strip("\n")
        shown: list[RenderableType] = [Block(rest, rows_max=rows)] if rest else []
        if status:
            shown.append(Text(clean_line(status), style="dim", no_wrap=True, overflow="ellipsis"))
        self._live.update(Group(*shown), refresh=True)
