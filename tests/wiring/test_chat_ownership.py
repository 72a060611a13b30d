"""Whose conversations are whose, on a real server with keys: another's are as if they were not."""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import httpx
import pytest
from starlette.routing import Route
from websockets.asyncio.client import ClientConnection

from chatserve.api.answer import Desk
from chatserve.api.chat_collaborators import Conversations
from chatserve.api.chat_routes import chat_routes
from tests.wiring.chat_streams import ChatClient, Json, Watched
from tests.wiring.given_redis import GivenSite
from tests.wiring.server import ENDLESS

STRANGERS = ("bob", "operator")
LONG = ENDLESS | {"max_tokens": 3_500}


@dataclass
class Belongings:
    """What ada has: a conversation with an exchange and a reply that runs, and its ids."""

    conversation: str
    ended: Watched
    live: Watched


@asynccontextmanager
async def belongings(ada: ChatClient) -> AsyncGenerator[Belongings]:
    conversation = await ada.new(title="Mine", system="Be kind.", settings={"temperature": 0.5})
    ended = await ada.send(conversation, "first", content="A secret.", max_tokens=4)
    assert isinstance(ended, Watched)
    async with ada.watching(conversation, "second", **LONG) as live:
        yield Belongings(conversation, ended, live)
        await ada.stop(live.reply)
    assert live.kind == "done"


Ask = Callable[[httpx.AsyncClient, str, str], Awaitable[httpx.Response]]


def _turn(**fields: object) -> Ask:
    def ask(http: httpx.AsyncClient, conversation: str, _: str) -> Awaitable[httpx.Response]:
        return http.post(f"/api/conversations/{conversation}/turns", json=fields)

    return ask


def _events(after: str | None) -> Ask:
    def ask(http: httpx.AsyncClient, _: str, reply: str) -> Awaitable[httpx.Response]:
        headers = {} if after is None else {"Last-Event-ID": after}
        return http.get(f"/api/replies/{reply}/events", headers=headers)

    return ask


# By method and route, every way in which somebody may ask for what is another's.
WAYS: dict[tuple[str, str], list[Ask]] = {
    ("GET", "/api/conversations/{id}"): [
        lambda http, conversation, _: http.get(f"/api/conversations/{conversation}"),
    ],
    ("PATCH", "/api/conversations/{id}"): [
        lambda http, conversation, _: http.patch(
            f"/api/conversations/{conversation}", json={"title": "Yours"}
        ),
        lambda http, conversation, _: http.patch(
            f"/api/conversations/{conversation}", json={"leaf": "first"}
        ),
    ],
    ("DELETE", "/api/conversations/{id}"): [
        lambda http, conversation, _: http.delete(f"/api/conversations/{conversation}"),
    ],
    ("GET", "/api/conversations/{id}/export"): [
        lambda http, conversation, _: http.get(f"/api/conversations/{conversation}/export"),
    ],
    ("POST", "/api/conversations/{id}/turns"): [
        _turn(id="new", content="Hello!"),
        _turn(id="new", content="Hello!", parent=None),
        _turn(id="new", content="Hello!", parent="first"),
        _turn(id="new", parent="first"),
        # The very turn that its owner sent: a known one's reply would be given.
        _turn(id="first", content="A secret.", max_tokens=4),
        _turn(id="first", content="Another body."),
        _turn(id="second", content="Tell a long story.", **LONG),
    ],
    ("GET", "/api/replies/{id}/events"): [
        _events(None), _events("1-1"), _events("9-9"), _events("the end"),
    ],
    ("DELETE", "/api/replies/{id}"): [
        lambda http, _, reply: http.delete(f"/api/replies/{reply}"),
    ],
}  # fmt: skip
OWN = {  # of whoever asks: these name nothing that could be another's
    ("POST", "/api/conversations"),
    ("GET", "/api/conversations"),
    ("POST", "/api/conversations/import"),
}


def test_every_route_is_tried() -> None:
    routes = chat_routes(cast("Desk", None), cast("Conversations", None))
    asked = {
        (method, route.path)
        for route in routes
        if isinstance(route, Route)
        for method in route.methods or ()
        if method != "HEAD"
    }
    assert asked == WAYS.keys() | OWN


@pytest.mark.parametrize("stranger", STRANGERS)
async def test_anothers_things_are_not_found_on_any_route(site: GivenSite, stranger: str) -> None:
    async with site.client("ada") as ada, site.client(stranger) as other, belongings(ada) as hers:
        before = await ada.whole(hers.conversation)
        nobodys = f"{'x' * 24}", f"{'x' * 24}.{'y' * 24}"
        for ways in WAYS.values():
            for way in ways:
                for reply in (hers.ended.reply, hers.live.reply):
                    theirs = await _asked(way, other, (hers.conversation, reply), hers)
                    absent = await _asked(way, other, nobodys, hers)
                    assert theirs.status_code == 404, theirs.text
                    # Nothing tells what is another's from what never was.
                    assert theirs.json() == absent.json()
                    assert theirs.headers.keys() == absent.headers.keys()
        for search in ({}, {"search": "secret"}, {"search": "Mine"}):
            listed = await other.http.get("/api/conversations", params=search)
            assert listed.status_code == 200
            assert hers.conversation not in {each["id"] for each in listed.json()["conversations"]}
        assert await ada.whole(hers.conversation) == before, "nothing was changed"
        await hers.live.until_longer(1)
        assert hers.live.final is None, "it was not stopped"


async def _asked(
    way: Ask, client: ChatClient, ids: tuple[str, str], hers: Belongings
) -> httpx.Response:
    answer = await way(client.http, *ids)
    if answer.request.headers.get("Last-Event-ID") == "the end":
        # Its owner would be told that there is nothing more.
        headers = {"Last-Event-ID": hers.ended.last_id}
        answer = await client.http.get(answer.request.url, headers=headers)
    return answer


async def test_a_socket_gives_nothing_of_anothers(site: GivenSite) -> None:
    async with (
        site.client("ada") as ada,
        site.client("bob") as bob,
        belongings(ada) as hers,
        site.socket("bob") as socket,
    ):
        frames: list[Json] = [
            {"type": "send", "conversation": hers.conversation, "id": "new", "content": "Hello!"},
            {
                "type": "send",
                "conversation": hers.conversation,
                "id": "first",
                "content": "A secret.",
                "max_tokens": 4,
            },
            {"type": "send", "conversation": hers.conversation, "id": "again", "parent": "first"},
        ]
        for reply in (hers.ended, hers.live):
            frames += [
                {"type": "attach", "reply": reply.reply},
                {"type": "attach", "reply": reply.reply, "after": reply.last_id},
                {"type": "stop", "reply": reply.reply},
            ]
        for number, frame in enumerate(frames):
            told = await _answered(socket, frame | {"request": f"r{number}"})
            assert told["event"] == "failed", frame
            assert told["request"] == f"r{number}"
            assert told["code"] == "not_found"
        # Word of changes is its owner's; bob hears of his own, and of nothing before that.
        await ada.http.patch(f"/api/conversations/{hers.conversation}", json={"title": "Changed"})
        own = await bob.new()
        changed: Json = json.loads(await socket.recv())
        assert (changed["event"], changed["conversation"]) == ("changed", own)
        await hers.live.until_longer(1)
        assert hers.live.final is None


async def _answered(socket: ClientConnection, frame: Json) -> Json:
    await socket.send(json.dumps(frame))
    return json.loads(await socket.recv())


# What an owner takes along ------------------------------------------------------------------------


async def test_an_export_is_anybodys_to_import_and_then_their_own(site: GivenSite) -> None:
    async with site.client("ada") as ada, site.client("bob") as bob:
        original = await _with_a_branch(ada)
        file = await _exported(ada, original)
        copies: list[tuple[ChatClient, str]] = []
        for client in (ada, bob):
            answer = await client.http.post("/api/conversations/import", json=file)
            assert answer.status_code == 201, answer.text
            copies.append((client, answer.json()["id"]))
            assert copies[-1][1] != original
        whole = await ada.whole(original)
        for client, copy in copies:
            assert await _exported(client, copy) == file
            imported = await client.whole(copy)
            for name in ("title", "system", "settings", "leaf", "turns", "created"):
                assert imported[name] == whole[name], name
        # The next turn of each copy is the same prompt: their ids are made from the same text. The
        # original goes on from the ids that the model wrote, which may be others for that text.
        usages = [await _prompt_tokens(client, conversation) for client, conversation in copies]
        assert usages[0] == usages[1], usages
        assert (await bob.http.delete(f"/api/conversations/{copies[1][1]}")).status_code == 204
        assert (await ada.whole(copies[0][1]))["turns"], "another's copy is untouched"


async def _with_a_branch(client: ChatClient) -> str:
    """Two exchanges, the first answered twice, the leaf on the elder branch."""
    conversation = await client.new(system="Be kind. ☂", settings={"temperature": 0.0})
    first = await client.send(conversation, "a", content="Hello — 'you'!\n\n\ttabs", max_tokens=8)
    again = await client.send(conversation, "b", content=None, parent="a", max_tokens=6)
    assert isinstance(first, Watched)
    assert isinstance(again, Watched)
    second = await client.send(
        conversation, "c", content="And then?", parent=first.reply, max_tokens=8
    )
    assert isinstance(second, Watched)
    return conversation


async def _exported(client: ChatClient, conversation: str) -> dict[str, Any]:
    answer = await client.http.get(f"/api/conversations/{conversation}/export")
    assert answer.status_code == 200
    assert "attachment" in answer.headers["content-disposition"]
    return answer.json()


async def _prompt_tokens(client: ChatClient, conversation: str) -> int:
    seen = await client.send(conversation, "next", content="Go on.", max_tokens=1)
    assert isinstance(seen, Watched)
    assert seen.final is not None
    return seen.final["usage"]["prompt_tokens"]
