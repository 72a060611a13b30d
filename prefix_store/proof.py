"""The proof of forgetting: what a dropped page looked like on the disk, and a search for it.

Before pages are dropped, `Slab.witnesses` or `noted` (also while a store runs, as `python -m
prefix_store witness`) notes of each its name and pieces of its ciphertext from all over the slot.
Afterwards `search` looks for any of them, at any place, in every file of a folder. A note says
nothing of a page's content; it does hold the page's name, so it belongs outside the folder that is
searched.
"""

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prefix_store.layout import (
    SLOT_HEADER_BYTES,
    UNIT,
    SlotHeader,
    SlotLayout,
    shape_of,
    slab_id_of,
    unpack_slot_header,
)
from prefix_store.values import PageShape

PIECE_BYTES = 32  # so many random bytes are nowhere by chance
PIECES = 16
_READ_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Witness:
    """A page as it lay on the disk: its name, and pieces of its ciphertext."""

    name: bytes
    pieces: tuple[bytes, ...]

    @classmethod
    def of_slot(cls, name: bytes, sealed: memoryview) -> "Witness":
        """Pieces at even distances, the first and the last bytes among them."""
        last = max(0, len(sealed) - PIECE_BYTES)
        offsets = dict.fromkeys(last * step // (PIECES - 1) for step in range(PIECES))
        return cls(name, tuple(bytes(sealed[at : at + PIECE_BYTES]) for at in offsets))

    def to_json(self) -> str:
        """One line."""
        pieces = [piece.hex() for piece in self.pieces]
        return json.dumps({"name": self.name.hex(), "pieces": pieces})

    @classmethod
    def from_json(cls, line: str) -> "Witness":
        """The witness of a line; ValueError for anything else."""
        try:
            fields: dict[str, object] = json.loads(line)
            name, pieces = fields["name"], fields["pieces"]
            if not isinstance(name, str) or not isinstance(pieces, list):
                raise TypeError
            return cls(bytes.fromhex(name), tuple(bytes.fromhex(str(piece)) for piece in pieces))
        except (KeyError, TypeError) as error:
            raise ValueError("this is not a line of a proof") from error


def noted(folder: Path, names: Collection[bytes]) -> list[Witness]:
    """The pages of these names as they lie in a folder now, wherever they do: it is read and not
    locked, so that a store that runs may be looked at. Raises OSError, and ValueError for a slab
    that is none."""
    found: list[Witness] = []
    for path in sorted(folder.glob("*.slab")):
        for header, slot in slots_with(path, names)[2]:
            found.append(Witness.of_slot(header.name, slot[SLOT_HEADER_BYTES:]))
    return found


def slots_with(
    path: Path, names: Collection[bytes]
) -> tuple[PageShape, bytes, list[tuple[SlotHeader, memoryview]]]:
    """A slab's shape and id, and its slots of pages of these names: each header, and all that was
    sealed. Raises OSError, and ValueError for a slab that is none."""
    wanted, found = frozenset(names), list[tuple[SlotHeader, memoryview]]()
    with path.open("rb") as file:
        head = file.read(UNIT)
        shape, slab_id = shape_of(head), slab_id_of(head)
        layout, slot = SlotLayout(shape), 0
        while True:
            file.seek(layout.offset(slot))
            raw = file.read(layout.sealed_bytes)
            if len(raw) < layout.sealed_bytes:
                return shape, slab_id, found
            header = unpack_slot_header(shape, slab_id, memoryview(raw))
            if header is not None and header.name in wanted:
                found.append((header, memoryview(raw)))
            slot += 1


@dataclass(frozen=True, slots=True)
class Trace:
    """Something of a page that was found. what: 'name' or 'ciphertext'."""

    path: Path
    offset: int
    name: bytes
    what: str


def search(paths: Iterable[Path], witnesses: Iterable[Witness]) -> Iterator[Trace]:
    """Every place in these files, and in the files of these folders, where a page's name (as bytes
    or as hexadecimal digits) or a piece of its ciphertext stands. Raises OSError."""
    wanted: list[tuple[bytes, bytes, str]] = []
    for witness in witnesses:
        for form in (
            witness.name,
            witness.name.hex().encode(),
            witness.name.hex().upper().encode(),
        ):
            wanted.append((form, witness.name, "name"))
        wanted.extend((piece, witness.name, "ciphertext") for piece in witness.pieces)
    overlap = max((len(needle) for needle, _, _ in wanted), default=1) - 1
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and not file.is_symlink():
                yield from _search_file(file, wanted, overlap)


def _search_file(
    path: Path, wanted: list[tuple[bytes, bytes, str]], overlap: int
) -> Iterator[Trace]:
    with path.open("rb") as file:
        before, offset = b"", 0
        while chunk := file.read(_READ_BYTES):
            text = before + chunk
            for needle, name, what in wanted:
                at = text.find(needle)
                while at >= 0:
                    # What ends in the part kept from before was reported with it.
                    if at + len(needle) > len(before):
                        yield Trace(path, offset - len(before) + at, name, what)
                    at = text.find(needle, at + 1)
            offset += len(chunk)
            before = text[-overlap:] if overlap else b""
