"""The outbox by itself: one frame after the other in the order of their coming, and then its end.

Most frames are written by their sources and not by the writer, so each test holds a source in the
middle of that and looks at what others may do meanwhile. Frames that nobody reads, and those whose
sources have gone, are in `test_socket_slow_peers.py`.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import pytest
from starlette.types import Message

from chatserve.api.outbox import Outbox
from tests.api.harness import PATIENCE_SECONDS

CASES = 200
STEPS_MAX = 60
ANSWERS_MAX = 2 * STEPS_MAX  # never reached
LOOP_TURNS = 10  # more than it takes to hear a bell and to write what is there
GOING = (1001, "Going.")


@dataclass
class Wire:
    """What a peer gets: texts, and the code of the close frame. Shut, it holds who sends."""

    sent: list[str | int] = field(default_factory=list[str | int])
    begun: set[str | int] = field(default_factory=set[str | int])
    broken_off: set[str | int] = field(default_factory=set[str | int])
    way: asyncio.Event = field(default_factory=asyncio.Event)
    gone: bool = False
    senders: set[asyncio.Task[None] | None] = field(default_factory=set[asyncio.Task[None] | None])
    senders_max: int = 0  # at one time

    async def send(self, message: Message) -> None:
        sender = asyncio.current_task()
        self.senders.add(sender)
        self.senders_max = max(self.senders_max, len(self.senders))
        said: str | int = message["text"] if "text" in message else message["code"]
        self.begun.add(said)
        try:
            await self.way.wait()
            if self.gone:
                raise OSError("the peer has gone")
            self.sent.append(said)
        except asyncio.CancelledError:
            self.broken_off.add(said)
            raise
        finally:
            self.senders.remove(sender)


async def everybody_waits() -> None:
    """Let all that can go on do so."""
    for _ in range(LOOP_TURNS):
        await asyncio.sleep(0)


@dataclass
class Scene:
    """An outbox, its writer and what else the test starts."""

    outbox: Outbox
    wire: Wire
    writer: asyncio.Task[None]
    group: asyncio.TaskGroup

    def put(self, frame: str) -> asyncio.Task[None]:
        return self.group.create_task(self.outbox.put(frame))

    async def held(self, frame: str) -> asyncio.Task[None]:
        """A source in the middle of writing by itself, of which the writer knows nothing."""
        self.wire.way.clear()
        source = self.put(frame)
        await everybody_waits()
        assert self.wire.senders == {source}
        return source


@contextlib.asynccontextmanager
async def scene() -> AsyncGenerator[Scene]:
    """Its writer waits for a frame. At the end one frame at a time has been on its way."""
    outbox, wire = Outbox(ANSWERS_MAX), Wire()
    async with asyncio.timeout(PATIENCE_SECONDS), asyncio.TaskGroup() as group:
        writer = group.create_task(outbox.write(wire.send))
        await everybody_waits()
        wire.way.set()
        yield Scene(outbox, wire, writer, group)
        writer.cancel()
    assert wire.senders_max == 1


# -- a source that writes by itself


@pytest.mark.parametrize("by_source", [False, True])
async def test_what_came_while_a_source_wrote_goes_out_after_it(by_source: bool) -> None:
    async with scene() as on:
        first = await on.held("first")
        others = [on.put("second")] if by_source else []
        if not by_source:
            on.outbox.post("second")
        await everybody_waits()
        assert on.wire.sent == []
        on.wire.way.set()
        await asyncio.gather(first, *others)
        await everybody_waits()
        assert on.wire.sent == ["first", "second"]


async def test_the_close_frame_goes_out_after_what_a_source_was_writing() -> None:
    async with scene() as on:
        source = await on.held("last")
        on.outbox.finish(*GOING)
        await everybody_waits()
        assert on.wire.senders == {source}
        on.wire.way.set()
        await asyncio.gather(source, on.writer)
        assert on.wire.sent == ["last", 1001]


async def test_a_source_that_is_cancelled_in_the_middle_lets_the_next_ones_go() -> None:
    async with scene() as on:
        source = await on.held("withdrawn")
        on.outbox.post("next")
        on.outbox.finish(*GOING)
        await everybody_waits()
        source.cancel()
        on.wire.way.set()
        await on.writer
        assert on.wire.sent == ["next", 1001]


async def test_a_source_does_not_write_past_an_answer_that_waits() -> None:
    async with scene() as on:
        on.outbox.post("answer")  # the writer has not even heard of it
        await on.outbox.put("text")
        assert on.wire.sent == ["answer", "text"]


async def test_a_source_whose_peer_has_gone_waits_until_it_is_cancelled() -> None:
    """The reader hears of it too, and ends them all; the writer does by its next frame."""
    async with scene() as on:
        source = await on.held("lost")
        on.wire.gone = True
        on.wire.way.set()
        await everybody_waits()
        assert not source.done()
        assert not on.writer.done()
        source.cancel()
        await asyncio.wait({source})
        assert source.cancelled()
    assert on.wire.sent == []


# -- the end


@pytest.mark.parametrize("closed", [False, True])
async def test_after_the_end_nothing_is_written_and_sources_wait(closed: bool) -> None:
    async with scene() as on:
        on.outbox.finish(*GOING)
        if closed:
            await on.writer
        source = on.put("late")
        on.outbox.post("late too")
        await everybody_waits()
        assert on.writer.done()
        assert not source.done()
        assert on.wire.sent == [1001]
        source.cancel()


# -- all of it, as dice want


@dataclass
class Crowd:
    """Sources that come and go, and what is true of it all: the frames as they came."""

    on: Scene
    taken: list[str] = field(default_factory=list[str])
    withdrawn: set[str] = field(default_factory=set[str])
    sources: list[asyncio.Task[None]] = field(default_factory=list[asyncio.Task[None]])

    def name(self, of: str) -> str:
        """The next frame's, which nobody takes after the end."""
        frame = f"{of}-{len(self.taken)}"
        if not self.on.outbox.finished:
            self.taken.append(frame)
        return frame

    async def talk(self, name: str, dice: random.Random) -> None:
        while True:
            frame = self.name(name)
            try:
                await self.on.outbox.put(frame)
            except asyncio.CancelledError:
                # What the writer has begun to write goes out; a source takes its own with it.
                if frame not in self.on.wire.begun or frame in self.on.wire.broken_off:
                    self.withdrawn.add(frame)
                raise
            for _ in range(dice.randrange(1, 4)):
                await asyncio.sleep(0)

    async def act(self, dice: random.Random) -> None:
        """One thing that may happen."""
        match dice.choices(["come", "go", "post", "shut", "open"], [2, 1, 4, 2, 4])[0]:
            case "come":
                talk = self.talk(f"source {len(self.sources)}", dice)
                self.sources.append(self.on.group.create_task(talk))
            case "go" if self.sources:
                dice.choice(self.sources).cancel()
            case "post":
                self.on.outbox.post(self.name("answer"))
            case "shut":
                self.on.wire.way.clear()
            case _:
                self.on.wire.way.set()
        for _ in range(dice.choice([0, 0, 1, 2, 5])):
            await asyncio.sleep(0)


async def test_sources_and_answers_go_out_as_they_came_whatever_the_dice_want() -> None:
    seed = random.randrange(2**32)
    written = withdrawn = 0
    for number in range(CASES):
        dice = random.Random(f"{seed}-{number}")
        print(f"seed {seed}-{number}")
        async with scene() as on:
            crowd = Crowd(on)
            for _ in range(dice.randint(5, STEPS_MAX)):
                await crowd.act(dice)
            on.outbox.finish(*GOING)
            for _ in range(dice.randint(0, 5)):
                await crowd.act(dice)
            on.wire.way.set()
            await on.writer
            for source in crowd.sources:
                source.cancel()
        kept = [each for each in crowd.taken if each not in crowd.withdrawn]
        assert on.wire.sent == [*kept, 1001]
        written += len(kept)
        withdrawn += len(crowd.taken) - len(kept)
    assert written > 10 * CASES
    assert withdrawn > 0, "the dice must show it all"
