"""What an admin does to the cache, over HTTP, and on the command line."""

import argparse
import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from chatserve.api.keys import key_ring
from chatserve.cache_command import add_cache_options, request_of, run_cache_command
from chatserve.errors import NotFound, SettingsError, Unavailable
from tests.api.harness import site

LEASE = "/admin/cache/lease"


class Actions:
    """Keeps what it is told. Knows the conversation `known`."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def _do(self, *words: object) -> None:
        if words[1:2] and words[1] != "known":
            raise NotFound("There is no such conversation.")
        self.told.append(words)

    def flush(self) -> Mapping[str, int]:
        self._do("flush")
        return {"pages": 3, "host_pages": 4}

    async def lease(self, conversation: str, seconds: float) -> Mapping[str, int]:
        self._do("lease", conversation, seconds)
        return {"pages": 5, "host_pages": 6}

    async def warm(self, conversation: str) -> Mapping[str, int]:
        self._do("warm", conversation)
        return {"device": 1, "coming": 2, "below": 3, "nowhere": 4}

    async def evict(self, conversation: str) -> Mapping[str, int]:
        self._do("evict", conversation)
        return {"pages": 7, "host_pages": 8, "pages_stayed": 9, "host_pages_stayed": 1}

    async def forget(self, conversation: str) -> Mapping[str, int]:
        self._do("forget", conversation)
        return {"conversations": 1}

    async def verify(self, pages: int) -> Mapping[str, int]:
        self._do("verify")
        self.told[-1] = ("verify", pages)
        return dict(VERIFIED)


VERIFIED = {
    "checked": 9,
    "wrong": 2,
    "unreadable": 1,
    "absent": 0,
    "compared": 5,
    "different": 3,
}
ASKED: list[tuple[str, dict[str, Any], tuple[object, ...], dict[str, int]]] = [
    ("flush", {}, ("flush",), {"pages": 3, "host_pages": 4}),
    (
        "lease",
        {"conversation": "known", "seconds": 90},
        ("lease", "known", 90.0),
        {"pages": 5, "host_pages": 6},
    ),
    (
        "warm",
        {"conversation": "known"},
        ("warm", "known"),
        {"device": 1, "coming": 2, "below": 3, "nowhere": 4},
    ),
    (
        "evict",
        {"conversation": "known"},
        ("evict", "known"),
        {"pages": 7, "host_pages": 8, "pages_stayed": 9, "host_pages_stayed": 1},
    ),
    ("forget", {"conversation": "known"}, ("forget", "known"), {"conversations": 1}),
    ("verify", {"pages": 9}, ("verify", 9), VERIFIED),
]


@pytest.mark.parametrize(("name", "body", "told", "answered"), ASKED)
async def test_each_action_is_done_once_and_its_outcome_told(
    name: str, body: dict[str, Any], told: tuple[object, ...], answered: dict[str, int]
) -> None:
    actions = Actions()
    async with site(cache=lambda: actions) as running, running.client() as client:
        answer = await client.post(f"/admin/cache/{name}", json=body)
        assert (answer.status_code, answer.json()) == (200, answered)
        assert answer.headers["cache-control"] == "no-store"
    assert actions.told == [told]


@pytest.mark.parametrize(
    ("name", "body", "param"),
    [
        ("lease", {"conversation": "known"}, "seconds"),
        ("lease", {"seconds": 1}, "conversation"),
        ("lease", {"conversation": "known", "seconds": -1}, "seconds"),
        ("lease", {"conversation": "known", "seconds": 86_401}, "seconds"),
        ("lease", {"conversation": "known", "seconds": "60"}, "seconds"),
        ("lease", {"conversation": "known", "seconds": True}, "seconds"),
        ("lease", {"conversation": "", "seconds": 1}, "conversation"),
        ("lease", {"conversation": "x" * 257, "seconds": 1}, "conversation"),
        ("warm", {"conversation": 7}, "conversation"),
        ("warm", {"conversation": "known", "seconds": 1}, "seconds"),
        ("evict", {}, "conversation"),
        ("forget", {}, "conversation"),
        ("forget", {"conversation": "known", "pages": 1}, "pages"),
        ("verify", {}, "pages"),
        ("verify", {"pages": 0}, "pages"),
        ("verify", {"pages": 4097}, "pages"),
        ("verify", {"pages": 1.5}, "pages"),
        ("verify", {"pages": True}, "pages"),
        ("evict", {"conversation": None}, "conversation"),
    ],
)
async def test_a_wrong_field_is_named_and_nothing_is_done(
    name: str, body: dict[str, Any], param: str
) -> None:
    actions = Actions()
    async with site(cache=lambda: actions) as running, running.client() as client:
        answer = await client.post(f"/admin/cache/{name}", json=body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param
    assert not actions.told


async def test_a_body_that_is_no_object_or_too_long_is_refused() -> None:
    actions = Actions()
    headers = {"content-type": "application/json"}
    async with site(cache=lambda: actions) as running, running.client() as client:
        for content in (b"", b"[]", b'{"conversation": "known", "seconds": NaN}'):
            answer = await client.post(LEASE, content=content, headers=headers)
            assert answer.status_code == 400
        answer = await client.post(LEASE, content=b" " * 5_000, headers=headers)
        assert answer.status_code == 413
    assert not actions.told


async def test_an_unknown_conversation_is_a_404_and_a_loading_model_a_503() -> None:
    def loading() -> Actions:
        raise Unavailable("The model is loading.", retry_after=2.0)

    async with site(cache=Actions) as running, running.client() as client:
        answer = await client.post("/admin/cache/warm", json={"conversation": "other"})
        assert answer.status_code == 404
    async with site(cache=loading) as running, running.client() as client:
        for name, body, _, _ in ASKED:
            answer = await client.post(f"/admin/cache/{name}", json=body)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")


async def test_only_an_admin_may(tmp_path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(
        '[[keys]]\nname = "ann"\nkey = "key-of-ann"\nrole = "admin"\n'
        '[[keys]]\nname = "bob"\nkey = "key-of-bob"\n'
    )
    actions = Actions()
    keys = key_ring(key_file=file)
    async with site(cache=lambda: actions, keys=keys) as running, running.client() as client:
        for name, body, _, _ in ASKED:
            for key, status in (("key-of-bob", 403), ("nobody", 401)):
                headers = {"Authorization": f"Bearer {key}"}
                answer = await client.post(f"/admin/cache/{name}", json=body, headers=headers)
                assert answer.status_code == status
    assert not actions.told


# The command line ----------------------------------------------------------------------------


def given(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_cache_options(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("flush",), "3 pages forgotten on the device, 4 in host memory"),
        (
            ("lease", "known", "--seconds", "90"),
            "the lease is set for 5 pages of the device, 6 of host memory",
        ),
        (
            ("warm", "known"),
            "1 pages on the device, 2 on the way there, 3 left below, 4 nowhere",
        ),
        (
            ("verify", "--pages", "9"),
            "9 pages checked: 2 wrong, 1 unreadable; 5 compared with the device's, 3 different",
        ),
        (("evict", "known"), "7 pages left the device, 8 of host memory; 10 stayed"),
        (("forget", "known"), "1 conversation forgotten: nothing of it is kept"),
    ],
)
async def test_the_command_says_what_the_server_did(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    actions = Actions()
    async with site(cache=lambda: actions) as running:
        url = f"http://127.0.0.1:{running.port}"
        status = await asyncio.to_thread(run_cache_command, given(*words, "--url", url))
    assert status == 0
    assert capsys.readouterr().out == f"{said}\n"
    assert len(actions.told) == 1


@pytest.mark.parametrize(
    "words",
    [
        ("lease", "known"),
        ("lease", "--seconds", "9"),
        ("warm",),
        ("evict", "known", "--seconds", "9"),
        ("forget",),
        ("flush", "known"),
        ("verify",),
        ("verify", "known", "--pages", "9"),
        ("warm", "known", "--pages", "9"),
        ("stats", "known"),
        ("stats", "--seconds", "0"),
    ],
)
def test_options_that_do_not_belong_together_are_refused_before_anything_is_asked(
    words: tuple[str, ...],
) -> None:
    with pytest.raises(SettingsError):
        request_of(given(*words))


async def test_the_command_tells_a_refusal() -> None:
    async with site(cache=Actions) as running:
        url = f"http://127.0.0.1:{running.port}"
        asked = given("warm", "other", "--url", url)
        with pytest.raises(SettingsError, match="no such conversation"):
            await asyncio.to_thread(run_cache_command, asked)
