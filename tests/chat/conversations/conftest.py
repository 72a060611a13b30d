"""One life of a server on a store in memory."""

from collections.abc import AsyncIterator

import pytest

from chatserve.chat.store.memory_store import MemoryStore
from tests.chat.conversations.chats import Process, process


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
async def life(store: MemoryStore) -> AsyncIterator[Process]:
    async with process(store) as made:
        yield made
