"""`chatserve chat` on a terminal of its own: what is typed, and what it draws."""

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path

PATIENCE_SECONDS = 15.0
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|[\r\x08]")
PASTE_BEGINS, PASTE_ENDS = "\x1b[200~", "\x1b[201~"


class PseudoTerminal:
    """One process on a terminal of 24 rows and 80 columns."""

    def __init__(self, process: asyncio.subprocess.Process, file: int) -> None:
        self.process = process
        self.raw = b""
        self._file = file
        self._asked = 0
        self._news = asyncio.Event()
        asyncio.get_running_loop().add_reader(file, self._read)

    @property
    def text(self) -> str:
        """All that was drawn, without what steers the terminal, and without white space: editors
        go on in a line by moving the cursor as well as by spaces."""
        return "".join(_CONTROL.sub("", self.raw.decode("utf-8", "replace")).split())

    @property
    def end(self) -> int:
        """Where what is drawn from now on begins."""
        return len(self.text)

    async def asks(self) -> None:
        """Wait until a line can be typed: as often as there were lines before, and once more."""
        self._asked += 1
        async with asyncio.timeout(PATIENCE_SECONDS):
            while self.raw.count(b"\x1b[?2004h") < self._asked:
                self._news.clear()
                await self._news.wait()

    def type(self, keys: str) -> None:
        os.write(self._file, keys.encode())

    async def shows(self, wanted: str, *, after: int = 0) -> int:
        """Wait until this is drawn beyond a place; returns the place behind it."""
        wanted = "".join(wanted.split())
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while (found := self.text.find(wanted, after)) < 0:
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise AssertionError(f"{wanted!r} is not in {self.text[after:]!r}") from None
        return found + len(wanted)

    async def ends(self) -> int:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self.process.wait()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._file)
        os.close(self._file)

    def _read(self) -> None:
        try:
            piece = os.read(self._file, 65_536)
        except OSError:  # the other side is closed
            piece = b""
        if not piece:
            asyncio.get_running_loop().remove_reader(self._file)
        self.raw += piece
        self._news.set()


def environment(folder: Path) -> Mapping[str, str]:
    """Without what the machine's user has set; the editor asks the terminal nothing."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return kept | {
        "TERM": "xterm",
        "LANG": "C.UTF-8",
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "XDG_STATE_HOME": str(folder),
    }


def command(url: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "chatserve", "chat", "--url", url, *options]


@contextlib.asynccontextmanager
async def terminal(url: str, folder: Path, *options: str) -> AsyncGenerator[PseudoTerminal]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = await asyncio.create_subprocess_exec(
        *command(url, *options),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(folder),
        preexec_fn=_take_terminal,
        start_new_session=True,
    )
    os.close(theirs)
    shown = PseudoTerminal(process, ours)
    try:
        yield shown
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            await process.wait()
        shown.close()


def _take_terminal() -> None:
    """Make it the process's own, so that Ctrl-C is a signal to it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
