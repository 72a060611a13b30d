"""Page names: a keyed 256-bit hash of everything before the end of a page.

    root(tenant)   = H(key, 'root';  tenant, cache_salt, model fingerprint, layout)
    enter page     = H(key, 'enter'; root ‖ last public name ‖ token ids)    first page of a tenant
    own page       = H(key, 'own';   parent name ‖ token ids)                every later page
    public page    = H(key, 'public'; parent ‖ token ids)                    registered prompts only

H is BLAKE2b with a 32-byte key and a 32-byte digest (RFC 7693). The type tag is BLAKE2b's
`person` parameter, so a name of one kind can never be a name of another. Fields of a root are
typed and length-prefixed, so no two different tuples of fields give the same bytes. Token ids are
hashed as little-endian int32, and a page has a fixed number of them, so nothing needs a separator.

BLAKE2b against HMAC-SHA256, measured for a 16-token page: see docs/log.md.

Names are stable across restarts as long as the key is (`keys.py`). Whoever compares token ids on a
hit as well (the cache floor does) is safe even from a collision.
"""

import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

NAME_BYTES = 32

PageName = bytes
Root = bytes

_ROOT = b"root"
_ENTER = b"enter"
_OWN = b"own"
_NO_PUBLIC_PARENT = bytes(NAME_BYTES)

assert array("i").itemsize == 4, "token ids are hashed as int32"


@dataclass(frozen=True, slots=True, kw_only=True)
class RootFields:
    """All that must be equal for two sequences to share a page, besides their tokens.

    fingerprint: 32 bytes or more that stand for the model: weights, configuration, compute and KV
    dtype, rotary rules, the KV format's number. layout: the page layout, in words of the caller.
    """

    tenant: str
    cache_salt: str
    fingerprint: bytes
    layout: str


class PageNamer:
    """Names whole pages of one page size under one key. Pure, and so safe in any thread."""

    def __init__(self, key: bytes, *, page_size: int) -> None:
        """key: 16 to 64 bytes. Raises ValueError for a key or page size out of range."""
        if not 16 <= len(key) <= 64:
            raise ValueError("a name key has 16 to 64 bytes")
        if page_size < 1:
            raise ValueError("a page has at least one position")
        self.page_size = page_size
        self._key = key

    def root(self, fields: RootFields) -> Root:
        """The name above a namespace's first page."""
        body = b"".join(
            _field(kind, value)
            for kind, value in (
                (b"t", fields.tenant.encode()),
                (b"s", fields.cache_salt.encode()),
                (b"m", fields.fingerprint),
                (b"l", fields.layout.encode()),
                (b"p", struct.pack("<q", self.page_size)),
            )
        )
        return self._hash(_ROOT, body)

    def names(
        self, root: Root, tokens: Sequence[int], parent: PageName | None = None
    ) -> list[PageName]:
        """Names of the whole pages of `tokens`, in order; a partial last page has none.

        With `parent`, the tokens continue after the page of that name. Raises OverflowError for
        a token id outside int32.
        """
        size = self.page_size
        whole = len(tokens) - len(tokens) % size
        raw = array("i", tokens[:whole]).tobytes()
        step = 4 * size
        key = self._key
        names: list[PageName] = []
        for start in range(0, 4 * whole, step):
            page = raw[start : start + step]
            if parent is None:
                parent = self._hash(_ENTER, root + _NO_PUBLIC_PARENT + page)
            else:
                parent = blake2b(
                    parent + page, digest_size=NAME_BYTES, key=key, person=_OWN
                ).digest()
            names.append(parent)
        return names

    def _hash(self, tag: bytes, body: bytes) -> bytes:
        return blake2b(body, digest_size=NAME_BYTES, key=self._key, person=tag).digest()


def token_bytes(tokens: Iterable[int]) -> bytes:
    """Token ids as the int32 bytes that names are made of and hits are compared by."""
    return array("i", tokens).tobytes()


def _field(kind: bytes, value: bytes) -> bytes:
    return kind + struct.pack("<Q", len(value)) + value
