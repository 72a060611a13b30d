"""Drafts: what a user still types, computed ahead of the turn; a chat that is opened, likewise.

It may not know sockets, frames or pages. A Typist is one socket's: whatever it hears last counts.

    take ─▶ newest ─▶ its path (store, once a chat) ─▶ the engine is idle ─▶ ids ─▶ engine.draft
             ▲ newer text takes its place at any of these arrows

Theory of operation. Nothing is awaited of a draft, so everything may be left out: a store that is
away, a text too long for the context, a template that refuses. What waits for the engine to be
idle is the tokenization too, so that under load a typist costs a frame's parsing and no more, but
for one thing: what the conversation has on the device is held there for a while (`WishDoor.hold`),
by the names that its replies told the store, so that it is there when the text is sent. A draft
whose parent is still being written is tried again when the conversation changes.

Only the *settled* part of a text is computed: the ids of its prompt up to the last word's begin,
as far as another word there leaves them as they are. A text without white space (a long link,
Chinese) is settled but for its end. A rule that were wrong for some vocabulary would waste a page,
no more: pages are named by the ids that they hold.
"""

import asyncio
import re
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Container, Hashable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Generic, Protocol

from chatserve.chat.audience import Clock
from chatserve.chat.conversations.changes import Changes
from chatserve.chat.conversations.draft_ask import DraftAsk
from chatserve.chat.conversations.history import History
from chatserve.chat.conversations.wish_door import WishDoor
from chatserve.chat.service import PreparedT
from chatserve.chat.store.conversation import ReplyState, Role, Turn
from chatserve.chat.store.session_store import SessionStore, no_parent
from chatserve.engine.values import Request
from chatserve.engine.wishes import HOLD_SECONDS
from chatserve.errors import RequestError, Unavailable

NAMES_MAX = 1 << 16  # of what was computed ahead of kept conversations; the oldest are forgotten
TEXTS_MAX = 16 << 20  # code points that all typists' texts have while they wait
HOLD_AGAIN_SECONDS = HOLD_SECONDS / 4  # while something is typed
UNSETTLED_MAX = 32  # code points at a text's end that more typing may still change
_LAST_WORD = re.compile(r"\s+\S*\s*\Z")


class DraftDoor(Protocol[PreparedT]):
    """What drafts need of the engine floor."""

    def prepare(self, request: Request) -> PreparedT:
        """Pure, for any thread."""
        ...

    def page_names(self, prepared: PreparedT, tokens: Sequence[int]) -> tuple[bytes, ...]:
        """As `EngineDoor.page_names`."""
        ...

    def draft(self, key: Hashable, prepared: PreparedT) -> bool:
        """On the loop, never waits: in place of this key's draft before."""
        ...

    def withdraw(self, key: Hashable) -> None:
        """On the loop. Harmless where there is none."""
        ...

    async def wait_idle(self) -> None:
        """Until no request is there."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftMeans(Generic[PreparedT]):
    """What all typists share. wishes, clock: None where nothing is held for who types."""

    engine: DraftDoor[PreparedT]
    history: History
    store: SessionStore
    changes: Changes
    executor: Executor
    wishes: WishDoor[PreparedT] | None = None
    clock: Clock | None = None


@dataclass(slots=True)
class _Path:
    """Where a text goes. turns None: the reply before it is not there yet. told: names of the
    conversation's pages, None where the store was not asked yet; held: since when they are."""

    place: tuple[str | None, bool, str | None]
    system: str | None
    turns: tuple[Turn, ...] | None
    told: frozenset[bytes] | None = None
    held: float | None = None


@dataclass(frozen=True, slots=True)
class _Prepared(Generic[PreparedT]):
    """A draft as the engine takes it. names: of what will be kept of it."""

    request: PreparedT
    names: tuple[bytes, ...]


class Drafts(Generic[PreparedT]):
    """All typists of a process; on the event loop. One text at a time is tokenized, and only the
    typist whose turn that is waits for the engine to be idle: a pause lets one in, not a crowd."""

    def __init__(self, means: DraftMeans[PreparedT]) -> None:
        self.means = means
        self.places = asyncio.Semaphore(1)
        self._held = 0
        self._names: OrderedDict[str, set[bytes]] = OrderedDict()  # by conversation
        self._noted = 0
        self._typists: weakref.WeakSet[Typist[PreparedT]] = weakref.WeakSet()

    def typist(self, owner: str) -> "Typist[PreparedT]":
        """For one socket."""
        typist = Typist(self, owner)
        self._typists.add(typist)
        return typist

    def noted(self, conversation: str) -> frozenset[bytes]:
        """What was computed ahead for it, or will be."""
        return frozenset(self._names.get(conversation, ()))

    def note(self, conversation: str, names: Collection[bytes]) -> None:
        """This was computed ahead for it, or will be."""
        known = self._names.setdefault(conversation, set())
        before = len(known)
        known.update(names)
        self._noted += len(known) - before
        self._names.move_to_end(conversation)
        while self._noted > NAMES_MAX:
            self._noted -= len(self._names.popitem(last=False)[1])

    def forget(self, conversation: str) -> frozenset[bytes]:
        """It is deleted: nothing more is computed ahead for it. The names of what was."""
        for typist in tuple(self._typists):
            typist.leave(conversation)
        names = frozenset(self._names.pop(conversation, ()))
        self._noted -= len(names)
        return names

    def hold(self, text: str) -> bool:
        """Whether there is room for one more text; then it counts until `let_go`."""
        room = self._held + len(text) <= TEXTS_MAX
        self._held += len(text) * room
        return room

    def let_go(self, text: str) -> None:
        """A text waits no more."""
        self._held -= len(text)


class Typist(Generic[PreparedT]):
    """One socket's user. `take` what is typed; `run` is the task that acts on it."""

    def __init__(self, drafts: Drafts[PreparedT], owner: str) -> None:
        self._drafts = drafts
        self._means = drafts.means
        self._owner = owner
        self._newest: DraftAsk | None = None
        self._arrived = asyncio.Event()
        self._path: _Path | None = None
        self._too_early = False

    def take(self, ask: DraftAsk) -> None:
        """This counts, and nothing before it. Never waits."""
        self._forget(self._newest)
        if self._drafts.hold(ask.text):
            self._newest = ask
            self._arrived.set()

    async def run(self, failed: Callable[[Exception, str], None]) -> None:
        """Until cancelled. failed: is told of what cannot be, with the request of its ask."""
        with self._means.changes.listen(self._owner, self._hear):
            while True:
                await self._arrived.wait()
                self._arrived.clear()
                if self._newest is not None:
                    await self._act(self._newest, failed)

    def close(self) -> None:
        """The socket is gone, and `run` cancelled. Synchronous, idempotent."""
        self._forget(self._newest)
        self._means.engine.withdraw(self)

    async def _act(self, ask: DraftAsk, failed: Callable[[Exception, str], None]) -> None:
        try:
            self._too_early = not await self._compute(ask)
        except Unavailable:
            self._too_early = False
        except Exception as error:
            self._too_early = False
            failed(error, ask.request)
        if not self._too_early:
            self._forget(ask)

    async def _compute(self, ask: DraftAsk) -> bool:
        """False where the turn before it is still being written."""
        path = await self._find(ask)
        if ask.conversation is not None:
            await self._hold(ask.conversation, path)
        if path.turns is None:
            return False
        async with self._drafts.places:
            await self._means.engine.wait_idle()
            if self._newest is ask:
                prepared = await self._off_loop(path.system, path.turns, ask.text)
                there = ask.conversation is None or self._path is path  # else it has changed
                if prepared is not None and there:
                    if ask.conversation is not None:
                        self._drafts.note(ask.conversation, prepared.names)
                    self._means.engine.draft(self, prepared.request)
        return True

    async def _hold(self, conversation: str, path: _Path) -> None:
        """Nobody takes the pages of what was said here, while something is typed behind it."""
        wishes, clock = self._means.wishes, self._means.clock
        if wishes is None or clock is None:
            return
        if path.held is not None and clock.now() - path.held < HOLD_AGAIN_SECONDS:
            return
        if path.told is None:
            path.told = await self._means.store.page_names(conversation)
        path.held = clock.now()
        wishes.hold(path.told)

    def _forget(self, ask: DraftAsk | None) -> None:
        if ask is not None and self._newest is ask:
            self._drafts.let_go(ask.text)
            self._newest = None

    def leave(self, conversation: str) -> None:
        """This conversation is deleted, whatever is typed there."""
        if self._path is not None and self._path.place[0] == conversation:
            self._path = None
            self._means.engine.withdraw(self)

    def _hear(self, conversation: str) -> None:
        """A conversation of this owner has changed."""
        if self._path is not None and self._path.place[0] == conversation:
            self._path = None
            if self._too_early:
                self._arrived.set()

    # Where a text goes ---------------------------------------------------------------------

    async def _find(self, ask: DraftAsk) -> _Path:
        """Raises NotFound; asks the store once for each place, until its conversation changes."""
        place = (ask.conversation, ask.at_leaf, ask.parent)
        if ask.conversation is None:
            return _Path(place, ask.system, ())
        while self._path is None or self._path.place != place:
            reading = self._path = _Path(place, None, None)  # forgotten if it changes meanwhile
            try:
                known, turns, replies = await self._means.store.tree(self._owner, ask.conversation)
                running = {reply.id for reply in replies if reply.state is ReplyState.RUNNING}
                parent = known.leaf if ask.at_leaf else ask.parent
                path = path_to(parent, {turn.id: turn for turn in turns}, running)
            except BaseException:
                self._path = None
                raise
            if self._path is reading:
                self._path = _Path(place, known.system, path)
        return self._path

    def _off_loop(
        self, system: str | None, turns: Sequence[Turn], text: str
    ) -> "asyncio.Future[_Prepared[PreparedT] | None]":
        loop = asyncio.get_running_loop()
        try:
            return loop.run_in_executor(self._means.executor, self._prepare, system, turns, text)
        except RuntimeError as error:  # the executor's way to say that it was shut down
            raise Unavailable("The server is shutting down.") from error

    def _prepare(
        self, system: str | None, turns: Sequence[Turn], text: str
    ) -> "_Prepared[PreparedT] | None":
        """In a thread. None: there is nothing to compute ahead."""
        try:
            tokens = settled_ids(self._means.history, system, turns, text)
        except RequestError:
            return None
        if not tokens:
            return None
        request = Request(request_id="draft", tokens=tokens, max_tokens=0, tenant=self._owner)
        prepared = self._means.engine.prepare(request)
        return _Prepared(prepared, self._means.engine.page_names(prepared, tokens))


def settled_ids(
    history: History, system: str | None, turns: Sequence[Turn], text: str
) -> tuple[int, ...]:
    """The first ids of the prompt that a text behind these turns will have, whatever follows it.

    Raises RequestError where there is no such prompt.
    """
    kept = _settled(text)
    rest = text[len(kept) :] if text.strip() else "x"
    # Another word behind other white space, so that nothing of it is alike.
    other = "\n" if rest.startswith(" ") else " "
    other += "x" if rest.lstrip().startswith("1") else "1"
    ids = history.prompt(system, (*turns, _typed(kept + rest))).tokens
    others = history.prompt(system, (*turns, _typed(kept + other))).tokens
    pairs = enumerate(zip(ids, others, strict=False))
    same = next((at for at, (one, two) in pairs if one != two), min(len(ids), len(others)))
    return ids[: max(0, same - 1)]  # a lone space may be alike, and join with what follows


def _settled(text: str) -> str:
    """A text without its last word, or without its end where that is a very long word."""
    found = _LAST_WORD.search(text, max(0, len(text) - UNSETTLED_MAX))
    return text[: max(0, len(text) - UNSETTLED_MAX) if found is None else found.start()]


def _typed(text: str) -> Turn:
    return Turn(id="draft", parent=None, role=Role.USER, text=text, created=0.0)


def path_to(
    parent: str | None, turns: Mapping[str, Turn], running: Container[str]
) -> tuple[Turn, ...] | None:
    """From the first message to `parent`; None where that is a reply that runs, or awaits one.
    Raises NotFound where it is no turn."""
    path: list[Turn] = []
    name = parent
    if name is not None and name in running:
        return None
    while name is not None:
        turn = turns.get(name)
        if turn is None:
            raise no_parent()
        path.append(turn)
        name = turn.parent
    awaits = path and path[0].role is Role.USER
    return None if awaits else tuple(reversed(path))
