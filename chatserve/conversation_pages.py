"""python -m chatserve.conversation_pages DATA_DIR CONVERSATION

Prints what the cached pages of a kept conversation are called, one name a line in hexadecimal, from
the server of conversations in the data folder. For the proof that a deletion left nothing
(docs/conversations.md): to be noted before it. The owner of the folder may look at a server that
runs; nothing is changed. Exit status 1 where nothing is known of the conversation.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from chatserve.chat.store.redis_link import RedisLink
from chatserve.chat.store.redis_store import RedisStore
from chatserve.errors import ChatserveError, SettingsError
from chatserve.redis_binary import read_record


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m chatserve.conversation_pages")
    parser.add_argument("data_dir", type=Path, metavar="DATA_DIR")
    parser.add_argument("conversation", metavar="CONVERSATION")
    given = parser.parse_args(arguments)
    try:
        names = asyncio.run(page_names(given.data_dir, given.conversation))
    except ChatserveError as error:
        print(f"chatserve: {error.message}", file=sys.stderr)
        return 2
    for name in sorted(names):
        print(name.hex())
    return 0 if names else 1


async def page_names(data_dir: Path, conversation: str) -> frozenset[bytes]:
    """The names of 32 bytes that the endings of the conversation's replies told, whoever owns it.

    Raises SettingsError where the folder has no server, Unavailable where it does not answer.
    """
    record = read_record(data_dir / "redis" / "server.json")
    if record is None:
        raise SettingsError(f"{data_dir} has no server of conversations.")
    async with RedisLink(f"unix://{record.socket}") as link:
        return await RedisStore(link).page_names(conversation)


if __name__ == "__main__":
    sys.exit(main())
