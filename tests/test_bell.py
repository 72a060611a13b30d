"""A bell wakes its one waiter, loses no ringing and survives a cancelled wait."""

import asyncio

import pytest

from chatserve.bell import Bell


async def test_a_ringing_before_the_wait_is_heard() -> None:
    bell = Bell()
    bell.ring()
    async with asyncio.timeout(5):
        await bell.wait()


async def test_a_ringing_while_somebody_waits_wakes_it() -> None:
    bell = Bell()
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        waiting = group.create_task(bell.wait())
        await asyncio.sleep(0)
        assert not waiting.done()
        bell.ring()
        bell.ring()


async def test_what_was_muted_is_not_heard_again() -> None:
    bell = Bell()
    bell.ring()
    bell.mute()
    waiting = asyncio.create_task(bell.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    bell.ring()
    async with asyncio.timeout(5):
        await waiting


async def test_a_muting_between_the_ringing_and_the_waking_keeps_nobody_waiting() -> None:
    bell = Bell()
    waiting = asyncio.create_task(bell.wait())
    await asyncio.sleep(0)
    bell.ring()
    bell.mute()
    async with asyncio.timeout(5):
        await waiting


async def test_a_wait_that_was_cancelled_leaves_room_for_the_next() -> None:
    bell = Bell()
    waiting = asyncio.create_task(bell.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    bell.ring()
    async with asyncio.timeout(5):
        await bell.wait()


async def test_a_second_waiter_is_a_mistake_of_ours() -> None:
    bell = Bell()
    waiting = asyncio.create_task(bell.wait())
    await asyncio.sleep(0)
    with pytest.raises(AssertionError):
        await bell.wait()
    bell.ring()
    await waiting
