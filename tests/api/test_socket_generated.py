"""Viewers of one reply who come and go by SSE and by WebSocket, in an order that dice make.

What tells the truth is a string: the reply's text. The reply here is the chat floor's own mailbox
(`ChatViewing`), which a test lets talk, crash and end; all the rest of the way is the real one.
"""

import asyncio
import random
from typing import Any

import httpx
import orjson
import pytest

from chatserve.api.chat_schema import turn_ask
from chatserve.chat.conversations.chat_reply import ChatViewing
from chatserve.chat.conversations.reply_events import ReplyFinal, ReplyProgress
from chatserve.chat.store.conversation import ReplyCursor
from tests.api.fake_conversations import DONE
from tests.api.harness import PATIENCE_SECONDS, Site, quick, site, until
from tests.api.socket_peer import conversation, tab

CASES = 100
STEPS_MAX = 25
VIEWERS_MAX = 6
CANCEL_SECONDS = 1.0
# Small, so that a text of some words is several events.
LIMITS = quick(event_text_max=5, socket_ping_seconds=3_600.0)
TURN: dict[str, object] = {"id": "t1", "content": "x"}
WORDS = ("a", "bc ", "\n\ndata: x", '"\\', "\u2028\x85", "é\U0001f600", "123456789012345")


class Spoken:
    """A reply that says what the dice want."""

    def __init__(self, conversation: str, turn: str, reply: str) -> None:
        self.conversation, self.turn, self.id = conversation, turn, reply
        self.epoch = 1
        self.logged: tuple[int, ...] = ()
        self.progress: ReplyProgress | None = None
        self.final: ReplyFinal | None = None
        self.broken_off = False
        self.texts: list[str] = []
        self.viewings: set[ChatViewing] = set()

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def length(self) -> int:
        return len(self.text)

    @property
    def tokens(self) -> int:
        return len(self.texts)

    @property
    def viewers(self) -> int:
        return len(self.viewings)

    @property
    def end(self) -> ReplyCursor | None:
        return None if self.final is None else self.final.cursor

    def view(self, after: ReplyCursor | None = None) -> ChatViewing:
        return ChatViewing(self, after)

    def attach(self, viewing: ChatViewing) -> None:
        self.viewings.add(viewing)

    def detach(self, viewing: ChatViewing) -> None:
        self.viewings.discard(viewing)

    def say(self, text: str) -> None:
        self.texts.append(text)
        self._wake()

    def finish(self, kind: str = "done", data: Any = DONE) -> None:
        cursor = ReplyCursor(self.epoch, self.length + 1)
        self.final = ReplyFinal(cursor=cursor, kind=kind, data=data)
        self._wake()

    def crash(self, kept: int) -> None:
        """Be taken up by another process, which nobody looks at yet. What was in the log when an
        earlier one was taken up stays there."""
        assert not self.viewings
        self.logged, self.epoch = (*self.logged, kept), self.epoch + 1
        self.texts = [self.text[:kept]]

    def _wake(self) -> None:
        for viewing in self.viewings:
            viewing.wake()


class Viewer:
    """What a client makes of the events it gets, over all its connections."""

    def __init__(self, running: Site, client: httpx.AsyncClient, reply: Spoken) -> None:
        self.running, self.client, self.reply = running, client, reply
        self.text, self.last = "", ""
        self.places = [("", "")]  # where it has been: the text and the last id of each
        self.finals: list[str] = []
        self.connections = self.snapshots = 0
        self.task: asyncio.Task[None] | None = None

    @property
    def looking(self) -> bool:
        return self.task is not None and not self.task.done()

    def come(self, group: asyncio.TaskGroup, dice: random.Random) -> None:
        """Look from where it was, from an earlier place, or from the start."""
        assert not self.looking
        if self.finals:
            return
        if dice.random() < 0.2:
            self.text, self.last = dice.choice(self.places)
        by_turn = dice.random() < 0.2
        if by_turn:
            self.text = self.last = ""
        way = dice.choice([self._by_sse, self._by_socket])
        self.task = group.create_task(way(by_turn))
        self.connections += 1

    async def go(self) -> None:
        """Look away, wherever it is. A client that is opening or closing a connection may lose a
        cancellation, and is told again."""
        while self.task is not None and not self.task.done():
            self.task.cancel()
            await asyncio.wait({self.task}, timeout=CANCEL_SECONDS)

    async def _by_sse(self, by_turn: bool) -> None:
        reply = self.reply
        if by_turn:
            path = f"/api/conversations/{reply.conversation}/turns"
            request = self.client.stream("POST", path, json=TURN)
        else:
            header = {"Last-Event-ID": self.last} if self.last else {}
            path = f"/api/replies/{reply.id}/events"
            request = self.client.stream("GET", path, headers=header)
        async with request as answer:
            assert answer.status_code == 200
            fields: dict[str, str] = {}
            async for line in answer.aiter_lines():
                if line:
                    name, _, value = line.partition(": ")
                    fields[name] = value
                elif fields.get("event"):
                    self._take(fields["event"], fields.get("id"), orjson.loads(fields["data"]))
                    fields = {}
        assert self.finals, "the stream ended without its final event"

    async def _by_socket(self, by_turn: bool) -> None:
        reply = self.reply
        async with tab(self.running) as page:
            if by_turn:
                await page.tell("send", conversation=reply.conversation, **TURN)
            else:
                cursor = {"after": self.last} if self.last else {}
                await page.tell("attach", reply=reply.id, **cursor)
            while not self.finals:
                heard = await page.hear()
                self._take(heard["event"], heard.get("id"), heard)
            assert (await page.ask("ping"))["event"] == "pong", "the final event is the last one"

    def _take(self, event: str, name: str | None, data: dict[str, Any]) -> None:
        assert not self.finals, "nothing follows the final event"
        match event:
            case "accepted":
                assert name is None
                assert data["reply"] == self.reply.id
                return
            case "delta":
                assert data["text"]
                self.text += data["text"]
                assert data["seq"] == len(self.text)
            case "snapshot":
                self.snapshots += 1
                self.text = data["text"]
                assert data["seq"] == len(self.text)
            case _:
                assert event == "done"
                self.finals.append(event)
                assert int(name.partition("-")[2]) == len(self.text) + 1  # type: ignore[union-attr]
        assert name is not None
        assert place(name) > place(self.last), "ids grow, within an epoch and from one to the next"
        self.last = name
        self.places.append((self.text, name))


def place(name: str) -> tuple[int, int]:
    epoch, _, seq = (name or "0-0").partition("-")
    return int(epoch), int(seq)


async def act(
    reply: Spoken, viewers: list[Viewer], group: asyncio.TaskGroup, *, dice: random.Random
) -> None:
    """One step of a case."""
    viewer = dice.choice(viewers)
    match dice.choices(
        ["say", "come", "go", "crash", "stop", "finish"], weights=[40, 25, 15, 4, 1, 1]
    )[0]:
        case "say" if reply.final is None:
            reply.say(dice.choice(WORDS))
        case "come" if not viewer.looking:
            viewer.come(group, dice)
        case "go" if viewer.looking:
            await viewer.go()
        case "crash" if reply.final is None:
            for each in viewers:
                await each.go()
            await until(lambda: not reply.viewings)
            reply.crash(dice.randint(max(reply.logged, default=0), reply.length))
        case "stop":
            answer = await viewer.client.delete(f"/api/replies/{reply.id}")
            assert answer.status_code == 204
        case "finish" if reply.final is None:
            reply.finish()
        case _:
            pass
    for _ in range(dice.choice([0, 0, 1, 5, 50])):
        await asyncio.sleep(0)


async def case(running: Site, client: httpx.AsyncClient, dice: random.Random) -> list[Viewer]:
    """A reply's life; gives those who looked at it."""
    name = await conversation(running)
    asked = turn_ask(TURN, owner="local", conversation=name, limits=LIMITS)
    reply: Any = await running.conversations.send(asked)
    assert isinstance(reply, Spoken)
    viewers = [Viewer(running, client, reply) for _ in range(dice.randint(1, VIEWERS_MAX))]
    async with asyncio.timeout(PATIENCE_SECONDS), asyncio.TaskGroup() as group:
        for _ in range(dice.randint(5, STEPS_MAX)):
            await act(reply, viewers, group, dice=dice)
        if reply.final is None and dice.random() < 0.5:
            reply.finish()
        for viewer in viewers:
            if not viewer.looking:
                viewer.come(group, dice)
        if reply.final is None:
            reply.say("the end")
            reply.finish()
    for viewer in viewers:
        assert viewer.text == reply.text
        assert viewer.finals == ["done"]
        assert viewer.last == str(reply.end)
        assert viewer.connections > 0
    answer = await client.get(f"/api/replies/{reply.id}/events?after={reply.end}")
    assert answer.status_code == 204
    await until(lambda: not reply.viewings)
    return viewers


@pytest.mark.parametrize("part", range(2))
async def test_every_viewer_makes_the_replys_text_of_what_it_gets(part: int) -> None:
    seed = random.randrange(2**32)
    viewers: list[Viewer] = []
    async with site(LIMITS) as running, running.client() as client:
        running.conversations.make_reply = Spoken
        for number in range(part, CASES, 2):
            dice = random.Random(f"{seed}-{number}")
            print(f"seed {seed}-{number}")
            viewers += await case(running, client, dice)
        await until(lambda: running.conversations.listeners == 0)
    assert sum(viewer.connections for viewer in viewers) > CASES
    assert sum(viewer.snapshots for viewer in viewers) > 0, "the dice must show it all"
