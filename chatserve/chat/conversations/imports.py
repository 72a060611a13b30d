"""What a file's conversation becomes when it is kept. Pure, for any thread.

It gets an id of ours. Where its asker has named the import, the id follows from that name and from
what the file says, so that an import that is asked for again, because its answer was lost, is the
same conversation. Times are not part of that: where a file has none they are its reader's.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

from chatserve.chat.store.conversation import Conversation, Turn
from chatserve.chat.store.session_store import TURNS_MAX
from chatserve.errors import TooLarge

ID_BYTES = 18  # of an id: 144 bits, 36 hexadecimal digits


def taken_in(
    owner: str, conversation: Conversation, turns: Sequence[Turn], *, id: str
) -> tuple[Conversation, tuple[Turn, ...]]:
    """The owner's, under this id. Raises TooLarge.

    Token ids are not taken from outside: they are made again from the texts.
    """
    if len(turns) > TURNS_MAX:
        raise TooLarge(f"A conversation has at most {TURNS_MAX} turns.", param="turns")
    kept = tuple(replace(turn, token_ids=None, encoding="") for turn in turns)
    leaf = conversation.leaf
    if leaf not in {turn.id for turn in kept}:
        leaf = kept[-1].id if kept else None
    return replace(conversation, id=id, owner=owner, revision=1, leaf=leaf), kept


def import_id(owner: str, ask: str, conversation: Conversation, turns: Sequence[Turn]) -> str:
    """The same for the same import, and for no other."""
    said = hashlib.blake2b(digest_size=ID_BYTES, person=b"chatserve import")

    def add(*values: object) -> None:
        said.update(json.dumps(values, sort_keys=True).encode("ascii") + b"\n")

    add(owner, ask, conversation.title, conversation.system, conversation.leaf)
    add(dict(conversation.settings))
    for turn in turns:
        final = None if turn.final is None else turn.final.decode("utf-8")
        add(turn.id, turn.parent, turn.role.value, turn.text, final)
    return said.hexdigest()
