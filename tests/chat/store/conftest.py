"""The two session stores."""

import asyncio
from collections.abc import AsyncGenerator, Generator

import pytest

from chatserve.chat.store.memory_store import MemoryStore
from chatserve.chat.store.session_store import SessionStore
from tests.chat.store.redis_process import RedisProcess, redis_store


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Generator[RedisProcess]:
    process = RedisProcess(tmp_path_factory.mktemp("redis"))
    asyncio.run(process.start())
    yield process
    asyncio.run(process.stop())


@pytest.fixture(params=["memory", "redis"])
async def store(
    request: pytest.FixtureRequest, process: RedisProcess
) -> AsyncGenerator[SessionStore]:
    if request.param == "memory":
        yield MemoryStore()
        return
    await process.command("FLUSHALL")
    async with redis_store(process.server.url) as store:
        yield store
