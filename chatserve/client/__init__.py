"""A client for chatserve's conversations; asyncio, typed, light to import. See docs/client.md.

    async with ChatClient("http://127.0.0.1:8000") as client:
        conversation = await client.create(system="Be brief.")
        reply = client.send(conversation, "What is a page?")
        async for text in reply:
            print(text, end="", flush=True)

It may not know the server's floors: what it knows of the server is the wire.
"""

from chatserve.client.chat_client import ChatClient
from chatserve.client.errors import (
    BrokenProtocol,
    ChatError,
    ClientClosed,
    Refused,
    ReplyFailed,
    TextReplaced,
    Unreachable,
)
from chatserve.client.limits import ClientLimits
from chatserve.client.reply import LEAF, Leaf, Reply
from chatserve.client.values import (
    Conversation,
    Final,
    Miss,
    OpenReply,
    Receipt,
    ReplyEvent,
    ReplyProgress,
    ReplyWaiting,
    TextDelta,
    TextSnapshot,
    Timings,
    Tree,
    Turn,
    Usage,
)

__all__ = [
    "LEAF",
    "BrokenProtocol",
    "ChatClient",
    "ChatError",
    "ClientClosed",
    "ClientLimits",
    "Conversation",
    "Final",
    "Leaf",
    "Miss",
    "OpenReply",
    "Receipt",
    "Refused",
    "Reply",
    "ReplyEvent",
    "ReplyFailed",
    "ReplyProgress",
    "ReplyWaiting",
    "TextDelta",
    "TextReplaced",
    "TextSnapshot",
    "Timings",
    "Tree",
    "Turn",
    "Unreachable",
    "Usage",
]
