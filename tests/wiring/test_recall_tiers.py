"""The recall set through every tier of a real server: the same answers, and receipts that are true.

    computed ─▶ device ─▶ disk, after a flush ─▶ disk, after SIGTERM ─▶ disk, after kill -9 ─▶
    a pool so small that everything moves all the time

and with host memory between, in the tests' own process:

    computed ─▶ host memory, behind a small pool ─▶ disk, after a flush ─▶ host memory ─▶
    disk, after SIGTERM ─▶ host memory so small that everything moves there, too

Each conversation has a `cache_salt` of its own, so that no other one's pages are in its receipts.

A process knows the ids of the replies that it has told, and finds all whole pages of a conversation
that is sent again. The next process encodes those replies anew. Where the model has spelled one in
other tokens than the tokenizer does, the pages before it are found and the rest is computed, once.
Which these are, and how many tokens are alike, is known here from the ids that the answers name.
"""

import asyncio
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from operator import eq
from pathlib import Path

import httpx
import pytest
import torch

from chatserve.demonstration.corpus import Chat
from chatserve.demonstration.evaluate import is_right
from chatserve.engine import tiers
from tests.wiring.in_process import living
from tests.wiring.recall import (
    RECALLED_MIN,
    Answer,
    Told,
    all_kept,
    ask,
    converse_all,
    flush,
    recall_set,
    state_of,
    until,
)
from tests.wiring.server import Revived, reviving

CHATS = 4
CHATS_HOST = 5
CHATS_LONG = 32
SMALL_POOL = "2MiB"  # 409 tokens: a conversation or two
HOST_MEMORY = "64MiB"  # all conversations
SMALL_HOST_MEMORY = "1MiB"  # half of the small pool
SMALL_POOL_LONG = "3MiB"  # some of the larger set's conversations are longer
END_SECONDS_MAX = 60.0


def own(chat: int, turn: int) -> str:
    """The salt of all turns of a conversation."""
    del turn
    return f"conversation {chat}"


def alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two prompts begin with alike."""
    return sum(1 for _ in takewhile(bool, map(eq, one, other)))


@dataclass(frozen=True, slots=True)
class Again:
    """A prompt that was asked again. reusable: its tokens that need not be computed."""

    answer: Answer
    reusable: int


@dataclass
class Talks:
    """The set, and what is said of it. told: as it went at first, each turn on its own. talked: as
    it went with the cache, the last time. knowing: whether the server's process has told that.
    computed: of each conversation, the ids of the last prompts that were computed with its salt."""

    chats: Sequence[Chat]
    page_size: int
    told: Sequence[Told] = ()
    talked: Sequence[Told] = ()
    knowing: bool = False
    computed: Sequence[set[tuple[int, ...]]] = field(default_factory=list[set[tuple[int, ...]]])

    async def compute(self, client: httpx.AsyncClient) -> None:
        """Every answer on its own, from nothing: what all later ones are compared with."""
        self.told = await converse_all(client, self.chats, lambda chat, turn: f"{chat}/{turn}")
        for told in self.told:
            for answer in told.answers:
                assert answer.cached == 0, "the reference has used the cache"
        right = [
            is_right(chat.turns[-1], told.texts[-1])
            for chat, told in zip(self.chats, self.told, strict=True)
        ]
        assert sum(right) >= RECALLED_MIN * len(right), "the set would not notice a wrong page"

    async def talk(self, client: httpx.AsyncClient) -> list[Told]:
        """All conversations at once, turn after turn, and the answers are those computed alone."""
        told = await converse_all(client, self.chats, own)
        assert [each.texts for each in told] == [each.texts for each in self.told]
        self.talked, self.knowing = told, True
        self.computed = self.computed or [set() for _ in told]
        for each, computed in zip(told, self.computed, strict=True):
            computed.add(each.last_prompt_ids(anew=False))
        return told

    async def once_more(self, client: httpx.AsyncClient) -> list[Again]:
        """Each conversation's last prompt again, one after the other; the same answers."""
        answers: list[Again] = []
        for number, (told, talked) in enumerate(zip(self.told, self.talked, strict=True)):
            answer = await ask(
                client, told.prompts[-1], salt=own(number, 0), stream=bool(number % 2)
            )
            assert answer.text == told.texts[-1]
            ids = talked.last_prompt_ids(anew=not self.knowing)
            assert answer.prompt == len(ids)
            computed = self.computed[number]
            most = max(alike(ids, each) for each in computed)
            computed.add(ids)
            answers.append(Again(answer, answer.reusable(most, self.page_size)))
        return answers

    async def from_device(self, client: httpx.AsyncClient) -> None:
        for again in await self.once_more(client):
            assert again.answer.device == again.answer.cached == again.reusable

    async def from_memory(self, client: httpx.AsyncClient) -> None:
        """All whole pages, from host memory what the small pool does not have."""
        answers: list[Answer] = []
        for again in await self.once_more(client):
            answers.append(again.answer)
            assert answers[-1].device + answers[-1].host == answers[-1].cached == again.reusable
        shares = [sum(getattr(each, name) for each in answers) for name in ("device", "host")]
        print(f"tokens from the device and from host memory: {shares}")
        assert shares[1] > shares[0], "the pool holds one conversation or two"

    async def from_disk(self, client: httpx.AsyncClient) -> None:
        """All whole pages, but where the server says that it has chosen to compute: it does where
        loading was measured to be slower, as it may be on a busy machine."""
        before = await state_of(client)
        again = await self.once_more(client)
        answers = [each.answer for each in again]
        after = await state_of(client)
        chosen = [each["engine"]["tiers"]["recomputes_total"] for each in (before, after)]
        loaded = [each["cache"]["transit"]["loaded_total"] for each in (before, after)]
        whole = [each.answer.disk == each.reusable for each in again]
        assert all(answer.device == answer.host == 0 for answer in answers)
        assert whole.count(False) <= chosen[1] - chosen[0], answers
        assert any(whole)
        pages = sum(-(-answer.disk // self.page_size) for answer in answers)
        assert pages == loaded[1] - loaded[0], "receipts say what was loaded"


@dataclass(kw_only=True)
class Journey(Talks):
    """The set on its way through the tiers of one data folder."""

    revived: Revived
    small_pool: tuple[str, ...]

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.revived.server.url, timeout=120)

    async def restart(self, *options: str, kill: bool = False) -> None:
        if kill:
            self.revived.kill()
        else:
            self.revived.server.process.send_signal(signal.SIGTERM)
            assert await self.revived.terminated(END_SECONDS_MAX) == 0
        await self.revive(*options)

    async def revive(self, *options: str) -> None:
        """Another process, which knows no reply's ids."""
        self.knowing = False
        self.revived.spawn(*options)
        await self.revived.ready()


async def through_every_tier(folder: Path, *, chats: int, page_size: int, small_pool: str) -> None:
    """The whole journey, checked at each place. small_pool: what `--kv-memory` says at its end."""
    options = ["--dtype", "float32", "--page-size", str(page_size)]
    with reviving(folder, options) as revived:
        pool = ("--kv-memory", small_pool)
        journey = Journey(recall_set(chats), page_size, revived=revived, small_pool=pool)
        await revived.ready()
        async with journey.client() as client:
            await journey.compute(client)
            for told in await journey.talk(client):
                first, *later = told.answers
                assert first.cached == 0
                for before, answer in zip(told.answers, later, strict=False):
                    assert answer.device >= before.whole(page_size), "what the turn before left"
                    assert answer.disk == 0
            await journey.from_device(client)
            assert await flush(client) > 0
            await journey.from_disk(client)
            await journey.from_device(client)
        await journey.restart()
        async with journey.client() as client:
            await journey.from_disk(client)
            await all_kept(client)
        await journey.restart(*journey.small_pool, kill=True)
        async with journey.client() as client:
            await journey.from_disk(client)
            await everything_moves(journey, client)
            if chats == CHATS_LONG:
                await killed_while_everything_moves(journey, client)
    assert "Traceback" not in revived.logs()


async def everything_moves(journey: Talks, client: httpx.AsyncClient) -> None:
    """All at once in a pool that holds one or two: evicted and brought up again, time and again."""
    before = await state_of(client)
    answers = [
        answer
        for told in [*await journey.talk(client), *await journey.talk(client)]
        for answer in told.answers
    ]
    await all_kept(client)
    after = await state_of(client)
    assert after["cache"]["pages"]["total"] < sum(
        told.answers[-1].whole(journey.page_size) // journey.page_size for told in journey.told
    ), "the pool is not small"
    loaded, evicted = (
        after["cache"]["transit"]["loaded_total"] - before["cache"]["transit"]["loaded_total"],
        after["cache"]["evicted_for_space_total"] - before["cache"]["evicted_for_space_total"],
    )
    sources = [sum(getattr(each, name) for each in answers) for name in ("device", "disk")]
    print(f"page size {journey.page_size}: {loaded} pages loaded, {evicted} evicted, {sources}")
    assert evicted > after["cache"]["pages"]["total"]
    assert 0 < sources[1] <= journey.page_size * loaded, "receipts name no more than was loaded"


async def killed_while_everything_moves(journey: Journey, client: httpx.AsyncClient) -> None:
    """kill -9 in the middle of it: whatever is found at the next start, the answers are right."""
    talking = asyncio.ensure_future(journey.talk(client))
    before = (await state_of(client))["cache"]["transit"]["loaded_total"]

    async def moves() -> bool:
        assert not talking.done(), "it was over before the kill"
        return (await state_of(client))["cache"]["transit"]["loaded_total"] > before + 20

    await until("nothing moves", moves)
    journey.revived.kill()
    with pytest.raises(httpx.TransportError):
        await talking
    await journey.revive(*journey.small_pool)
    async with journey.client() as again:
        assert any(each.answer.disk for each in await journey.once_more(again))
        await everything_moves(journey, again)


async def test_the_recall_set_is_the_same_from_every_tier(tmp_path: Path) -> None:
    await through_every_tier(tmp_path, chats=CHATS, page_size=16, small_pool=SMALL_POOL)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
async def test_the_recall_set_is_the_same_from_host_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is below is brought up, however long the last time took: no rate is ever fresh.
    monkeypatch.setattr(tiers, "STALE_SECONDS", -1.0)
    options = ("--dtype", "float32", "--page-size", "16", "--kv-memory", SMALL_POOL)
    talks = Talks(recall_set(CHATS_HOST), 16)
    with living(tmp_path, *options, "--host-memory", HOST_MEMORY) as server:
        async with server.client() as client:
            await talks.compute(client)
            for told in await talks.talk(client):
                for answer in told.answers:
                    assert answer.disk == 0, "host memory holds them all"
            await talks.from_memory(client)
            assert await flush(client) > 0
            await talks.from_disk(client)
            await talks.from_memory(client)
            await all_kept(client)
    talks.knowing = False
    with living(tmp_path, *options, "--host-memory", SMALL_HOST_MEMORY) as server:
        async with server.client() as client:
            await talks.from_disk(client)
            await everything_moves(talks, client)
            host = (await state_of(client))["engine"]["tiers"]["host"]
            assert host["total"] < host["evicted_total"], "host memory is not small"
            assert host["promoted_total"] > host["total"]
            assert host["corrupt_total"] == 0


@pytest.mark.soak
@pytest.mark.parametrize("page_size", [8, 16, 64])
async def test_a_large_recall_set_with_pages_of_other_sizes(tmp_path: Path, page_size: int) -> None:
    await through_every_tier(
        tmp_path, chats=CHATS_LONG, page_size=page_size, small_pool=SMALL_POOL_LONG
    )
