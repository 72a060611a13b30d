"""Wiring: the page store of a data folder, opened for one model, and its upkeep.

Chatting goes on without it: a store that cannot be opened is one line in the log, and one whose
disk fails is tried again every few seconds until it works.
"""

import asyncio
import logging
import shutil
from pathlib import Path

from chatserve.engine.tiers import TierLimits
from chatserve.settings import Settings
from prefix_store import MasterSecret, PageShape, PageStore, Slab, StoreError, StoreStatistics

_log = logging.getLogger(__name__)

FOLDER_NAME = "pages"
CAPACITY_SHARE = 0.25  # of what is free on the disk, where nothing is said
CAPACITY_MOST = 16 << 30
UPKEEP_SECONDS = 60.0  # between two looks for pages that are too old
PROBE_SECONDS = 2.0  # between two tries of a disk that failed
_DAY_SECONDS = 86_400.0
_KEEP_BYTES = 8 << 20  # copied down by one job: some milliseconds of one thread


class KeptPages:
    """A store with one slab open. `run` looks after it; `close` ends it. Blocking where it says."""

    def __init__(self, store: PageStore, slab: Slab, shape: PageShape) -> None:
        self.slab = slab
        self._store = store
        self._shape = shape

    @classmethod
    def open(cls, settings: Settings, secret: MasterSecret, shape: PageShape) -> "KeptPages | None":
        """Open it, blocking; None where there is none to be had, or none is wanted."""
        if settings.disk_capacity == 0 or not settings.prefix_cache:
            return None
        folder = settings.data_dir / FOLDER_NAME
        store = None
        try:
            store = PageStore.open(
                folder,
                secret,
                capacity_bytes=_capacity(settings, folder),
                max_age_seconds=settings.max_page_age,
            )
            return cls(store, store.slab(shape), shape)
        except (StoreError, OSError, ImportError) as error:
            _log.warning("pages are not kept over restarts: %s", error)
            if store is not None:
                store.close()
            return None

    def limits(self, settings: Settings) -> TierLimits:
        """What the engine may do with it."""
        budget, page_bytes = settings.disk_write_budget, self._shape.page_bytes
        return TierLimits(
            keep_pages=max(1, _KEEP_BYTES // page_bytes),
            write_pages_a_second=None if not budget else budget / page_bytes / _DAY_SECONDS,
        )

    async def run(self) -> None:
        """Upkeep, until cancelled."""
        loop = asyncio.get_running_loop()
        due = loop.time() + UPKEEP_SECONDS
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            if self.statistics().degraded is not None:
                await asyncio.to_thread(self._probe)
            elif loop.time() >= due:
                due = loop.time() + UPKEEP_SECONDS
                await asyncio.to_thread(self._store.gc)

    def statistics(self) -> StoreStatistics:
        """A frozen picture."""
        return self._store.statistics()

    def close(self) -> None:
        """Write down what is where, and give the folder back. Blocks."""
        self._store.close()

    def _probe(self) -> None:
        if self.slab.probe():
            _log.info("the page store writes again")


def _capacity(settings: Settings, folder: Path) -> int:
    """Bytes. What the folder holds already counts as free."""
    if settings.disk_capacity is not None:
        return settings.disk_capacity
    there = sum(entry.stat().st_size for entry in folder.iterdir()) if folder.is_dir() else 0
    free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free + there
    return min(CAPACITY_MOST, int(free * CAPACITY_SHARE))
