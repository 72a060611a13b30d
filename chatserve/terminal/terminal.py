"""`chatserve chat` from its options to its exit status: put together here, and nowhere else."""

import asyncio
import contextlib
import sys

from chatserve.client import ChatClient, ChatError, Unreachable
from chatserve.terminal.chat import Chat, told
from chatserve.terminal.line_input import Interrupts, line_source
from chatserve.terminal.options import ChatOptions
from chatserve.terminal.screen import Screen, screen_for

EXIT_FAILED = 1  # something that was said was not answered
EXIT_CANNOT_START = 2
EXIT_INTERRUPTED = 130  # as a shell says it


def run_chat(options: ChatOptions) -> int:
    """Until the user leaves; returns the exit status."""
    for file in (sys.stdout, sys.stderr):
        if hasattr(file, "reconfigure"):
            file.reconfigure(errors="replace")  # pyright: ignore
    screen = screen_for(sys.stdout)
    try:
        return asyncio.run(_run(options, screen))
    except ValueError as error:  # a URL or a key that is none
        screen.trouble(str(error))
        return EXIT_CANNOT_START
    except KeyboardInterrupt:  # before there was anything to talk to
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read us has gone
        sys.stdout = None
        return EXIT_FAILED


async def _run(options: ChatOptions, screen: Screen) -> int:
    interrupts = Interrupts()
    async with ChatClient(options.url, key=options.key) as client:
        if not await _welcome(client, options, screen):
            return EXIT_CANNOT_START
        with interrupts.installed():
            lines = line_source(interrupts, options.history)
            chat = Chat(client, screen, lines)
            if options.draft:
                lines.on_typing = chat.typing
            if options.conversation is not None:
                try:
                    await chat.open(options.conversation)
                except ChatError as error:
                    screen.trouble(told(error))
                    return EXIT_CANNOT_START
            await chat.run()
            return EXIT_FAILED if chat.failed else 0


async def _welcome(client: ChatClient, options: ChatOptions, screen: Screen) -> bool:
    """The first question to the server: is it there, and may we."""
    try:
        async with contextlib.aclosing(client.conversations()) as found:
            await anext(found, None)
    except Unreachable as error:
        screen.trouble(f"{error.message} Is a server running? chatserve serve starts one.")
        return False
    except ChatError as error:
        screen.trouble(told(error))
        return False
    if sys.stdin.isatty() and sys.stdout.isatty():
        screen.note(f"chatserve at {client.url} · /help shows the commands, Ctrl-D leaves")
    return True
