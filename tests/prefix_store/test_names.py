"""Page names: equal exactly when everything before the end of the page is equal."""

import subprocess
import sys
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import prefix_store
from prefix_store.names import NAME_BYTES, PageNamer, RootFields, token_bytes

KEY = b"k" * 32
SIZE = 4
FIELDS = RootFields(tenant="a", cache_salt="", fingerprint=b"f" * 32, layout="page-major")
TOKENS = list(range(12))
FAST = settings(max_examples=150, deadline=None, print_blob=True)


def namer(key: bytes = KEY, page_size: int = SIZE) -> PageNamer:
    return PageNamer(key, page_size=page_size)


def names(fields: RootFields = FIELDS, tokens: list[int] = TOKENS) -> list[bytes]:
    return namer().names(namer().root(fields), tokens)


def test_names_are_the_same_in_another_process() -> None:
    program = (
        "from prefix_store.names import PageNamer, RootFields\n"
        "n = PageNamer(b'k' * 32, page_size=4)\n"
        "f = RootFields(tenant='a', cache_salt='', fingerprint=b'f' * 32, layout='page-major')\n"
        "print(n.names(n.root(f), list(range(12)))[-1].hex())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(prefix_store.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == names()[-1].hex()


def test_names_are_keyed_blake2b_of_parent_and_tokens_with_a_type_tag() -> None:
    root = namer().root(FIELDS)
    first, second = namer().names(root, TOKENS[:8])

    def by_hand(person: bytes, body: bytes) -> bytes:
        return blake2b(body, digest_size=NAME_BYTES, key=KEY, person=person).digest()

    raw = b"".join(token.to_bytes(4, "little", signed=True) for token in TOKENS[:8])
    assert first == by_hand(b"enter", root + bytes(32) + raw[:16])
    assert second == by_hand(b"own", first + raw[16:])


@pytest.mark.parametrize(
    "other",
    [
        replace(FIELDS, tenant="b"),
        replace(FIELDS, cache_salt="s"),
        replace(FIELDS, fingerprint=b"f" * 31 + b"g"),
        replace(FIELDS, fingerprint=b"f" * 33),
        replace(FIELDS, layout="heads first"),
    ],
)
def test_any_other_field_gives_no_hit(other: RootFields) -> None:
    assert not set(names(other)) & set(names())


def test_another_key_or_page_size_gives_no_hit() -> None:
    other = namer(b"K" * 32)
    assert not set(other.names(other.root(FIELDS), TOKENS)) & set(names())
    wide = namer(page_size=8)
    assert wide.root(FIELDS) != namer().root(FIELDS)
    assert not set(wide.names(wide.root(FIELDS), TOKENS)) & set(names())


@FAST
@given(st.integers(0, 11), st.integers(-(2**31), 2**31 - 1))
def test_one_other_token_renames_its_page_and_all_after_it(index: int, token: int) -> None:
    tokens = TOKENS[:]
    tokens[index] = token
    same = [one == other for one, other in zip(names(), names(tokens=tokens), strict=True)]
    first = len(same) if token == TOKENS[index] else index // SIZE
    assert same == [page < first for page in range(len(same))]


@FAST
@given(st.lists(st.integers(0, 2**31 - 1), max_size=30), st.integers(0, 7))
def test_naming_goes_on_after_a_parent(tokens: list[int], pages: int) -> None:
    root = namer().root(FIELDS)
    whole = namer().names(root, tokens)
    cut = min(pages, len(whole))
    parent = whole[cut - 1] if cut else None
    assert whole[:cut] + namer().names(root, tokens[cut * SIZE :], parent) == whole
    assert len(whole) == len(tokens) // SIZE
    assert all(len(name) == NAME_BYTES for name in whole)


TEXT = st.text(max_size=6)
ROOTS = st.builds(
    RootFields, tenant=TEXT, cache_salt=TEXT, fingerprint=st.binary(max_size=6), layout=TEXT
)


@FAST
@given(ROOTS, ROOTS)
def test_roots_are_equal_exactly_when_their_fields_are(one: RootFields, other: RootFields) -> None:
    assert (namer().root(one) == namer().root(other)) == (one == other)


@FAST
@given(TEXT, TEXT, st.integers(0, 6))
def test_a_character_cannot_move_from_one_field_to_the_next(
    tenant: str, salt: str, cut: int
) -> None:
    joined = tenant + salt
    one = replace(FIELDS, tenant=tenant, cache_salt=salt)
    other = replace(FIELDS, tenant=joined[:cut], cache_salt=joined[cut:])
    assert (namer().root(one) == namer().root(other)) == (one == other)


def test_a_name_of_one_kind_is_never_one_of_another() -> None:
    root = namer().root(FIELDS)
    (entered,) = namer().names(root, TOKENS[:4])
    (owned,) = namer().names(root, TOKENS[:4], parent=root)
    (owned_by_zeros,) = namer().names(root, TOKENS[:4], parent=bytes(32))
    assert len({root, entered, owned, owned_by_zeros}) == 4


@pytest.mark.parametrize("token", [2**31, -(2**31) - 1, 10**30])
def test_a_token_id_outside_int32_is_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        names(tokens=[1, 2, 3, token])
    with pytest.raises(OverflowError):
        token_bytes([token])


@pytest.mark.parametrize(("key", "page_size"), [(b"k" * 15, 4), (b"k" * 65, 4), (KEY, 0)])
def test_a_key_or_page_size_out_of_range_is_refused(key: bytes, page_size: int) -> None:
    with pytest.raises(ValueError, match=r"key|page"):
        PageNamer(key, page_size=page_size)
