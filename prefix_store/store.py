"""The page store: a folder with a lock, a size cap, and a slab for each model that is served."""

import logging
import os
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from pathlib import Path

from prefix_store.errors import StoreError, StoreLocked
from prefix_store.files import FOLDER_MODE, Files, LocalFiles
from prefix_store.keys import MasterSecret
from prefix_store.layout import slab_stem
from prefix_store.names import PageName
from prefix_store.others import OtherPages, identity, read_others
from prefix_store.recovery import (
    ENDINGS,
    MINIMUM_BYTES,
    Place,
    open_slots,
    remove_rest,
    remove_slab,
    saved_at,
)
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
        self._others: tuple[OtherPages, ...] = ()
        self._idle_names: dict[str, OtherPages] = {}  # of slabs that `drop` has looked into
        self._lock = threading.Lock()  # of the two above; never held while the disk works
        self._turn = threading.Lock()  # of who opens a slab, or closes one; before `_lock`

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
            descriptor = take_lock(files, folder)
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
        with self._turn:
            if self._lock_descriptor is None:
                raise StoreError("the page store is closed")
            slab = self._slabs.get(stem)
            if slab is None:
                slab = self._open_slab(shape, stem)
                with self._lock:
                    self._slabs[stem] = slab
            return slab

    def _opened(self) -> tuple[Slab, ...]:
        with self._lock:
            return tuple(self._slabs.values())

    def _open_slab(self, shape: PageShape, stem: str) -> Slab:
        place, room = self._place, self._place.room
        if room.capacity_bytes < MINIMUM_BYTES:
            raise StoreError(f"a page store needs {MINIMUM_BYTES} bytes at least")
        room.adopt(stem)
        try:
            slots, sealer = open_slots(place, shape)
        except OSError as error:
            with suppress(OSError):
                self._survey(stem)
            raise StoreError(f"a slab cannot be opened: {error}") from error
        slab = Slab(slots, sealer, place.keys, place.clock)
        room.opened(stem, slots.bytes_for(slots.high), slab.give_back)
        if room.excess():
            try:
                here = slots.bytes_for(slots.high)
                room.press(stem, here, here)
            except OSError as error:
                log.warning("A slab of another model cannot be removed: %s", error)
            slab.give_back(room.excess())
        return slab

    def others(self) -> tuple[OtherPages, ...]:
        """The names of pages in slabs that are not opened, by those used last. Reads files."""
        self._others = read_others(self._place)
        return self._others

    def drop(self, names: Collection[PageName]) -> int:
        """Forget pages in every slab of the folder, as `Slab.drop` does in one; how many there
        were. Slabs that nobody has opened are opened for it, one by one, and given back: each once,
        and later only if it may have one of the names. Left alone is a slab whose header is damaged
        or was written under another secret: nobody can read its pages.

        Raises StoreError where the disk refuses: call it again with the same names.
        """
        wanted = frozenset(names)
        with self._turn:
            if self._lock_descriptor is None:
                raise StoreError("the page store is closed")
            count = sum(slab.drop(wanted) for slab in self._opened())
            for stem in self._place.room.idle:
                known = self._idle_names.get(stem)
                if known is None or any(name in known for name in wanted):
                    count += self._drop_idle(stem, wanted)
            for pages in self._others:
                pages.forget(wanted)
        return count

    def _drop_idle(self, stem: str, names: frozenset[PageName]) -> int:
        """Of a slab that nobody has opened."""
        room = self._place.room
        self._idle_names.pop(stem, None)
        room.adopt(stem)
        try:
            return self._drop_adopted(stem, names)
        except FileNotFoundError:
            # Without its slab the table is of no use, and it says names.
            room.leave(stem, 0, partial(remove_rest, self._place, stem))
            try:
                room.remove(stem)
            except OSError as error:
                raise StoreError(f"what is left of a slab cannot be removed: {error}") from error
            return 0
        except OSError as error:
            raise StoreError(f"a slab of another model cannot be opened: {error}") from error
        finally:
            with suppress(OSError):
                self._survey(stem)

    def _drop_adopted(self, stem: str, names: frozenset[PageName]) -> int:
        place = self._place
        found = identity(place, stem)
        if found is None:
            log.warning("%s.slab is damaged, or of another secret: left alone", stem)
            return 0
        slots, sealer = open_slots(place, found[0])
        slab = Slab(slots, sealer, place.keys, place.clock)
        try:
            count = slab.drop(names)
            # Its files are young from now on, so what is too old in it goes page by page.
            slab.gc(self._max_age_seconds)
            left, room = tuple(slots.index.entries), place.room
        finally:
            slab.close()
        self._idle_names[stem] = OtherPages(found[0], left, lambda: stem in room.idle)
        return count

    def gc(self) -> int:
        """Remove pages, and slabs that are not opened, unused for longer than `max_age_seconds`;
        keep the folder within its capacity; save when pages were last used. How many pages were
        removed from open slabs. Call it now and then (it overwrites what it removes)."""
        self._remove_idle()
        return sum(slab.gc(self._max_age_seconds) for slab in self._opened())

    def _remove_idle(self) -> None:
        room, age = self._place.room, self._max_age_seconds
        for stem in room.idle:
            saved = saved_at(self._place, stem)
            old = age is not None and (saved is None or saved < self._place.clock() - age)
            if old or room.excess():
                try:
                    room.remove(stem)
                except OSError as error:
                    log.warning("A slab of another model cannot be removed: %s", error)

    def statistics(self) -> StoreStatistics:
        """The folder and its open slabs. Waits for no disk."""
        room = self._place.room
        slabs = tuple(slab.statistics() for slab in self._opened())
        return StoreStatistics(
            folder=self._place.folder,
            capacity_bytes=room.capacity_bytes,
            bytes=room.idle_bytes() + sum(slab.bytes for slab in slabs),
            unopened=len(room.idle),
            reclaimed=room.reclaimed,
            slabs=slabs,
            degraded=next((slab.degraded for slab in slabs if slab.degraded), None),
        )

    def close(self) -> None:
        """Close all slabs and give the folder back. Idempotent."""
        with self._turn:
            for slab in self._opened():
                slab.close()
            descriptor, self._lock_descriptor = self._lock_descriptor, None
        if descriptor is not None:
            with suppress(OSError):
                self._place.files.close(descriptor)

    def _survey(self, only: str | None = None) -> None:
        """Count the slabs in the folder, all or one: nobody has opened them yet."""
        sizes: dict[str, int] = {}
        files, folder = self._place.files, self._place.folder
        for name in files.list_folder(folder):
            stem, dot, ending = name.partition(".")
            if dot + ending not in ENDINGS or (only is not None and stem != only):
                continue
            descriptor = files.open(folder / name, create=False, writable=False)
            try:
                sizes[stem] = sizes.get(stem, 0) + files.size(descriptor)
            finally:
                files.close(descriptor)
        for stem, size in sizes.items():
            self._place.room.leave(stem, size, partial(remove_slab, self._place, stem))


def take_lock(files: Files, folder: Path) -> int:
    """The descriptor that holds the folder's lock; closing it gives the lock back. Raises
    StoreLocked where another has it, OSError where the disk refuses."""
    descriptor = files.open(folder / LOCK_NAME, create=True)
    try:
        taken = files.lock(descriptor)
    except OSError:
        files.close(descriptor)
        raise
    if not taken:
        files.close(descriptor)
        raise StoreLocked(f"{folder} is in use by another process")
    return descriptor
