"""NamedPages: which page names of a conversation the store has not been told yet.

It may not know what names mean, but that each stands for all before it: where two rows of names
have the same one at a place, they are the same up to there. So of a reply's row only what follows
its predecessor's has to be kept. What is forgotten here is told again, in full.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from chatserve.chat.store.conversation import Turn

MARKS_MAX = 16_384  # replies: some megabytes


@dataclass(frozen=True, slots=True)
class _Mark:
    """How many names a reply's row has, and the last of them."""

    count: int
    last: bytes


class NamedPages:
    """One process's. On the event loop."""

    def __init__(self, marks_max: int = MARKS_MAX) -> None:
        self._marks: OrderedDict[str, _Mark] = OrderedDict()
        self._marks_max = marks_max

    def new(self, path: Sequence[Turn], names: Sequence[bytes]) -> tuple[bytes, ...]:
        """Of a reply's row, to a path of turns, what the endings on the path did not have."""
        for turn in reversed(path):
            mark = self._marks.get(turn.id)
            if mark is not None and len(names) >= mark.count and self._ends(names, mark):
                return tuple(names[mark.count :])
        return tuple(names)

    def kept(self, reply: str, names: Sequence[bytes]) -> None:
        """The store has a reply's whole row now, with what the path before it has."""
        if names:
            self._marks[reply] = _Mark(len(names), names[-1])
            self._marks.move_to_end(reply)
            if len(self._marks) > self._marks_max:
                self._marks.popitem(last=False)

    @staticmethod
    def _ends(names: Sequence[bytes], mark: _Mark) -> bool:
        return names[mark.count - 1] == mark.last
