"""Page names: a keyed 256-bit hash of everything before the end of a page.

    root(tenant)   = H(key, 'root';  tenant, cache_salt, model fingerprint, layout)
    enter page     = H(key, 'enter'; root ‖ last public name ‖ token ids)    first page of a tenant
    own page       = H(key, 'own';   parent name ‖ token ids)                every later page
    public root    = H(key, 'public root'; model fingerprint, layout)
    public page    = H(key, 'public'; parent ‖ token ids)                    registered prompts only

A prefix is named publicly for as long as the public name of its next whole page is registered, and
no further; without such pages zeros stand for the last public name. So which names a line of tokens
has depends on its tenant's root, its tokens and the set of registered names (`PublicNames`), never
on what is resident. Whoever names a part of a line and goes on later must do both by one set: a
public name is told from a tenant's own by being in it.

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
_PUBLIC_ROOT = b"public root"
_PUBLIC = b"public"
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


@dataclass(frozen=True, slots=True)
class PublicNames:
    """The names of registered prompts' whole pages, under their one root (`public_root`).

    Whatever has a name's page has its parents' names registered too: names are registered by the
    chain (`public_names`).
    """

    root: Root
    names: frozenset[PageName] = frozenset()


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
        return self._root(
            _ROOT,
            (b"t", fields.tenant.encode()),
            (b"s", fields.cache_salt.encode()),
            (b"m", fields.fingerprint),
            (b"l", fields.layout.encode()),
        )

    def public_root(self, *, fingerprint: bytes, layout: str) -> Root:
        """The name above every public prompt's first page; both as in `RootFields`."""
        return self._root(_PUBLIC_ROOT, (b"m", fingerprint), (b"l", layout.encode()))

    def public_names(self, root: Root, tokens: Sequence[int]) -> list[PageName]:
        """What the whole pages of `tokens` are called once they are registered, in order.

        root: `public_root`'s. Raises OverflowError for a token id outside int32.
        """
        names: list[PageName] = []
        for page in self._pages(tokens):
            names.append(self._hash(_PUBLIC, (names[-1] if names else root) + page))
        return names

    def names(
        self,
        root: Root,
        tokens: Sequence[int],
        parent: PageName | None = None,
        public: PublicNames | None = None,
    ) -> list[PageName]:
        """Names of the whole pages of `tokens`, in order; a partial last page has none.

        With `parent`, the tokens continue after the page of that name. public: the registered
        names, None where nothing is to be shared with other tenants; the same for all parts of one
        line. Raises OverflowError for a token id outside int32.
        """
        pages = self._pages(tokens)
        names: list[PageName] = []
        if public is not None and public.names and (parent is None or parent in public.names):
            above = public.root if parent is None else parent
            for page in pages:
                above = self._hash(_PUBLIC, above + page)
                if above not in public.names:
                    break
                names.append(above)
            last = names[-1] if names else parent or _NO_PUBLIC_PARENT
            parent = None
        else:
            last = _NO_PUBLIC_PARENT
        key = self._key
        for page in pages[len(names) :]:
            if parent is None:
                parent = self._hash(_ENTER, root + last + page)
            else:
                parent = blake2b(
                    parent + page, digest_size=NAME_BYTES, key=key, person=_OWN
                ).digest()
            names.append(parent)
        return names

    def own_names(
        self, root: Root, tokens: Sequence[int], *, public_root: Root, public_pages: int
    ) -> set[PageName]:
        """Every name that a whole page of `tokens` has as this root's own, whatever was registered
        when it was named, as long as that was never more than the first `public_pages` pages.

        For who must find all there is of a line, whose pages may have been named at different
        times. About a microsecond for each page, as many times as there may be public ones.
        """
        pages = self._pages(tokens)
        names: set[PageName] = set()
        last, above = _NO_PUBLIC_PARENT, public_root
        for first in range(min(public_pages + 1, len(pages))):
            parent = self._hash(_ENTER, root + last + pages[first])
            names.add(parent)
            for page in pages[first + 1 :]:
                parent = self._hash(_OWN, parent + page)
                names.add(parent)
            last = above = self._hash(_PUBLIC, above + pages[first])
        return names

    def _pages(self, tokens: Sequence[int]) -> list[bytes]:
        """The token ids of each whole page, as they are hashed."""
        size = self.page_size
        whole = len(tokens) - len(tokens) % size
        raw = array("i", tokens[:whole]).tobytes()
        return [raw[start : start + 4 * size] for start in range(0, 4 * whole, 4 * size)]

    def _root(self, tag: bytes, *fields: tuple[bytes, bytes]) -> Root:
        size = (b"p", struct.pack("<q", self.page_size))
        return self._hash(tag, b"".join(_field(kind, value) for kind, value in (*fields, size)))

    def _hash(self, tag: bytes, body: bytes) -> bytes:
        return blake2b(body, digest_size=NAME_BYTES, key=self._key, person=tag).digest()


def token_bytes(tokens: Iterable[int]) -> bytes:
    """Token ids as the int32 bytes that names are made of and hits are compared by."""
    return array("i", tokens).tobytes()


def _field(kind: bytes, value: bytes) -> bytes:
    return kind + struct.pack("<Q", len(value)) + value
