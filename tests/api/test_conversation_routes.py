"""Conversations by HTTP: what is taken, what is shown, whose they are, and the file format."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import orjson
import pytest

from chatserve.api.keys import KeyRing, key_ring
from chatserve.errors import Busy, Unavailable
from tests.api.harness import Site, site, until

ADA, BOB = "ada-key-0123456789", "bob-key-0123456789"
TURN: dict[str, Any] = {"id": "t1", "content": "one two"}


@pytest.fixture
async def served() -> AsyncGenerator[Site]:
    async with site() as running:
        running.conversations.on_send = lambda reply: (reply.say("said"), reply.finish())
        yield running


@pytest.fixture
def keys(tmp_path: Any) -> KeyRing:
    path = tmp_path / "keys.toml"
    path.write_text(
        f'[[keys]]\nname = "ada"\nkey = "{ADA}"\n[[keys]]\nname = "bob"\nkey = "{BOB}"\n'
    )
    return key_ring(key_file=path)


async def begin(client: httpx.AsyncClient, **fields: Any) -> str:
    answer = await client.post("/api/conversations", json=fields)
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def error_of(answer: httpx.Response) -> dict[str, Any]:
    return answer.json()["error"]


# -- the shelf


async def test_a_conversation_from_its_creation_to_its_deletion(served: Site) -> None:
    async with served.client() as client:
        name = await begin(client, title=" One ", system="Be kind.", settings={"temperature": 1})
        path = f"/api/conversations/{name}"
        made = (await client.get(path)).json()
        assert made["title"] == "One"
        assert made["system"] == "Be kind."
        assert made["settings"] == {"temperature": 1.0}
        assert made["turns"] == made["replies"] == []
        changes = {"title": "Two", "system": None, "settings": {"stop": "x"}}
        changed = (await client.patch(path, json=changes)).json()
        assert changed["title"] == "Two"
        assert changed["system"] is None
        assert changed["settings"] == {"stop": ["x"]}
        assert changed["revision"] == made["revision"] + 1
        assert (await client.delete(path)).status_code == 204
        assert (await client.get(path)).status_code == 404
        assert (await client.delete(path)).status_code == 404


async def test_what_is_an_owners_own_is_not_stored_on_the_way(served: Site) -> None:
    async with served.client() as client:
        name = await begin(client)
        for path in ("", f"/{name}", f"/{name}/export"):
            answer = await client.get(f"/api/conversations{path}")
            assert answer.headers["cache-control"] == "no-store"
            assert answer.headers["x-content-type-options"] == "nosniff"


async def test_pages_of_the_list_hold_each_conversation_once(served: Site) -> None:
    async with served.client() as client:
        names = [await begin(client, title=f"chat {index}") for index in range(7)]
        found: list[str] = []
        query: dict[str, Any] = {"limit": 3}
        while True:
            page = (await client.get("/api/conversations", params=query)).json()
            assert len(page["conversations"]) <= 3
            assert "turns" not in page["conversations"][0]
            found += [each["id"] for each in page["conversations"]]
            if page["next"] is None:
                break
            query["after"] = page["next"]
        assert found == names[::-1]
        hits = (await client.get("/api/conversations", params={"search": "T 3"})).json()
        assert [each["id"] for each in hits["conversations"]] == [names[3]]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=-1", "limit"),
        ("limit=x", "limit"),
        ("limit=%D9%A3", "limit"),
        ("limit=1000000000000", "limit"),
        ("after=", "after"),
        ("after=" + "x" * 201, "after"),
        ("search=" + "x" * 201, "search"),
    ],
)
async def test_a_wrong_query_is_named(served: Site, query: str, param: str) -> None:
    async with served.client() as client:
        answer = await client.get(f"/api/conversations?{query}")
        assert answer.status_code == 400
        assert error_of(answer)["param"] == param
        assert (await client.get("/api/conversations?limit=100000")).status_code == 200


@pytest.mark.parametrize(
    ("method", "body", "param"),
    [
        ("POST", {"title": ""}, "title"),
        ("POST", {"title": "a\nb"}, "title"),
        ("POST", {"title": "a\x85b"}, "title"),
        ("POST", {"title": "a\u202eb"}, "title"),
        ("POST", {"title": "x" * 201}, "title"),
        ("POST", {"title": 1}, "title"),
        ("POST", {"system": ["x"]}, "system"),
        ("POST", {"settings": []}, "settings"),
        ("POST", {"settings": {"temperature": 3}}, "settings.temperature"),
        ("POST", {"settings": {"n": 1}}, "settings.n"),
        ("POST", {"settings": {"model": "x"}}, "settings.model"),
        ("POST", {"owner": "x"}, "owner"),
        ("PATCH", {}, None),
        ("PATCH", {"title": None}, "title"),
        ("PATCH", {"revision": 1}, "revision"),
        ("PATCH", {"system": 1}, "system"),
        ("PATCH", {"settings": None}, "settings"),
        ("PATCH", {"leaf": None}, "leaf"),
        ("PATCH", {"leaf": "a/b"}, "leaf"),
    ],
)
async def test_a_wrong_field_is_named(
    served: Site, method: str, body: dict[str, Any], param: str | None
) -> None:
    async with served.client() as client:
        path = "/api/conversations"
        if method == "PATCH":
            path += "/" + await begin(client)
        answer = await client.request(method, path, json=body)
        assert answer.status_code == 400
        assert error_of(answer)["param"] == param


async def test_a_leaf_is_one_of_the_turns(served: Site) -> None:
    async with served.client() as client:
        path = f"/api/conversations/{await begin(client)}"
        await client.post(f"{path}/turns", json=TURN)
        assert (await client.patch(path, json={"leaf": "t1"})).json()["leaf"] == "t1"
        missing = await client.patch(path, json={"leaf": "t2"})
        assert missing.status_code == 404
        assert error_of(missing)["param"] == "leaf"


@pytest.mark.parametrize("name", ["c9", "%2e%2e", "a%00b", "x" * 161, "é"])
async def test_what_is_not_there_is_not_found(served: Site, name: str) -> None:
    async with served.client() as client:
        await begin(client)
        for method, path in [
            ("GET", f"/api/conversations/{name}"),
            ("GET", f"/api/conversations/{name}/export"),
            ("DELETE", f"/api/conversations/{name}"),
            ("GET", f"/api/replies/{name}/events"),
            ("DELETE", f"/api/replies/{name}"),
        ]:
            assert (await client.request(method, path)).status_code == 404, path
        answer = await client.post(f"/api/conversations/{name}/turns", json=TURN)
        assert answer.status_code == 404
        assert error_of(answer)["code"] == "not_found"


async def test_another_owners_things_are_not_found(keys: KeyRing) -> None:
    async with site(keys=keys) as running, running.client() as client:
        running.conversations.on_send = lambda reply: reply.say("secret")
        ada = {"Authorization": f"Bearer {ADA}"}
        made = await client.post("/api/conversations", json={"title": "own"}, headers=ada)
        name = made.json()["id"]
        path = f"/api/conversations/{name}"
        turns = f"{path}/turns"
        async with client.stream("POST", turns, json=TURN, headers=ada) as answer:
            await anext(answer.aiter_lines())
            (reply,) = running.conversations.replies
            client.headers["Authorization"] = f"Bearer {BOB}"
            tried = [
                await client.get(path),
                await client.patch(path, json={"title": "x"}),
                await client.get(f"{path}/export"),
                await client.post(turns, json=TURN),
                await client.get(f"/api/replies/{reply}/events"),
                await client.delete(f"/api/replies/{reply}"),
                await client.delete(path),
            ]
            assert [answer.status_code for answer in tried] == [404] * len(tried)
            assert all("secret" not in answer.text for answer in tried)
            assert (await client.get("/api/conversations")).json()["conversations"] == []
            assert running.conversations.replies[reply].end is None


async def test_nobody_gets_in_without_a_key_or_from_another_site(keys: KeyRing) -> None:
    async with site(keys=keys) as running, running.client() as client:
        assert (await client.get("/api/conversations")).status_code == 401
        client.headers["Authorization"] = f"Bearer {ADA}"
        foreign = {"Origin": "https://evil.example"}
        answer = await client.post("/api/conversations", json={}, headers=foreign)
        assert answer.status_code == 403
        answer = await client.post(
            "/api/conversations", content="{}", headers={"Content-Type": "text/plain"}
        )
        assert answer.status_code == 415
        assert not running.conversations.known


async def test_a_server_without_conversations_has_none_of_their_routes() -> None:
    async with site(conversations=None) as running, running.client() as client:
        assert (await client.get("/api/conversations")).status_code == 404
        assert (await client.get("/api/replies/x/events")).status_code == 404


# -- turns


async def test_what_a_turn_means_goes_down_whatever_its_spelling(served: Site) -> None:
    bodies: list[dict[str, Any]] = [
        TURN | {"temperature": 1, "stop": "x", "max_tokens": 5, "user": "me"},
        TURN | {"max_completion_tokens": 5, "stop": ["x"], "temperature": 1.0, "top_p": None},
    ]
    async with served.client() as client:
        for body in bodies:
            turns = f"/api/conversations/{await begin(client)}/turns"
            assert (await client.post(turns, json=body)).status_code == 200
    first, second = served.conversations.sent
    assert first.sampling == {"temperature": 1.0, "stop": ["x"], "max_tokens": 5}
    assert second.sampling == first.sampling
    assert second.digest == first.digest
    assert first.owner == "local"
    assert first.at_leaf


@pytest.mark.parametrize(
    "other",
    [
        {"content": "one  two"},
        {"parent": None},
        {"parent": "t0"},
        {"temperature": 0.5},
        {"seed": 1},
        {"stop": ["x", "y"]},
    ],
)
async def test_another_body_under_a_known_id_is_a_conflict(
    served: Site, other: dict[str, Any]
) -> None:
    async with served.client() as client:
        turns = f"/api/conversations/{await begin(client)}/turns"
        first = await client.post(turns, json=TURN)
        again = await client.post(turns, json=dict(reversed(TURN.items())))
        assert again.content == first.content
        answer = await client.post(turns, json=TURN | other)
        assert answer.status_code == 409
        assert error_of(answer)["code"] == "conflict"
    assert len(served.conversations.replies) == 1


async def test_a_parent_is_absent_null_or_a_turn(served: Site) -> None:
    async with served.client() as client:
        turns = f"/api/conversations/{await begin(client)}/turns"
        for index, place in enumerate([{}, {"parent": None}, {"parent": "c1.r2"}]):
            await client.post(turns, json={"id": f"t{index}", "content": "x"} | place)
        await client.post(turns, json={"id": "again", "parent": "t0"})
    asked = [(turn.at_leaf, turn.parent, turn.content) for turn in served.conversations.sent]
    assert asked == [
        (True, None, "x"),
        (False, None, "x"),
        (False, "c1.r2", "x"),
        (False, "t0", None),
    ]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"content": "x"}, "id"),
        ({"id": "", "content": "x"}, "id"),
        ({"id": "x" * 65, "content": "x"}, "id"),
        ({"id": "a b", "content": "x"}, "id"),
        ({"id": "a\n", "content": "x"}, "id"),
        ({"id": 1, "content": "x"}, "id"),
        (TURN | {"content": ""}, "content"),
        (TURN | {"content": ["x"]}, "content"),
        ({"id": "t", "parent": None}, "content"),
        (TURN | {"parent": 1}, "parent"),
        (TURN | {"parent": ""}, "parent"),
        (TURN | {"parent": "x" * 200}, "parent"),
        (TURN | {"n": 1}, "n"),
        (TURN | {"stream": True}, "stream"),
        (TURN | {"logprobs": True}, "logprobs"),
        (TURN | {"messages": [{"role": "user", "content": "x"}]}, "messages"),
        (TURN | {"model": "tiny/model"}, "model"),
        (TURN | {"cache_salt": "x"}, "cache_salt"),
        (TURN | {"temperature": True}, "temperature"),
        (TURN | {"temperature": "1"}, "temperature"),
        (TURN | {"top_p": 0}, "top_p"),
        (TURN | {"seed": 2**63}, "seed"),
        (TURN | {"stop": [""]}, "stop"),
        (TURN | {"stop": ["x"] * 17}, "stop"),
        (TURN | {"logit_bias": {"x": 1}}, "logit_bias"),
        (TURN | {"stop_token_ids": [1] * 129}, "stop_token_ids"),
        (TURN | {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        (TURN | {"max_tokens": 1, "min_tokens": 2}, "min_tokens"),
        (TURN | {"nonsense": 1}, "nonsense"),
    ],
)
async def test_a_wrong_turn_is_refused_before_anything_is_written(
    served: Site, body: dict[str, Any], param: str
) -> None:
    async with served.client() as client:
        turns = f"/api/conversations/{await begin(client)}/turns"
        answer = await client.post(turns, json=body)
        assert answer.status_code == 400
        assert error_of(answer)["param"] == param
        assert answer.headers["content-type"] == "application/json"
    assert not served.conversations.sent


async def test_a_busy_or_absent_store_says_when_to_come_back(served: Site) -> None:
    async with served.client() as client:
        turns = f"/api/conversations/{await begin(client)}/turns"
        served.conversations.refusal = Busy("Full.", retry_after=7.0)
        busy = await client.post(turns, json=TURN)
        assert (busy.status_code, busy.headers["retry-after"]) == (429, "7")
        assert error_of(busy)["type"] == "rate_limit_error"
        served.conversations.refusal = Unavailable("Away.", retry_after=0.2)
        away = await client.post(turns, json=TURN)
        assert (away.status_code, away.headers["retry-after"]) == (503, "1")
        assert (await client.post("/api/conversations", json={})).status_code == 503


async def test_a_key_has_so_many_replies_at_once(tmp_path: Any) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(f'[[keys]]\nname = "ada"\nkey = "{ADA}"\nrequests = 2\n')
    async with site(keys=key_ring(key_file=path)) as running, running.client() as client:
        client.headers["Authorization"] = f"Bearer {ADA}"
        turns = f"/api/conversations/{await begin(client)}/turns"
        replies = running.conversations.replies
        async with asyncio.TaskGroup() as group:
            for index in range(2):
                body = {"id": f"t{index}", "content": "x"}
                group.create_task(client.post(turns, json=body))
            await until(lambda: running.conversations.viewers == 2)
            third = await client.post(turns, json={"id": "t2", "content": "x"})
            assert third.status_code == 429
            assert "retry-after" in third.headers
            again = await client.get(f"/api/replies/{next(iter(replies))}/events")
            assert again.status_code == 429
            for reply in replies.values():
                reply.finish()
        assert (await client.post(turns, json={"id": "t0", "content": "x"})).status_code == 200
    assert len(replies) == 2


async def test_a_body_that_is_too_large_is_refused(served: Site) -> None:
    async with served.client() as client:
        turns = f"/api/conversations/{await begin(client)}/turns"
        body = orjson.dumps(TURN | {"content": "x" * 1_100_000})
        kind = {"Content-Type": "application/json"}
        answer = await client.post(turns, content=body, headers=kind)
        assert answer.status_code == 413
        answer = await client.post(turns, content=b"[]", headers=kind)
        assert answer.status_code == 400
    assert not served.conversations.sent


# -- export and import


async def test_an_export_is_imported_as_what_it_was(served: Site) -> None:
    async with served.client() as client:
        name = await begin(client, title="T", system="S", settings={"top_k": 3, "stop": ["a"]})
        turns = f"/api/conversations/{name}/turns"
        await client.post(turns, json=TURN)
        served.conversations.keep(next(iter(served.conversations.replies.values())))
        await client.post(turns, json={"id": "t2", "content": "line\r\n\u2028 end"})
        await client.post(turns, json={"id": "t3", "content": "other root", "parent": None})
        first = (await client.get(f"/api/conversations/{name}/export")).json()
        assert len(first["turns"]) == 4
        added = await client.post("/api/conversations/import", json=first)
        assert added.status_code == 201
        other = added.json()["id"]
        assert other != name
        second = (await client.get(f"/api/conversations/{other}/export")).json()
        assert without_times(second) == without_times(first)
        third = await client.post("/api/conversations/import", json=second)
        again = (await client.get(f"/api/conversations/{third.json()['id']}/export")).json()
        assert without_times(again) == without_times(first)


async def test_an_import_may_have_a_name(served: Site) -> None:
    async with served.client() as client:
        for more in ({}, {"id": None}, {"id": "mine"}):
            answer = await client.post("/api/conversations/import", json=FILE | more)
            assert answer.status_code == 201
        assert served.conversations.import_asks == [None, None, "mine"]
        named = {"id": "new", "title": "One", "system": "Be kind."}
        assert await begin(client, **named) == await begin(client, **named)
        assert served.conversations.import_asks[3:] == ["new", "new"]
        assert (await client.post("/api/conversations", json={"id": "?"})).status_code == 400


def without_times(file: dict[str, Any]) -> dict[str, Any]:
    turns = [{k: v for k, v in turn.items() if k != "created"} for turn in file["turns"]]
    return {k: v for k, v in file.items() if k != "created"} | {"turns": turns}


def turn(name: str, parent: str | None, role: str = "user", **more: Any) -> dict[str, Any]:
    return {"id": name, "parent": parent, "role": role, "content": "x"} | more


FILE: dict[str, Any] = {
    "format": "chatserve.conversation",
    "version": 1,
    "title": "T",
    "leaf": "b",
    "turns": [turn("a", None), turn("b", "a", "assistant"), turn("c", "b")],
}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"format": "x"}, "format"),
        ({"version": 2}, "version"),
        ({"version": "1"}, "version"),
        ({"owner": "x"}, "owner"),
        ({"id": "a/b"}, "id"),
        ({"id": 1}, "id"),
        ({"title": "a\nb"}, "title"),
        ({"settings": {"n": 2}}, "settings.n"),
        ({"created": -1}, "created"),
        ({"leaf": "z"}, "leaf"),
        ({"leaf": None}, "leaf"),
        ({"turns": []}, "leaf"),
        ({"turns": {}}, "turns"),
        ({"turns": [1]}, "turns[0]"),
        ({"turns": [turn("a", None, "assistant")]}, "turns[0].role"),
        ({"turns": [turn("a", "a")]}, "turns[0].parent"),
        ({"turns": [turn("a", "b"), turn("b", None)]}, "turns[0].parent"),
        ({"turns": [turn("a", None), turn("a", None)]}, "turns[1].id"),
        ({"turns": [turn("a", None), turn("b", "a")]}, "turns[1].role"),
        ({"turns": [turn("a/b", None)]}, "turns[0].id"),
        ({"turns": [turn("a", None, "system")]}, "turns[0].role"),
        ({"turns": [turn("a", None, content="")]}, "turns[0].content"),
        ({"turns": [turn("a", None, content=None)]}, "turns[0].content"),
        ({"turns": [turn("a", None, final={})]}, "turns[0].content"),
        ({"turns": [turn("a", None, token_ids=[1])]}, "turns[0].token_ids"),
        (
            {"turns": [turn("a", None), turn("b", "a", "assistant", final={"x": "y" * 70_000})]},
            "turns[1].final",
        ),
        ({"turns": [turn(f"t{index}", None) for index in range(10_001)]}, "turns"),
    ],
)
async def test_a_file_that_is_no_conversation_is_refused(
    served: Site, change: dict[str, Any], param: str
) -> None:
    async with served.client() as client:
        answer = await client.post("/api/conversations/import", json=FILE | change)
        assert answer.status_code == 400, answer.text
        assert error_of(answer)["param"] == param
        assert not served.conversations.known
        assert (await client.post("/api/conversations/import", json=FILE)).status_code == 201
