"""Offsets and encodings of the store's files; README.md is the document of the format.

Pure functions over bytes. All numbers are little-endian.

    slab file    header page | scratch page | slot 0 | slot 1 | …
    slot         header 160 | token ids, encrypted, +16 | page, encrypted, +16 | zeros to 4096
    table file   header page | state A 16 KiB | state B 16 KiB | block 0 | block 1 | …
    block        42 records of 96 bytes | zeros | code 16
    gone file    header page | tombstone 32, code 16 | …

A code is a keyed BLAKE2b over the bytes before it and their place: what has a wrong code was not
written by us there.
"""

import struct
from hashlib import sha256
from typing import NamedTuple

from prefix_store.names import PageName
from prefix_store.values import PageShape

FORMAT_VERSION = 1
UNIT = 4096  # what disks and page caches move; slots and blocks begin at multiples of it
SLAB_ID_BYTES = 16
NONCE_BYTES = 12
TAG_BYTES = 16
CODE_BYTES = 16
LINK_BYTES = 16
NO_LINK = bytes(LINK_BYTES)

SLAB_MAGIC = b"PGSLAB\r\n"
TABLE_MAGIC = b"PGTABL\r\n"
GONE_MAGIC = b"PGGONE\r\n"
SLOT_MAGIC = b"PGSLOT\r\n"

# magic, version, page tokens, page bytes, fingerprint, slab id
_FILE_HEADER = struct.Struct("<8sHxxIQ32s16s")
SCRATCH_OFFSET = UNIT
SLOTS_OFFSET = 2 * UNIT

# magic, version, token count, position, fingerprint, slab id, name, parent's link, token nonce,
# page nonce, write number; zeros to 160
SLOT_HEADER_BYTES = 160
_SLOT_HEADER = struct.Struct("<8sHxxII32s16s32s16s12s12sQ12x")
assert _SLOT_HEADER.size == SLOT_HEADER_BYTES

# name, parent's link, page nonce, position, write number, last use, uses, kind
RECORD_BYTES = 96
_RECORD = struct.Struct("<32s16s12sIQdIB11x")
assert _RECORD.size == RECORD_BYTES
RECORDS_PER_BLOCK = (UNIT - CODE_BYTES) // RECORD_BYTES
STATE_BYTES = 4 * UNIT
STATE_OFFSETS = (UNIT, UNIT + STATE_BYTES)
BLOCKS_OFFSET = UNIT + 2 * STATE_BYTES

TOMBSTONE_BYTES = 32
GONE_RECORD_BYTES = TOMBSTONE_BYTES + CODE_BYTES
GONE_OFFSET = UNIT

FREE, USED = 0, 1


class SlotHeader(NamedTuple):
    """What a slot says about itself, in clear and bound to its ciphertext. A tuple, as a record:
    one is made for each page that is read or written."""

    name: PageName
    link: bytes
    position: int
    token_nonce: bytes
    nonce: bytes
    write: int


class Record(NamedTuple):
    """What the table says about a slot in use. A tuple: hundreds of thousands are made at once."""

    name: PageName
    link: bytes
    nonce: bytes
    position: int
    write: int
    last_use: float
    uses: int


class SlotParts(NamedTuple):
    """Views of what lies in one slot in memory. bound: header and token ids, to which the page is
    bound; page: encrypted, with its tag; sealed: all but the zeros."""

    header: memoryview
    tokens: memoryview
    bound: memoryview
    page: memoryview
    sealed: memoryview


class SlotLayout:
    """Where things lie in a slot of one shape."""

    def __init__(self, shape: PageShape) -> None:
        self.tokens_at = SLOT_HEADER_BYTES
        self.page_at = self.tokens_at + shape.token_bytes + TAG_BYTES
        self.sealed_bytes = self.page_at + shape.page_bytes + TAG_BYTES
        self.slot_bytes = -(-self.sealed_bytes // UNIT) * UNIT

    def offset(self, slot: int) -> int:
        """Where a slot begins in the slab file."""
        return SLOTS_OFFSET + slot * self.slot_bytes

    def slots_in(self, file_bytes: int) -> int:
        """How many slots a slab file of that length has, a partial last one included."""
        return max(0, -(-(file_bytes - SLOTS_OFFSET) // self.slot_bytes))

    def parts(self, slot: memoryview) -> SlotParts:
        """Views of the parts of a slot in memory."""
        return SlotParts(
            header=slot[: self.tokens_at],
            tokens=slot[self.tokens_at : self.page_at],
            bound=slot[: self.page_at],
            page=slot[self.page_at : self.sealed_bytes],
            sealed=slot[: self.sealed_bytes],
        )


def slab_stem(shape: PageShape) -> str:
    """The name of a shape's files without their endings: 32 hexadecimal digits."""
    fields = struct.pack("<QQ", shape.page_bytes, shape.page_tokens)
    return sha256(b"chatserve slab" + shape.fingerprint + fields).hexdigest()[:32]


def pack_file_header(magic: bytes, shape: PageShape, slab_id: bytes) -> bytes:
    """The fields at the start of each file of a slab; a code and zeros follow."""
    return _FILE_HEADER.pack(
        magic, FORMAT_VERSION, shape.page_tokens, shape.page_bytes, shape.fingerprint, slab_id
    )


FILE_HEADER_BYTES = _FILE_HEADER.size


def file_header_version(raw: bytes) -> tuple[bytes, int]:
    """Magic and version of any file that may be ours."""
    return raw[:8], int.from_bytes(raw[8:10], "little")


def slab_id_of(raw: bytes) -> bytes:
    """The slab id that a file header states."""
    return raw[FILE_HEADER_BYTES - SLAB_ID_BYTES : FILE_HEADER_BYTES]


def shape_of(raw: bytes) -> PageShape:
    """The shape that a file header states; ValueError where it cannot be one."""
    _, _, page_tokens, page_bytes, fingerprint, _ = _FILE_HEADER.unpack(raw[:FILE_HEADER_BYTES])
    return PageShape(fingerprint=fingerprint, page_bytes=page_bytes, page_tokens=page_tokens)


def pack_slot_header(shape: PageShape, slab_id: bytes, header: SlotHeader) -> bytes:
    """The 160 bytes at the start of a slot."""
    return _SLOT_HEADER.pack(
        SLOT_MAGIC,
        FORMAT_VERSION,
        shape.page_tokens,
        header.position,
        shape.fingerprint,
        slab_id,
        header.name,
        header.link,
        header.token_nonce,
        header.nonce,
        header.write,
    )


def unpack_slot_header(shape: PageShape, slab_id: bytes, raw: memoryview) -> SlotHeader | None:
    """What a slot says, or None where it is not a slot of this slab."""
    if len(raw) < SLOT_HEADER_BYTES:
        return None
    magic, version, tokens, position, fingerprint, slab, name, link, token_nonce, nonce, write = (
        _SLOT_HEADER.unpack(raw[:SLOT_HEADER_BYTES])
    )
    if (
        magic != SLOT_MAGIC
        or version != FORMAT_VERSION
        or tokens != shape.page_tokens
        or fingerprint != shape.fingerprint
        or slab != slab_id
    ):
        return None
    return SlotHeader(name, link, position, token_nonce, nonce, write)


def pack_record(record: Record | None) -> bytes:
    """A table record; None for a slot with nothing in it."""
    if record is None:
        return bytes(RECORD_BYTES)
    return _RECORD.pack(
        record.name,
        record.link,
        record.nonce,
        record.position,
        record.write,
        record.last_use,
        min(record.uses, 0xFFFFFFFF),
        USED,
    )


def unpack_block(raw: bytes | memoryview) -> list[Record | None]:
    """The records of a block whose code is right, in order of slots."""
    return [
        Record._make(fields[:-1]) if fields[-1] == USED else None
        for fields in _RECORD.iter_unpack(raw[: RECORDS_PER_BLOCK * RECORD_BYTES])
    ]
