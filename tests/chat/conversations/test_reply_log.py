"""The log's one writer: nothing lost, nothing twice, nothing that grows while the store is away."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from chatserve.chat.audience import Clock
from chatserve.chat.conversations.reply_log import LogLimits, ReplyLog
from chatserve.chat.store.conversation import LogEntry, ReplyCursor
from chatserve.chat.store.session_store import Unlogged
from chatserve.errors import Unavailable
from tests.chat.conversations.chats import DEADLINE_SECONDS, until
from tests.chat.engine import ManualTime


@dataclass(slots=True)
class Speaker:
    """A reply that says what the test tells it to."""

    id: str
    said: str = ""
    taken: int = 0
    superseded: bool = False

    def take_entry(self) -> LogEntry | None:
        text = self.said[self.taken :]
        self.taken = len(self.said)
        if not text:
            return None
        return LogEntry(
            reply=self.id, cursor=ReplyCursor(1, self.taken), text=text, token_ids=(len(text),)
        )

    def give_way(self) -> None:
        self.superseded = True


@dataclass(slots=True)
class Shelf:
    """A store's logs. fates: of the coming trips, in order; 'before', 'after' or None."""

    logs: dict[str, list[LogEntry]] = field(default_factory=dict)
    trips: list[Sequence[LogEntry]] = field(default_factory=list)
    fates: list[str | None] = field(default_factory=list)
    unlogged: Unlogged = field(default_factory=Unlogged)
    gate: asyncio.Event | None = None

    async def append(self, entries: Sequence[LogEntry]) -> Unlogged:
        self.trips.append(entries)
        if self.gate is not None:
            await self.gate.wait()
        fate = self.fates.pop(0) if self.fates else None
        if fate == "before":
            raise Unavailable("away")
        for entry in entries:
            log = self.logs.setdefault(entry.reply, [])
            if not log or log[-1].cursor < entry.cursor:
                log.append(entry)
        if fate == "after":
            raise Unavailable("no answer")
        if fate == "bug":
            raise ZeroDivisionError
        return self.unlogged

    def text(self, reply: str) -> str:
        """What is kept of a reply; its entries follow one another without gap or overlap."""
        text = ""
        for entry in self.logs.get(reply, []):
            text += entry.text
            assert entry.cursor.seq == len(text)
        return text


@dataclass(slots=True)
class Desk:
    log: ReplyLog
    shelf: Shelf
    time: ManualTime

    def say(self, speaker: Speaker, text: str) -> None:
        speaker.said += text
        self.log.touch(speaker)

    async def tick(self) -> float:
        """Ring the writer's timer; its length."""
        await until(lambda: self.time.due)
        (timer,) = self.time.due
        timer.cancelled = True
        timer.call()
        for _ in range(5):
            await asyncio.sleep(0)
        return timer.seconds


@asynccontextmanager
async def desk(**limits) -> AsyncIterator[Desk]:
    """A writer at work; closed at the end, it writes what is left and ends."""
    shelf, time = Shelf(), ManualTime()
    log = ReplyLog(shelf, Clock(time.now, time.call_later), LogLimits(**limits))
    async with asyncio.timeout(DEADLINE_SECONDS), asyncio.TaskGroup() as group:
        group.create_task(log.run())
        yield Desk(log, shelf, time)
        log.close()
    assert time.due == []


async def test_what_was_said_within_a_tick_is_one_entry_and_all_replies_are_one_trip():
    async with desk() as found:
        speakers = [Speaker(f"c.{number}") for number in range(5)]
        for speaker in speakers:
            found.log.enter(speaker)
            found.say(speaker, "a")
        await until(lambda: found.shelf.trips)
        for text in ("b", "c"):
            for speaker in speakers:
                found.say(speaker, text)
        assert await found.tick() == 0.025
        await until(lambda: len(found.shelf.trips) == 2)
        assert [entry.text for entry in found.shelf.trips[1]] == ["bc"] * 5
    assert {found.shelf.text(speaker.id) for speaker in speakers} == {"abc"}


async def test_the_tick_grows_with_the_replies_and_trips_are_bounded():
    async with desk(entries_per_trip=64) as found:
        speakers = [Speaker(f"c.{number}") for number in range(200)]
        for speaker in speakers:
            found.log.enter(speaker)
            found.say(speaker, "a")
        await until(lambda: len(found.shelf.logs) == 200)
        assert await found.tick() == pytest.approx(200 / 2_000)
        assert [len(trip) for trip in found.shelf.trips] == [64, 64, 64, 8]


async def test_silence_costs_no_trip():
    async with desk() as found:
        speaker = Speaker("c.1")
        found.log.enter(speaker)
        found.log.touch(speaker)
        await found.tick()
        assert found.time.due == []
    assert found.shelf.trips == []


async def test_while_the_store_is_away_one_entry_waits_and_the_rest_stays_with_the_reply():
    async with desk() as found:
        speaker = Speaker("c.1")
        found.log.enter(speaker)
        found.shelf.fates = ["after", "before", "before", None]
        found.say(speaker, "ab")
        await until(lambda: found.shelf.trips)
        for _ in range(3):
            found.say(speaker, "x" * 1_000)
            assert await found.tick() <= 1.0
            assert found.log.statistics().doubtful <= 1
        assert [[each.text for each in trip] for trip in found.shelf.trips] == [["ab"]] * 4
        await found.tick()
        assert len(found.shelf.trips) == 5
        assert found.log.statistics().failures_total == 3
    assert found.shelf.text("c.1") == speaker.said


async def test_waits_for_the_store_grow_up_to_a_second():
    async with desk() as found:
        speaker = Speaker("c.1")
        found.log.enter(speaker)
        found.shelf.fates = ["before"] * 12
        found.say(speaker, "ab")
        waits = [await found.tick() for _ in range(12)]
        assert waits[0] <= 0.05
        assert 0.5 <= min(waits[-3:]) <= max(waits) <= 1.0
        assert await found.tick() == 0.025


async def test_a_mistake_in_the_store_is_logged_and_stops_nothing(caplog):
    async with desk() as found:
        speaker = Speaker("c.1")
        found.log.enter(speaker)
        found.shelf.fates = ["bug"]
        found.say(speaker, "ab")
        await found.tick()
        await until(lambda: len(found.shelf.trips) == 2)
    assert "ZeroDivisionError" in caplog.text
    assert found.shelf.text("c.1") == "ab"


async def test_a_reply_that_another_process_has_is_told_once_and_written_no_more():
    async with desk() as found:
        speaker = Speaker("c.1")
        found.log.enter(speaker)
        found.shelf.unlogged = Unlogged(superseded=frozenset({"c.1", "c.unknown"}))
        found.say(speaker, "ab")
        await until(lambda: speaker.superseded)
        found.say(speaker, "cd")
        assert found.log.statistics().replies == 0
    assert len(found.shelf.trips) == 1


async def test_a_reply_that_the_store_has_lost_goes_on_and_is_written_no_more(caplog):
    async with desk() as found:
        speakers = [Speaker("c.1"), Speaker("d.1")]
        found.shelf.unlogged = Unlogged(gone=frozenset({"c.1", "d.1", "c.unknown"}))
        for speaker in speakers:
            found.log.enter(speaker)
            found.say(speaker, "ab")
        await until(lambda: found.log.statistics().replies == 0)
        for speaker in speakers:
            found.say(speaker, "cd")
        await found.tick()
    assert len(found.shelf.trips) == 1
    assert not any(speaker.superseded for speaker in speakers)
    assert "2 running replies are not in the store any more" in caplog.text


async def test_leaving_waits_for_the_entry_on_its_way_and_not_for_a_failed_ones_return():
    async with desk() as found:
        speaker = Speaker("c.1")
        found.log.enter(speaker)
        found.shelf.gate = asyncio.Event()
        found.shelf.fates = ["before"]
        found.say(speaker, "ab")
        await until(lambda: found.shelf.trips)
        leaving = asyncio.create_task(found.log.leave(speaker))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not leaving.done()
        found.shelf.gate.set()
        await leaving
        found.say(speaker, "cd")
        await found.tick()
    assert len(found.shelf.trips) == 1
    assert found.log.statistics().doubtful == 0


async def test_a_leaving_cancelled_leaves_a_reply_that_is_not_logged():
    async with desk() as found:
        speaker, other = Speaker("c.1"), Speaker("c.2")
        for each in (speaker, other):
            found.log.enter(each)
        found.shelf.gate = asyncio.Event()
        found.say(speaker, "ab")
        await until(lambda: found.shelf.trips)
        leaving = asyncio.create_task(found.log.leave(speaker))
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        found.shelf.gate.set()
        found.say(speaker, "cd")
        found.say(other, "e")
    assert found.shelf.text("c.1") == "ab"
    assert found.shelf.text("c.2") == "e"


async def test_closing_writes_what_is_left_without_waiting_for_the_tick():
    async with desk() as found:
        speaker = Speaker("c.1")
        found.log.enter(speaker)
        found.say(speaker, "a")
        await until(lambda: found.shelf.trips)
        found.say(speaker, "b")
    assert found.shelf.text("c.1") == "ab"


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_fails_each_log_is_its_replys_text_up_to_some_place(seed: int):
    source = random.Random(seed)
    async with desk(entries_per_trip=3) as found:
        speakers = [Speaker(f"c.{number}") for number in range(6)]
        for speaker in speakers:
            found.log.enter(speaker)
        for _ in range(60):
            found.say(source.choice(speakers), source.choice("abc") * source.randrange(4))
            if source.random() < 0.5:
                found.shelf.fates.append(source.choice(["before", "after", None]))
            if source.random() < 0.4 and found.time.due:
                await found.tick()
            for speaker in speakers:
                assert speaker.said.startswith(found.shelf.text(speaker.id))
        found.shelf.fates.clear()
        while found.log.statistics().doubtful or any(
            found.shelf.text(each.id) != each.said for each in speakers
        ):
            await found.tick()
    assert all(found.shelf.text(speaker.id) == speaker.said for speaker in speakers)
