"""Key material: one secret on disk, and a key for each use derived from it.

The secret is 32 random bytes in a file of mode 0600 in the data folder, outside any folder that
holds pages. Keys are derived by HKDF-SHA256 (RFC 5869, expand step; the secret is uniformly random,
so the extract step uses an empty salt) with a distinct label each, so that one key says nothing
about another.
"""

import hmac
import os
import secrets
from hashlib import sha256
from pathlib import Path

SECRET_BYTES = 32
_FILE_NAME = "secret"


class MasterSecret:
    """Derives a key for each use from one secret of 32 bytes; ValueError for any other length."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"a secret has {SECRET_BYTES} bytes")
        self._root = hmac.digest(bytes(sha256().digest_size), secret, "sha256")

    @classmethod
    def ephemeral(cls) -> "MasterSecret":
        """A secret that dies with the process: nothing outlives it, nothing can be found again."""
        return cls(secrets.token_bytes(SECRET_BYTES))

    @classmethod
    def open(cls, folder: Path) -> "MasterSecret":
        """The secret of a data folder, made at first use.

        Raises OSError where the file cannot be read or made, ValueError where it is not 32 bytes,
        or is open to other users.
        """
        path = folder / _FILE_NAME
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            _create(path)
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with open(descriptor, "rb") as file:
            if os.fstat(descriptor).st_mode & 0o077:
                raise ValueError(f"{path} is readable by others; expected mode 0600")
            secret = file.read(SECRET_BYTES + 1)
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"{path} does not hold a secret of {SECRET_BYTES} bytes")
        return cls(secret)

    def derive(self, label: str, length: int = 32) -> bytes:
        """The key for one use. Up to 255 x 32 bytes. The same label always gives the same key."""
        if not 1 <= length <= 255 * 32:
            raise ValueError("HKDF-SHA256 gives 1 to 8160 bytes")
        info = b"chatserve " + label.encode()
        blocks: list[bytes] = []
        last = b""
        while len(blocks) * 32 < length:
            last = hmac.digest(self._root, last + info + bytes([len(blocks) + 1]), "sha256")
            blocks.append(last)
        return b"".join(blocks)[:length]


def _create(path: Path) -> None:
    """Write a new secret. Two processes that race end with the file of the first."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        os.unlink(draft)
