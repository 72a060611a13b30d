"""WishDoor: what the chat floor asks of the engine floor about what was kept of a conversation.

Names are the engine's, 32 bytes each; what they stand for is not for this floor to know.
"""

from collections.abc import Collection
from typing import Protocol, TypeVar

from chatserve.engine.wishes import Dismissed, Leased, Warmth

PreparedT_contra = TypeVar("PreparedT_contra", contravariant=True)


class WishDoor(Protocol[PreparedT_contra]):
    """`engine.wishes.Wishes`. On the event loop; no method waits."""

    def lease(self, names: Collection[bytes], seconds: float) -> Leased:
        """Others leave memory before these, for so long from now; 0 ends that."""
        ...

    def hold(self, names: Collection[bytes]) -> None:
        """The same as a courtesy, for a short time."""
        ...

    def evict(self, names: Collection[bytes]) -> Dismissed:
        """These leave memory, as far as nobody uses them."""
        ...

    def warm(self, prepared: PreparedT_contra) -> Warmth:
        """Bring up what is kept below of a prompt; how much of it is where."""
        ...
