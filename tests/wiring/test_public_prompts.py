"""A real server, its keys, and a system prompt that they share, or do not."""

import json
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from chatserve.prompt_files import KEPT_NAME
from tests.wiring.server import MODEL, Server, completed, events, reviving, running

PAGE_SIZE = 16
TENANTS = ("ann", "bob", "cat", "dan", "eve", "fay")
SYSTEM = "You answer in few words, and you say so when you do not know. " * 6
OTHER = "You are a patient teacher of chess, and never move a piece for your pupil. " * 6


def keys(folder: Path) -> list[str]:
    """Options for keys; ann is the admin."""
    path = folder / "keys.toml"
    roles = {"ann": 'role = "admin"\n'}
    path.write_text(
        "".join(
            f'[[keys]]\nname = "{name}"\nkey = "{name}-has-a-key"\n{roles.get(name, "")}'
            for name in TENANTS
        )
    )
    return ["--api-key-file", str(path)]


def key_of(tenant: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {tenant}-has-a-key"}


def cached(server: Server, tenant: str, *, system: str = SYSTEM, user: str, **more: object) -> int:
    """Tokens of a chat's prompt that were there before it."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 2, "temperature": 0}
    answer = httpx.post(
        server.url + "/v1/chat/completions", json=body | more, headers=key_of(tenant), timeout=60
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def cached_in_a_conversation(server: Server, tenant: str, *, user: str) -> int:
    """The same of a conversation's first turn."""
    there = {"base_url": server.url, "headers": key_of(tenant), "timeout": 60}
    with httpx.Client(**there) as client:
        made = client.post("/api/conversations", json={"system": SYSTEM}).json()
        turn = {"id": "1", "content": user, "max_tokens": 2}
        answer = client.post(f"/api/conversations/{made['id']}/turns", json=turn)
    (done,) = [each for each in events(answer.text.splitlines()) if "usage" in each]
    return done["usage"]["prompt_tokens_details"]["cached_tokens"]  # type: ignore[index]


def post(server: Server, name: str, text: str, *, tenant: str = "ann") -> httpx.Response:
    body = {"name": name, "text": text}
    return httpx.post(server.url + "/admin/prompts", json=body, headers=key_of(tenant), timeout=60)


def delete(server: Server, name: str, *, tenant: str = "ann") -> httpx.Response:
    return httpx.delete(f"{server.url}/admin/prompts/{name}", headers=key_of(tenant), timeout=60)


def listed(server: Server) -> dict[str, tuple[int, int, str]]:
    answer = httpx.get(server.url + "/admin/prompts", headers=key_of("ann"), timeout=60)
    return {
        each["name"]: (each["pages"], each["tokens"], each["source"])
        for each in answer.json()["prompts"]
    }


def test_tenants_share_exactly_the_pages_of_a_registered_prompt(tmp_path: Path) -> None:
    with running(tmp_path, keys(tmp_path), key="ann-has-a-key") as server:
        assert cached(server, "ann", user="What is a page?") == 0
        assert cached(server, "bob", user="What is a page?") == 0, "shared without registration"
        made = post(server, "house", SYSTEM)
        assert made.status_code == 201
        pages, tokens = made.json()["pages"], made.json()["tokens"]
        assert pages > 3
        assert pages == tokens // PAGE_SIZE
        assert cached(server, "ann", user="What is a page?") == 0, "under public names it is new"
        # The same user message, so that all of the prompt's pages would match if they could.
        assert cached(server, "bob", user="What is a page?") == pages * PAGE_SIZE
        assert cached(server, "cat", user="Something else entirely.") == pages * PAGE_SIZE
        shared = cached_in_a_conversation(server, "fay", user="Something of my own.")
        assert shared == pages * PAGE_SIZE
        assert cached(server, "dan", user="What is a page?", cache_salt="mine") == 0
        assert cached(server, "dan", system=OTHER, user="What is a page?") == 0
        assert cached(server, "bob", user="What is a page?") > pages * PAGE_SIZE, "its own as well"

        assert delete(server, "house").status_code == 204
        assert delete(server, "house").status_code == 404
        assert cached(server, "eve", user="What is a page?") == 0, "shared after DELETE"
        assert listed(server) == {}


def test_prompts_and_their_pages_outlive_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "prompts.toml"
    file.write_text(f'[[prompts]]\nname = "teacher"\ntext = """{OTHER}"""\n')
    options = [*keys(tmp_path), "--public-prompts", str(file)]
    with running(tmp_path, options, key="ann-has-a-key") as server:
        assert post(server, "house", SYSTEM).status_code == 201
        before = listed(server)
        assert {name: source for name, (_, _, source) in before.items()} == {
            "house": "posted",
            "teacher": "file",
        }
        for system in (SYSTEM, OTHER):
            assert cached(server, "ann", system=system, user="What is a page?") == 0
    kept = json.loads((tmp_path / "data" / KEPT_NAME).read_text())
    assert kept["prompts"] == [{"name": "house", "text": SYSTEM}], "the file's are its own"
    with running(tmp_path, options, key="ann-has-a-key") as server:
        assert listed(server) == before
        for name, system in (("house", SYSTEM), ("teacher", OTHER)):
            shared = before[name][0] * PAGE_SIZE
            assert cached(server, "bob", system=system, user="What is a page?") == shared
        disk = server.cache()["disk"]
        assert disk is not None
        assert delete(server, "house").status_code == 204
        assert delete(server, "teacher").status_code == 204
    with running(tmp_path, options, key="ann-has-a-key") as server:
        assert set(listed(server)) == {"teacher"}, "the file says so at each start"
        assert cached(server, "cat", user="What is a page?") == 0


async def test_a_posted_prompt_is_kept_when_the_answer_is_there(tmp_path: Path) -> None:
    with reviving(tmp_path, keys(tmp_path)) as revived:
        await revived.ready()
        assert post(revived.server, "house", SYSTEM).status_code == 201
        revived.kill()
        revived.spawn()
        await revived.ready()
        assert set(listed(revived.server)) == {"house"}


def test_only_admins_come_in_and_wrong_bodies_are_told(tmp_path: Path) -> None:
    with running(tmp_path, keys(tmp_path), key="ann-has-a-key") as server:
        assert post(server, "house", SYSTEM, tenant="bob").status_code == 403
        assert delete(server, "house", tenant="bob").status_code == 403
        assert httpx.get(server.url + "/admin/prompts").status_code == 401
        assert listed(server) == {}
        short = post(server, "short", "Be kind.")
        assert short.status_code == 201
        assert short.json()["pages"] == short.json()["tokens"] // PAGE_SIZE == 0
        long = post(server, "long", "word " * 20_000)
        assert long.status_code == 400
        assert long.json()["error"]["code"] == "context_length_exceeded"
        assert long.json()["error"]["param"] == "text"
        assert set(listed(server)) == {"short"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["cannot be read"]),
        (f'[[prompts]]\nname = "a"\ntext = "{"word " * 20_000}"', ["'a'", "tokens", "context"]),
    ],
)
def test_a_wrong_file_ends_the_process_with_one_line(
    tmp_path: Path, text: str | None, words: Sequence[str]
) -> None:
    file = tmp_path / "prompts.toml"
    if text is not None:
        file.write_text(text)
    done = completed(
        *("serve", "--port", "0", "--log-level", "error"),
        *("--data-dir", str(tmp_path / "data"), "--public-prompts", str(file)),
        fresh=text is not None,  # not a line more from anything that is imported
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("chatserve: --public-prompts")
    assert all(word in done.stderr for word in [str(file), *words]), done.stderr
