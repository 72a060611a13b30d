"""Wiring: an admin's actions on the cache, as the API floor names their outcomes."""

from collections.abc import Awaitable, Callable, Mapping

from chatserve.cache_views import CacheViews
from chatserve.chat.conversations.residence import Residence
from chatserve.engine.engine import Engine
from chatserve.engine.sequence import PreparedRequest


class CacheActions:
    """`api.cache_routes.CacheActions` of one engine and its conversations."""

    def __init__(
        self,
        engine: Engine,
        residence: Residence[PreparedRequest],
        views: CacheViews,
        *,
        forget: Callable[[str], Awaitable[None]],
    ) -> None:
        """forget: deletes a conversation, whoever owns it."""
        self.views = views
        self._delete = forget
        self._engine = engine
        self._residence = residence

    def flush(self) -> Mapping[str, int]:
        """Pages that left the device, and host memory."""
        flushed = self._engine.flush()
        return {"pages": flushed.device, "host_pages": flushed.host}

    async def lease(self, conversation: str, seconds: float) -> Mapping[str, int]:
        """Pages of the device, and of host memory, that have the lease (or had one: 0 seconds)."""
        leased = await self._residence.lease(conversation, seconds)
        return {"pages": leased.device, "host_pages": leased.host}

    async def warm(self, conversation: str) -> Mapping[str, int]:
        """Pages on the device, on the way there, left below it for want of room, and nowhere."""
        return (await self._residence.warm(conversation))._asdict()

    async def evict(self, conversation: str) -> Mapping[str, int]:
        """Pages that left the device and host memory, and those that stayed there."""
        gone = await self._residence.evict(conversation)
        return {
            "pages": gone.device,
            "host_pages": gone.host,
            "pages_stayed": gone.device_stayed,
            "host_pages_stayed": gone.host_stayed,
        }

    async def forget(self, conversation: str) -> Mapping[str, int]:
        """Conversations that are deleted: one. Returns when nothing of it is left."""
        await self._delete(conversation)
        return {"conversations": 1}

    async def verify(self, pages: int) -> Mapping[str, int]:
        """Pages of the disk that were checked, and what came of them (`verifier.Verified`)."""
        return (await self._engine.verifier.verify(pages))._asdict()
