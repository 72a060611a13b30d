"""Wiring: the page store of a data folder, opened for one model, and its upkeep.

Chatting goes on without it: a store that cannot be opened, or whose disk fails, is one line in the
log, and is tried again every few seconds until it works. One that somebody removes is begun anew.
"""

import asyncio
import logging
import os
import shutil
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random

from chatserve.engine.tiers import TierLimits
from chatserve.settings import Settings
from prefix_store import (
    MasterSecret,
    OtherPages,
    PageName,
    PageRead,
    PageShape,
    PageStore,
    PageWrite,
    Slab,
    StoreError,
    StoreStatistics,
    Verdict,
)
from prefix_store.layout import slab_stem
from prefix_store.store import LOCK_NAME

_log = logging.getLogger(__name__)

FOLDER_NAME = "pages"
CAPACITY_SHARE = 0.25  # of what is free on the disk, where nothing is said
CAPACITY_MOST = 16 << 30
OPENING_SECONDS = 2.0  # that a start waits: what is found then need not be computed
UPKEEP_SECONDS = 60.0  # between two looks for pages that are too old
PROBE_SECONDS = 2.0  # between two tries of a disk that failed
_DAY_SECONDS = 86_400.0
_UNBOUNDED = 1 << 62
_KEEP_BYTES = 8 << 20  # copied down by one job: some milliseconds of one thread


class LateSlab:
    """A slab that may still be opening (`traffic.Depot`): so long it has nothing, and a page that
    is brought to it waits in its thread. slab: None too where it could not be opened, and where
    pages are only dropped, from the store's other slabs. What was to be dropped and could not be,
    since nothing was open, is not found when it opens, until it has been dropped."""

    def __init__(self, *, drops_only: bool = False) -> None:
        self.slab: Slab | None = None
        self.store: PageStore | None = None
        self._drops_only = drops_only
        self.opened = threading.Event()
        self._owed = frozenset[PageName]()  # drops; never changed, but replaced

    def find(self, names: Sequence[PageName]) -> int:
        """How many of these names, from the first, it has."""
        if self.slab is None:
            return 0
        owed = self._owed
        reach = next((at for at, name in enumerate(names) if name in owed), None) if owed else None
        return self.slab.find(names[:reach])

    def contains(self, name: PageName) -> bool:
        """Whether it has the name."""
        return self.slab is not None and name not in self._owed and self.slab.contains(name)

    def touch(self, names: Sequence[PageName]) -> None:
        """These were used."""
        if self.slab is not None:
            self.slab.touch(names)

    def get(self, reads: Sequence[PageRead]) -> list[bool]:
        """As `Slab.get`."""
        if self.slab is None or not self._owed.isdisjoint(read.name for read in reads):
            return [False] * len(reads)
        return self.slab.get(reads)

    def sample(self, count: int, random: Random) -> list[PageName]:
        """As `Slab.sample`."""
        return [] if self.slab is None else self.slab.sample(count, random)

    def verify(
        self, names: Sequence[PageName], into: Sequence[bytearray | memoryview]
    ) -> list[Verdict]:
        """As `Slab.verify`."""
        if self.slab is None:
            return [Verdict.ABSENT] * len(names)
        return self.slab.verify(names, into)

    def put(self, writes: Sequence[PageWrite]) -> list[bool]:
        """As `Slab.put`, when it is open."""
        self.opened.wait()
        return [False] * len(writes) if self.slab is None else self.slab.put(writes)

    def drop(self, names: Collection[PageName]) -> int:
        """As `PageStore.drop`, when it is open: in the slabs of other models, types and page sizes
        too. Raises StoreError too where it could not be opened: what is to be forgotten may be in
        there."""
        self.opened.wait()
        if self.store is None or (self.slab is None and not self._drops_only):
            self._owed = self._owed.union(names)
            raise StoreError("the page store could not be opened, so nothing in it can be dropped")
        count = self.store.drop(names)
        self._owed = self._owed.difference(names)
        return count


class KeptPages:
    """A store with one slab open. `run` looks after it; `close` ends it. Blocking where it says.

    drops_only: no page is kept or found, but what an earlier server has kept can be forgotten.
    """

    def __init__(
        self,
        settings: Settings,
        secret: MasterSecret,
        shape: PageShape,
        *,
        drops_only: bool = False,
    ) -> None:
        self.drops_only = drops_only
        self.depot = LateSlab(drops_only=drops_only)
        self._settings = settings
        self._secret = secret
        self._shape = shape
        self.others: tuple[OtherPages, ...] = ()  # of models that are not served
        self._store: PageStore | None = None
        self._opened_files: Mapping[Path, tuple[int, int]] = {}
        self._trouble: str | None = None
        self._turn = threading.Lock()  # of who opens it, or closes it
        self._closed = False

    @classmethod
    def open(
        cls, settings: Settings, secret: MasterSecret, shape: PageShape, *, passage: bool = True
    ) -> "KeptPages | None":
        """Open it; None where none is wanted and none is there. One that is there is opened for
        drops whatever is wanted. One that cannot be opened now is tried again. passage: whether
        pages have a way down to it.

        Blocks for a few seconds at the most: what takes longer goes on in a thread, and until then
        nothing is found.
        """
        wanted = passage and settings.disk_capacity != 0 and settings.prefix_cache
        if not wanted and not os.path.lexists(settings.data_dir / FOLDER_NAME):
            return None
        kept = cls(settings, secret, shape, drops_only=not wanted)
        threading.Thread(target=kept._open, name="chatserve-slab", daemon=True).start()
        kept.depot.opened.wait(OPENING_SECONDS)
        return kept

    @property
    def _folder(self) -> Path:
        return self._settings.data_dir / FOLDER_NAME

    def _open(self) -> None:
        """Open what is not open yet. Blocks."""
        settings = self._settings
        with self._turn:
            if self._closed:
                return
            try:
                if self._store is None:
                    self._store = PageStore.open(
                        self._folder,
                        self._secret,
                        capacity_bytes=self._capacity(),
                        max_age_seconds=settings.max_page_age,
                    )
                    self.depot.store = self._store
                slab = None
                if not self.drops_only:
                    slab = self._store.slab(self._shape)
                    self._opened_files = self._files_there()
            except (StoreError, OSError, ImportError) as error:
                if str(error) != self._trouble:
                    lost = (
                        "cannot be forgotten" if self.drops_only else "are not kept over restarts"
                    )
                    _log.warning("pages %s: %s", lost, error)
                self._trouble = str(error)
            else:
                if self._trouble is not None:
                    _log.info("the page store is open")
                self._trouble = None
                self.depot.slab = slab  # last: whoever finds it open finds no trouble
            finally:
                self.depot.opened.set()
            if self._store is not None and self.depot.slab is not None:
                self.others = self._store.others()

    def limits(self, settings: Settings) -> TierLimits:
        """What the engine may do with it."""
        if self.drops_only:
            return TierLimits(keep_pages=0)
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
            if not self.depot.opened.is_set():
                continue
            await asyncio.to_thread(self._mind_removal)
            if self._trouble is not None or (self._store and self._store.statistics().degraded):
                await asyncio.to_thread(self._probe)
            elif loop.time() >= due and self._store is not None:
                due = loop.time() + UPKEEP_SECONDS
                await asyncio.to_thread(self._store.gc)

    def statistics(self) -> StoreStatistics | None:
        """A frozen picture; None while it opens, and where no pages are kept."""
        if self.drops_only or not self.depot.opened.is_set():
            return None
        trouble, store = self._trouble, self._store
        if store is not None:
            found = store.statistics()
            return replace(found, degraded=trouble or found.degraded)
        capacity = self._settings.disk_capacity or 0
        return StoreStatistics(
            folder=self._folder,
            capacity_bytes=capacity,
            bytes=0,
            unopened=0,
            reclaimed=0,
            degraded=trouble,
        )

    def close(self) -> None:
        """Write down what is where, and give the folder back. Blocks."""
        with self._turn:
            self._closed = True
            if self._store is not None:
                self._store.close()

    def _files_there(self) -> Mapping[Path, tuple[int, int]]:
        """Device and inode of the files that are never replaced while they are open."""
        found: dict[Path, tuple[int, int]] = {}
        for path in (self._folder / LOCK_NAME, self._folder / f"{slab_stem(self._shape)}.slab"):
            with suppress(OSError):
                status = path.stat()
                found[path] = (status.st_dev, status.st_ino)
        return found

    def _mind_removal(self) -> None:
        """Begin anew where somebody has taken the folder or the slab away: what is written to files
        that have no name any more is lost with the process."""
        if not self._opened_files or self._files_there() == self._opened_files:
            return
        with self._turn:
            if self._closed or self._store is None:
                return
            _log.warning("%s was removed or replaced: it is begun anew", self._folder)
            self._trouble = "the page store was removed while it was open"
            self._opened_files = {}
            self.depot.slab = self.depot.store = None
            self._store.close()
            self._store = None
        self._open()

    def _probe(self) -> None:
        if self.depot.slab is None:
            self._open()
        elif self.depot.slab.probe():
            _log.info("the page store writes again")

    def _capacity(self) -> int:
        """Bytes. What the folder holds already counts as free."""
        settings, folder = self._settings, self._folder
        if self.drops_only:
            return _UNBOUNDED  # nothing is written, and nothing has to go but what is dropped
        if settings.disk_capacity is not None:
            return settings.disk_capacity
        there = sum(entry.stat().st_size for entry in folder.iterdir()) if folder.is_dir() else 0
        free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free + there
        return min(CAPACITY_MOST, int(free * CAPACITY_SHARE))
