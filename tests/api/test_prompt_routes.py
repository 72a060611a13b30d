"""Public prompts by HTTP, over a list that a test holds: shapes, statuses, whose business it is."""

from collections.abc import AsyncGenerator
from pathlib import Path

import httpx
import pytest

from chatserve.api.keys import key_ring
from chatserve.api.prompt_routes import PromptInfo
from chatserve.errors import Conflict, NotFound, RequestError, Unavailable
from tests.api.harness import LIMITS, Site, site

ADA, BOB = "ada-key-0123456789", "bob-key-0123456789"
HOUSE = {"name": "house", "text": "one two three four"}


class FakePrompts:
    """A word is a token, two are a page. refusal: raised by whatever changes anything."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.refusal: Exception | None = None

    def info(self, name: str) -> PromptInfo:
        words = len(self.texts[name].split())
        return PromptInfo(name=name, pages=words // 2, tokens=words, posted=name != "given")

    def prompts(self) -> list[PromptInfo]:
        return [self.info(name) for name in sorted(self.texts)]

    async def register(self, name: str, text: str) -> tuple[PromptInfo, bool]:
        if self.refusal is not None:
            raise self.refusal
        new = self.texts.get(name) != text
        self.texts[name] = text
        return self.info(name), new

    async def unregister(self, name: str) -> None:
        if self.refusal is not None:
            raise self.refusal
        if self.texts.pop(name, None) is None:
            raise NotFound("There is no public prompt of that name.")


@pytest.fixture
def shelf() -> FakePrompts:
    return FakePrompts()


@pytest.fixture
async def served(shelf: FakePrompts) -> AsyncGenerator[Site]:
    async with site(prompts=lambda: shelf) as running:
        yield running


async def test_a_prompt_from_its_registration_to_its_end(served: Site, shelf: FakePrompts) -> None:
    shelf.texts["given"] = "one"
    async with served.client() as client:
        made = await client.post("/admin/prompts", json=HOUSE)
        shown = {"name": "house", "pages": 2, "tokens": 4, "source": "posted"}
        assert (made.status_code, made.json()) == (201, shown)
        assert made.headers["cache-control"] == "no-store"
        again = await client.post("/admin/prompts", json=HOUSE)
        assert (again.status_code, again.json()) == (200, shown)
        other = await client.post("/admin/prompts", json=HOUSE | {"text": "five"})
        assert (other.status_code, other.json()["pages"]) == (201, 0)
        listed = (await client.get("/admin/prompts")).json()
        assert [(each["name"], each["source"]) for each in listed["prompts"]] == [
            ("given", "file"),
            ("house", "posted"),
        ]
        gone = await client.delete("/admin/prompts/house")
        assert (gone.status_code, gone.content) == (204, b"")
        missing = await client.delete("/admin/prompts/house")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": "a"}, "text"),
        ({"text": "a"}, "name"),
        ({"name": 1, "text": "a"}, "name"),
        ({"name": "a", "text": None}, "text"),
        ({"name": "a", "text": ["a"]}, "text"),
        ({"name": "a", "text": "a", "role": "user"}, "role"),
        ([], None),
        ("house", None),
    ],
)
async def test_a_wrong_body_is_told(
    served: Site, shelf: FakePrompts, body: object, param: str | None
) -> None:
    async with served.client() as client:
        answer = await client.post("/admin/prompts", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.json()["error"]["param"] == param
    assert not shelf.texts


@pytest.mark.parametrize(
    ("refusal", "status", "param"),
    [
        (RequestError("The text is empty.", param="text"), 400, "text"),
        (Conflict("There may be 256 public prompts at the most."), 409, None),
        (Unavailable("Public prompts cannot be kept: the disk refuses."), 503, None),
    ],
)
async def test_what_the_shelf_refuses_is_passed_on(
    served: Site, shelf: FakePrompts, refusal: Exception, status: int, param: str | None
) -> None:
    shelf.refusal = refusal
    async with served.client() as client:
        for answer in (
            await client.post("/admin/prompts", json=HOUSE),
            await client.delete("/admin/prompts/house"),
        ):
            assert answer.status_code == status
            assert answer.json()["error"]["message"] == str(refusal)
            assert answer.json()["error"]["param"] == param


async def test_a_body_has_the_limits_and_the_type_of_all_others(
    served: Site, shelf: FakePrompts
) -> None:
    async with served.client() as client:
        long = HOUSE | {"text": "x" * LIMITS.body_bytes_max}
        assert (await client.post("/admin/prompts", json=long)).status_code == 413
        answer = await client.post("/admin/prompts", data=HOUSE)
        assert answer.status_code == 415
        foreign = {"Origin": "https://elsewhere.example"}
        assert (await client.post("/admin/prompts", json=HOUSE, headers=foreign)).status_code == 403
        assert not shelf.texts


async def test_admins_only(tmp_path: Path, shelf: FakePrompts) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(
        f'[[keys]]\nname = "ada"\nkey = "{ADA}"\nrole = "admin"\n'
        f'[[keys]]\nname = "bob"\nkey = "{BOB}"\n'
    )
    async with site(prompts=lambda: shelf, keys=key_ring(key_file=path)) as running:
        for key, status in ((None, 401), (BOB, 403), (ADA, 200)):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            async with running.client(headers=headers) as client:
                assert (await client.get("/admin/prompts")).status_code == status
                posted = await client.post("/admin/prompts", json=HOUSE)
                assert posted.status_code == (201 if key == ADA else status)
                assert ("house" in shelf.texts) == (key == ADA)
                gone = await client.delete("/admin/prompts/house")
                assert gone.status_code == (204 if key == ADA else status)


async def test_while_the_model_loads_all_of_it_is_unavailable() -> None:
    def find() -> FakePrompts:
        raise Unavailable("The model is loading.", retry_after=3.0)

    async with site(prompts=find) as running, running.client() as client:
        answers: list[httpx.Response] = [
            await client.get("/admin/prompts"),
            await client.post("/admin/prompts", json=HOUSE),
            await client.delete("/admin/prompts/house"),
        ]
    assert [each.status_code for each in answers] == [503] * 3
    assert {each.headers["retry-after"] for each in answers} == {"3"}
