"""Where typed lines come from: a terminal with an editor, or a file. It may not know the chat.

    TypedLines   a terminal: prompt_toolkit edits; pasted lines stay together (bracketed paste),
                 Enter sends, Alt-Enter breaks the line, the arrows bring back what was typed
    FileLines    a pipe or a file: one message a line

prompt_toolkit and not `input()`: that one waits in a thread which nothing ends, so Ctrl-C and a
clean exit are not to be had with it, it sends a paste line by line, and it does not tell what is
being typed (`on_typing`, for drafts).

Theory of operation: `line` gives the next line, or raises EOFError (Ctrl-D), LineDropped (Ctrl-C).
`while_replying` is a `with` block during which Ctrl-C calls `on_stop`, and so does a line "/stop";
on a terminal nothing is echoed there, and what else was typed is the beginning of the next line.
`while_waiting` is one for everything else that waits.
"""

import asyncio
import contextlib
import os
import signal
import sys
import termios
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.formatted_text import ANSI
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from chatserve.terminal.line_history import LineHistory

LINE_BYTES_MAX = 4 * 1024 * 1024
_READ_BYTES = 65_536
_STOP = "/stop"


class LineDropped(Exception):
    """Ctrl-C while a line was being typed."""


class LineSource(Protocol):
    """See the module. on_typing is given the text at each change of it."""

    on_typing: Callable[[str], None]

    async def line(self, prompt: str, default: str = "") -> str:
        """The next line. Raises EOFError, LineDropped."""
        ...

    def while_replying(self, on_stop: Callable[[], None]) -> AbstractContextManager[None]:
        """A block during which a reply can be stopped."""
        ...

    def while_waiting(self, on_interrupt: Callable[[], None]) -> AbstractContextManager[None]:
        """A block that Ctrl-C ends."""
        ...


class Interrupts:
    """Ctrl-C, as long as we run: it does what was last asked for, and never ends the process."""

    def __init__(self) -> None:
        self._act: Callable[[], None] | None = None

    @contextlib.contextmanager
    def installed(self) -> Generator[None]:
        """For the whole run."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._interrupted)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    @contextlib.contextmanager
    def doing(self, act: Callable[[], None]) -> Generator[None]:
        """Within the block an interrupt calls this."""
        before, self._act = self._act, act
        try:
            yield
        finally:
            self._act = before

    def _interrupted(self) -> None:
        if self._act is not None:
            self._act()


class TypedLines:
    """A terminal."""

    def __init__(self, interrupts: Interrupts, history: Path | None) -> None:
        self.on_typing = _ignore
        self._interrupts = interrupts
        self._ahead = bytearray()  # typed while a reply was written
        self._ended = False  # Ctrl-D, while a reply was written
        self._session: PromptSession[str] = PromptSession(
            history=LineHistory(history),
            key_bindings=_bindings(),
            multiline=True,
            prompt_continuation="  ",
            enable_history_search=False,
        )
        self._session.default_buffer.on_text_changed += self._changed

    def _changed(self, buffer: Buffer) -> None:
        self.on_typing(buffer.text)

    async def line(self, prompt: str, default: str = "") -> str:
        """What is typed until Enter."""
        if self._ended:
            raise EOFError
        ahead, self._ahead = self._ahead.decode("utf-8", "replace"), bytearray()
        try:
            return await self._session.prompt_async(
                ANSI(f"\x1b[1;36m{prompt}\x1b[0m "),
                default=default or ahead.rstrip("\n"),
                handle_sigint=False,
            )
        except KeyboardInterrupt:
            raise LineDropped from None

    @contextlib.contextmanager
    def while_replying(self, on_stop: Callable[[], None]) -> Generator[None]:
        """Reads what is typed, without showing it."""
        file, loop = sys.stdin.fileno(), asyncio.get_running_loop()

        def read() -> None:
            piece = os.read(file, _READ_BYTES)
            if not piece:
                self._ended = True
                loop.remove_reader(file)
                return
            if piece.decode("utf-8", "replace").strip() == _STOP:
                on_stop()
            elif len(self._ahead) + len(piece) <= LINE_BYTES_MAX:
                self._ahead += piece

        with self._interrupts.doing(on_stop), _without_echo(file):
            loop.add_reader(file, read)
            try:
                yield
            finally:
                loop.remove_reader(file)

    def while_waiting(self, on_interrupt: Callable[[], None]) -> AbstractContextManager[None]:
        """Ctrl-C alone is looked at."""
        return self._interrupts.doing(on_interrupt)


def _ignore(text: str) -> None:
    """Nobody wants to know."""


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _send(event: KeyPressEvent) -> None:  # pyright: ignore[reportUnusedFunction]
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _break(event: KeyPressEvent) -> None:  # pyright: ignore[reportUnusedFunction]
        event.current_buffer.insert_text("\n")

    return bindings


@contextlib.contextmanager
def _without_echo(file: int) -> Generator[None]:
    before = termios.tcgetattr(file)
    quiet = termios.tcgetattr(file)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(file, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(file, termios.TCSANOW, before)


class FileLines:
    """A pipe or a file, by its descriptor."""

    def __init__(self, interrupts: Interrupts, file: int) -> None:
        self.on_typing = _ignore  # never called
        self._interrupts = interrupts
        self._file = file
        self._read = bytearray()
        self._ended = False

    async def line(self, prompt: str, default: str = "") -> str:
        """The next line of the file; prompt and default are for people."""
        while (end := self._read.find(b"\n")) < 0 and not self._ended:
            await self._readable()
            piece = os.read(self._file, _READ_BYTES)
            self._ended = not piece
            self._read += piece
            if len(self._read) > LINE_BYTES_MAX:
                raise EOFError(f"A line has at most {LINE_BYTES_MAX} bytes.")
        if not self._read:
            raise EOFError
        size = len(self._read) if end < 0 else end + 1
        line = bytes(self._read[:size])
        del self._read[:size]
        return line.decode("utf-8", "replace").rstrip("\r\n")

    async def _readable(self) -> None:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        interrupted = False

        def interrupt() -> None:
            nonlocal interrupted
            interrupted = True
            ready.set()

        try:
            loop.add_reader(self._file, ready.set)
        except PermissionError:  # a plain file can always be read
            return
        try:
            with self._interrupts.doing(interrupt):
                await ready.wait()
        finally:
            loop.remove_reader(self._file)
        if interrupted:
            raise EOFError

    @contextlib.contextmanager
    def while_replying(self, on_stop: Callable[[], None]) -> Generator[None]:
        """Nothing is read meanwhile."""
        with self._interrupts.doing(on_stop):
            yield

    def while_waiting(self, on_interrupt: Callable[[], None]) -> AbstractContextManager[None]:
        """Ctrl-C alone is looked at."""
        return self._interrupts.doing(on_interrupt)


def line_source(interrupts: Interrupts, history: Path | None) -> LineSource:
    """Standard input's."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return TypedLines(interrupts, history)
    return FileLines(interrupts, sys.stdin.fileno())
