"""Pages to put, and checks that what comes back is one of them or nothing."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from prefix_store import MasterSecret, PageRead, PageShape, PageStore, PageWrite, Slab
from prefix_store.files import Files

SHAPE = PageShape(fingerprint=b"f" * 32, page_bytes=3000, page_tokens=16)
SECRET = MasterSecret(bytes(range(32)))
FOLDER = Path("/store")


def name(number: int) -> bytes:
    return hashlib.sha256(b"name %d" % number).digest()


def tokens(number: int, shape: PageShape = SHAPE) -> bytes:
    return hashlib.shake_128(b"tokens %d" % number).digest(shape.token_bytes)


def page(number: int, shape: PageShape = SHAPE) -> bytes:
    return hashlib.shake_128(b"page %d" % number).digest(shape.page_bytes)


def parent(number: int, run: int = 8) -> bytes | None:
    """Pages come in sequences of `run`."""
    return name(number - 1) if number % run else None


def write(number: int, shape: PageShape = SHAPE, run: int = 8) -> PageWrite:
    return PageWrite(
        name=name(number),
        parent=parent(number, run),
        position=number % run,
        tokens=tokens(number, shape),
        page=page(number, shape),
    )


def get(slab: Slab, number: int) -> bool:
    """Whether the slab has the page; AssertionError if it gives another one."""
    into = bytearray(slab.shape.page_bytes)
    [hit] = slab.get([PageRead(name(number), tokens(number, slab.shape), into)])
    assert not hit or into == page(number, slab.shape), f"page {number} is another one"
    return hit


def get_all(slab: Slab, numbers: Sequence[int]) -> list[bool]:
    """As `get`, of all in one call."""
    into = [bytearray(slab.shape.page_bytes) for _ in numbers]
    hits = slab.get(
        [
            PageRead(name(number), tokens(number, slab.shape), buffer)
            for number, buffer in zip(numbers, into, strict=True)
        ]
    )
    for number, hit, buffer in zip(numbers, hits, into, strict=True):
        assert not hit or buffer == page(number, slab.shape), f"page {number} is another one"
    return hits


def open_store(
    files: Files | None = None,
    folder: Path = FOLDER,
    capacity_bytes: int = 1 << 20,
    secret: MasterSecret = SECRET,
) -> PageStore:
    return PageStore.open(folder, secret, capacity_bytes=capacity_bytes, files=files)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
