"""Chat: the conversation at a terminal, one line after the other.

It may not know sockets, nor how lines are typed or shown. Theory of operation: what is known here
is the conversation, the turn that the next message follows (`_leaf`), and the last message that can
be answered anew (`_asked`); the tree is asked for where a command needs it. A new conversation
exists at the server from its first message on. An error ends the command that met it, not the chat.

A reply: the first Ctrl-C stops it, the second leaves it to the server.
"""

import asyncio
import time

from chatserve.client import ChatClient, ChatError, Conversation, Refused, Reply, Tree, Turn
from chatserve.terminal.clean_text import clean_line
from chatserve.terminal.commands import (
    HELP,
    Command,
    CommandError,
    Message,
    count,
    parsed,
)
from chatserve.terminal.conversation_file import read_file, write_file
from chatserve.terminal.line_input import LineDropped, LineSource
from chatserve.terminal.receipt_line import receipt_line
from chatserve.terminal.screen import Screen

LISTED_MAX = 50
_PROMPT = ">"
_TITLE_SHOWN_MAX = 60


class Chat:
    """One per run. `failed`: a message was not answered as it should be."""

    def __init__(self, client: ChatClient, screen: Screen, lines: LineSource) -> None:
        self.failed = False
        self._client = client
        self._screen = screen
        self._lines = lines
        self._conversation: Conversation | None = None
        self._leaf: str | None = None
        self._asked: str | None = None
        self._title: str | None = None  # of the next new conversation
        self._system: str | None = None
        self._listed: list[Conversation] = []
        self._next_line = ""  # what the next prompt begins with
        self._edited: Turn | None = None
        self._drafted = ""  # what the server was told last of the line

    def typing(self, text: str) -> None:
        """What is in the line now: the server may begin to read it."""
        drafted = "" if text.startswith("/") else text
        if self._conversation is not None and drafted != self._drafted:
            self._drafted = drafted
            parent = self._leaf if self._edited is None else self._edited.parent
            self._client.draft(self._conversation, parent, drafted)

    async def run(self) -> None:
        """Until the end of the lines, or /quit."""
        while True:
            default, self._next_line = self._next_line, ""
            prompt = _PROMPT if self._edited is None else "edit>"
            try:
                line = await self._lines.line(prompt, default)
            except EOFError:
                return
            except LineDropped:
                if self._edited is None:
                    self._screen.note("(Ctrl-D or /quit leaves)")
                self._edited = None
                continue
            try:
                if not await self._interruptible(line):
                    return
            except CommandError as error:
                self._screen.trouble(str(error))
            except ChatError as error:
                self.failed = True
                self._screen.trouble(told(error))

    async def open(self, conversation: str) -> None:
        """Show it, and the reply that runs in it. Raises ChatError."""
        tree = await self._client.open(conversation)
        self._take(tree)
        self._show(tree)
        running = [reply for reply in tree.replies if reply.running]
        if running:
            await self._follow(self._client.attach(tree.conversation, running[-1].id))

    async def _interruptible(self, line: str) -> bool:
        """As `_do`; Ctrl-C ends what waits, apart from replies, which it stops."""
        task = asyncio.current_task()
        assert task is not None, "in a task"
        interrupted = False

        def interrupt() -> None:
            nonlocal interrupted
            if not interrupted:
                interrupted = task.cancel()

        try:
            with self._lines.while_waiting(interrupt):
                return await self._do(line)
        except asyncio.CancelledError:
            if not interrupted or task.uncancel():
                raise
            self._screen.note("(interrupted)")
            return True

    async def _do(self, line: str) -> bool:
        """False: that was all."""
        wanted, edited = parsed(line), self._edited
        self._edited = None
        match wanted:
            case Message(text=text) if edited is not None:
                await self._send(text, edited.parent)
                await self._show_place()
            case Message(text=text):
                await self._send(text, self._leaf)
            case Command(name="quit"):
                return False
            case Command(name="help"):
                self._screen.note(HELP)
            case Command(name="stop"):
                await self._stop()
            case Command(name="new"):
                self._begin_anew(wanted.rest or None)
            case Command(name="open"):
                await self.open(self._chosen(wanted))
            case Command(name="list"):
                await self._list(wanted.rest)
            case Command(name="system"):
                await self._set_system(wanted.rest or None)
            case Command(name="title"):
                await self._set_title(wanted.rest)
            case Command(name="import"):
                await self._import(wanted.rest)
            case Command():
                await self._do_inside(wanted)
            case None:
                pass
        return True

    async def _do_inside(self, command: Command) -> None:
        """What needs a conversation."""
        conversation = self._current()
        match command.name:
            case "history":
                self._show(await self._client.open(conversation))
            case "edit":
                await self._edit(command)
            case "regen":
                if self._asked is None:
                    raise CommandError("There is no message to answer.")
                await self._follow(self._client.regenerate(conversation, self._asked))
                await self._show_place()
            case "branch":
                await self._branch(command)
            case "delete":
                await self._delete()
            case "export":
                await self._export(command.rest)
            case name:
                raise AssertionError(name)

    # Replies ---------------------------------------------------------------------------------

    async def _send(self, text: str, parent: str | None) -> None:
        if self._conversation is None:
            made = await self._client.create(title=self._title, system=self._system)
            self._conversation, self._title = made, None
        self._drafted = ""  # what was typed is a message now
        await self._follow(self._client.send(self._conversation, text, parent=parent))

    async def _follow(self, reply: Reply) -> None:
        """Show a reply to its end. Raises ChatError."""

        def stop() -> None:
            if reply.stop_wanted:
                self._screen.note("(left: the reply goes on at the server)")
                reply.close()
            else:
                self._screen.note("(stopping; once more leaves the reply to the server)")
                reply.stop()

        with reply, self._lines.while_replying(stop):
            try:
                with self._screen.reply() as view:
                    async for event in reply.events():
                        began = time.monotonic()
                        view.take(event)
                        drawn = time.monotonic() - began
                        # Drawing has a share of the time; the text merges meanwhile.
                        if self._screen.frame_seconds:
                            await asyncio.sleep(max(self._screen.frame_seconds, 3 * drawn))
            finally:
                if reply.turn is not None:
                    self._asked = reply.turn
            final = await reply.wait()
        assert reply.id is not None, "ended without an id"
        self._leaf = reply.id
        self._screen.note(receipt_line(final))

    async def _stop(self) -> None:
        """Outside of a reply: one that runs elsewhere."""
        tree = await self._client.open(self._current())
        running = [reply for reply in tree.replies if reply.running]
        if not running:
            raise CommandError("No reply is being written.")
        reply = self._client.attach(tree.conversation, running[-1].id)
        reply.stop()
        await self._follow(reply)

    # The tree --------------------------------------------------------------------------------

    def _take(self, tree: Tree) -> None:
        branch = tree.branch()
        asked = [turn for turn in branch if turn.role == "user"]
        self._conversation = tree.conversation
        self._asked = asked[-1].id if asked else None
        answers = [turn for turn in branch if turn.role == "assistant"]
        self._leaf = answers[-1].id if answers else None

    def _show(self, tree: Tree) -> None:
        self._screen.note(f"{_title(tree.conversation)}\n")
        number = 0
        for turn in tree.branch(self._leaf_in(tree)):
            own = turn.role == "user"
            number += own
            who = f"you {number}" if own else "chatserve"
            self._screen.said(f"{who}{_place(tree, turn)}", turn.text, own=own)

    def _leaf_in(self, tree: Tree) -> str | None:
        return self._leaf if tree.branch(self._leaf) else None

    async def _show_place(self) -> None:
        """After a reply that made a branch: which of how many."""
        tree = await self._client.open(self._current())
        branch = tree.branch(self._leaf)
        places = [_place(tree, turn) for turn in branch[-2:]]
        self._screen.note(" ".join(place.strip() for place in places if place))

    async def _own_turn(self, word: str | None) -> tuple[Tree, Turn, tuple[Turn, ...]]:
        """The tree, a message of the user's by its number, and the branch it is on."""
        tree = await self._client.open(self._current())
        branch = tree.branch(self._leaf_in(tree))
        own = [turn for turn in branch if turn.role == "user"]
        number = count(word or str(len(own)), len(own), "message")
        return tree, own[number - 1], branch

    async def _edit(self, command: Command) -> None:
        words = command.words
        _, turn, _ = await self._own_turn(words[0] if words else None)
        self._edited = turn
        self._next_line = turn.text

    async def _branch(self, command: Command) -> None:
        words = command.words
        if not words:
            raise CommandError("Which version? /branch K, or /branch K n")
        tree, turn, branch = await self._own_turn(words[1] if len(words) > 1 else None)
        versions = tree.siblings(turn)
        answers = [each for each in branch if each.parent == turn.id]
        if len(versions) < 2 and answers:
            versions = tree.siblings(answers[0])
        chosen = versions[count(words[0], len(versions), "version") - 1]
        leaf = tree.leaf_below(chosen)
        await self._client.update(tree.conversation, leaf=leaf.id)
        await self.open(tree.conversation.id)

    # Conversations ---------------------------------------------------------------------------

    def _current(self) -> Conversation:
        if self._conversation is None:
            raise CommandError("There is no conversation yet: say something, or /open one.")
        return self._conversation

    def _begin_anew(self, title: str | None) -> None:
        self._conversation = self._leaf = self._asked = self._system = None
        self._title = title
        self._screen.note("(a new conversation)")

    def _chosen(self, command: Command) -> str:
        word = command.rest
        if word.isdecimal() and self._listed:
            return self._listed[count(word, len(self._listed), "conversation") - 1].id
        if not word or len(word.split()) > 1:
            raise CommandError("Which one? /open N of the last /list, or /open ID")
        return word

    async def _list(self, search: str) -> None:
        self._listed = []
        async for conversation in self._client.conversations(search=search or None):
            self._listed.append(conversation)
            if len(self._listed) == LISTED_MAX:
                break
        rows = [
            f"{number:>3}  {_date(each.updated)}  {_title(each)}"
            for number, each in enumerate(self._listed, 1)
        ]
        if len(rows) == LISTED_MAX:
            rows.append("     … and older ones: /list with a part of a title or text")
        self._screen.note("\n".join(rows) or "(no conversations)")

    async def _set_system(self, text: str | None) -> None:
        if self._conversation is None:
            self._system = text
        else:
            self._conversation = await self._client.set_system(self._conversation, text)
        self._screen.note("(no system prompt)" if text is None else "(the system prompt is set)")

    async def _set_title(self, title: str) -> None:
        if not title:
            raise CommandError("Which title? /title TEXT")
        self._conversation = await self._client.update(self._current(), title=title)

    async def _delete(self) -> None:
        conversation = self._current()
        try:
            answer = await self._lines.line(f"delete “{_title(conversation)}”? (y/n)")
        except LineDropped:
            return
        if answer.strip().lower() in ("y", "yes"):
            await self._client.delete(conversation)
            self._listed = []
            self._begin_anew(None)

    async def _export(self, name: str) -> None:
        if not name:
            raise CommandError("Which file? /export FILE")
        write_file(name, await self._client.export_file(self._current()))
        self._screen.note(f"(written to {name})")

    async def _import(self, name: str) -> None:
        if not name:
            raise CommandError("Which file? /import FILE")
        made = await self._client.import_file(read_file(name))
        await self.open(made.id)


def told(error: ChatError) -> str:
    """One line that says what happened, and what can be done."""
    if isinstance(error, Refused) and error.status == 401:
        return "The server wants an API key: --key-file FILE, or CHATSERVE_API_KEY."
    again = f" Try again in {error.retry_after:.0f} s." if error.retry_after else ""
    return f"{error.message}{again}"


def _place(tree: Tree, turn: Turn) -> str:
    versions = tree.siblings(turn)
    if len(versions) < 2:
        return ""
    return f" ({versions.index(turn) + 1}/{len(versions)})"


def _title(conversation: Conversation) -> str:
    title = clean_line(conversation.title) or "(untitled)"
    return title if len(title) <= _TITLE_SHOWN_MAX else title[: _TITLE_SHOWN_MAX - 1] + "…"


def _date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "(no date)       "
