"""Keys of a store, and how a page is sealed into a slot and opened again.

    store key = HKDF(secret, "prefix store pages")     page key = HMAC-SHA256(store key, name)
    code key  = HKDF(secret, "prefix store codes")     link key = HKDF(secret, "prefix store links")

A slot holds two AES-256-GCM messages under its page key, each with 96 fresh random bits as nonce:
the token ids, with the header as associated data, and the page, with header and encrypted ids as
associated data. Two messages rather than one, so that the page is decrypted straight into the
caller's buffer. Both nonces are in the header, so neither message stands without the other.

A parent is written down as a link, a keyed hash of its name: a page that is forgotten leaves its
name nowhere, not even in its children.
"""

import hmac
from hashlib import blake2b, sha256

from prefix_store.keys import MasterSecret
from prefix_store.layout import (
    CODE_BYTES,
    LINK_BYTES,
    NO_LINK,
    NONCE_BYTES,
    SlotHeader,
    SlotLayout,
    SlotParts,
    pack_slot_header,
)
from prefix_store.names import PageName
from prefix_store.values import Buffer, PageShape, PageWrite

NONCES_BYTES = 2 * NONCE_BYTES  # what sealing a slot takes


class StoreKeys:
    """All that is derived from the secret for a folder of pages."""

    def __init__(self, secret: MasterSecret) -> None:
        self._store = secret.derive("prefix store pages")
        # HMAC-SHA256 by its definition, both halves begun: a third of hmac.digest's time.
        padded = self._store.ljust(sha256().block_size, b"\0")
        self._inner = sha256(bytes(byte ^ 0x36 for byte in padded))
        self._outer = sha256(bytes(byte ^ 0x5C for byte in padded))
        self._codes = secret.derive("prefix store codes")
        self._links = secret.derive("prefix store links")

    def page_key(self, name: PageName) -> bytes:
        """The AES-256 key of one page."""
        inner = self._inner.copy()
        inner.update(name)
        outer = self._outer.copy()
        outer.update(inner.digest())
        return outer.digest()

    def tombstone(self, nonce: bytes) -> bytes:
        """What is left of a dropped write: says nothing without the key, and holds no name."""
        return hmac.digest(self._store, b"gone" + nonce, "sha256")

    def link(self, name: PageName | None) -> bytes:
        """The 16 bytes by which children know their parent; zeros for no parent."""
        if name is None:
            return NO_LINK
        return blake2b(name, key=self._links, digest_size=LINK_BYTES).digest()

    def code(self, place: bytes, data: Buffer) -> bytes:
        """16 bytes that bind `data` to its place; `place` must not be a prefix of another."""
        state = blake2b(place, key=self._codes, digest_size=CODE_BYTES)
        state.update(data)
        return state.digest()


class Sealer:
    """Seals and opens slots of one slab. Holds no buffer, so any thread may use it."""

    def __init__(self, keys: StoreKeys, shape: PageShape, slab_id: bytes) -> None:
        # Imported here: names and keys work on machines without the wheel.
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self.layout = SlotLayout(shape)
        self.slab_id = slab_id
        self.shape = shape
        self._keys = keys
        self._cipher: type[AESGCM] = AESGCM
        self._invalid = InvalidTag

    def seal(
        self, write: PageWrite, link: bytes, number: int, nonces: bytes, slot: SlotParts
    ) -> None:
        """Fill a slot's bytes, up to its zeros. nonces: NONCES_BYTES fresh random bytes, first
        those of the token ids, then the page's."""
        token_nonce, nonce = nonces[:NONCE_BYTES], nonces[NONCE_BYTES:]
        header = SlotHeader(write.name, link, write.position, token_nonce, nonce, number)
        raw = pack_slot_header(self.shape, self.slab_id, header)
        slot.header[:] = raw
        cipher = self._cipher(self._keys.page_key(write.name))
        cipher.encrypt_into(token_nonce, write.tokens, raw, slot.tokens)
        cipher.encrypt_into(nonce, write.page, slot.bound, slot.page)

    def tokens(self, header: SlotHeader, slot: SlotParts) -> bytes | None:
        """A slot's token ids, or None where they are not what was sealed."""
        cipher = self._cipher(self._keys.page_key(header.name))
        try:
            return cipher.decrypt(header.token_nonce, slot.tokens, slot.header)
        except self._invalid:
            return None

    def page(
        self,
        header: SlotHeader,
        slot: SlotParts,
        tokens: bytes | None,
        into: bytearray | memoryview,
    ) -> bool | None:
        """Decrypt a slot's page straight into `into`. tokens None: whatever it has.

        True: it is the page with these token ids. None: it is a page with others. False: this is
        not what was sealed, and `into` may hold garbage.
        """
        cipher = self._cipher(self._keys.page_key(header.name))
        try:
            sealed = cipher.decrypt(header.token_nonce, slot.tokens, slot.header)
            if tokens is not None and sealed != tokens:
                return None
            cipher.decrypt_into(header.nonce, slot.page, slot.bound, into)
        except self._invalid:
            return False
        return True
