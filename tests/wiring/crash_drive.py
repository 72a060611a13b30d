"""Chats under load on a server that is killed -9: what clients were told, against what was kept.

Theory of operation. A number of chatters talk without end, each through one conversation of a
script after the other, by SSE and by socket, over connections that are cut at random bytes too. A
chatter does what a client should: it repeats a turn under the same id until that is accepted, comes
back to a reply until that has ended, and sometimes forgets all and sends the turn again. What it
was told is in its `Chat`. Beside them one task kills the server and starts it again:

    place       the kill falls
    ACCEPT      up to 30 ms after some turn was sent
    STREAMING   up to 30 ms after some piece of text arrived
    ENDING      up to 10 ms after some final event arrived (replies end by the dozen)
    RESUMING    up to 0.3 s after the server was ready, while it takes up what was running
    STARTING    before the server was ready
    MACHINE     as STREAMING, and its Redis is killed too: all that a machine's end leaves is files

Once the server is back every turn that was acknowledged must be there, once. When a chat has ended
its tree must be what the chatter was told, word for word, and what an undisturbed server says.
"""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from statistics import median
from typing import Any

import httpx

from tests.wiring.chat_client import (
    Refused,
    ReplyView,
    Severed,
    by_socket,
    resume_by_sse,
    send_by_sse,
)
from tests.wiring.chats_told import (
    Answer,
    Chat,
    Line,
    answer_of,
    check_nothing_doubled,
    check_promised,
    check_told,
)
from tests.wiring.server import Revived

# Of a client whose server is away. Who asks more often only keeps it from starting.
RETRY_SECONDS = 1.0
OPENED_AT_ONCE = 8  # conversations that are looked at, at one time


class Place(Enum):
    """Where a kill falls; the module's head says what that means."""

    ACCEPT = "accept"
    STREAMING = "streaming"
    ENDING = "ending"
    RESUMING = "resuming"
    STARTING = "starting"
    MACHINE = "machine"


# Seconds after its moment that a kill falls at the latest.
LATE: Mapping[Place, float] = {
    Place.ACCEPT: 0.03,
    Place.STREAMING: 0.03,
    Place.ENDING: 0.01,
    Place.RESUMING: 0.3,
    Place.MACHINE: 0.03,
}
# How many of its moments pass at the most; of those there are enough while replies run.
PASSES: Mapping[Place, int] = {
    Place.ACCEPT: 8,
    Place.STREAMING: 120,
    Place.ENDING: 8,
    Place.MACHINE: 120,
}
# The event of a reply whose arrival is such a moment.
EVENTS: Mapping[str, Sequence[Place]] = {
    "delta": (Place.STREAMING, Place.MACHINE),
    "done": (Place.ENDING,),
}

SYSTEM = "You are a patient guide to the museum of old machines."
SETTINGS = {"temperature": 0, "repetition_penalty": 1.1}
SCRIPTS: Sequence[Sequence[Line]] = (
    (Line("Hello, I am Ida."), Line("What is my name?"), Line("Thank you!")),
    (Line("Tell me of the sea.", 40, ignore_eos=True), Line(None, 40, ignore_eos=True)),
    (Line("Count from 1 to 12.", 60), Line("And back again.", 48, ignore_eos=True)),
    (Line("What is a loom?", 24, ignore_eos=True), Line("Who made it?"), Line(None)),
    (Line("A list of small birds, please.", 96, ignore_eos=True),),
    (Line("Hm."), Line("Hm?"), Line("Hm!", 32, ignore_eos=True)),
)


@dataclass
class Figures:
    """What has happened. look_seconds: of the checks after a restart."""

    kills: Counter[str] = field(default_factory=Counter)
    start_seconds: list[float] = field(default_factory=list)
    chats: int = 0
    replies: int = 0
    taken_up: int = 0  # replies that were running at a kill
    snapshots: int = 0
    severed: int = 0
    closed: Counter[int | None] = field(default_factory=Counter)  # sockets, by the server's code
    refused: Counter[str] = field(default_factory=Counter)
    checked: int = 0  # acknowledged turns that were looked for after a restart
    look_seconds: list[float] = field(default_factory=list)

    def told(self) -> str:
        """For people, a line each."""
        starts, looks = sorted(self.start_seconds), sorted(self.look_seconds)
        return "\n".join(
            (
                f"{self.kills.total()} kills: {dict(self.kills)}",
                f"start to ready: median {median(starts):.1f} s, longest {starts[-1]:.1f} s "
                f"({len(starts)} starts)",
                f"looking at what was promised: median {median(looks):.2f} s, "
                f"longest {looks[-1]:.2f} s",
                f"{self.chats} conversations, {self.replies} replies, {self.taken_up} of them "
                f"taken up after a kill, {self.snapshots} snapshots",
                f"{self.checked} acknowledged turns looked for after restarts",
                f"{self.severed} connections severed, refused {dict(self.refused)}",
            )
        )


class CrashDrive:
    """See the module. `undisturbed` first, then `run`."""

    def __init__(self, revived: Revived, dice: random.Random, *, chatters: int) -> None:
        self.figures = Figures()
        self.chats: list[Chat] = []
        self._revived = revived
        self._dice = dice
        self._chatters = chatters
        self._answers: list[list[Answer]] = []
        self._redis = 0
        self._talking: dict[str, Chat] = {}
        self._over = False
        self._began = time.monotonic()
        self._wanted: Place | None = None
        self._passes = 0
        self._moment = asyncio.Event()
        self._there = asyncio.Event()

    @asynccontextmanager
    async def _client(self) -> AsyncGenerator[None]:
        """What asks for all but replies. Closed at the end: nothing of ours is held open then."""
        url = self._revived.server.url
        async with httpx.AsyncClient(base_url=url, timeout=60) as self._http:
            yield

    async def undisturbed(self) -> None:
        """All scripts, side by side, without a cut: the answers that are right."""
        async with self._client():
            await self._undisturbed()

    async def _undisturbed(self) -> None:
        await self._back()
        chats = [await self._begin(number) for number in range(len(SCRIPTS))]
        async with asyncio.TaskGroup() as group:
            for chat in chats:
                group.create_task(self._plainly(chat))
        for chat in chats:
            answers = [answer_of(view) for _, view in chat.asked]
            self._answers.append(answers)
            assert any(answer.text for answer in answers)
            await self._check_settled(chat)

    async def _plainly(self, chat: Chat) -> None:
        for line in SCRIPTS[chat.script]:
            view, turn = self._next(chat, line)
            await send_by_sse(self._revived.port, view, turn)

    async def run(self, places: Sequence[Place]) -> None:
        """Load, killed at these places, and its end."""
        async with self._client():
            await self._run(places)

    async def _run(self, places: Sequence[Place]) -> None:
        self._over = False
        async with asyncio.TaskGroup() as group:
            for _ in range(self._chatters):
                group.create_task(self._chatter())
            for place in places:
                await self._kill(place)
            await self._back()
            self._over = True
        await self._look_at_all()

    # The kills -------------------------------------------------------------------------------

    async def _kill(self, place: Place) -> None:
        revived = self._revived
        if place is Place.STARTING:
            usual = min(self.figures.start_seconds, default=4.0)
            await self._while_starting(self._dice.uniform(0, usual))
            if revived.announced:
                place = Place.RESUMING
        else:
            await self._back()
            if place in PASSES:
                await self._arrive_at(place)
            await asyncio.sleep(self._dice.uniform(0, LATE[place]))
        self._there.clear()
        revived.kill()
        print(f"{time.monotonic() - self._began:7.1f} s  {place.value}")
        self.figures.kills[place.value] += 1
        # None where the machine was killed and the next start was, before it had one of its own.
        self._redis = revived.redis_pid() if revived.redis_lives() else 0
        if place is Place.MACHINE:
            assert self._redis
            os.kill(self._redis, signal.SIGKILL)
            self._redis = 0
        revived.spawn()

    async def _while_starting(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._revived.ready()

    async def _arrive_at(self, place: Place) -> None:
        self._moment.clear()
        self._passes = self._dice.randint(1, PASSES[place])
        self._wanted = place
        await self._moment.wait()

    def _pass(self, place: Place) -> None:
        if self._wanted is place:
            self._passes -= 1
            if self._passes == 0:
                self._wanted = None
                self._moment.set()

    async def _back(self) -> None:
        """The server is there again, and what it had promised."""
        seconds = await self._revived.ready()
        if not self._there.is_set():
            self._there.set()
            self.figures.start_seconds.append(round(seconds, 2))
        if self._redis:
            assert self._revived.redis_pid() == self._redis, "the living Redis was not adopted"
        began = time.monotonic()
        promised = [
            (chat, line, view, view.ended)  # as of now: the load goes on
            for chat in self._talking.values()
            for line, view in chat.asked
            if view.reply is not None
        ]
        places = asyncio.Semaphore(OPENED_AT_ONCE)

        async def look(chat: Chat) -> None:
            async with places:
                whole = await self._ask_http("GET", f"/api/conversations/{chat.conversation}")
            for of, line, view, ended in promised:
                if of is chat:
                    self.figures.checked += 1
                    check_promised(whole, line, view, ended=ended)
            check_nothing_doubled(whole, chat)

        async with asyncio.TaskGroup() as group:
            for chat in tuple(self._talking.values()):
                group.create_task(look(chat))
        self.figures.look_seconds.append(time.monotonic() - began)

    # The chatters ----------------------------------------------------------------------------

    async def _chatter(self) -> None:
        """One conversation at the least."""
        while True:
            chat = await self._begin(self._dice.randrange(len(SCRIPTS)))
            self._talking[chat.conversation] = chat
            for line in SCRIPTS[chat.script]:
                view, turn = self._next(chat, line)
                await self._to_the_end(view, turn)
            await self._check_settled(chat)
            del self._talking[chat.conversation]
            if self._over:
                return

    async def _begin(self, script: int) -> Chat:
        body = {"system": SYSTEM, "settings": SETTINGS}
        made = await self._ask_http("POST", "/api/conversations", body)
        chat = Chat(made["id"], script)
        self.chats.append(chat)
        self.figures.chats += 1
        return chat

    def _next(self, chat: Chat, line: Line) -> tuple[ReplyView, dict[str, object]]:
        before = chat.asked[-1][1].turn if chat.asked else None
        view = ReplyView(chat.conversation, f"ask-{len(chat.asked)}", watcher=self._watch)
        chat.asked.append((line, view))
        return view, line.turn(before)

    def _watch(self, event: str) -> None:
        for place in EVENTS.get(event, ()):
            self._pass(place)

    async def _to_the_end(self, view: ReplyView, turn: Mapping[str, object]) -> None:
        while not view.ended:
            view.put_off = False
            try:
                await self._attempt(view, turn)
            except Severed as severed:
                self.figures.severed += 1
                self.figures.closed[severed.code] += severed.code is not None
            except Refused as refused:
                self._count(refused)
            await self._while_away()

    async def _while_away(self) -> None:
        """Nothing while the server is there; else wait for it, but not too patiently."""
        with suppress(TimeoutError):
            async with asyncio.timeout(RETRY_SECONDS * (0.5 + self._dice.random())):
                await self._there.wait()

    async def _attempt(self, view: ReplyView, turn: Mapping[str, object]) -> None:
        dice, port = self._dice, self._revived.port
        limit = dice.randrange(2_500) if dice.random() < 0.25 else None
        sent: Callable[[], None] = lambda: self._pass(Place.ACCEPT)  # noqa: E731
        way = dice.choice(["sse", "socket", "socket", "again"])
        if way == "again" or (way == "sse" and view.reply is None):
            view.forget()
            await send_by_sse(port, view, turn, bytes_max=limit, on_sent=sent)
        elif way == "sse":
            await resume_by_sse(port, view, bytes_max=limit)
        else:
            await by_socket(port, [view], {view.ask: turn}, bytes_max=limit, on_sent=sent)

    def _count(self, refused: Refused) -> None:
        self.figures.refused[str(refused.status)] += 1
        assert refused.status == 503, refused
        assert float(refused.headers["retry-after"]) >= 1

    async def _ask_http(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        """Asked until it is answered."""
        while True:
            try:
                answer = await self._http.request(method, path, json=body)
            except httpx.TransportError:
                pass
            else:
                if answer.status_code != 503:
                    answer.raise_for_status()
                    return answer.json()
                assert int(answer.headers["retry-after"]) >= 1
            await self._while_away()

    # The checks ------------------------------------------------------------------------------

    async def _check_settled(self, chat: Chat) -> None:
        """Everything has ended: the tree is what the client was told, and what is right."""
        whole = await self._ask_http("GET", f"/api/conversations/{chat.conversation}")
        check_told(whole, chat)
        for (_, view), answer in zip(chat.asked, self._answers[chat.script], strict=True):
            assert answer_of(view) == answer, f"{answer_of(view)}\n{answer}"
            self.figures.replies += 1
            self.figures.taken_up += max(view.epochs) > 1
            self.figures.snapshots += view.snapshots

    async def _look_at_all(self) -> None:
        """Every conversation opens, is listed, and holds what it held when it was settled."""
        for chat in self.chats:
            whole = await self._ask_http("GET", f"/api/conversations/{chat.conversation}")
            check_told(whole, chat)
        listed: set[str] = set()
        after = ""
        while True:
            page = await self._ask_http("GET", f"/api/conversations?limit=100{after}")
            listed |= {each["id"] for each in page["conversations"]}
            if page["next"] is None:
                break
            after = f"&after={page['next']}"
        assert {chat.conversation for chat in self.chats} <= listed
