"""What a line means: a message, or a command with its words. Pure.

/new [title]   a new conversation      /edit [n]      change your n-th message, as a branch
//text         the message "/text"     …              see HELP
"""

import re
from dataclasses import dataclass

HELP = """\
/new [title]      begin a new conversation
/list [search]    your conversations, latest first
/open N | ID      one of the list, or by its id
/history          this conversation from its beginning
/edit [n]         change your n-th message (the last one), as a new branch
/regen            another answer to your last message
/branch K [n]     the K-th version of your n-th message (the last one), or of its answer
/stop             end a reply that is being written; so does Ctrl-C
/system [text]    the system prompt; without a text: none
/title TEXT       a new title
/delete           delete this conversation
/export FILE      write it to a file
/import FILE      a conversation from such a file
/help             this list
/quit             leave; so does Ctrl-D
//text            a message that begins with a slash

Enter sends, Alt-Enter begins a new line. Replies go on at the server when you leave."""

_NAMES = frozenset(re.findall(r"^/(\w+)", HELP, re.MULTILINE))


class CommandError(Exception):
    """What was typed means nothing; the message says why."""


@dataclass(frozen=True, slots=True)
class Message:
    """To be sent."""

    text: str


@dataclass(frozen=True, slots=True)
class Command:
    """name: without the slash. rest: what follows, without the spaces around it."""

    name: str
    rest: str

    @property
    def words(self) -> list[str]:
        """What follows, word by word."""
        return self.rest.split()


def parsed(line: str) -> Message | Command | None:
    """None: nothing was typed. Raises CommandError."""
    text = line.strip()
    if not text:
        return None
    if not text.startswith("/"):
        return Message(line.strip("\n"))
    if text.startswith("//"):
        return Message(text[1:])
    name, _, rest = text[1:].partition(" ")
    if name not in _NAMES:
        raise CommandError(f"There is no /{name}. /help shows what there is.")
    return Command(name, rest.strip())


def count(word: str, most: int, what: str) -> int:
    """A number from 1 to `most`. Raises CommandError."""
    if word.isascii() and word.isdecimal() and len(word) < 9 and 1 <= int(word) <= most:
        return int(word)
    if not most:
        raise CommandError(f"There is no {what}.")
    raise CommandError(f"The {what} is a number from 1 to {most}.")
