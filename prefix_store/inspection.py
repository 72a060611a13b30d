"""A look at a folder of pages without changing it: what `check` and `stats` print.

`check` reads and decrypts every slot. Each is one of: a page (it opens, and the table knows it),
free (nothing but zeros, and the table knows that), or wrong, in one of these ways.

    bad         the table has a page here, and it does not open
    unlisted    something is here, and the table knows nothing of it
    forgotten   a page that was dropped is here
    records     the table's record of this slot is damaged or missing
"""

import struct
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from prefix_store.files import Files, read_bytes
from prefix_store.gone import Gone
from prefix_store.keys import MasterSecret
from prefix_store.layout import (
    SLAB_MAGIC,
    UNIT,
    SlotLayout,
    file_header_version,
    shape_of,
    slab_id_of,
    slab_stem,
    unpack_slot_header,
)
from prefix_store.names import PageName
from prefix_store.proof import slots_with
from prefix_store.recovery import slab_header
from prefix_store.sealing import Sealer, StoreKeys
from prefix_store.slab_file import SlabFile
from prefix_store.table import Table
from prefix_store.values import PageShape


@dataclass(slots=True)
class SlabReport:
    """What was found in one slab. trouble: why it cannot be read at all, or None."""

    slab: str
    trouble: str | None = None
    page_bytes: int = 0
    page_tokens: int = 0
    bytes: int = 0
    slots: int = 0
    pages: int = 0
    free: int = 0
    bad: int = 0
    unlisted: int = 0
    forgotten: int = 0
    records: int = 0
    tombstones: int = 0
    in_doubt: int = 0
    saved_at: float = 0.0
    counters: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def is_well(self) -> bool:
        """Whether there is nothing but pages and free slots."""
        wrong = self.bad or self.unlisted or self.forgotten or self.records
        return self.trouble is None and not wrong

    def as_mapping(self) -> Mapping[str, object]:
        """All fields by name."""
        return asdict(self)


def inspect(folder: Path, secret: MasterSecret, files: Files, *, verify: bool) -> list[SlabReport]:
    """A report of each slab in a folder, by name. verify: open every slot. Raises OSError where the
    folder cannot be read."""
    keys = StoreKeys(secret)
    stems = {name.partition(".")[0] for name in files.list_folder(folder) if name.endswith(".slab")}
    return [_Inspection(folder, stem, keys, files).run(verify=verify) for stem in sorted(stems)]


class KeptTokens(NamedTuple):
    """What a page on the disk continues its chain with. position: its index in the chain; tokens:
    its ids, int32 bytes."""

    name: PageName
    shape: PageShape
    position: int
    tokens: bytes


def kept_tokens(
    folder: Path, secret: MasterSecret, names: Collection[PageName]
) -> list[KeptTokens]:
    """The token ids of these pages, as far as they lie in a folder, ordered by their positions. It
    is read and not locked, so that a store that runs may be looked at: a page that is just being
    written is left out. Raises OSError, ValueError for a slab that is none."""
    keys, found = StoreKeys(secret), list[KeptTokens]()
    for path in sorted(folder.glob("*.slab")):
        shape, slab_id, slots = slots_with(path, names)
        sealer = Sealer(keys, shape, slab_id)
        for header, slot in slots:
            tokens = sealer.tokens(header, sealer.layout.parts(slot))
            if tokens is not None:
                found.append(KeptTokens(header.name, shape, header.position, tokens))
    return sorted(found, key=lambda page: page.position)


class _Inspection:
    def __init__(self, folder: Path, stem: str, keys: StoreKeys, files: Files) -> None:
        self._path = folder / f"{stem}.slab"
        self._keys = keys
        self._files = files
        self._report = SlabReport(stem)

    def run(self, *, verify: bool) -> SlabReport:
        report = self._report
        try:
            self._run(verify=verify)
        except (OSError, ValueError, struct.error) as error:
            report.trouble = str(error)
        return report

    def _run(self, *, verify: bool) -> None:
        report, files = self._report, self._files
        shape, slab_id = self._identity()
        report.page_bytes, report.page_tokens = shape.page_bytes, shape.page_tokens
        gone = Gone(files, self._path.with_suffix(".gone"), self._keys, shape, slab_id)
        table = Table(files, self._path.with_suffix(".table"), self._keys, shape, slab_id)
        slab: SlabFile | None = None
        try:
            slab = SlabFile(files, self._path, SlotLayout(shape), writable=False)
            if not gone.load(writable=False):
                raise ValueError("its tombstones are damaged")
            report.slots = slab.slots()
            state, records, lost = table.load(report.slots, repair=False)
            report.tombstones = len(gone)
            report.in_doubt = len(state.window)
            report.counters, report.saved_at = state.counters, state.saved_at
            report.records = len(lost)
            report.bytes = (
                slab.layout.offset(report.slots) + Table.bytes_for(report.slots) + gone.file_bytes
            )
            sealer = Sealer(self._keys, shape, slab_id)
            for slot, record in enumerate(records[: report.slots]):
                if not verify:
                    report.pages += record is not None
                    report.free += record is None
                else:
                    nonce = None if record is None else record.nonce
                    self._check(slab, sealer, gone, slot, nonce)
        finally:
            if slab is not None:
                slab.retire()
            table.close()
            gone.close()

    def _identity(self) -> tuple[PageShape, bytes]:
        descriptor = self._files.open(self._path, create=False, writable=False)
        try:
            raw = read_bytes(self._files, descriptor, UNIT, 0)
        finally:
            self._files.close(descriptor)
        magic, version = file_header_version(raw)
        if magic != SLAB_MAGIC:
            raise ValueError("it is not a slab")
        shape, slab_id = shape_of(raw), slab_id_of(raw)
        if raw != slab_header(self._keys, shape, slab_id):
            raise ValueError(f"its header (version {version}) is damaged, or of another secret")
        if slab_stem(shape) != self._report.slab:
            raise ValueError("its name is that of another shape")
        return shape, slab_id

    def _check(
        self, slab: SlabFile, sealer: Sealer, gone: Gone, slot: int, nonce: bytes | None
    ) -> None:
        report, sealed = self._report, sealer.layout.sealed_bytes
        buffer = slab.buffer()
        buffer[:sealed] = bytes(sealed)
        slab.read(slot, buffer, sealed)
        if bytes(buffer[:sealed]) == bytes(sealed):
            report.free += nonce is None
            report.bad += nonce is not None
            return
        header = unpack_slot_header(sealer.shape, sealer.slab_id, buffer)
        whole = False
        if header is not None:
            parts, page = sealer.layout.parts(buffer), bytearray(sealer.shape.page_bytes)
            tokens = sealer.tokens(header, parts)
            whole = tokens is not None and sealer.page(header, parts, tokens, page) is True
        if whole and header is not None and header.nonce in gone:
            report.forgotten += 1
        elif whole and header is not None and header.nonce == nonce:
            report.pages += 1
        elif nonce is not None:
            report.bad += 1
        else:
            report.unlisted += 1
