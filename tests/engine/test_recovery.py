"""Exceptions of our own, anywhere under `plan` and `commit`: the engine begins again on an empty
cache, whoever goes on says what the model says, and everybody has exactly one final emission."""

import asyncio
import random
from dataclasses import replace

import pytest

from chatserve.cache.statistics import CacheStatistics
from chatserve.engine.engine import Engine
from chatserve.engine.values import FinishReason
from chatserve.errors import EngineError, Unavailable
from tests.engine.build import House, Setup, ask, build, quiet, random_tokens, running
from tests.engine.faulty_blocks import METHODS, Plot, Trap, faulty_maker, once
from tests.engine.oracle import Heard, assert_prefix, assert_right, listen
from tests.engine.stepper import InjectedFault, Stepper


def faulty_setup(plot: Plot, **sizes: int) -> Setup:
    return Setup(
        **{"pages": 40, "page_size": 4, "budget_max": 24, **sizes}, make_blocks=faulty_maker(plot)
    )


def requests(seed: int, count: int = 8) -> list:
    source = random.Random(seed)
    stem = random_tokens(source, 14)
    return [
        ask(
            (*stem[: source.randrange(1, 15)], *random_tokens(source, index % 4)),
            source.randrange(1, 16),
            name=f"{index}",
            samples=source.choice([1, 1, 2, 3]),
            temperature=1.0,
            seed=index,
            stop_ids=frozenset(random_tokens(source, 3)),
        )
        for index in range(count)
    ]


def drive(stepper: Stepper) -> int:
    """Run to the end as the engine would, with a recovery after each exception."""
    recoveries = 0
    for _ in range(3000):
        try:
            if not stepper.step():
                break
            stepper.scheduler.check()
        except InjectedFault:
            recoveries += 1
            stepper.recover()
            stepper.scheduler.check()
    assert not stepper.scheduler.busy
    return recoveries


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("call", [1, 2, 5, 11, 23])
def test_one_exception_of_our_own_costs_nobody_a_token(method: str, call: int, when: str) -> None:
    quiet = [True]
    plot = once(method, call, when)
    stepper = Stepper(faulty_setup(lambda name: None if quiet else plot(name)))
    for request in requests(call):
        stepper.ask(request)
    quiet.clear()
    recoveries = drive(stepper)
    quiet.append(True)
    assert recoveries <= 1
    stepper.assert_right_so_far()
    for asked in stepper.asked.values():
        assert asked.over, "no final emission"
        for heard in asked.heard:
            assert heard.finish in (FinishReason.STOP, FinishReason.LENGTH)
    stepper.assert_right()
    stepper.house.assert_baseline()


def lost(heard: Heard) -> bool:
    return heard.finish is FinishReason.ERROR


async def hear_all(house: House, engine: Engine, seed: int, *, leave: float = 0.0) -> None:
    source = random.Random(seed)

    async def one(request) -> None:
        with engine.open(house.prepare(request)) as stream:
            if source.random() < leave:
                for _ in range(source.randrange(6)):
                    await asyncio.sleep(0)
                return
            heard = await listen(stream)
        for sample, one_heard in enumerate(heard):
            assert_prefix(request, one_heard, sample, house.setup.vocabulary)
            assert one_heard.finish is not None
            assert not lost(one_heard) or isinstance(one_heard.error, EngineError | Unavailable)
        if not any(map(lost, heard)):
            assert_right(request, heard, house.setup.vocabulary)

    await asyncio.gather(*map(one, requests(seed, 12)))


@pytest.mark.parametrize("seed", range(12))
async def test_exceptions_at_random_places_never_give_a_wrong_token(seed: int) -> None:
    source = random.Random(seed)
    print(f"seed={seed}")
    armed: list[int] = []

    def plot(name: str) -> str | None:
        # Recovery itself settles its fresh pool, and is the one place that must not fail.
        if armed and name != "settle" and source.random() < 0.01:
            return source.choice(["before", "after"])
        return None

    house = build(replace(faulty_setup(plot), launched=seed % 2 == 1))
    house.engine.on_step = lambda: None  # between an exception and recovery nothing need hold
    task = asyncio.create_task(house.engine.run())
    armed.append(1)
    async with asyncio.timeout(10):
        await hear_all(house, house.engine, seed, leave=0.2)
        armed.clear()
        await quiet(house)
    assert not task.done(), "the loop died"
    if house.engine.healthy:
        await hear_all(house, house.engine, seed + 100)
        house.assert_baseline()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_who_is_at_hand_at_two_exceptions_ends_and_the_others_go_on() -> None:
    stepper = Stepper(Setup(pages=40, page_size=4, budget_max=24))
    asked = [stepper.ask(request) for request in requests(3)]
    (bad,) = stepper.sequences(asked[2])
    order = stepper.scheduler._planner._order

    def faulty_order(outline, sequence, count):
        if sequence is bad:
            raise InjectedFault("in plan")
        return order(outline, sequence, count)

    stepper.scheduler._planner._order = faulty_order
    assert drive(stepper) == 2
    assert all(map(lost, asked[2].heard))
    stepper.assert_right(*asked[:2], *asked[3:])
    stepper.house.assert_baseline()


def test_who_left_and_is_at_hand_at_a_second_exception_is_nobodys() -> None:
    stepper = Stepper(Setup(pages=32, page_size=4, budget_min=8, budget_max=8))
    seal, stays = stepper.scheduler._seal, requests(3)[0]
    leaving = stepper.ask(ask(random_tokens(random.Random(1), 30), 8))

    def faulty_seal(_sequence: object) -> None:
        raise InjectedFault("in commit")

    stepper.scheduler._seal = faulty_seal
    assert not stepper.survive(stepper.step)
    asked = stepper.ask(stays)
    stepper.plan()
    stepper.abort(leaving)
    assert not stepper.survive(stepper.step)
    stepper.scheduler._seal = seal
    assert stepper.scheduler.counts.finished[FinishReason.ERROR] == 0
    stepper.run_all()
    stepper.assert_right(asked)
    stepper.house.assert_baseline()


def test_who_was_on_its_way_out_at_an_exception_does_not_come_back() -> None:
    trap = Trap()
    stepper = Stepper(faulty_setup(trap))
    leaving, stays = (stepper.ask(ask(random_tokens(random.Random(1), 30), 8)) for _ in range(2))
    stepper.plan()
    stepper.abort(leaving)
    trap.set("release", 1, "before")  # what it was ended with
    assert not stepper.survive(stepper.step)
    assert len(stepper.scheduler.roster) == 1
    stepper.run_all()
    stepper.assert_right(stays)
    stepper.house.assert_baseline()


def test_what_the_cache_has_counted_goes_on_when_it_is_begun_anew() -> None:
    stepper = Stepper(Setup(pages=12, page_size=4, budget_max=24))
    for _ in range(2):
        for request in requests(3):
            stepper.ask(request)
    stepper.run_all()
    stepper.house.blocks.flush()
    for key in range(2):
        stepper.draft(key, random_tokens(random.Random(1), 8))
    stepper.run_all()
    before = stepper.house.blocks.statistics()
    stepper.recover()
    after = stepper.house.blocks.statistics()
    assert before.draft_pages > after.draft_pages == after.named_pages == 0
    totals = [name for name in CacheStatistics.__slots__ if name.endswith(("_total", "_tokens"))]
    assert len(totals) >= 10
    for name in totals:
        assert getattr(after, name) == getattr(before, name), name
    counted = {name for name in totals if getattr(before, name)}
    assert counted >= {"query_tokens", "hit_tokens", "sealed_total", "evicted_for_space_total"}
    assert counted >= {"copies_total", "evicted_by_flush_total", "draft_sealed_total"}
    assert before.claims.waited == after.claims.waited > 0


def test_an_engine_that_cannot_recover_says_so_and_ends_everything() -> None:
    stepper = Stepper(Setup(pages=40, page_size=4))

    def never(*_: object, **__: object) -> None:
        raise InjectedFault("always")

    stepper.scheduler._planner.outline = never
    asked = [stepper.ask(request) for request in requests(3)]
    recoveries = drive(stepper)
    assert recoveries < 20
    assert stepper.scheduler.broken is not None
    assert all(lost(heard) for one in asked for heard in one.heard)


async def test_a_consumer_that_leaves_while_the_engine_begins_again_is_forgotten() -> None:
    house = build(Setup(pages=40, page_size=4))
    async with running(house, recoveries=1) as engine:
        stays = ask((1, 2, 3), 8)
        leaving = engine.open(house.prepare(ask((4, 5, 6), 30)))
        cut = engine.open(house.prepare(ask((7, 8, 9), 30)))
        with engine.open(house.prepare(stays)) as stream:
            await cut.get()
            engine._recovering = True
            leaving.close()
            cut.finish(0, 1)
            engine._signal.set()
            assert_right(stays, await listen(stream), house.setup.vocabulary)
        last = [emission async for batch in cut for emission in batch][-1]
        assert last.finish is FinishReason.STOP
        await quiet(house)
    house.assert_baseline()


@pytest.mark.parametrize("call", range(3, 9))
async def test_a_fault_while_two_steps_are_under_way_leaves_neither_of_them_waiting(
    call: int,
) -> None:
    """The second one's result is asked for though no plan comes behind it."""
    house = build(Setup(pages=40, page_size=4, launched=True))
    async with running(house, recoveries=1) as engine:
        look, calls = engine.on_step, 0

        def faulty_look() -> None:
            nonlocal calls
            calls += 1
            if calls == call:
                raise InjectedFault("in looking")
            look()

        engine.on_step = faulty_look
        stays = ask((1, 2, 3), 8)
        async with asyncio.timeout(60):
            with engine.open(house.prepare(stays)) as stream:
                assert_right(stays, await listen(stream), house.setup.vocabulary)
        await quiet(house)
    house.assert_baseline()


async def test_a_draft_that_meets_a_fault_of_ours_is_not_taken_and_the_engine_begins_again() -> (
    None
):
    house = build(Setup(pages=40, page_size=4))
    put, drafts = house.scheduler._drafts.put, house.scheduler._drafts

    def faulty_put(_key: object, _prepared: object) -> bool:
        raise InjectedFault("in draft")

    async with running(house, recoveries=1) as engine:
        prepared = house.prepare(ask((1, 2, 3, 4, 5), 0))
        drafts.put = faulty_put
        assert not engine.draft("typist", prepared)
        drafts.put = put
        assert not engine.draft("typist", prepared), "taken by a cache that is given up"
        stays = ask((1, 2, 3), 8)
        with engine.open(house.prepare(stays)) as stream:
            assert_right(stays, await listen(stream), house.setup.vocabulary)
        await quiet(house)
        assert engine.draft("typist", prepared)
        await quiet(house)
    house.assert_baseline()
