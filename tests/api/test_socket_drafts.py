"""`focus` and `draft` frames: no answer but an error, and nothing left of them behind a socket."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from chatserve.chat.conversations.draft_ask import DraftAsk
from chatserve.errors import NotFound
from tests.api.harness import LIMITS, Site, site, until
from tests.api.socket_peer import Tab, conversation, tab


class FakeTypist:
    """Keeps what it takes; `failed` is the socket's ear once it runs."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.taken: list[DraftAsk] = []
        self.failed: Callable[[Exception, str], None] | None = None
        self.running = False
        self.closed = 0

    def take(self, ask: DraftAsk) -> None:
        self.taken.append(ask)

    async def run(self, failed: Callable[[Exception, str], None]) -> None:
        self.failed, self.running = failed, True
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.running = False

    def close(self) -> None:
        self.closed += 1


class Typists:
    """Those of a site, in order."""

    def __init__(self, served: Site) -> None:
        self.made: list[FakeTypist] = []
        self.off = False
        conversations: Any = served.conversations
        conversations.typist = self.make

    def make(self, owner: str) -> FakeTypist | None:
        if self.off:
            return None
        self.made.append(FakeTypist(owner))
        return self.made[-1]


@pytest.fixture
async def served() -> AsyncGenerator[Site]:
    async with site() as running:
        yield running


async def answered(page: Tab) -> None:
    """What was sent before this was acted on, and nothing of it was answered."""
    assert (await page.ask("ping"))["event"] == "pong"


async def test_a_socket_has_one_typist_who_takes_all_that_is_typed(served: Site) -> None:
    typists = Typists(served)
    async with tab(served) as page:
        await answered(page)
        assert not typists.made, "a typist for somebody who only reads"
        await page.tell("focus", conversation="c1")
        await page.tell("draft", conversation="c1", text="he")
        await page.tell("draft", conversation="c1", text="hello", parent="c1.r1")
        await page.tell("draft", conversation="c1", text="", parent=None)
        await answered(page)
        (typist,) = typists.made
        assert typist.owner == "local"
        assert typist.taken == [
            DraftAsk(request="q2", conversation="c1"),
            DraftAsk(request="q3", conversation="c1", text="he"),
            DraftAsk(request="q4", conversation="c1", text="hello", at_leaf=False, parent="c1.r1"),
            DraftAsk(request="q5", conversation="c1", text="", at_leaf=False, parent=None),
        ]


async def test_a_chat_that_is_not_there_yet_is_typed_in_with_its_system_prompt(
    served: Site,
) -> None:
    typists = Typists(served)
    async with tab(served) as page:
        await page.tell("focus", system="be brief")
        await page.tell("draft", text="hello", system="be brief")
        await page.tell("draft", conversation="", text="hello")
        await page.tell("draft", conversation=None, text="hello", system=None)
        await answered(page)
        assert typists.made[0].taken == [
            DraftAsk(request="q1", conversation=None, system="be brief"),
            DraftAsk(request="q2", conversation=None, text="hello", system="be brief"),
            DraftAsk(request="q3", conversation=None, text="hello"),
            DraftAsk(request="q4", conversation=None, text="hello"),
        ]


@pytest.mark.parametrize(
    ("frame", "param"),
    [
        ({"type": "draft", "conversation": "c1"}, "text"),
        ({"type": "draft", "conversation": "c1", "text": None}, "text"),
        ({"type": "draft", "conversation": "c1", "text": ["a"]}, "text"),
        ({"type": "draft", "conversation": "c1", "text": "a", "parent": 7}, "parent"),
        ({"type": "draft", "conversation": "c1", "text": "a", "parent": "no such/id"}, "parent"),
        ({"type": "draft", "conversation": "c1", "text": "a", "system": "s"}, "system"),
        ({"type": "draft", "text": "a", "system": 7}, "system"),
        ({"type": "draft", "text": "a", "temperature": 1.0}, "temperature"),
        ({"type": "draft", "text": "a", "reply": "c1.r1"}, "reply"),
        ({"type": "focus", "conversation": "c1", "text": "a"}, "text"),
        ({"type": "focus", "conversation": "c1", "parent": "t1"}, "parent"),
        ({"type": "focus", "conversation": 7}, "conversation"),
        ({"type": "ping", "text": "a"}, "text"),
        ({"type": "attach", "reply": "c1.r1", "system": "s"}, "system"),
    ],
)
async def test_a_wrong_frame_is_told_and_the_socket_goes_on(
    served: Site, frame: dict[str, object], param: str
) -> None:
    typists = Typists(served)
    async with tab(served) as page:
        await page.say({"request": "q"} | frame)
        heard = await page.hear()
        assert (heard["event"], heard["request"]) == ("failed", "q")
        assert heard["param"] == param
        await answered(page)
        assert not [ask for typist in typists.made for ask in typist.taken]


async def test_an_id_that_can_be_none_is_not_found(served: Site) -> None:
    Typists(served)
    async with tab(served) as page:
        heard = await page.ask("draft", conversation="no such/id", text="a")
        assert (heard["event"], heard["code"]) == ("failed", "not_found")


async def test_what_the_typist_cannot_do_is_told_with_the_request_of_its_frame(
    served: Site,
) -> None:
    typists = Typists(served)
    async with tab(served) as page:
        request = await page.tell("draft", conversation="c1", text="a")
        await until(lambda: typists.made and typists.made[0].failed)
        failed = typists.made[0].failed
        assert failed is not None
        failed(NotFound("There is no such conversation."), request)
        heard = await page.hear()
        assert (heard["event"], heard["request"]) == ("failed", request)
        assert heard["code"] == "not_found"
        failed(ZeroDivisionError("a secret"), request)
        heard = await page.hear()
        assert heard["event"] == "failed"
        assert "secret" not in str(heard)
        await answered(page)


async def test_a_socket_that_goes_takes_its_typist_along(served: Site) -> None:
    typists = Typists(served)
    async with tab(served) as page:
        await page.tell("draft", conversation="c1", text="a")
        await until(lambda: typists.made and typists.made[0].running)
        (typist,) = typists.made
    await until(lambda: typist.closed)
    assert not typist.running
    await until(lambda: not served.server_state.tasks)


async def test_a_socket_that_goes_at_once_closes_a_typist_that_never_ran(served: Site) -> None:
    typists = Typists(served)
    for _ in range(20):
        async with tab(served) as page:
            await page.tell("draft", conversation="c1", text="a")
            page.connection.transport.abort()
    await until(lambda: not served.server_state.tasks)
    assert all(typist.closed and not typist.running for typist in typists.made)


async def test_with_drafts_off_what_is_typed_is_ignored(served: Site) -> None:
    typists = Typists(served)
    typists.off = True
    async with tab(served) as page:
        await page.tell("focus", conversation="c1")
        await page.tell("draft", conversation="c1", text="a")
        await answered(page)


async def test_typing_takes_no_place_of_a_turn(served: Site) -> None:
    typists = Typists(served)
    name = await conversation(served)
    async with tab(served) as page:
        for number in range(LIMITS.socket_viewings_max + 5):
            await page.tell("draft", conversation=name, text="a" * number)
        await page.send_turn(name)
        (typist,) = typists.made
        assert len(typist.taken) == LIMITS.socket_viewings_max + 5
