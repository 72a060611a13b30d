"""An owner's list of conversations: its order, where a part of it begins, and what a search finds.

It may not know any store. Latest update first, ids where times are equal. A cursor is the place of
the last conversation that was given, not a count: one that is updated meanwhile moves to the front
and shifts nothing, so that the parts of a list neither repeat nor leave out what stays as it is.
"""

import base64
import binascii
import math
from collections.abc import Iterable
from dataclasses import dataclass

from chatserve.chat.store.conversation import Conversation
from chatserve.errors import RequestError

CURSOR_CHARACTERS_MAX = 512  # a time and an id in base64


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a conversation stands in its owner's list; later places are smaller."""

    updated: float
    id: str

    @classmethod
    def of(cls, conversation: Conversation) -> "Place":
        """The place of a conversation as it is."""
        return cls(conversation.updated, conversation.id)

    @classmethod
    def read(cls, cursor: str) -> "Place":
        """What `written` gave. Raises RequestError for anything else."""
        try:
            if len(cursor) > CURSOR_CHARACTERS_MAX:
                raise ValueError(cursor)
            raw = base64.b64decode(cursor.encode("ascii"), altchars=b"-_", validate=True)
            updated, _, identity = raw.decode("utf-8").partition(" ")
            place = cls(float(updated), identity)
            if not identity or not math.isfinite(place.updated):
                raise ValueError(cursor)
        except (ValueError, binascii.Error) as error:
            raise RequestError("'after' is no cursor of a list.", param="after") from error
        return place

    def written(self) -> str:
        """As clients give it back."""
        return base64.urlsafe_b64encode(f"{self.updated!r} {self.id}".encode()).decode("ascii")


def holds(sought: str, title: str, texts: Iterable[str]) -> bool:
    """Whether a title or one of the texts contains what is sought; `sought` is case-folded."""
    return sought in title.casefold() or any(sought in text.casefold() for text in texts)
