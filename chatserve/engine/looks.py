"""Looks: where pages are, for an admin who looks. Nothing is changed, and no use is counted.

It may not know whose pages they are. Every look is one synchronous call on the engine's loop, so
that what it says was true at one moment.
"""

from collections.abc import Collection
from typing import NamedTuple

from chatserve.cache.page_map import PageMap
from chatserve.engine.scheduler import Scheduler
from prefix_store.names import PageName


class PageMaps(NamedTuple):
    """Of the device's pages, and of host memory's where there is any."""

    device: PageMap
    host: PageMap | None


class Whereabouts(NamedTuple):
    """Pages by the fastest place that has them, each counted once: the device, host memory, what
    is below that, nowhere."""

    device: int = 0
    host: int = 0
    disk: int = 0
    nowhere: int = 0


class Looks:
    """One engine's."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def page_maps(self) -> PageMaps:
        """What every page is now. For its time see `page_map.py`."""
        host = self._scheduler.tiers.overview()
        device = self._scheduler.blocks.overview().page_map()
        return PageMaps(device, None if host is None else host.page_map())

    def whereabouts(self, names: Collection[PageName]) -> Whereabouts:
        """Where the pages of these names are. O(names)."""
        blocks = self._scheduler.blocks
        rest = below = blocks.overview().without(names)
        host = self._scheduler.tiers.overview()
        if host is not None:
            below = host.without(rest)
        disk = sum(blocks.below((name,), 0) for name in below)
        device, in_host = len(names) - len(rest), len(rest) - len(below)
        return Whereabouts(device, in_host, disk, len(below) - disk)
