"""Below: what the cache floor knows of the tiers under the device, whatever they are."""

from collections.abc import Sequence
from typing import Protocol

from prefix_store.names import PageName


class Below(Protocol):
    """What the cache floor asks of the tiers below the device: hints, never promises."""

    def find(self, names: Sequence[PageName]) -> int:
        """How many of these names, from the first, it has."""
        ...

    def contains(self, name: PageName) -> bool:
        """Whether it has this one."""
        ...

    def touch(self, names: Sequence[PageName]) -> None:
        """These were used."""
        ...
