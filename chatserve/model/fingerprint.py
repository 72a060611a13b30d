"""The fingerprint: 32 bytes that are equal only where the same tokens give the same pages.

May not know: names, tenants, requests.

Theory: pages outlive the process and move between machines, so everything that decides their
contents is hashed: the weights, our own KV format number, the config, types, rotary factors and
the layout. Each field goes in as tag, length and bytes, so no two lists of fields give the same
input. Weights are hashed as a tree (pieces of 64 MiB in threads; hashlib lets go of the GIL), and
a file's digest is remembered by path, size, modification time and inode. The threads are daemons:
a process that refuses its model, or is stopped while it starts, need not wait for them.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Thread
from typing import cast

from chatserve.model.layout import KVLayout

# Raise it with every change of what a page holds: rotary, attention, order of elements. Old pages
# then miss.
KV_FORMAT = 1

_PIECE_BYTES = 64 << 20
_READ_BYTES = 4 << 20
_HASH_THREADS = max(1, min(4, os.cpu_count() or 1))
# A model has at most a few hundred files; the oldest entries go first.
_CACHE_ENTRIES_MAX = 2000

Field = str | int | bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FingerprintFields:
    """Everything a page's contents depend on. Any one of them changed gives another digest.

    weights: `weights_digest`; config: canonical JSON; rotary: `rotary_digest`.
    """

    weights: bytes
    config: str
    compute_dtype: str
    rotary: bytes
    layout: KVLayout
    kv_format: int = KV_FORMAT
    quantization: str = "none"
    adapter: str = "none"

    def digest(self) -> bytes:
        """32 bytes, the same in every process and on every machine."""
        pairs: list[tuple[str, Field]] = []
        for field in fields(self):
            value: Field | KVLayout = getattr(self, field.name)
            if isinstance(value, KVLayout):
                pairs.extend(value.digest_fields())
            else:
                pairs.append((field.name, value))
        return digest_pairs(pairs)


def digest_pairs(pairs: Iterable[tuple[str, Field]]) -> bytes:
    """BLAKE2b-256 over typed, length-prefixed (name, value) pairs, in their order."""
    digest = hashlib.blake2b(digest_size=32, person=b"chatserve model")
    for name, value in pairs:
        for part in (name, value):
            if isinstance(part, bytes):
                tag, body = b"b", part
            elif isinstance(part, str):
                tag, body = b"s", part.encode()
            else:
                tag, body = b"i", str(part).encode()
            digest.update(tag + len(body).to_bytes(8, "little") + body)
    return digest.digest()


def config_text(config: Mapping[str, object]) -> str:
    """Canonical JSON of a model's config without what does not change its computation."""
    volatile = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"}
    kept = {key: value for key, value in config.items() if key not in volatile}
    return json.dumps(kept, sort_keys=True, default=str)


def weights_digest(files: Sequence[Path], *, cache_file: Path | None = None) -> bytes:
    """32 bytes over the contents and names of the weight files.

    cache_file: JSON that remembers digests of unchanged files; broken or unwritable, it is
    ignored. Raises OSError when a weight file cannot be read.
    """
    known = _read_cache(cache_file)
    pairs: list[tuple[str, Field]] = []
    fresh = False
    for path in files:
        key = _file_key(path)
        digest = known.get(key)
        if digest is None:
            digest = known[key] = _hash_file(path).hex()
            fresh = True
            if _file_key(path) != key:
                raise OSError(f"the weight file '{path}' changed while it was read")
        pairs.append((path.name, bytes.fromhex(digest)))
    if fresh and cache_file is not None:
        _write_cache(cache_file, known)
    return digest_pairs(pairs)


def _hash_file(path: Path) -> bytes:
    size = path.stat().st_size
    starts = range(0, max(size, 1), _PIECE_BYTES)
    leaves: dict[int, bytes] = {}
    errors: list[OSError] = []
    left = iter(starts)  # shared: each thread takes the next piece

    def work() -> None:
        try:
            for start in left:
                leaves[start] = _hash_piece(path, start)
        except OSError as error:
            errors.append(error)

    threads = [
        Thread(target=work, name="weights-digest", daemon=True)
        for _ in range(min(_HASH_THREADS, len(starts)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return digest_pairs([("size", size), *(("piece", leaves[start]) for start in starts)])


def _hash_piece(path: Path, start: int) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        left = _PIECE_BYTES
        while left and (data := file.read(min(left, _READ_BYTES))):
            digest.update(data)
            left -= len(data)
    return digest.digest()


def _file_key(path: Path) -> str:
    status = path.stat()
    parts = [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino]
    return json.dumps(parts)


def _read_cache(cache_file: Path | None) -> dict[str, str]:
    if cache_file is None:
        return {}
    try:
        entries = json.loads(cache_file.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {
        key: value
        for key, value in cast("dict[str, object]", entries).items()
        if isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")
    }


def _write_cache(cache_file: Path, entries: dict[str, str]) -> None:
    """Whole or not at all: written beside it and renamed. A cache that cannot be kept is no
    reason to stop.
    """
    kept = dict(list(entries.items())[-_CACHE_ENTRIES_MAX:])
    fresh = cache_file.with_name(f"{cache_file.name}.{os.getpid()}")
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(kept))
        fresh.replace(cache_file)
    except OSError:
        return
