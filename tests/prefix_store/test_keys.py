"""Key material: one secret per folder, private, made once; keys by HKDF."""

import hashlib
import hmac
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from prefix_store.keys import SECRET_BYTES, MasterSecret

SECRET = bytes(range(SECRET_BYTES))


def test_a_secret_is_made_once_and_found_again(tmp_path: Path) -> None:
    first = MasterSecret.open(tmp_path)
    again = MasterSecret.open(tmp_path)
    assert first.derive("names") == again.derive("names")
    assert [path.name for path in tmp_path.iterdir()] == ["secret"], "a draft was left behind"


def test_each_folder_has_a_secret_of_its_own(tmp_path: Path) -> None:
    keys = set[bytes]()
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        keys.add(MasterSecret.open(tmp_path / name).derive("names"))
    assert len(keys) == 3


def test_the_secret_file_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        MasterSecret.open(tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o601, 0o666])
def test_a_secret_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    MasterSecret.open(tmp_path)
    (tmp_path / "secret").chmod(mode)
    with pytest.raises(ValueError, match="0600"):
        MasterSecret.open(tmp_path)


@pytest.mark.parametrize("size", [0, 1, SECRET_BYTES - 1, SECRET_BYTES + 1])
def test_a_secret_of_another_length_is_refused_not_replaced(tmp_path: Path, size: int) -> None:
    path = tmp_path / "secret"
    path.touch(mode=0o600)
    path.write_bytes(bytes(size))
    with pytest.raises(ValueError, match="32 bytes"):
        MasterSecret.open(tmp_path)
    assert path.read_bytes() == bytes(size)


def test_a_link_in_place_of_the_secret_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.touch(mode=0o600)
    target.write_bytes(SECRET)
    (tmp_path / "secret").symlink_to(target)
    with pytest.raises(OSError, match="secret"):
        MasterSecret.open(tmp_path)


def test_creators_that_race_end_with_one_secret(tmp_path: Path) -> None:
    racers = 8
    barrier = Barrier(racers)

    for round_number in range(10):
        folder = tmp_path / str(round_number)
        folder.mkdir()
        with ThreadPoolExecutor(racers) as pool:
            keys = set(pool.map(_race, [folder] * racers, [barrier] * racers))
        assert len(keys) == 1
        assert [path.name for path in folder.iterdir()] == ["secret"]


def _race(folder: Path, barrier: Barrier) -> bytes:
    barrier.wait()
    return MasterSecret.open(folder).derive("names")


def test_every_label_has_a_key_of_its_own() -> None:
    secret = MasterSecret(SECRET)
    labels = ["names", "store", "cookie", "name", "names ", ""]
    keys = {secret.derive(label) for label in labels}
    assert len(keys) == len(labels)
    assert SECRET not in keys
    assert secret.derive("names") == MasterSecret(SECRET).derive("names")
    assert secret.derive("names") != MasterSecret.ephemeral().derive("names")


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100, 8160])
def test_keys_are_those_of_rfc_5869(length: int) -> None:
    # Extract with a salt of zeros, then expand: T(n) = HMAC(PRK, T(n-1) | info | n).
    pseudorandom = hmac.new(bytes(32), SECRET, hashlib.sha256).digest()
    wanted, last, counter = b"", b"", 1
    while len(wanted) < length:
        block = last + b"chatserve names" + counter.to_bytes(1, "big")
        last = hmac.new(pseudorandom, block, hashlib.sha256).digest()
        wanted, counter = wanted + last, counter + 1
    assert MasterSecret(SECRET).derive("names", length) == wanted[:length]


def test_keys_agree_with_another_implementation_of_hkdf() -> None:
    hashes = pytest.importorskip("cryptography.hazmat.primitives.hashes")
    hkdf = pytest.importorskip("cryptography.hazmat.primitives.kdf.hkdf")
    other = hkdf.HKDF(algorithm=hashes.SHA256(), length=80, salt=None, info=b"chatserve store")
    assert MasterSecret(SECRET).derive("store", 80) == other.derive(SECRET)


@pytest.mark.parametrize("length", [0, -1, 8161])
def test_a_length_that_hkdf_cannot_give_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="HKDF"):
        MasterSecret(SECRET).derive("names", length)


def test_a_secret_of_the_wrong_length_makes_no_keys() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        MasterSecret(b"short")
