"""python -m chatserve.conversation_pages DATA_DIR CONVERSATION

Prints what the cached pages of a kept conversation are called, one name a line in hexadecimal, from
the server of conversations in the data folder. For the proof that a deletion left nothing
(docs/conversations.md): to be noted before it. Pages of public prompts stay when a conversation is
deleted, so those that are on the disk are left out, and counted on standard error. The owner of the
folder may look at a server that runs; nothing is changed. Exit status 1 where nothing is known of
the conversation.
"""

import argparse
import asyncio
import struct
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from chatserve.chat.store.redis_link import RedisLink
from chatserve.chat.store.redis_store import RedisStore
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
        names = asyncio.run(page_names(given.data_dir, given.conversation))
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
    for name in sorted(names - public):
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
