"""API keys: who holds which, and what a holder may do.

It knows no HTTP. Theory of operation: only digests of keys are kept, and a presented key is
compared with all of them in constant time. Without any key everybody is the one local admin; the
wiring floor then refuses to listen beyond the loopback device.
"""

import hashlib
import hmac
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import msgspec

from chatserve.engine.values import LOCAL_TENANT
from chatserve.errors import SettingsError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY_LENGTH_MIN = 8


class KeyFields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One `[[keys]]` table of a key file."""

    name: str
    key: str
    role: str = "user"
    requests: int | None = None  # at once
    cache_share: float = 0.0  # of the pages, which others' pressure does not take


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """The owner of a key; `name` is the tenant. digest is empty for the local holder."""

    name: str
    admin: bool
    requests_max: int | None = None
    cache_share: float = 0.0
    digest: bytes = field(default=b"", repr=False)


LOCAL_HOLDER = Holder(name=LOCAL_TENANT, admin=True)


class KeyRing:
    """All keys of one server."""

    def __init__(self, holders: Iterable[Holder] = ()) -> None:
        self._holders = tuple(holders)
        self._by_name = {holder.name: holder for holder in self._holders}
        if len(self._by_name) != len(self._holders):
            raise SettingsError("Two API keys have the same name.")
        if len({holder.digest for holder in self._holders}) != len(self._holders):
            raise SettingsError("Two names have the same API key.")
        if sum(holder.cache_share for holder in self._holders) > 1.0:
            raise SettingsError("The cache shares of the API keys are more than 1 together.")

    def __bool__(self) -> bool:
        return bool(self._holders)

    def find(self, key: str) -> Holder | None:
        """The holder of a key. Compares with every digest, whichever matches."""
        digest = _digest(key)
        found: Holder | None = None
        for holder in self._holders:
            if hmac.compare_digest(digest, holder.digest):
                found = holder
        return found

    def cache_shares(self) -> dict[str, float]:
        """The part of the cache that each tenant is guaranteed, where there is one."""
        return {each.name: each.cache_share for each in self._holders if each.cache_share}

    @property
    def tenants(self) -> tuple[str, ...]:
        """All names; the local one where there are no keys."""
        return tuple(self._by_name) or (LOCAL_TENANT,)

    def named(self, name: str) -> Holder | None:
        """The holder with that name, for cookies."""
        return self._by_name.get(name)


def key_ring(*, api_key: str | None = None, key_file: Path | None = None) -> KeyRing:
    """The ring for `--api-key` and `--api-key-file`; both may be given."""
    holders: list[Holder] = []
    if api_key is not None:
        # A single key is its owner's whole server, so it may do everything.
        holders.append(_holder(KeyFields(name=LOCAL_TENANT, key=api_key, role="admin")))
    if key_file is not None:
        holders.extend(_holder(fields) for fields in _read(key_file))
    return KeyRing(holders)


def _digest(key: str) -> bytes:
    # surrogatepass: whatever arrives has a digest, also what cannot be a key.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _holder(fields: KeyFields) -> Holder:
    if not _NAME.fullmatch(fields.name):
        raise SettingsError(
            "The name of an API key is 1 to 64 letters, digits, dots, dashes or underscores."
        )
    if fields.role not in ("user", "admin"):
        raise SettingsError(f"The role of the API key {fields.name!r} is neither user nor admin.")
    if (
        len(fields.key) < _KEY_LENGTH_MIN
        or not fields.key.isascii()
        or not fields.key.isprintable()
    ):
        raise SettingsError(
            f"The API key {fields.name!r} needs at least {_KEY_LENGTH_MIN} printable characters."
        )
    if fields.requests is not None and fields.requests < 1:
        raise SettingsError(f"The API key {fields.name!r} allows less than one request.")
    if not 0.0 <= fields.cache_share <= 1.0:  # NaN too
        raise SettingsError(f"The cache share of the API key {fields.name!r} is not 0 to 1.")
    return Holder(
        name=fields.name,
        admin=fields.role == "admin",
        requests_max=fields.requests,
        cache_share=fields.cache_share,
        digest=_digest(fields.key),
    )


def _read(path: Path) -> Sequence[KeyFields]:
    try:
        tables = cast(object, tomllib.loads(path.read_text("utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"Cannot read the key file {path}: {type(error).__name__}.") from error
    try:
        keys = msgspec.convert(tables, dict[str, list[KeyFields]], strict=True)
    except msgspec.ValidationError as error:
        raise SettingsError(f"The key file {path} is wrong: {error}.") from None
    if set(keys) != {"keys"}:
        raise SettingsError(f"The key file {path} must hold [[keys]] tables and nothing else.")
    return keys["keys"]
