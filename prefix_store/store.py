"""The page store: a folder with a lock, a size cap, and a slab for each model that is served."""

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from prefix_store.errors import StoreError, StoreLocked
from prefix_store.files import FOLDER_MODE, Files, LocalFiles
from prefix_store.keys import MasterSecret
from prefix_store.layout import slab_stem
from prefix_store.recovery import ENDINGS, Place, open_slots, remove_slab
from prefix_store.room import Room
from prefix_store.sealing import StoreKeys
from prefix_store.slab import Slab
from prefix_store.values import PageShape, StoreStatistics

LOCK_NAME = "lock"
log = logging.getLogger(__name__)


class PageStore:
    """Pages in a folder, by name. Any thread. `open` makes one; `close` ends it.

    A folder has one owner at a time. Every file in it is ours to remove.
    """

    def __init__(self, place: Place, lock_descriptor: int, max_age_seconds: float | None) -> None:
        self._place = place
        self._lock_descriptor: int | None = lock_descriptor
        self._max_age_seconds = max_age_seconds
        self._slabs: dict[str, Slab] = {}
        self._reclaimed = 0
        self._sizes: dict[str, int] = {}  # of the slabs that were there when we came
        self._lock = threading.RLock()
        place.room.reclaim = self._reclaim

    @classmethod
    def open(
        cls,
        folder: Path,
        secret: MasterSecret,
        *,
        capacity_bytes: int,
        max_age_seconds: float | None = None,
        files: Files | None = None,
        clock: Callable[[], float] = time.time,
    ) -> "PageStore":
        """Open the store of a folder, or make it (mode 0700).

        capacity_bytes: what all files of the folder may take together. max_age_seconds: pages
        unread for longer are removed by `gc`. clock: seconds since the epoch.

        Raises StoreLocked where another has it open, StoreError where the folder cannot be used.
        """
        files = files or LocalFiles()
        try:
            files.make_folder(folder)
            if files.folder_mode(folder) & ~FOLDER_MODE:
                raise StoreError(f"{folder} is open to other users; expected mode 0700")
            descriptor = files.open(folder / LOCK_NAME, create=True)
            if not files.lock(descriptor):
                files.close(descriptor)
                raise StoreLocked(f"{folder} is in use by another process")
        except OSError as error:
            raise StoreError(f"{folder} cannot be a page store: {error}") from error
        place = Place(
            folder=folder,
            files=files,
            keys=StoreKeys(secret),
            room=Room(capacity_bytes),
            clock=clock,
            random=os.urandom,
        )
        store = cls(place, descriptor, max_age_seconds)
        try:
            store._survey()
        except OSError as error:
            store.close()
            raise StoreError(f"{folder} cannot be read: {error}") from error
        return store

    def slab(self, shape: PageShape) -> Slab:
        """The slab of a shape, made where there is none. The same object each time.

        A slab that cannot be used (another format, another secret) is begun anew, with one line in
        the log. Raises StoreError where the disk refuses or the capacity is too small.
        """
        stem = slab_stem(shape)
        with self._lock:
            if self._lock_descriptor is None:
                raise StoreError("the page store is closed")
            if stem not in self._slabs:
                try:
                    slots, sealer = open_slots(self._place, shape)
                except OSError as error:
                    raise StoreError(f"a slab cannot be opened: {error}") from error
                self._slabs[stem] = Slab(slots, sealer, self._place.keys, self._place.clock)
            return self._slabs[stem]

    def statistics(self) -> StoreStatistics:
        """The folder and its open slabs."""
        with self._lock:
            return StoreStatistics(
                folder=self._place.folder,
                capacity_bytes=self._place.room.capacity_bytes,
                bytes=self._place.room.claimed_bytes,
                unopened=len(self._unopened()),
                reclaimed=self._reclaimed,
                slabs=tuple(slab.statistics() for slab in self._slabs.values()),
            )

    def close(self) -> None:
        """Close all slabs and give the folder back. Idempotent."""
        with self._lock:
            for slab in self._slabs.values():
                slab.close()
            descriptor, self._lock_descriptor = self._lock_descriptor, None
        if descriptor is not None:
            with suppress(OSError):
                self._place.files.close(descriptor)

    def _survey(self) -> None:
        """Count what lies in the folder."""
        sizes: dict[str, int] = {}
        files = self._place.files
        for name in files.list_folder(self._place.folder):
            stem, dot, ending = name.partition(".")
            if dot + ending not in ENDINGS:
                continue
            descriptor = files.open(self._place.folder / name, create=False, writable=False)
            try:
                sizes[stem] = sizes.get(stem, 0) + files.size(descriptor)
            finally:
                files.close(descriptor)
        for stem, size in sizes.items():
            self._place.room.force(stem, size)
        self._sizes = sizes

    def _unopened(self) -> list[str]:
        return [stem for stem in self._sizes if stem not in self._slabs]

    def _reclaim(self, missing_bytes: int) -> None:
        """Remove slabs that are not opened until so many bytes are free."""
        for stem in self._unopened():
            if missing_bytes <= 0:
                return
            try:
                remove_slab(self._place, stem)
            except OSError as error:
                log.warning("A slab of another model cannot be removed: %s", error)
                continue
            self._place.room.release(stem)
            missing_bytes -= self._sizes.pop(stem)
            self._reclaimed += 1
