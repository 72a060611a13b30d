"""Public names: tenants share exactly the registered whole pages, and nothing of what follows."""

from collections.abc import Sequence
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given, settings

from prefix_store.names import PageNamer, PublicNames, RootFields

SIZE = 4
NAMER = PageNamer(b"k" * 32, page_size=SIZE)
ANN = RootFields(tenant="ann", cache_salt="", fingerprint=b"f" * 32, layout="page-major")
BOB = replace(ANN, tenant="bob")
ROOT = NAMER.public_root(fingerprint=ANN.fingerprint, layout=ANN.layout)
FAST = settings(max_examples=150, deadline=None, print_blob=True)

# Few ids, so that lines often begin alike.
LINE = st.lists(st.integers(0, 1), max_size=6 * SIZE)
LINES = st.lists(LINE, max_size=4)


def registered(
    *prompts: Sequence[int], root: bytes = ROOT, namer: PageNamer = NAMER
) -> PublicNames:
    chains = [namer.public_names(root, prompt) for prompt in prompts]
    return PublicNames(root, frozenset(name for chain in chains for name in chain))


def names(fields: RootFields, tokens: Sequence[int], public: PublicNames | None) -> list[bytes]:
    return NAMER.names(NAMER.root(fields), tokens, public=public)


def whole_pages_alike(one: Sequence[int], other: Sequence[int]) -> int:
    pages = min(len(one), len(other)) // SIZE
    same = (one[at * SIZE : at * SIZE + SIZE] == other[at * SIZE : at * SIZE + SIZE]
            for at in range(pages))  # fmt: skip
    return next((at for at, equal in enumerate(same) if not equal), pages)


def shared_pages(tokens: Sequence[int], prompts: Sequence[Sequence[int]]) -> int:
    """By the rule itself, without a name."""
    return max((whole_pages_alike(tokens, prompt) for prompt in prompts), default=0)


@FAST
@given(LINES, LINE)
def test_two_tenants_share_exactly_the_registered_whole_pages(
    prompts: list[list[int]], tokens: list[int]
) -> None:
    public = registered(*prompts)
    one, other = names(ANN, tokens, public), names(BOB, tokens, public)
    shared = shared_pages(tokens, prompts)
    assert one[:shared] == other[:shared] == NAMER.public_names(ROOT, tokens)[:shared]
    assert not set(one[shared:]) & set(other)
    assert not set(one[shared:]) & public.names
    assert len(one) == len(set(one)) == len(tokens) // SIZE


@FAST
@given(LINES, LINE, LINE)
def test_different_tokens_never_get_one_name(
    prompts: list[list[int]], one: list[int], other: list[int]
) -> None:
    public = registered(*prompts)
    alike = whole_pages_alike(one, other)
    first, second = names(ANN, one, public), names(ANN, other, public)
    assert first[:alike] == second[:alike]
    assert not set(first[alike:]) & set(second[alike:])


@FAST
@given(LINES, LINE, st.integers(0, 7))
def test_naming_goes_on_wherever_it_stopped(
    prompts: list[list[int]], tokens: list[int], pages: int
) -> None:
    """Inside the public part, at its end and after it: as a reply fills page after page."""
    public = registered(*prompts)
    root, whole = NAMER.root(ANN), names(ANN, tokens, public)
    cut = min(pages, len(whole))
    parent = whole[cut - 1] if cut else None
    assert whole[:cut] + NAMER.names(root, tokens[cut * SIZE :], parent, public) == whole
    by_page = list[bytes]()
    for start in range(0, len(whole) * SIZE, SIZE):
        above = by_page[-1] if by_page else None
        by_page += NAMER.names(root, tokens[start : start + SIZE], above, public)
    assert by_page == whole


@FAST
@given(LINES, LINE)
def test_what_is_not_registered_any_more_is_not_shared(
    prompts: list[list[int]], tokens: list[int]
) -> None:
    assume(prompts)
    gone, *rest = prompts
    before, after = registered(*prompts), registered(*rest)
    left = shared_pages(tokens, rest)
    assert names(ANN, tokens, after)[:left] == names(ANN, tokens, before)[:left]
    assert not set(names(BOB, gone, after)[shared_pages(gone, rest) :]) & before.names


@FAST
@given(LINE, LINE)
def test_prompts_that_begin_alike_keep_what_they_share_until_both_are_gone(
    tail: list[int], other: list[int]
) -> None:
    head = [0, 1, 2, 3, 4, 5, 6, 7]
    both, one = registered(head + tail, head + other), registered(head + other)
    assert names(ANN, head, both) == names(BOB, head, both) == names(BOB, head, one)
    assert not set(names(ANN, head, registered())) & both.names


def test_without_registered_prompts_names_are_as_they_would_be_without_the_thing() -> None:
    tokens = list(range(3 * SIZE))
    assert names(ANN, tokens, registered()) == names(ANN, tokens, None)
    assert names(ANN, tokens, registered([9] * SIZE)) == names(ANN, tokens, None)


def test_nothing_is_shared_without_the_public_names() -> None:
    """What a request with a salt gets."""
    tokens = list(range(3 * SIZE))
    public = registered(tokens)
    salted = replace(ANN, cache_salt="s")
    assert not set(names(salted, tokens, None)) & (public.names | set(names(ANN, tokens, public)))
    assert not set(names(ANN, tokens, None)) & public.names


@pytest.mark.parametrize(
    ("fingerprint", "layout", "size", "key"),
    [
        (b"g" * 32, "page-major", SIZE, b"k" * 32),
        (b"f" * 31, "page-major", SIZE, b"k" * 32),
        (b"f" * 33, "page-major", SIZE, b"k" * 32),
        (b"f" * 32, "heads first", SIZE, b"k" * 32),
        (b"f" * 32, "", SIZE, b"k" * 32),
        (b"f" * 32, "page-major", 2 * SIZE, b"k" * 32),
        (b"f" * 32, "page-major", SIZE, b"K" * 32),
    ],
)
def test_any_other_field_gives_other_public_names(
    fingerprint: bytes, layout: str, size: int, key: bytes
) -> None:
    tokens = [7] * (4 * SIZE)
    namer = PageNamer(key, page_size=size)
    root = namer.public_root(fingerprint=fingerprint, layout=layout)
    assert root != ROOT
    other = set(namer.public_names(root, tokens))
    assert other
    assert not other & registered(tokens).names


def test_a_byte_cannot_move_between_the_fields_of_the_public_root() -> None:
    one = NAMER.public_root(fingerprint=b"ab", layout="c")
    assert one != NAMER.public_root(fingerprint=b"a", layout="bc")


def test_a_public_name_is_never_one_of_another_kind() -> None:
    """Even of the same bytes: the tag is not among them."""
    page = list(range(SIZE))
    (public,) = NAMER.public_names(ROOT, page)
    own = NAMER.names(ROOT, page, parent=ROOT)
    entered = NAMER.names(ROOT, page)
    tenantless = NAMER.root(replace(ANN, tenant="", cache_salt=""))
    assert len({public, *own, *entered, ROOT, tenantless}) == 5


def test_the_first_own_page_is_bound_to_the_tenant_and_to_the_last_public_page() -> None:
    tokens = list(range(3 * SIZE))
    last_page = tokens[2 * SIZE :]
    for pages in (1, 2):
        public = registered(tokens[: pages * SIZE])
        entered = [names(fields, tokens, public)[pages] for fields in (ANN, BOB)]
        assert entered[0] != entered[1]
    one = names(ANN, tokens, registered(tokens[: 2 * SIZE]))[2]
    as_own = NAMER.names(NAMER.root(ANN), last_page, names(ANN, tokens, None)[1])
    assert one not in as_own


@pytest.mark.parametrize("token", [2**31, -(2**31) - 1])
def test_a_token_id_outside_int32_is_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        NAMER.public_names(ROOT, [1, 2, 3, token])


@FAST
@given(LINES, LINE, st.integers(0, 3))
def test_own_names_are_all_that_any_set_so_deep_could_have_given(
    prompts: list[list[int]], tokens: list[int], more: int
) -> None:
    deepest = max((len(prompt) // SIZE for prompt in prompts), default=0)
    root = NAMER.root(ANN)
    found = NAMER.own_names(root, tokens, public_root=ROOT, public_pages=deepest + more)
    for public in (registered(*prompts), registered(*prompts[:1]), registered(), None):
        shared = 0 if public is None else len(set(names(ANN, tokens, public)) & public.names)
        assert set(names(ANN, tokens, public)[shared:]) <= found
    pages = len(tokens) // SIZE
    assert len(found) == sum(pages - each for each in range(min(pages, deepest + more + 1)))
    assert not found & set(NAMER.public_names(ROOT, tokens))
    assert not found & set(names(BOB, tokens, registered(*prompts)))
