"""The fingerprint and the layout: any one field changed gives another digest."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chatserve.errors import ModelRefused
from chatserve.model import KVLayout, LayerShape, LoadedModel, fingerprint, load_model
from chatserve.model.fingerprint import FingerprintFields, digest_pairs, weights_digest
from tests.model.families import build, edit_config

LAYOUT = KVLayout(16, torch.float32, (LayerShape(2, 8), LayerShape(4, 8)))
FIELDS = FingerprintFields(
    weights=b"w" * 32, config="{}", compute_dtype="torch.float32", rotary=b"r" * 32, layout=LAYOUT
)


def test_any_one_field_flips_the_digest() -> None:
    variants = [
        FIELDS,
        replace(FIELDS, weights=b"v" * 32),
        replace(FIELDS, config='{"a": 1}'),
        replace(FIELDS, compute_dtype="torch.bfloat16"),
        replace(FIELDS, rotary=b"s" * 32),
        replace(FIELDS, kv_format=FIELDS.kv_format + 1),
        replace(FIELDS, quantization="int8"),
        replace(FIELDS, adapter="mine"),
        replace(FIELDS, layout=replace(LAYOUT, page_size=32)),
        replace(FIELDS, layout=replace(LAYOUT, dtype=torch.bfloat16)),
        replace(FIELDS, layout=replace(LAYOUT, dtype=torch.float8_e4m3fn)),
        replace(FIELDS, layout=replace(LAYOUT, layers=LAYOUT.layers[:1])),
        replace(FIELDS, layout=replace(LAYOUT, layers=LAYOUT.layers[::-1])),
        replace(FIELDS, layout=replace(LAYOUT, layers=(LayerShape(8, 2), LayerShape(4, 8)))),
    ]
    digests = {variant.digest() for variant in variants}
    assert len(digests) == len(variants)
    assert all(len(digest) == 32 for digest in digests)
    assert FIELDS.digest() == replace(FIELDS).digest()


def test_fields_are_typed_and_length_prefixed() -> None:
    inputs: list[list[tuple[str, str | int | bytes]]] = [
        [("a", "bc")], [("ab", "c")], [("a", b"bc")], [("a", "b"), ("c", "")],
        [("a", 1)], [("a", "1")], [("a", b"1")], [],
    ]  # fmt: skip
    assert len({digest_pairs(pairs) for pairs in inputs}) == len(inputs)


def test_weights_are_hashed_as_a_tree_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(fingerprint, "_READ_BYTES", 300)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    contents = os.urandom(3500)
    for path in files:
        path.write_bytes(contents)
    cache = tmp_path / "deep" / "digests.json"
    digest = weights_digest(files, cache_file=cache)
    assert digest == weights_digest(files)
    assert digest != weights_digest(files[:1])
    for position in (0, 999, 1000, 3499):
        changed = bytearray(contents)
        changed[position] ^= 1
        files[1].write_bytes(changed)
        assert weights_digest(files) != digest
    files[1].write_bytes(contents[:3000])
    assert weights_digest(files, cache_file=cache) != digest
    files[1].write_bytes(contents)
    os.utime(files[1], ns=(1, 1))
    assert weights_digest(files, cache_file=cache) == digest

    def never(path: Path) -> bytes:
        raise AssertionError("hashed again")

    monkeypatch.setattr(fingerprint, "_hash_file", never)
    assert weights_digest(files, cache_file=cache) == digest
    os.utime(files[1], ns=(2, 2))
    with pytest.raises(AssertionError):
        weights_digest(files, cache_file=cache)


@pytest.mark.parametrize("text", ["{", "[]", '{"x": 3}', '{"x": "short"}'])
def test_a_broken_digest_cache_is_ignored(tmp_path: Path, text: str) -> None:
    weights, cache = tmp_path / "w", tmp_path / "cache.json"
    weights.write_bytes(b"weights")
    cache.write_text(text)
    assert weights_digest([weights], cache_file=cache) == weights_digest([weights])
    assert weights_digest([weights], cache_file=weights / "nowhere") == weights_digest([weights])


def test_models_that_differ_have_different_fingerprints(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    def load(folder: Path, dtype: str = "float32", page_size: int = 16) -> LoadedModel:
        return load_model(folder, device="cpu", dtype=dtype, page_size=page_size)

    folder = folder_of("llama")
    copy = shutil.copytree(folder, tmp_path / "copy")
    theta = build("llama", tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 5e3})
    epsilon = shutil.copytree(folder, tmp_path / "epsilon")
    edit_config(epsilon, rms_norm_eps=1e-3)
    same = [load(folder).fingerprint(), load(copy).fingerprint()]
    others = [
        load(folder, dtype="bfloat16").fingerprint(),
        load(folder, page_size=8).fingerprint(),
        load(theta).fingerprint(),
        load(epsilon).fingerprint(),
        load(build("llama", tmp_path / "seed", seed=1)).fingerprint(),
        load(folder_of("qwen2")).fingerprint(),
    ]
    assert same[0] == same[1]
    assert len({same[0], *others}) == 7


def test_weights_that_vanish_while_they_are_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> bytes:
        raise OSError("disk gone")

    monkeypatch.setattr("chatserve.model.loader.weights_digest", fail)
    folder = build("llama", tmp_path)
    model = load_model(folder, device="cpu", dtype="float32", page_size=16)
    with pytest.raises(ModelRefused, match="disk gone"):
        model.fingerprint()


def test_layer_views_tile_a_page_without_gaps() -> None:
    pool = LAYOUT.allocate(3, "cpu", fill=0.0)
    assert pool.shape == (3, LAYOUT.page_elements)
    assert LAYOUT.page_elements == 2 * 16 * (2 * 8 + 4 * 8)
    assert LAYOUT.page_bytes == 4 * LAYOUT.page_elements
    for layer, shape in enumerate(LAYOUT.layers):
        view = LAYOUT.layer_view(pool, layer)
        assert view.shape == (3, 2, 16, shape.kv_heads, shape.head_dim)
        view += layer + 1
    assert pool.unique().tolist() == [1.0, 2.0]
    assert LAYOUT.layer_view(pool, 1).data_ptr() == pool.data_ptr() + 4 * 2 * 16 * 2 * 8
    assert LAYOUT.allocate(2, "cpu").shape == (2, LAYOUT.page_elements)
