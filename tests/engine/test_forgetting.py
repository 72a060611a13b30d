"""Forgetting in every tier: what nobody may find any more, and who still uses it."""

import asyncio
import threading

import pytest

from chatserve.cache.transit import Keep, Keeps
from chatserve.engine.engine import Engine
from chatserve.engine.traffic import Delivery, Traffic
from chatserve.errors import Unavailable
from prefix_store.names import token_bytes
from tests.engine.build import House, Setup, ask, build, quiet, running
from tests.engine.fake_depot import FakeDepot
from tests.engine.stepper import Stepper

PROMPT = tuple(range(1, 14))  # three whole pages of four, and one token


async def said(engine: Engine, house: House, tokens=PROMPT, most: int = 8, **fields) -> list[int]:
    heard: list[int] = []
    with engine.open(house.prepare(ask(tokens, most, **fields))) as stream:
        async for batch in stream:
            heard += [token for emission in batch for token in emission.tokens]
    return heard


async def kept_below(house: House, names) -> None:
    """Wait until the copies are there."""
    depot = house.setup.depot
    assert depot is not None
    while not all(map(depot.contains, names)):  # noqa: ASYNC110
        await asyncio.sleep(0)
    await quiet(house)


def resident(house: House) -> set[bytes]:
    return set(house.blocks._index.pages().values())


async def test_what_is_forgotten_is_in_no_tier_and_computed_anew() -> None:
    house = build(Setup(depot=FakeDepot()))
    names = house.prepare(ask(PROMPT)).names
    async with running(house) as engine:
        first = await said(engine, house)
        await kept_below(house, names)
        await engine.forget(names)
        assert not resident(house) & set(names)
        assert not house.setup.depot.kept.keys() & set(names)
        pages = house.blocks.statistics()
        assert (pages.forgotten_total, pages.ghosts) == (5, 0)  # with two pages of the answer
        before = house.blocks.statistics().hit_tokens
        assert await said(engine, house) == first
        assert house.blocks.statistics().hit_tokens == before
        await kept_below(house, names)
        assert set(names) <= resident(house), "computed anew, it is found again"


async def test_pages_of_a_running_reply_go_when_it_ends_and_none_of_its_come_back() -> None:
    house = build(Setup(depot=FakeDepot()))
    names = house.prepare(ask(PROMPT)).names
    async with running(house) as engine:
        stream = engine.open(house.prepare(ask(PROMPT, 40)))
        with stream:
            heard: list[int] = []
            async for batch in stream:
                heard += [token for emission in batch for token in emission.tokens]
                if len(heard) >= 8 and not house.blocks.forgetting.total:
                    await engine.forget(names)
                    assert house.blocks.forgetting.ghosts >= len(names)
                    assert not resident(house)
        await quiet(house)
        assert len(heard) == 40, "who is running goes on"
        assert not resident(house)
        assert not house.setup.depot.kept, "and nothing of it is copied down"
        assert house.blocks.forgetting.ghosts == 0
        assert house.blocks.pool.free == house.blocks.pool.total
        assert await said(engine, house, most=40) == heard


async def test_other_tenants_and_other_prefixes_stay() -> None:
    house = build(Setup(depot=FakeDepot()))
    other = tuple(range(40, 53))
    async with running(house) as engine:
        await said(engine, house)
        await said(engine, house, tenant="b")
        await said(engine, house, other)
        kept = {*house.prepare(ask(PROMPT, tenant="b")).names, *house.prepare(ask(other)).names}
        await kept_below(house, kept)
        await engine.forget(house.prepare(ask(PROMPT)).names)
        assert kept <= resident(house)
        assert kept <= house.setup.depot.kept.keys()


async def test_public_pages_are_not_one_conversations_to_forget() -> None:
    house = build(Setup(depot=FakeDepot()))
    house.engine.publish([house.engine.public_names(PROMPT[:8])])
    names = house.prepare(ask(PROMPT)).names
    async with running(house) as engine:
        await said(engine, house)
        await kept_below(house, names)
        await engine.forget(names)
        assert resident(house) & set(names) == set(names[:2])
        assert house.setup.depot.kept.keys() & set(names) == set(names[:2])


async def test_a_disk_that_refuses_is_told_and_nothing_is_found_meanwhile() -> None:
    depot = FakeDepot()
    house = build(Setup(depot=depot))
    names = house.prepare(ask(PROMPT)).names
    async with running(house) as engine:
        await said(engine, house)
        await kept_below(house, names)
        depot.refusing = True
        with pytest.raises(Unavailable) as refused:
            await engine.forget(names)
        assert refused.value.retry_after
        assert not resident(house) & set(names)
        assert house.blocks.below(names, 0) == 0
        depot.refusing = False
        await engine.forget(names)
        assert not house.blocks.forgetting._below
    with pytest.raises(Unavailable):
        await house.engine.forget(names)


class SlowDepot(FakeDepot):
    """A depot whose next copies wait, once they are with the I/O thread."""

    def hold(self) -> None:
        self.began, self.may_go_on = threading.Event(), threading.Event()

    def put(self, writes):
        if hasattr(self, "began"):
            self.began.set()
            self.may_go_on.wait()
        return super().put(writes)


async def test_a_copy_that_was_ordered_and_not_begun_is_not_made() -> None:
    depot = FakeDepot()
    house = build(Setup(depot=depot))
    names = house.prepare(ask(PROMPT)).names
    stepper = Stepper(Setup())
    stepper.ask(ask(PROMPT, 1))
    stepper.run_all()
    blocks = stepper.house.blocks
    keeps = Keeps(
        1,
        tuple(
            Keep(
                blocks._index._by_name[name].page, name, None, at, token_bytes(PROMPT[4 * at :][:4])
            )
            for at, name in enumerate(names)
        ),
        (),
    )
    traffic = Traffic(depot, stepper.house.runner, page_bytes=stepper.house.runner.page_bytes)
    delivered: asyncio.Future[Delivery] = asyncio.get_running_loop().create_future()
    traffic.keep(keeps)  # and no thread is there yet
    await traffic.drop(names[1:])
    traffic.begin(delivered.set_result)
    async with asyncio.timeout(60):
        assert (await delivered).done == (True, False, False)
    assert depot.kept.keys() == {names[0]}
    traffic.close()
    assert await asyncio.to_thread(traffic.join, 60)


async def test_tokens_that_nobody_read_are_told_by_the_closed_stream() -> None:
    house = build(Setup())
    async with running(house) as engine:
        whole = await said(engine, house, most=30)
        with engine.open(house.prepare(ask(PROMPT, 30))) as stream:
            (first,) = await stream.get()
            while not stream._mail:  # noqa: ASYNC110
                await asyncio.sleep(0)
        unread = stream.unread(0)
        heard = [*first.tokens, *unread]
        assert heard == whole[: len(heard)]
        assert unread
        names = house.engine.page_names(house.prepare(ask(PROMPT)), (*PROMPT, *heard))
        await quiet(house)
        assert resident(house) & set(names) == set(names)
        assert len(house.prepare(ask((*PROMPT, *whole))).names) > len(names)


async def test_a_copy_that_is_just_being_made_is_dropped_with_the_rest() -> None:
    depot = SlowDepot()
    depot.hold()
    house = build(Setup(depot=depot))
    names = house.prepare(ask(PROMPT)).names
    async with running(house) as engine:
        await said(engine, house)
        assert await asyncio.to_thread(depot.began.wait, 60)
        forgetting = asyncio.create_task(engine.forget(names))
        await asyncio.sleep(0)
        assert not resident(house) & set(names), "gone on the device from the moment of the call"
        depot.may_go_on.set()
        await forgetting
        await quiet(house)
        assert not depot.kept.keys() & set(names)


class SlowDropDepot(FakeDepot):
    """A depot that takes its time to forget."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self.may_go_on = threading.Event(), threading.Event()

    def drop(self, names):
        self.began.set()
        assert self.may_go_on.wait(60)
        return super().drop(names)


async def test_what_the_disk_has_not_yet_dropped_is_not_looked_for_there() -> None:
    depot = SlowDropDepot()
    house = build(Setup(depot=depot))
    names = house.prepare(ask(PROMPT)).names
    async with running(house) as engine:
        first = await said(engine, house)
        await kept_below(house, names)
        try:
            forgetting = asyncio.create_task(engine.forget(names))
            assert await asyncio.to_thread(depot.began.wait, 60)
            assert depot.kept.keys() >= set(names), "it is all there still"
            assert house.blocks.below(names, 0) == 0
            reads, hits = depot.reads, house.blocks.statistics().hit_tokens
            assert await said(engine, house) == first
            assert (depot.reads, house.blocks.statistics().hit_tokens) == (reads, hits)
        finally:
            depot.may_go_on.set()
        await forgetting
        assert not house.blocks.forgetting._below
        await quiet(house)
