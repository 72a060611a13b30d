"""What a broken server of conversations does to a chatserve under way: real processes.

While a fault lasts the replies that run go on for their viewers, and a new turn works or is refused
in time; once it is over every turn is there once, and answered, and the loop was never held. What
calls alone do under the same faults is in `tests/chat/store/test_redis_faults.py`.
"""

import asyncio
import json
import signal
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import pytest

from tests.wiring.chat_streams import WAIT_SECONDS_MAX, ChatClient, Json, Refusal, Watched
from tests.wiring.given_redis import GivenSite
from tests.wiring.server import ENDLESS

REFUSAL_SECONDS_MAX = 1.0  # asked for, and the calls' own deadline; a busy machine gets three
BACK_SECONDS_MAX = 2.0  # asked for, and what the pauses between tries add up to; likewise
SLACK = 3.0
SLOW_SECONDS = 0.5
LIVE = 3
LONG = ENDLESS | {"max_tokens": 3_500}
OWN_WORDS = 100  # characters of a reply before its own end
FLUSHED = {
    "content": "Tell me of the sea.",
    "temperature": 0,
    "max_tokens": 300,
} | ENDLESS
CHARACTERS = 40  # that each live reply says in a phase
SEEN_LAG_SECONDS = 0.05
HELD_SECONDS = 0.5  # waiting for Redis on the loop would hold it for so long, and longer


@dataclass(frozen=True, slots=True)
class Fault:
    """works: new turns are accepted while it lasts, None = some."""

    name: str
    begin: Callable[[GivenSite], object]
    cure: Callable[[GivenSite], object]
    works: bool | None = False


def _restart(site: GivenSite) -> None:
    site.redis.kill()
    site.redis.start()


def _slow(site: GivenSite, seconds: float) -> None:
    site.way.seconds = seconds


FAULTS = (
    Fault(
        "hung",
        lambda site: site.redis.signal(signal.SIGSTOP),
        lambda site: site.redis.signal(signal.SIGCONT),
    ),
    Fault("stopped", lambda site: site.redis.kill(), lambda site: site.redis.start()),
    Fault(
        "slow", lambda site: _slow(site, SLOW_SECONDS), lambda site: _slow(site, 0.0), works=None
    ),
    Fault("too slow", lambda site: _slow(site, 1.5), lambda site: _slow(site, 0.0)),
    # Who met it while it was away keeps the others off for a moment (`redis_link.PAUSE_SECONDS`).
    Fault("restarted", _restart, lambda _: None, works=None),
    Fault("reset", lambda site: site.reset(), lambda _: None, works=True),
    Fault(
        "read-only",
        lambda site: site.redis.command("REPLICAOF", "127.0.0.1", "1"),
        lambda site: site.redis.command("REPLICAOF", "NO", "ONE"),
    ),
    Fault(
        "out of memory",
        lambda site: site.redis.command("CONFIG", "SET", "maxmemory", "1"),
        lambda site: site.redis.command("CONFIG", "SET", "maxmemory", "0"),
    ),
    Fault(
        "without rights",
        lambda site: site.redis.command("ACL", "SETUSER", "chats", "-evalsha"),
        lambda site: site.redis.command("ACL", "SETUSER", "chats", "+evalsha"),
    ),
)  # fmt: skip


@dataclass
class Live:
    """Replies that run. texts: of their viewers."""

    conversations: list[str]
    watched: list[Watched]

    async def speak(self) -> None:
        """Wait until each has said so much more."""
        await asyncio.gather(*[each.until_longer(CHARACTERS) for each in self.watched])
        assert all(each.final is None for each in self.watched), "it ended by itself"


@asynccontextmanager
async def live_replies(client: ChatClient) -> AsyncGenerator[Live]:
    """So many that run; stopped at the block's end, watched to their own, and looked up then."""
    conversations = [await client.new() for _ in range(LIVE)]
    async with AsyncExitStack() as stack:
        watching = [client.watching(each, "live", **LONG) for each in conversations]
        live = Live(conversations, [await stack.enter_async_context(each) for each in watching])
        yield live
        for each in live.watched:
            if each.final is None:
                await client.stop(each.reply)


async def has_turn_once(client: ChatClient, conversation: str, ask: str, text: str) -> None:
    """The conversation is this turn with this answer, and nothing runs in it."""
    whole = await client.whole(conversation)
    shown = [(turn["id"], turn["role"]) for turn in whole["turns"]]
    assert shown == [(ask, "user"), (whole["leaf"], "assistant")]
    assert whole["turns"][1]["content"] == text
    assert whole["replies"] == []


async def until_logged(site: GivenSite, log: str, length: int) -> int:
    """The log's length once it is longer: entries are written in bundles, behind what is seen."""
    began = time.monotonic()
    while (now := int(str(site.redis.command("XLEN", log)))) <= length:
        assert time.monotonic() < began + WAIT_SECONDS_MAX, "its log does not go on"
        await asyncio.sleep(0.02)
    return now


async def wave(client: ChatClient, conversations: list[str]) -> list[Watched | Refusal]:
    """A short turn to each, at once."""
    sent = [client.send(each, "new", max_tokens=4) for each in conversations]
    return await asyncio.gather(*sent)


async def until_accepted(client: ChatClient) -> float:
    """Seconds until a new turn is accepted."""
    began, seen = time.monotonic(), Watched()
    while True:
        answer = await client.http.post("/api/conversations", json={})
        if answer.status_code == 201:
            break
        assert answer.status_code == 503, answer.text
        assert time.monotonic() < began + WAIT_SECONDS_MAX, "it did not come back"
        await asyncio.sleep(0.02)
    conversation, turn = answer.json()["id"], {"id": "back", "content": "Hello!", "max_tokens": 1}
    while await client.watch(conversation, turn, seen) is not None:
        assert time.monotonic() < began + WAIT_SECONDS_MAX, "it did not come back"
        await asyncio.sleep(0.02)
    assert seen.kind == "done"
    return time.monotonic() - began


@dataclass(frozen=True, slots=True)
class Lag:
    """Ticks of the loop in a phase."""

    ticks: int
    late: int  # over SEEN_LAG_SECONDS
    held: int  # over HELD_SECONDS

    @classmethod
    def between(cls, before: dict[float, int], after: dict[float, int]) -> "Lag":
        ticks = after[float("inf")] - before[float("inf")]
        within = [after[bound] - before[bound] for bound in (SEEN_LAG_SECONDS, HELD_SECONDS)]
        return cls(ticks, ticks - within[0], ticks - within[1])

    def __str__(self) -> str:
        return f"{self.late} of {self.ticks} ticks over {SEEN_LAG_SECONDS * 1e3:.0f} ms"


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
async def test_live_replies_go_on_and_new_turns_are_refused_in_time(
    site: GivenSite, fault: Fault
) -> None:
    async with site.client("ada") as client:
        first, second, control = [[await client.new() for _ in range(4)] for _ in range(3)]
        async with live_replies(client) as live:
            lag = [site.lag()]
            await asyncio.gather(live.speak(), wave(client, control))
            lag.append(site.lag())
            try:
                await asyncio.to_thread(fault.begin, site)
                answers, _ = await asyncio.gather(wave(client, first), live.speak())
                again, _ = await asyncio.gather(wave(client, second), live.speak())
                lag.append(site.lag())
            finally:
                await asyncio.to_thread(fault.cure, site)
            back = await until_accepted(client)
        for conversation, watched in zip(live.conversations, live.watched, strict=True):
            assert watched.kind == "done", watched.final
            await has_turn_once(client, conversation, "live", watched.text)
        refusals = [each for each in answers + again if isinstance(each, Refusal)]
        seconds = [f"{refusal.seconds:.3f}" for refusal in refusals]
        calm, faulty = Lag.between(*lag[:2]), Lag.between(*lag[1:])
        print(
            f"{fault.name}: {len(answers + again) - len(refusals)} of {len(answers + again)} turns "
            f"accepted, refused in s: {' '.join(seconds) or '-'}; back in {back:.3f} s; "
            f"loop: {faulty}, without the fault {calm}"
        )
        for refusal in refusals:
            assert (refusal.status, refusal.code) == (503, "unavailable")
            assert refusal.retry_after is not None
            assert refusal.seconds < SLACK * REFUSAL_SECONDS_MAX
        if fault.works is None:
            assert len(refusals) < len(answers + again)
        else:
            assert bool(refusals) != fault.works
        assert back < SLACK * BACK_SECONDS_MAX
        assert faulty.held <= calm.held
        await _sent_again_all_are_there_once(client, first + second, answers + again)


async def _sent_again_all_are_there_once(
    client: ChatClient, conversations: list[str], answers: list[Watched | Refusal]
) -> None:
    """A client whose turn was refused sends it again, whether or not it was kept."""
    for conversation, answer in zip(conversations, answers, strict=True):
        seen = answer
        while isinstance(seen, Refusal):
            seen = await client.send(conversation, "new", max_tokens=4)
        assert seen.kind == "done"
        await has_turn_once(client, conversation, "new", seen.text)


async def test_a_socket_lives_through_a_hung_redis(site: GivenSite) -> None:
    """What is live is seen, attached to and stopped without Redis; what needs it is refused."""
    async with site.client("ada") as client, site.socket("ada") as socket:
        first, second = await client.new(), await client.new()
        heard: list[Json] = []

        async def hear(event: str, **fields: object) -> Json:
            """The next such frame; others are kept."""
            async with asyncio.timeout(WAIT_SECONDS_MAX):
                while True:
                    frame: Json = json.loads(await socket.recv())
                    heard.append(frame)
                    if frame["event"] == event and fields.items() <= frame.items():
                        return frame

        async def say(kind: str, request: str, **fields: object) -> None:
            await socket.send(json.dumps({"type": kind, "request": request} | fields))

        long = {"content": "Tell a long story."} | LONG
        await say("send", "1", conversation=first, id="live", **long)
        reply = (await hear("accepted", request="1"))["reply"]
        await hear("delta", reply=reply)
        site.redis.signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            await say("send", "2", conversation=second, id="new", content="Hello!", max_tokens=4)
            refused = await hear("failed", request="2")
            seconds = time.monotonic() - began
            assert refused["code"] == "unavailable"
            assert refused["retry_after"]
            assert seconds < SLACK * REFUSAL_SECONDS_MAX
            await hear("delta", reply=reply)
            await say("attach", "3", reply=reply)
            await hear("accepted", request="3")
            again = await hear("delta", reply=reply)
            assert len(again["text"]) == again["seq"], "from the beginning"
            await say("ping", "4")
            await hear("pong", request="4")
        finally:
            site.redis.signal(signal.SIGCONT)
        await say("stop", "5", reply=reply)
        assert (await hear("done", reply=reply))["finish_reason"] == "abort"
        print(f"socket: refused in {seconds:.3f} s")
        seen = await client.send(second, "new", max_tokens=4)
        while isinstance(seen, Refusal):
            seen = await client.send(second, "new", max_tokens=4)
        await has_turn_once(client, second, "new", seen.text)
        seqs = [frame["seq"] for frame in heard if frame["event"] == "delta"]
        text = "".join(
            frame["text"]
            for frame in heard[heard.index(again) :]
            if frame.get("reply") == reply and frame["event"] == "delta"
        )
        assert len(text) == max(seqs)
        await has_turn_once(client, first, "live", text)


async def test_flushed_replies_are_said_to_their_ends_and_new_conversations_work(
    site: GivenSite,
) -> None:
    async with site.client("ada") as client:
        ended = await client.new()
        kept = await client.send(ended, "a", **FLUSHED)
        assert isinstance(kept, Watched)
        assert kept.kind == "done"
        conversations = [await client.new() for _ in range(LIVE)]
        async with AsyncExitStack() as stack:
            watching = [client.watching(each, "a", **FLUSHED) for each in conversations]
            live = [await stack.enter_async_context(each) for each in watching]
            said = [len(watched.text) for watched in live]
            await asyncio.to_thread(site.redis.command, "FLUSHALL")
            again = await client.new()
            new = await client.send(again, "new", max_tokens=4)
            assert isinstance(new, Watched)
            assert new.kind == "done", "while the others are said to their ends"
        for watched, characters in zip(live, said, strict=True):
            assert len(watched.text) > characters
            # Behind the reply's own end tokens are nearly as likely as one another, and batch mates
            # decide; how many there are is below.
            assert watched.text[:OWN_WORDS] == kept.text[:OWN_WORDS]
            assert watched.kind == "failed"
            assert watched.final is not None
            assert kept.final is not None
            assert watched.final["code"] == "not_found"
            assert watched.final["retry_after"] is None, "nothing to come back for"
            tokens = watched.final["usage"]["completion_tokens"]
            assert tokens == kept.final["usage"]["completion_tokens"] == FLUSHED["max_tokens"]
            assert (await client.resume(watched)) == 404
        assert (await client.resume(kept)) == 404
        await has_turn_once(client, again, "new", new.text)
        assert (await client.http.delete(f"/api/conversations/{again}")).status_code == 204
        for conversation in (ended, *conversations):
            answer = await client.http.get(f"/api/conversations/{conversation}")
            assert answer.status_code == 404
            refusal = await client.send(conversation, "b")
            assert isinstance(refusal, Refusal)
            assert refusal.status == 404
        listed = await client.http.get("/api/conversations")
        assert listed.json() == {"conversations": [], "next": None}, "all was flushed"
        await until_accepted(client)
    state = site.server.wait_for("idle")
    assert state["conversations"]["running"] == 0
    assert state["conversations"]["waiting"] == 0


async def test_a_damaged_conversation_harms_no_other(site: GivenSite) -> None:
    async with site.client("ada") as client:
        async with live_replies(client) as live:
            damaged, unlogged, sound = live.conversations
            logs = [
                f"cs:{{{conversation}}}:log:{watched.reply}"
                for conversation, watched in zip(live.conversations, live.watched, strict=True)
            ]
            for key in (f"cs:{{{damaged}}}:running", f"cs:{{{damaged}}}:meta", logs[1]):
                site.redis.command("SET", key, "wrong")
            length = await until_logged(site, logs[2], 0)
            await live.speak()
            await until_logged(site, logs[2], length)
            refusal = await client.send(damaged, "b")
            assert isinstance(refusal, Refusal)
            assert (refusal.status, refusal.code) == (503, "unavailable")
            assert refusal.retry_after is not None
            listed = await client.http.get("/api/conversations", params={"search": "long story"})
            assert listed.status_code == 200
            found = {each["id"] for each in listed.json()["conversations"]}
            assert {unlogged, sound} <= found
            assert damaged not in found
        told = live.watched[0]
        assert told.kind == "failed"
        assert told.final is not None
        assert told.final["code"] == "unavailable"
        for conversation, watched in zip(live.conversations[1:], live.watched[1:], strict=True):
            assert watched.kind == "done", watched.final
            await has_turn_once(client, conversation, "live", watched.text)
        await until_accepted(client)
    site.server.wait_for("idle")
