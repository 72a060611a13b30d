"""`/api/socket`: what a tab may ask for, and what it is told."""

import asyncio
import gc
from collections.abc import AsyncGenerator
from typing import Any

import orjson
import pytest

from chatserve.api.chat_schema import ClientFrame
from chatserve.chat.conversations.reply_events import ReplyProgress
from chatserve.errors import Unavailable
from tests.api.fake_conversations import DONE, FakeChatReply
from tests.api.harness import Site, quick, site, soon, until
from tests.api.socket_peer import conversation, reply_in, tab
from tests.api.test_reply_events import events_in

NASTY = 'a\r\n\r\n"\\\u2028\x85\x00\U0001f600\ud7ff'


@pytest.fixture
async def served() -> AsyncGenerator[Site]:
    async with site() as running:
        yield running


# -- the same events as by SSE


async def test_a_turns_events_are_those_of_sse_with_their_names_and_places(served: Site) -> None:
    def script(reply: FakeChatReply) -> None:
        reply.progress = [ReplyProgress(queued=2, prompt_tokens=9, computed=4)]

    served.conversations.on_send = script
    name = await conversation(served)
    async with tab(served) as page:
        accepted = await page.send_turn(name)
        reply = await reply_in(served, name)
        assert await page.hear() == {
            "event": "progress",
            "conversation": name,
            "reply": reply.id,
            "queued": 2,
            "prompt_tokens": 9,
            "computed": 4,
        }
        reply.say(NASTY)
        delta = await page.hear()
        reply.finish()
        done = await page.hear()
    place = {"conversation": name, "reply": reply.id}
    assert accepted == {"event": "accepted", "request": "q1", "turn": "t1"} | place
    seq = len(NASTY)
    assert delta == {"event": "delta", "id": f"1-{seq}", "seq": seq, "text": NASTY} | place
    assert done == {"event": "done", "id": f"1-{seq + 1}"} | DONE | place
    await soon(reply.left)


@pytest.mark.parametrize("after", [None, "1-0", "1-4", "1-6", "1-9", "1-99", "2-3", "2-10", "7-1"])
@pytest.mark.parametrize("kind", ["done", "failed"])
async def test_whoever_comes_back_gets_the_same_by_either_way(
    served: Site, after: str | None, kind: str
) -> None:
    def script(reply: FakeChatReply) -> None:
        reply.say("one two")
        reply.crash(kept=4)
        reply.say("three")
        data = {"code": "numerical_fault", "message": "NaN", "retry_after": None}
        reply.finish(kind, DONE if kind == "done" else data)

    served.conversations.on_send = script
    name = await conversation(served)
    async with tab(served) as page, served.client() as client:
        await page.send_turn(name)
        await page.hear_until(kind)
        reply = await reply_in(served, name)
        query = {} if after is None else {"after": after}
        answer = await client.get(f"/api/replies/{reply.id}/events", params=query)
        await page.tell("attach", reply=reply.id, **query)
        if answer.status_code == 204:
            assert (await page.hear())["ended"] is True
            return
        heard = await page.hear_until(kind)
    told = list(events_in(answer.content))
    assert [(frame.pop("event"), frame.pop("id", None)) for frame in heard] == [
        (event.name, event.id) for event in told
    ]
    assert heard[0].pop("request") == "q2"
    place = {"conversation": name, "reply": reply.id}
    assert heard == [event.data | place for event in told]


async def test_a_turn_that_is_sent_again_is_the_same_reply(served: Site) -> None:
    name = await conversation(served)
    async with tab(served) as page:
        first = await page.send_turn(name)
        reply = await reply_in(served, name)
        reply.say("abc")
        await page.hear_until("delta")
        second = await page.send_turn(name)
        assert second["reply"] == first["reply"]
        assert (await page.hear())["text"] == "abc", "from the start, as the same POST gives it"
        other = await page.ask("send", conversation=name, id="t1", content="y")
        assert (other["event"], other["code"], other["param"]) == ("failed", "conflict", "id")
        reply.finish()
        assert (await page.hear())["event"] == "done", "the refusal did not end the viewing"
        third = await page.send_turn(name)
        assert third["reply"] == first["reply"]
        assert [frame["event"] for frame in await page.hear_until("done")] == ["delta", "done"]
    assert len(served.conversations.replies) == 1


async def test_sampling_fields_are_checked_as_in_a_body(served: Site) -> None:
    name = await conversation(served)
    async with tab(served) as page:
        wrong = await page.ask("send", conversation=name, id="t1", content="x", temperature=9)
        assert (wrong["event"], wrong["param"]) == ("failed", "temperature")
        assert not served.conversations.sent
        await page.send_turn(name, temperature=0.5, seed=7)
    (sent,) = served.conversations.sent
    assert sent.sampling == {"temperature": 0.5, "seed": 7}
    assert (sent.content, sent.at_leaf, sent.owner) == ("x", True, "local")


async def test_many_conversations_share_a_socket_and_each_keeps_its_order(served: Site) -> None:
    names = [await conversation(served) for _ in range(20)]
    async with tab(served) as page:
        for name in names:
            await page.tell("send", conversation=name, id="t", content="x")
        replies = [await reply_in(served, name, "t") for name in names]
        for step in range(50):
            for number, reply in enumerate(replies):
                reply.say(f"{number}:{step} ")
            await asyncio.sleep(0)
        for reply in replies:
            reply.finish()
        texts, ended = dict.fromkeys(names, ""), 0
        while ended < len(names):
            heard = await page.hear()
            if heard["event"] == "delta":
                texts[heard["conversation"]] += heard["text"]
                assert heard["seq"] == len(texts[heard["conversation"]])
            ended += heard["event"] == "done"
    assert [texts[reply.conversation] for reply in replies] == [reply.text for reply in replies]


# -- stop and ping


async def test_a_ping_is_answered_with_its_request(served: Site) -> None:
    async with tab(served) as page:
        assert await page.ask("ping") == {"event": "pong", "request": "q1"}


async def test_many_frames_in_one_piece_are_all_answered(served: Site) -> None:
    """More than may wait for being written: the writer has its turn between them."""
    async with tab(served) as page:
        count = 4 * quick().socket_answers_max
        requests = [await page.tell("ping") for _ in range(count)]
        assert [(await page.hear())["request"] for _ in range(count)] == requests


async def test_a_stop_ends_the_reply_for_all_who_look(served: Site) -> None:
    name = await conversation(served)
    async with tab(served) as page, tab(served) as other:
        accepted = await page.send_turn(name)
        reply = await reply_in(served, name)
        reply.say("abc")
        await page.hear_until("delta")
        await other.ask("attach", reply=accepted["reply"], after="1-3")
        await other.tell("stop", reply=accepted["reply"])
        for each in (page, other):
            done = await each.hear()
            assert (done["event"], done["finish_reason"]) == ("done", "stop_requested")
        # An ended reply stays as it is, and nothing more is said of it.
        await page.tell("stop", reply=accepted["reply"])
        assert (await page.ask("ping"))["event"] == "pong"
    assert reply.viewers == 0


# -- what is wrong with a frame

WRONG_FRAMES: list[tuple[object, str | None, str | None]] = [
    ({"request": "r"}, "r", "type"),
    ({"request": "r", "type": "shout"}, "r", "type"),
    ({"request": "r", "type": None}, "r", "type"),
    ({"request": "r", "type": ["ping"]}, "r", "type"),
    ({"request": "r", "type": "ping", "reply": "x"}, "r", "reply"),
    ({"request": "r", "type": "ping", "a": 1, "b": 2}, "r", "a"),
    ({"request": "r", "type": "stop"}, "r", "reply"),
    ({"request": "r", "type": "stop", "reply": None}, "r", "reply"),
    ({"request": "r", "type": "stop", "reply": 7}, "r", "reply"),
    ({"request": "r", "type": "stop", "reply": "x", "after": "1-1"}, "r", "after"),
    ({"request": "r", "type": "attach", "conversation": "c"}, "r", "conversation"),
    ({"request": "r", "type": "detach"}, "r", "reply"),
    ({"request": "r", "type": "detach", "reply": "x", "after": "1-1"}, "r", "after"),
    ({"request": "r", "type": "attach", "reply": "x", "after": "1"}, "r", "after"),
    ({"request": "r", "type": "attach", "reply": "x", "after": 1}, "r", "after"),
    ({"request": "r", "type": "attach", "reply": "x", "content": "y"}, "r", "content"),
    ({"request": "r", "type": "send", "id": "t", "content": "x"}, "r", "conversation"),
    ({"request": "r", "type": "send", "conversation": "c1", "content": "x"}, "r", "id"),
    ({"request": "r", "type": "send", "conversation": "c1", "id": "é", "content": "x"}, "r", "id"),
    (
        {"request": "r", "type": "send", "conversation": "c1", "id": "t", "content": 1},
        "r",
        "content",
    ),
    ({"request": "r", "type": "send", "conversation": "c1", "id": "t", "n": 2}, "r", "n"),
    ({"request": "r", "type": "send", "conversation": "c1", "id": "t", "reply": "r"}, "r", "reply"),
    ({"type": "ping"}, None, "request"),
    ({"type": "ping", "request": 7}, None, "request"),
    ({"type": "ping", "request": None}, None, "request"),
    ({"type": "ping", "request": "x" * 65}, None, "request"),
    ([{"type": "ping", "request": "r"}], None, None),
    ("ping", None, None),
    (7, None, None),
    (None, None, None),
]


@pytest.mark.parametrize(("sent", "request_name", "param"), WRONG_FRAMES)
async def test_a_wrong_frame_is_answered_by_name_and_the_socket_goes_on(
    served: Site, sent: object, request_name: str | None, param: str | None
) -> None:
    await conversation(served)
    async with tab(served) as page:
        await page.say(sent)
        heard = await page.hear()
        assert heard["event"] == "failed"
        assert "id" not in heard, "it is no event of a reply"
        assert (heard["request"], heard["param"]) == (request_name, param)
        assert heard["code"] in ("invalid_request", "unsupported_field")
        assert (await page.ask("ping"))["event"] == "pong"
    assert not served.conversations.sent


@pytest.mark.parametrize(
    "sent", ["", " ", "{", "{]", '{"a":NaN}', '{"a":1}}', '"\\ud800"', "[" * 2_000, "\x00", "nul"]
)
async def test_what_is_no_json_is_answered_and_the_socket_goes_on(served: Site, sent: str) -> None:
    async with tab(served) as page:
        await page.connection.send(sent)
        heard = await page.hear()
        assert (heard["event"], heard["request"], heard["code"]) == (
            "failed",
            None,
            "invalid_request",
        )
        assert (await page.ask("ping"))["event"] == "pong"


async def test_what_a_frame_says_is_not_said_back(served: Site) -> None:
    secret = "what-somebody-typed"
    async with tab(served) as page:
        for sent in (secret, f'"{secret}"', f'{{"request":"r","{secret}"'):
            await page.connection.send(sent)
            assert secret not in orjson.dumps(await page.hear()).decode()


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("send", {"conversation": "c9", "id": "t", "content": "x"}),
        ("send", {"conversation": "not/a/name", "id": "t", "content": "x"}),
        ("attach", {"reply": "c9.r1"}),
        ("attach", {"reply": "é"}),
        ("stop", {"reply": "c9.r1"}),
        ("detach", {"reply": "c9.r1"}),
    ],
)
async def test_what_is_not_there_is_not_found(
    served: Site, kind: str, fields: dict[str, Any]
) -> None:
    async with tab(served) as page:
        heard = await page.ask(kind, **fields)
        assert (heard["event"], heard["code"]) == ("failed", "not_found")
        assert (await page.ask("ping"))["event"] == "pong"


# -- refusals and faults behind the socket


async def test_a_refused_turn_says_when_to_come_back(served: Site) -> None:
    name = await conversation(served)
    served.conversations.refusal = Unavailable("The store is away.", retry_after=3.0)
    async with tab(served) as page:
        heard = await page.ask("send", conversation=name, id="t", content="x")
        assert (heard["event"], heard["code"]) == ("failed", "unavailable")
        assert heard["retry_after"] == 3.0
        served.conversations.refusal = None
        await page.send_turn(name)


async def test_our_own_fault_is_told_without_details_and_the_socket_goes_on(served: Site) -> None:
    name = await conversation(served)
    served.conversations.refusal = KeyError("what-somebody-typed")
    async with tab(served) as page:
        heard = await page.ask("send", conversation=name, id="t", content="x")
        assert (heard["event"], heard["code"]) == ("failed", "internal_error")
        assert "typed" not in heard["message"]
        served.conversations.refusal = None
        await page.send_turn(name)


@pytest.mark.parametrize("fault", [Unavailable("The store is away."), KeyError("x")])
async def test_a_viewing_that_breaks_off_is_told_and_the_socket_goes_on(
    served: Site, fault: Exception
) -> None:
    name = await conversation(served)
    async with tab(served) as page:
        accepted = await page.send_turn(name)
        reply = await reply_in(served, name)
        reply.say("abc")
        await page.hear_until("delta")
        reply.break_off(fault)
        broken = await page.hear()
        assert (broken["event"], broken["request"]) == ("failed", accepted["request"])
        assert broken["reply"] == reply.id, "among many, this one"
        assert "id" not in broken, "the reply may go on"
        await soon(reply.left)
        reply.fault = None
        await page.ask("attach", reply=reply.id, after="1-3")
        reply.finish()
        assert (await page.hear())["event"] == "done"


# -- how much at once


async def test_sends_at_once_have_a_limit_and_those_within_it_go_on() -> None:
    async with site(quick(socket_viewings_max=3)) as running:
        names = [await conversation(running) for _ in range(5)]
        async with tab(running) as page:
            for name in names:
                await page.tell("send", conversation=name, id="t", content="x")
            heard = [await page.hear() for _ in names]
            refused = [each for each in heard if each["event"] == "failed"]
            assert {each["code"] for each in refused} == {"busy"}
            assert sorted(each["request"] for each in refused) == ["q4", "q5"]
            assert len(running.conversations.replies) == 3, "nothing is kept of a refused turn"
            (await reply_in(running, names[0], "t")).finish()
            await page.hear_until("done")
            await page.send_turn(names[3], "t")


async def test_stops_at_once_have_a_limit() -> None:
    async with site(quick(socket_requests_max=2)) as running:
        gate = asyncio.Event()
        running.conversations.stop_hold = gate
        async with tab(running) as page:
            for _ in range(3):
                await page.tell("stop", reply="c1.r1")
            busy = await page.hear()
            assert (busy["request"], busy["code"]) == ("q3", "busy")
            gate.set()
            codes = {(heard := await page.hear())["request"]: heard["code"] for _ in range(2)}
            assert codes == {"q1": "not_found", "q2": "not_found"}


async def test_a_keys_places_count_its_viewings_on_all_its_sockets() -> None:
    async with site(quick(connections_max=2)) as running:
        name = await conversation(running)
        async with tab(running) as page:
            accepted = await page.send_turn(name)
            await page.ask("attach", reply=accepted["reply"])  # in the place of the first
            other = await conversation(running)
            await page.send_turn(other)
            third = await conversation(running)
            heard = await page.ask("send", conversation=third, id="t", content="x")
            assert (heard["event"], heard["code"]) == ("failed", "busy")


async def test_turns_being_accepted_share_the_budget_of_bodies() -> None:
    """A turn's text counts until it is accepted, and not while its reply is looked at."""
    async with site(quick(bodies_max=1)) as running:
        names = [await conversation(running) for _ in range(3)]
        large = "x" * (quick().body_bytes_max * 2 // 5)
        running.conversations.hold = asyncio.Event()
        async with tab(running) as page:
            for name in names:
                await page.tell("send", conversation=name, id="t", content=large)
            busy = await page.hear()
            assert (busy["request"], busy["code"]) == ("q3", "busy")
            running.conversations.hold.set()
            assert {(await page.hear())["request"] for _ in range(2)} == {"q1", "q2"}
            await page.send_turn(names[2], "t", content=large)
            await until(lambda: running.conversations.viewers == 3)
            gc.collect()
            assert not [each for each in gc.get_objects() if type(each) is ClientFrame]


# -- other tabs


async def test_a_change_reaches_the_owners_tabs(served: Site) -> None:
    async with tab(served) as one, tab(served) as two:
        await until(lambda: served.conversations.listeners == 2)
        name = await conversation(served)
        await served.conversations.update("local", name, {"title": "New"})
        await served.conversations.delete("local", name)
        for page in (one, two):
            heard = [await page.hear_any() for _ in range(3)]
            assert heard == [
                {"event": "changed", "conversation": name, "revision": revision}
                for revision in (1, 2, None)
            ]
    await until(lambda: served.conversations.listeners == 0)


async def test_changes_that_break_end_the_socket(served: Site) -> None:
    """A tab that would not hear of changes any more must know, and comes back."""
    async with tab(served) as page:
        await until(lambda: served.conversations.listeners == 1)
        served.conversations.break_changes(KeyError("x"))
        assert (await page.closed_by_server())[0] == 1011
