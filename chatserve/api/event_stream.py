"""The response that carries server-sent events: sse-starlette's, as this server wants it.

It may not know what events say (`sse.py` and `chat_events.py` make frames). The library gives
each send a cancel scope of its own, for a time limit that we do not use: who does not read is
noticed by the connection (`write_watch.py`), whose limit counts bytes and not sends.
"""

from collections.abc import AsyncIterator

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Message, Send

from chatserve.api.limits import Limits


class EventStream(EventSourceResponse):
    """Frames as they come, and a comment where none came for `ping_seconds`."""

    def __init__(self, frames: AsyncIterator[bytes], limits: Limits) -> None:
        super().__init__(
            frames,
            sep="\n",
            # Whole seconds are all that the keep-alive of proxies needs.
            ping=limits.ping_seconds,
            ping_message_factory=lambda: ServerSentEvent(comment="still here", sep="\n"),
            # Our own drain comes first (see server.py); this is what is left after it.
            shutdown_event=anyio.Event(),
            shutdown_grace_period=limits.farewell_seconds,
        )

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        await send(message)
