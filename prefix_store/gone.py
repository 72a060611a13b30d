"""Tombstones: what is remembered of dropped writes, so that an old copy of one is never read again.

Each is HMAC(store key, 'gone' ‖ nonce) of the write: it holds no name, and the same page written
again has a fresh nonce. They are kept until the slab is formatted anew.

Appended, and on the disk, before anything of a dropped page is overwritten. A record that is cut
off or damaged is skipped: an append that a crash cut off belongs to a drop that had not returned.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from prefix_store.files import Files, read_bytes, write_all
from prefix_store.layout import (
    CODE_BYTES,
    FILE_HEADER_BYTES,
    GONE_MAGIC,
    GONE_OFFSET,
    GONE_RECORD_BYTES,
    TOMBSTONE_BYTES,
    UNIT,
    pack_file_header,
)
from prefix_store.sealing import StoreKeys
from prefix_store.values import PageShape

BATCH_RECORDS = 4096


class Gone:
    """The gone file of one slab. `save` by one thread at a time, the rest under its lock."""

    def __init__(
        self, files: Files, path: Path, keys: StoreKeys, shape: PageShape, slab_id: bytes
    ) -> None:
        self._files = files
        self._path = path
        self._keys = keys
        self._shape = shape
        self._slab_id = slab_id
        self._tombstones: dict[bytes, int] = {}  # and where in the file each one is
        self._unsaved: list[bytes] = []
        self._descriptor: int | None = None
        self._end = GONE_OFFSET
        self._whole_anew = False  # after a failed sync nobody knows what of the file is there

    def __contains__(self, nonce: bytes) -> bool:
        return bool(self._tombstones) and self._keys.tombstone(nonce) in self._tombstones

    def __len__(self) -> int:
        return len(self._tombstones)

    @property
    def file_bytes(self) -> int:
        """Length of the file."""
        return self._end

    def create(self) -> None:
        """Write an empty file in place of what is there, and sync it."""
        self.close()
        self._descriptor = self._files.open(self._path, create=True)
        self._files.truncate(self._descriptor, 0)
        self._tombstones.clear()
        self._end = GONE_OFFSET
        write_all(self._files, self._descriptor, self._header(), 0)
        self._files.sync(self._descriptor)

    def load(self, *, writable: bool = True) -> bool:
        """Read the file; False where it is not this slab's."""
        self._descriptor = self._files.open(self._path, create=False, writable=writable)
        raw = read_bytes(self._files, self._descriptor, self._files.size(self._descriptor), 0)
        if raw[:UNIT] != self._header():
            return False
        self._end = len(raw) - (len(raw) - GONE_OFFSET) % GONE_RECORD_BYTES
        for offset in range(GONE_OFFSET, self._end, GONE_RECORD_BYTES):
            tombstone = raw[offset : offset + TOMBSTONE_BYTES]
            if self._record(offset, tombstone) == raw[offset : offset + GONE_RECORD_BYTES]:
                self._tombstones.setdefault(tombstone, offset)
        return True

    def remember(self, nonces: Iterable[bytes]) -> None:
        """From here on these writes are gone for this process; `save` makes it last."""
        for nonce in nonces:
            tombstone = self._keys.tombstone(nonce)
            if tombstone not in self._tombstones:
                self._tombstones[tombstone] = self._end
                self._end += GONE_RECORD_BYTES
                self._unsaved.append(tombstone)

    def save(self) -> None:
        """Put on the disk what is remembered. Raises OSError, and then the next `save` writes the
        whole file anew, on a descriptor that never failed."""
        if not self._unsaved and not self._whole_anew:
            return
        wanted = list(self._tombstones) if self._whole_anew else list(self._unsaved)
        try:
            if self._descriptor is None:
                self._descriptor = self._files.open(self._path, create=False)
            if self._whole_anew:
                write_all(self._files, self._descriptor, self._header(), 0)
            for first in range(0, len(wanted), BATCH_RECORDS):
                self._append(self._descriptor, wanted[first : first + BATCH_RECORDS])
            self._files.sync(self._descriptor)
        except OSError:
            self._whole_anew = True
            self.close()
            raise
        self._whole_anew = False
        saved = set(wanted)
        self._unsaved = [tombstone for tombstone in self._unsaved if tombstone not in saved]

    def close(self) -> None:
        """Give the descriptor back."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):
                self._files.close(descriptor)

    def _append(self, descriptor: int, tombstones: list[bytes]) -> None:
        """Write tombstones where they belong; those that follow each other in one write."""
        start = self._tombstones[tombstones[0]]
        body = bytearray()
        for tombstone in tombstones:
            offset = self._tombstones[tombstone]
            if offset != start + len(body):
                write_all(self._files, descriptor, bytes(body), start)
                start, body = offset, bytearray()
            body += self._record(offset, tombstone)
        write_all(self._files, descriptor, bytes(body), start)

    def _header(self) -> bytes:
        fields = pack_file_header(GONE_MAGIC, self._shape, self._slab_id)
        assert len(fields) == FILE_HEADER_BYTES
        return (fields + self._keys.code(b"gone header", fields)).ljust(UNIT, b"\0")

    def _record(self, offset: int, tombstone: bytes) -> bytes:
        place = b"gone at" + self._slab_id + offset.to_bytes(8, "little")
        code = self._keys.code(place, tombstone)
        assert len(code) == CODE_BYTES
        return tombstone + code
