"""Looks: where pages are, for an admin who looks. Nothing is changed, and no use is counted.

It may not know whose pages they are. What a look says was true at one moment: it is one synchronous
call on the engine's loop, or the picture that it is made from was.
"""

import asyncio
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from chatserve.cache.overview import NamedRun
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


class Copies(NamedTuple):
    """Pages of the device by the fastest place under it that has them too, each counted once: host
    memory, what is below that, none."""

    host: int = 0
    disk: int = 0
    none: int = 0


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """Runs of pages that are shared, by what they save with all under them, the most first; each
    one's `above` is a place in `runs`. None: its pages left while it was looked for, and so did all
    that continue it. pages_total, hits_total: of all shared pages of the device. more: whether
    there are other runs than these."""

    runs: tuple[NamedRun | None, ...] = ()
    pages_total: int = 0
    hits_total: int = 0
    more: bool = False


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
        rest = self._scheduler.blocks.overview().without(names)
        host, disk, none = self.copies(rest)
        return Whereabouts(len(names) - len(rest), host, disk, none)

    def copies(self, names: Collection[PageName]) -> Copies:
        """Where else than on the device pages of these names are. O(names)."""
        blocks, host = self._scheduler.blocks, self._scheduler.tiers.overview()
        below = names if host is None else host.without(names)
        disk = sum(blocks.below((name,), 0) for name in below)
        return Copies(len(names) - len(below), disk, len(below) - disk)

    async def shared_prefixes(self, most: int) -> SharedPrefixes:
        """Which prefixes on the device are shared (`cache/sharing.py`), as at most so many runs.
        The loop makes the picture, and asks for the names; a thread finds the runs."""
        blocks = self._scheduler.blocks
        found = await asyncio.to_thread(blocks.overview().sharing().runs, most)
        if blocks is not self._scheduler.blocks:
            return SharedPrefixes()  # the cache began anew, with none
        runs = tuple(map(blocks.overview().named, found.runs))
        return SharedPrefixes(runs, found.pages_total, found.hits_total, found.more)
