"""Every call that the store makes to the disk fails, once and for good, under a server that chats.

While it does, each answer is the one that a server without a cache gives, and `/admin/cache` soon
says `degraded`; once the disk is well again new pages are kept, without a restart. What the store
alone does at each single call is in `tests/prefix_store/test_disk_faults.py`.
"""

import asyncio
import errno
import itertools
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import torch

import prefix_store.store
from chatserve import kept_pages
from chatserve.demonstration.corpus import make_probe
from chatserve.engine import tiers
from prefix_store import MasterSecret, PageShape, PageStore, PageWrite
from prefix_store.recovery import MINIMUM_BYTES
from tests.seeds import drawn_seed
from tests.wiring.faulty_disk import CALLS, Fault, FaultyDisk
from tests.wiring.in_process import Living, living
from tests.wiring.recall import (
    WAIT_SECONDS_MAX,
    Answer,
    Messages,
    all_kept,
    ask,
    flush,
    state_of,
    until,
)

PAGE_SIZE = 16
# Few enough slots that checkpoints come often.
OPTIONS = ("--dtype", "float32", "--page-size", str(PAGE_SIZE), "--disk-capacity", "3MiB")
HOST_MEMORY = "4MiB"  # two of the prompts
CHATS = ("corrected", "system fact", "recall")
TOKENS_MAX = 8
PROBE_SECONDS = 0.1  # instead of two
DEGRADED_SECONDS_MAX = 1.0  # asked for; a busy machine gets three
SLACK = 3.0

WRITE = Fault("pwrite")
READ = Fault("pread_into")
SYNC = Fault("sync")
FULL = Fault("pwrite", errno.ENOSPC)


@dataclass(frozen=True)
class Case:
    """One call that fails. before: what has to fail first, once, so that the call is made at all.
    reads: it is provoked by a chat that comes back, not by a new one. harmless: the store works
    though it goes on failing."""

    fault: Fault
    before: tuple[Fault, ...] = ()
    reads: bool = False
    harmless: bool = False

    @property
    def name(self) -> str:
        """For the test's name."""
        return f"{self.fault.call} {errno.errorcode[self.fault.code]}"


CASES = (
    Case(WRITE),
    Case(FULL),
    Case(SYNC),
    Case(READ, reads=True),
    Case(SYNC, before=(WRITE,)),  # a probe's own
    Case(Fault("free_bytes"), before=(WRITE,)),  # once it writes again, it looks how far
    Case(Fault("open", errno.EMFILE), before=(WRITE,)),  # what a probe begins with
    Case(Fault("close"), before=(SYNC,), harmless=True),  # a descriptor whose sync failed
    # A bad slot is wiped as far as the file goes; one of a run is bad when it fails alone
    Case(Fault("size"), before=(READ, READ), reads=True),
    Case(Fault("truncate"), before=(FULL,)),  # a full disk gets slots back
)
# Where a slab that nobody has opened makes room.
REMOVING = (Fault("unlink"), Fault("list_folder"), Fault("sync_folder"))
# What is called when the store is opened.
OPENING = ("make_folder", "folder_mode", "list_folder", "lock", "open", "pwrite", "sync", "close")
# In the protocol, and of no use so far.
NEVER = {"rename"}


@pytest.fixture(autouse=True)
def _no_errors_in_the_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A disk that fails is a warning; an error, or a traceback, would be our own."""
    yield
    loud = [each for each in caplog.get_records("call") if each.levelno >= logging.ERROR]
    assert not loud, [each.getMessage() for each in loud]


@dataclass(frozen=True)
class Prompt:
    """What is asked, and the answer of a server without a cache."""

    messages: Messages
    text: str


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def questions() -> list[Messages]:
    """The last questions of some of the recall set, all that was said before included."""
    return [make_probe(skill, "disk faults").messages()[:-1] for skill in CHATS]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    async def answers(server: Living) -> list[Prompt]:
        made: list[Prompt] = []
        async with server.client() as client:
            for messages in questions():
                answer = await ask(client, messages, max_tokens=TOKENS_MAX)
                again = await ask(client, messages, max_tokens=TOKENS_MAX)
                assert answer.cached == again.cached == 0, "there is no cache"
                assert again.text == answer.text
                made.append(Prompt(messages, answer.text))
        return made

    folder = tmp_path_factory.mktemp("without-a-cache")
    with living(folder, *OPTIONS, "--prefix-cache", "off") as server:
        return asyncio.run(answers(server))


@dataclass
class Site:
    """A server over a disk that may fail. round, turn: parts of salts, so that pages are new."""

    server: Living
    disk: FaultyDisk
    prompts: Sequence[Prompt]
    client: httpx.AsyncClient
    round: int = 0
    turn: int = 0

    async def right(self, number: int, salt: str) -> Answer:
        """An answer, which is that of a server without a cache."""
        prompt = self.prompts[number]
        answer = await ask(
            self.client, prompt.messages, salt=f"{self.round} {salt}", max_tokens=TOKENS_MAX
        )
        assert answer.text == prompt.text, (number, salt, answer)
        return answer

    async def degraded(self) -> str | None:
        """What `/admin/cache` says."""
        disk = (await state_of(self.client))["disk"]
        return disk["degraded"]

    async def until_degraded(self) -> str:
        """Wait until the last fault has happened and is said; what is said."""
        happened = await asyncio.to_thread(self.disk.happened.wait, WAIT_SECONDS_MAX)
        assert happened, "no such call was made"
        await until("the fault is not told", self.is_degraded)
        reason = await self.degraded()
        assert reason is not None, "the disk is held, and it says that it is well"
        seconds = time.monotonic() - self.disk.first_at
        print(f"round {self.round}: {self.disk.what}: {reason!r} seen {seconds * 1e3:.0f} ms later")
        assert seconds < DEGRADED_SECONDS_MAX * SLACK
        return reason

    async def is_degraded(self) -> bool:
        return await self.degraded() is not None

    async def is_well(self) -> bool:
        return await self.degraded() is None

    async def until_well(self) -> None:
        """Wait until it is not said any more."""
        await until("the disk is well and still called degraded", self.is_well)

    async def keeps_again(self) -> None:
        """Wait until new pages are kept: they come back from the disk."""

        async def kept() -> bool:
            self.turn += 1
            salt = f"new {self.turn}"
            assert (await self.right(0, salt)).cached == 0
            await flush(self.client)
            await self.right(1, salt)  # where the pages were, there are others now
            found = await self.right(0, salt)
            assert found.disk in (0, found.whole(PAGE_SIZE)), "kept in part"
            return found.disk > 0

        await until("new pages are not kept", kept)
        assert await self.is_well()


@asynccontextmanager
async def site(folder: Path, prompts: Sequence[Prompt], *options: str) -> AsyncIterator[Site]:
    """A server whose store has a disk that may fail; well at first."""
    disk = FaultyDisk()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_store.store, "LocalFiles", disk.files)
        patch.setattr(kept_pages, "PROBE_SECONDS", PROBE_SECONDS)
        # What is below is brought up, however long the last time took: no rate is ever fresh.
        patch.setattr(tiers, "STALE_SECONDS", -1.0)
        with living(folder, *OPTIONS, *options) as server:
            try:
                async with server.client() as client:
                    yield Site(server, disk, prompts, client)
            finally:
                disk.repair()


async def survive(site: Site, case: Case, *, for_good: bool) -> None:
    """One round: a fault, chats under it, the disk is well again, new pages are kept."""
    site.round += 1
    disk = site.disk
    await site.right(0, "old")
    if case.reads:
        await flush(site.client)
    else:
        await all_kept(site.client)
    errors = (await state_of(site.client))["disk"]["slabs"][0]["io_errors"]
    disk.plan([*case.before, replace(case.fault, for_good=for_good)])
    turns = itertools.count()

    async def provoked() -> bool:
        turn = next(turns)
        if case.reads:  # pages to read provoke it, else new ones to write
            await site.client.post("/admin/cache/flush", json={})
            await site.right(1, f"instead {turn}")  # where the pages were, there are others now
            await site.right(0, "old")
        else:
            await site.right(0, f"provokes {turn}")
        return disk.happened.is_set()

    await until(f"{case.name} was not provoked", provoked)
    reason = await site.until_degraded()
    if not case.before:
        words = os.strerror(case.fault.code), "no space left on the disk"
        assert any(word in reason for word in words)
    await chats_go_on(site, "held")
    disk.let_go()

    async def failed_again() -> bool:
        await chats_go_on(site, f"tried {next(turns)}")
        return disk.times > 1

    if for_good:
        await until("it was not tried again", failed_again)
    if case.harmless:
        await site.until_well()
        await site.keeps_again()
    disk.repair()
    await site.until_well()
    await site.keeps_again()
    await site.right(0, "old")
    slab = (await state_of(site.client))["disk"]["slabs"][0]
    assert slab["io_errors"] > errors


async def chats_go_on(site: Site, salt: str) -> None:
    """Old and new chats, from the device, and after the device was emptied."""
    await asyncio.gather(
        site.right(0, "old"), site.right(1, salt), site.right(1, salt), site.right(2, salt)
    )
    answer = await site.client.post("/admin/cache/flush", json={})
    assert answer.status_code == 200
    await site.right(2, salt + " again")  # where pages were, there are others now
    await asyncio.gather(site.right(0, "old"), site.right(1, salt))


@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for-good"])
async def test_chats_go_on_whatever_call_fails(
    tmp_path: Path, prompts: list[Prompt], for_good: bool
) -> None:
    """One server, one fault after the other: it has to come back from each."""
    async with site(tmp_path, prompts) as here:
        for case in CASES:
            print(case.name)
            await survive(here, case, for_good=for_good)
        assert not here.disk.seen.keys() & NEVER


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param((CASES[0], CASES[3]), id="written and read"),
        pytest.param(CASES, id="all", marks=pytest.mark.soak),
    ],
)
async def test_chats_go_on_with_host_memory_between(
    tmp_path: Path, prompts: list[Prompt], cases: tuple[Case, ...]
) -> None:
    """The threads have slots then, and what the disk refuses waits there, or not at all."""
    async with site(tmp_path, prompts, "--host-memory", HOST_MEMORY) as here:
        for case in cases:
            print(case.name)
            await survive(here, case, for_good=True)
        host = (await state_of(here.client))["engine"]["tiers"]["host"]
        assert host["saved_total"], "host memory was not in use"
        assert host["corrupt_total"] == 0


def test_no_call_is_left_out() -> None:
    failing = {fault.call for fault in (*(case.fault for case in CASES), *REMOVING)}
    assert failing | set(OPENING) | NEVER == CALLS


def idle_slab(folder: Path) -> int:
    """A slab of a model that nobody serves, in the page store of a data folder: room for some chats
    where it goes. The capacity, in bytes, with which a new slab fits beside it, and no page."""
    data = folder / "data"
    data.mkdir(mode=0o700)
    pages = data / kept_pages.FOLDER_NAME
    shape = PageShape(fingerprint=b"another model".ljust(32), page_bytes=1 << 18, page_tokens=4)
    store = PageStore.open(pages, MasterSecret.open(data), capacity_bytes=64 << 20)
    slab = store.slab(shape)
    for number in range(16):
        name = number.to_bytes(32, "little")
        assert slab.put([PageWrite(name, None, 0, bytes(16), bytes(1 << 18))]) == [True]
    store.close()
    return sum(entry.stat().st_size for entry in pages.iterdir()) + MINIMUM_BYTES


@pytest.mark.parametrize(
    ("fault", "for_good"),
    [
        (REMOVING[0], True),
        (REMOVING[0], False),
        *(
            pytest.param(fault, for_good, marks=pytest.mark.soak)
            for fault in REMOVING[1:]
            for for_good in (False, True)
        ),
    ],
    ids=lambda value: value.call if isinstance(value, Fault) else str(value),
)
async def test_chats_go_on_where_room_cannot_be_made(
    tmp_path: Path, prompts: list[Prompt], fault: Fault, for_good: bool
) -> None:
    """The folder is full of another model's pages, and what is to remove them fails."""
    capacity = idle_slab(tmp_path)
    async with site(tmp_path, prompts, "--disk-capacity", str(capacity)) as here:
        assert (await state_of(here.client))["disk"]["unopened"] == 1
        here.disk.plan([replace(fault, for_good=for_good)])
        await here.right(0, "old")
        assert os.strerror(fault.code) in await here.until_degraded()
        await chats_go_on(here, "held")
        assert (await state_of(here.client))["disk"]["unopened"] == 1
        here.disk.let_go()
        await chats_go_on(here, "failing")
        here.disk.repair()
        await here.until_well()
        await here.keeps_again()
        assert (await state_of(here.client))["disk"]["unopened"] == 0


@pytest.mark.parametrize(
    ("call", "for_good"),
    [
        ("sync", True),
        *(
            pytest.param(call, for_good, marks=pytest.mark.soak)
            for call in OPENING
            for for_good in (False, True)
            if (call, for_good) != ("sync", True)
        ),
    ],
)
async def test_chats_go_on_where_the_store_cannot_be_opened(
    tmp_path: Path, prompts: list[Prompt], call: str, for_good: bool
) -> None:
    """Nothing is kept then, which is told; once it can be, without a restart, it is."""
    disk = FaultyDisk()
    disk.plan([Fault(call, for_good=for_good)], held=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_store.store, "LocalFiles", disk.files)
        with living(tmp_path, *OPTIONS) as server:
            async with server.client() as client:
                here = Site(server, disk, prompts, client)
                assert disk.happened.is_set()
                for number in range(len(CHATS)):
                    assert (await here.right(number, "first")).cached == 0
                    assert (await here.right(number, "first")).device > 0
                await here.client.post("/admin/cache/flush", json={})
                for number in range(len(CHATS)):
                    await here.right(number, "first")
                if for_good:
                    assert await here.until_degraded()
                disk.repair()
                await here.until_well()
                await here.keeps_again()


@pytest.mark.soak
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for-good"])
async def test_chats_go_on_whichever_of_all_calls_fails(
    tmp_path: Path, prompts: list[Prompt], for_good: bool
) -> None:
    """The first call from now on, the second, … until a round is over before the fault comes."""
    seed = drawn_seed()
    dice = random.Random(seed)
    number = failed = 0
    async with site(tmp_path, prompts) as here:
        while True:
            here.round += 1
            code = dice.choice([errno.EIO, errno.ENOSPC, errno.EMFILE])
            here.disk.plan([Fault("any", code, for_good, after=number)], held=False)
            await chats_go_on(here, "first")
            await chats_go_on(here, "second")
            await all_kept(here.client)
            over = not here.disk.happened.is_set()
            here.disk.repair()
            await here.until_well()
            await here.keeps_again()
            if over:
                break
            failed += 1
            number += dice.randrange(1, 4)
        print(f"{failed} of the first {number} calls failed; made in all: {here.disk.seen}")
    assert failed > 20
