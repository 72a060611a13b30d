"""python -m chatserve.conversation_pages DATA_DIR CONVERSATION

Prints what the cached pages of a kept conversation are called, one name a line in hexadecimal, from
the server of conversations in the data folder. For the proof that a deletion left nothing
(docs/conversations.md): to be noted before it. Two kinds are left out, and counted on standard
error: pages of public prompts that are on the disk, for they stay when a conversation is deleted,
and pages that another conversation begins with too, whose names that one keeps and whose bytes it
may write anew. The owner of the folder may look at a server that runs; nothing is changed. Exit
status 1 where nothing is known of the conversation.
"""

import argparse
import asyncio
import struct
import sys
from collections.abc import AsyncIterator, Collection, Sequence
from pathlib import Path
from typing import cast

from chatserve.chat.store.redis_link import RedisLink
from chatserve.chat.store.redis_store import RedisStore
from chatserve.chat.store.redis_values import names_key
from chatserve.errors import ChatserveError, SettingsError
from chatserve.kept_pages import FOLDER_NAME
from chatserve.redis_binary import read_record
from prefix_store import MasterSecret, PageNamer
from prefix_store.inspection import kept_tokens

# As the assembly has them, which would bring in torch; a test holds them together.
NAMES_LABEL = "page names"
LAYOUT = "page-major {}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m chatserve.conversation_pages")
    parser.add_argument("data_dir", type=Path, metavar="DATA_DIR")
    parser.add_argument("conversation", metavar="CONVERSATION")
    given = parser.parse_args(arguments)
    try:
        names, shared = asyncio.run(page_names(given.data_dir, given.conversation))
    except ChatserveError as error:
        print(f"chatserve: {error.message}", file=sys.stderr)
        return 2
    try:
        public = public_names(given.data_dir, names)
    except (OSError, ValueError) as error:
        print(f"chatserve: {given.data_dir} cannot be read: {error}", file=sys.stderr)
        return 2
    if public:
        print(f"chatserve: {len(public)} pages of public prompts are left out", file=sys.stderr)
    if shared:
        print(f"chatserve: {len(shared)} pages of other chats too are left out", file=sys.stderr)
    for name in sorted(names - public - shared):
        print(name.hex())
    return 0 if names else 1


async def page_names(
    data_dir: Path, conversation: str
) -> tuple[frozenset[bytes], frozenset[bytes]]:
    """The names of 32 bytes that the endings of the conversation's replies told, whoever owns it;
    and those of them that other conversations have as well.

    Raises SettingsError where the folder has no server, Unavailable where it does not answer.
    """
    record = read_record(data_dir / "redis" / "server.json")
    if record is None:
        raise SettingsError(f"{data_dir} has no server of conversations.")
    async with RedisLink(f"unix://{record.socket}") as link:
        store = RedisStore(link)
        names = await store.page_names(conversation)
        shared: set[bytes] = set()
        before, after = names_key("\0").split("\0")
        async for key in _keys(link, names_key("*")):
            other = key.removeprefix(before).removesuffix(after)
            if other != conversation:
                shared |= names & await store.page_names(other)
        return names, frozenset(shared)


async def _keys(link: RedisLink, pattern: str) -> AsyncIterator[str]:
    cursor = b"0"
    while True:
        (answer,) = await link.run([("SCAN", cursor, "MATCH", pattern, "COUNT", 1000)])
        cursor, keys = cast("tuple[bytes, list[bytes]]", answer)
        for key in keys:
            yield key.decode("utf-8")
        if int(cursor) == 0:
            return


def public_names(data_dir: Path, names: Collection[bytes]) -> frozenset[bytes]:
    """Those of these names that a public prompt gave to pages which lie in the data folder now.

    Names are hashes of a chain of token ids: a public one is that of the public root, or of a
    public page, with its own ids. Raises OSError, and ValueError for a folder that cannot be read.
    """
    if not names or not (data_dir / FOLDER_NAME).is_dir():
        return frozenset()
    secret = MasterSecret.open(data_dir)
    found: set[bytes] = set()
    for page in kept_tokens(data_dir / FOLDER_NAME, secret, names):
        size = page.shape.page_tokens
        namer = PageNamer(secret.derive(NAMES_LABEL), page_size=size)
        layout = LAYOUT.format(size)
        root = namer.public_root(fingerprint=page.shape.fingerprint, layout=layout)
        ids = struct.unpack(f"<{size}i", page.tokens)
        # In the order of their positions: what a page continues was looked at before it.
        if any(namer.public_names(above, ids)[0] == page.name for above in (root, *found)):
            found.add(page.name)
    return frozenset(found)


if __name__ == "__main__":
    sys.exit(main())
