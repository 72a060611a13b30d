"""`/api/socket`: coming back to a reply at any place, leaving it, and whose it is."""

import asyncio
import random
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from chatserve.api.keys import KeyRing, key_ring
from tests.api.fake_conversations import DONE, FakeChatReply
from tests.api.harness import LIMITS, Site, site, soon, until
from tests.api.socket_peer import Heard, Tab, conversation, reply_in, tab

USER, OTHER = "user-key-0123456789", "other-key-0123456789"


@pytest.fixture
async def served() -> AsyncGenerator[Site]:
    async with site() as running:
        yield running


async def begun(running: Site, page: Tab, said: str = "abc") -> FakeChatReply:
    """A reply that goes on, of which this was said and heard."""
    name = await conversation(running)
    await page.send_turn(name)
    reply = await reply_in(running, name)
    reply.say(said)
    while (await page.hear())["seq"] < len(said):
        pass
    return reply


def names(heard: list[Heard]) -> list[tuple[str, str | None]]:
    return [(frame["event"], frame.get("id")) for frame in heard]


# -- cursors


@pytest.mark.parametrize(
    ("after", "event", "text"),
    [
        (None, "delta", "abcdef"),
        ("1-0", "delta", "abcdef"),
        ("1-2", "delta", "cdef"),
        ("1-7", "snapshot", "abcdef"),
        ("2-1", "snapshot", "abcdef"),
    ],
)
async def test_a_running_reply_goes_on_from_the_cursor(
    served: Site, after: str | None, event: str, text: str
) -> None:
    async with tab(served) as page:
        reply = await begun(served, page, "abcdef")
        query = {} if after is None else {"after": after}
        accepted = await page.ask("attach", reply=reply.id, **query)
        assert (accepted["event"], accepted["turn"]) == ("accepted", "t1")
        assert "ended" not in accepted
        heard = await page.hear()
        assert (heard["event"], heard["id"], heard["text"]) == (event, "1-6", text)
        reply.say("g")
        assert (await page.hear())["text"] == "g"
        reply.finish()
        assert names([await page.hear()]) == [("done", "1-8")]


async def test_a_cursor_at_the_end_of_the_text_waits_for_more(served: Site) -> None:
    async with tab(served) as page:
        reply = await begun(served, page)
        await page.ask("attach", reply=reply.id, after="1-3")
        assert (await page.ask("ping"))["event"] == "pong", "nothing is said again"
        reply.say("d")
        assert names([await page.hear()]) == [("delta", "1-4")]


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ("1-4", [("delta", "2-8"), ("done", "2-9")]),
        ("1-3", [("delta", "2-8"), ("done", "2-9")]),
        ("1-6", [("snapshot", "2-8"), ("done", "2-9")]),
        ("2-6", [("delta", "2-8"), ("done", "2-9")]),
        ("2-8", [("done", "2-9")]),
        ("3-1", [("snapshot", "2-8"), ("done", "2-9")]),
    ],
)
async def test_a_cursor_of_another_epoch_holds_as_far_as_that_one_was_kept(
    served: Site, after: str, expected: list[tuple[str, str]]
) -> None:
    async with tab(served) as page:
        reply = await begun(served, page, "abcdef")
        reply.crash(kept=4)
        reply.say("EFGH")
        reply.finish()
        await page.tell("attach", reply=reply.id, after=after)
        heard = await page.hear_until("accepted")
        assert heard[-1]["request"] == "q2"
        heard = await page.hear_until("done")
    assert names(heard) == expected
    kept = "" if heard[0]["event"] == "snapshot" else "abcdEFGH"[: int(after.partition("-")[2])]
    assert kept + "".join(frame.get("text", "") for frame in heard) == "abcdEFGH"


async def test_the_final_cursor_is_answered_by_that_alone(served: Site) -> None:
    """What 204 is for SSE."""
    async with tab(served) as page:
        reply = await begun(served, page)
        reply.finish()
        await page.hear_until("done")
        viewed = reply.viewed
        assert await page.ask("attach", reply=reply.id, after="1-4") == {
            "event": "accepted",
            "request": "q2",
            "conversation": reply.conversation,
            "turn": "t1",
            "reply": reply.id,
            "ended": True,
        }
        assert (await page.ask("ping"))["event"] == "pong"
        assert reply.viewed == viewed


async def test_a_reply_cut_anywhere_and_resumed_is_whole(served: Site) -> None:
    """Over 120 sockets, left without a word after any number of frames."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    name = await conversation(served)
    text, last, done, sockets = "", "1-0", None, 0
    while done is None:
        async with tab(served) as page:
            sockets += 1
            if sockets == 1:
                await page.send_turn(name)
            reply = await reply_in(served, name)
            if sockets > 1:
                await page.ask("attach", reply=reply.id, after=last)
            for _ in range(dice.randrange(1, 6)):
                reply.say(dice.choice(["a", "é\n\n", '"\\', "\u2028 ", "\U0001f600"]))
                heard = await page.hear()
                text += heard["text"]
                last = heard["id"]
                assert heard["seq"] == len(text)
            reply.say(dice.choice(["", "unread"]))
            if sockets == 120:
                reply.finish()
                *rest, done = await page.hear_until("done")
                text += "".join(frame["text"] for frame in rest)
            elif dice.random() < 0.5:
                page.connection.transport.abort()
    assert text == reply.text
    assert {key: done[key] for key in DONE} == DONE
    await soon(reply.left)


# -- twice on one socket


async def test_a_second_look_takes_the_place_of_the_first(served: Site) -> None:
    async with tab(served) as page:
        reply = await begun(served, page, "abcdef")
        await page.ask("attach", reply=reply.id, after="1-2")
        assert (await page.hear())["text"] == "cdef"
        assert (reply.viewers, reply.viewed) == (1, 2)
        reply.say("g")
        assert names([await page.hear()]) == [("delta", "1-7")]
        reply.finish()
        assert names([await page.hear()]) == [("done", "1-8")]
        assert (await page.ask("ping"))["event"] == "pong", "each event came once"
    assert reply.viewers == 0


async def test_looks_at_one_reply_that_come_at_once_are_each_answered(served: Site) -> None:
    async with tab(served) as page:
        reply = await begun(served, page, "abcdef")
        asked = {await page.tell("attach", reply=reply.id, after="1-6") for _ in range(20)}
        asked |= {
            await page.tell("send", conversation=reply.conversation, id="t1", content="x")
            for _ in range(5)
        }
        answers: dict[str, Heard] = {}
        while len(answers) < len(asked):
            heard = await page.hear()
            if heard.get("request") in asked:
                assert heard["request"] not in answers
                answers[heard["request"]] = heard
        assert {each["event"] for each in answers.values()} == {"accepted"}
        await until(lambda: reply.viewers == 1)
        reply.finish()
        await page.hear_until("done")
        assert (await page.ask("ping"))["event"] == "pong", "one final event"
    assert reply.viewers == 0


# -- looking away


async def test_after_detached_no_event_of_that_reply_comes_and_it_goes_on(served: Site) -> None:
    async with tab(served) as page, tab(served) as other:
        reply, kept = await begun(served, page), await begun(served, page)
        await other.ask("attach", reply=reply.id, after="1-3")
        answer = await page.ask("detach", reply=reply.id)
        assert answer == {"event": "detached", "request": "q3", "reply": reply.id}
        assert reply.viewers == 1
        reply.say("d")
        kept.say("e")
        assert (await other.hear())["text"] == "d"
        assert (await page.hear())["text"] == "e"
        assert (await other.ask("detach", reply=reply.id))["event"] == "detached"
        await soon(reply.left)
        assert reply.end is None
        # And back, at the place where it was left.
        await page.ask("attach", reply=reply.id, after="1-3")
        assert (await page.hear())["text"] == "d"


async def test_a_detach_is_answered_again_and_after_the_end(served: Site) -> None:
    async with tab(served) as page:
        reply = await begun(served, page)
        for _ in range(2):
            assert (await page.ask("detach", reply=reply.id))["event"] == "detached"
        reply.finish()
        assert (await page.ask("detach", reply=reply.id))["event"] == "detached"
        unknown = await page.ask("detach", reply="c9.r1")
        assert (unknown["event"], unknown["code"]) == ("failed", "not_found")


async def test_a_detach_of_an_attach_on_its_way_comes_after_its_answer(
    served: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, go_on = served.conversations.reply, asyncio.Event()

    async def slow(owner: str, name: str) -> FakeChatReply:
        await go_on.wait()
        return await found(owner, name)

    async with tab(served) as page:
        reply = await begun(served, page)
        await page.ask("detach", reply=reply.id)
        monkeypatch.setattr(served.conversations, "reply", slow)
        attach = await page.tell("attach", reply=reply.id)
        detach = await page.tell("detach", reply=reply.id)
        strange = [await page.tell(kind, reply="c9.r1") for kind in ("attach", "detach")]
        await page.ask("ping")
        go_on.set()
        heard = [await page.hear() for _ in range(4)]
        events = {each["request"]: each["event"] for each in heard}
        assert events == {
            attach: "accepted",
            detach: "detached",
            strange[0]: "failed",
            strange[1]: "failed",
        }
        order = [each["request"] for each in heard]
        assert order.index(attach) < order.index(detach)
        reply.say("d")
        assert (await page.ask("ping"))["event"] == "pong"
        assert reply.viewers == 0


async def test_a_place_that_is_left_is_free_for_the_next_frame(served: Site) -> None:
    async with tab(served) as page:
        replies = [await begun(served, page) for _ in range(LIMITS.socket_viewings_max)]
        first, *_ = replies
        assert (await page.ask("attach", reply=first.id, after="1-3"))["code"] == "busy"
        for each in replies:
            await page.tell("detach", reply=each.id)
            await page.tell("attach", reply=each.id, after="1-3")
        heard = [await page.hear() for _ in range(2 * len(replies))]
        assert sorted(each["event"] for each in heard) == sorted(
            ["accepted", "detached"] * len(replies)
        )


# -- leaving


@pytest.mark.parametrize("way", ["close", "abort", "half"])
async def test_a_tab_that_goes_leaves_its_viewings_and_the_replies_go_on(
    served: Site, way: str
) -> None:
    async with tab(served) as page, tab(served) as other:
        replies = [await begun(served, page) for _ in range(3)]
        await other.ask("attach", reply=replies[0].id, after="1-3")
        match way:
            case "close":
                await page.connection.close()
            case "abort":
                page.connection.transport.abort()
            case _:
                page.connection.transport.write_eof()
        for reply in replies[1:]:
            await soon(reply.left)
        await until(lambda: replies[0].viewers == 1)
        assert not any(reply.end for reply in replies)
        replies[0].say("d")
        assert (await other.hear())["text"] == "d"
    await soon(replies[0].left)
    await until(lambda: not served.server_state.tasks)
    await until(lambda: not served.server_state.connections)


async def test_leaving_while_turns_are_being_accepted_is_passed_on(served: Site) -> None:
    name = await conversation(served)
    served.conversations.hold = asyncio.Event()
    async with tab(served) as page:
        await page.tell("send", conversation=name, id="t1", content="x")
        await soon(served.conversations.arrived)
    await soon(served.conversations.send_cancelled)
    await until(lambda: not served.server_state.tasks)
    assert not served.conversations.replies


async def test_a_reply_that_goes_on_elsewhere_is_told_without_a_final_event(served: Site) -> None:
    async with tab(served) as page:
        reply = await begun(served, page)
        reply.go_away()
        heard = await page.hear()
        assert (heard["event"], heard["code"], heard["reply"]) == (
            "failed",
            "unavailable",
            reply.id,
        )
        assert "id" not in heard
        assert (await page.ask("ping"))["event"] == "pong"


# -- whose


@pytest.fixture
async def keyed(tmp_path: Any) -> AsyncGenerator[Site]:
    path = tmp_path / "keys.toml"
    path.write_text(
        f'[[keys]]\nname = "bob"\nkey = "{USER}"\nrole = "user"\n'
        f'[[keys]]\nname = "eve"\nkey = "{OTHER}"\nrole = "user"\n'
    )
    keys: KeyRing = key_ring(key_file=path)
    async with site(keys=keys) as running:
        yield running


def tab_of(running: Site, key: str) -> Any:
    return tab(running, additional_headers={"Authorization": f"Bearer {key}"})


async def test_another_owners_things_are_not_found_whatever_is_asked_of_them(keyed: Site) -> None:
    name = await conversation(keyed, "bob")
    async with tab_of(keyed, USER) as bob, tab_of(keyed, OTHER) as eve:
        await bob.send_turn(name)
        reply = await reply_in(keyed, name)
        reply.say("abc")
        await bob.hear_until("delta")
        turn = {"id": "t1", "content": "x"}
        asked: list[tuple[str, dict[str, Any]]] = [
            ("send", {"conversation": name} | turn),
            ("send", {"conversation": name, "id": "t2"}),
            ("attach", {"reply": reply.id}),
            ("attach", {"reply": reply.id, "after": "1-3"}),
            ("attach", {"reply": reply.id, "after": "1-4"}),
            ("stop", {"reply": reply.id}),
            ("detach", {"reply": reply.id}),
        ]
        for kind, fields in asked:
            known = await eve.ask(kind, **fields)
            unknown = await eve.ask(
                kind, **{field: value.replace(name, "c999") for field, value in fields.items()}
            )
            assert known["code"] == "not_found"
            assert known | {"request": ""} == unknown | {"request": ""}, "no word that it is there"
        assert reply.end is None
        assert reply.viewed == 1
        reply.finish()
        assert (await bob.hear())["event"] == "done"
        assert (await eve.ask("attach", reply=reply.id, after="1-4"))["code"] == "not_found"


async def test_a_change_is_told_to_its_owners_tabs_and_to_nobody_else(keyed: Site) -> None:
    async with tab_of(keyed, USER) as one, tab_of(keyed, USER) as two, tab_of(keyed, OTHER) as eve:
        await until(lambda: keyed.conversations.listeners == 3)
        name = await conversation(keyed, "bob")
        await one.send_turn(name)
        await keyed.conversations.delete("bob", name)
        theirs = await conversation(keyed, "eve")
        heard = [await two.hear_any() for _ in range(3)]
        assert [(each["event"], each["conversation"]) for each in heard] == [("changed", name)] * 3
        assert [each["revision"] for each in heard] == [1, 2, None]
        assert await eve.hear_any() == {"event": "changed", "conversation": theirs, "revision": 1}
        assert (await eve.ask("ping"))["event"] == "pong"
        assert (await two.ask("ping"))["event"] == "pong"
        assert not eve.changes
        assert not two.changes, "nor of hers to them"
