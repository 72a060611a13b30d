"""Streamed text equals the text of all tokens decoded at once."""

import random
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chatserve.chat.text.control import ControlTokens
from chatserve.chat.text.detokenizer import Detokenizer
from chatserve.chat.text.template import read_template
from chatserve.chat.text.tokenizer import Tokenizer
from tests.chat.templates import CHATML
from tests.chat.text.carrying import carrying_tokenizer, ids_of
from tests.chat.vocabularies import KINDS, pretrained

_TEXTS = "CR\rLF\nU+2028 \u2028 event:\n\nevent: x 🙂👩‍👩‍👧 é e\u0301 你好 \ufffd\x85 ün"


def _build(kind: str) -> Tokenizer:
    wrapped = pretrained(kind, CHATML)
    return Tokenizer(wrapped, read_template(wrapped)[1])


_TOKENIZERS = {kind: _build(kind) for kind in KINDS}
_SIZE = 400  # ids of every kind: special, bytes, pieces; also some that no vocabulary has
_any_ids = st.lists(st.one_of(st.integers(0, _SIZE), st.integers(480, 600)), max_size=40)
_cuts = st.lists(st.integers(0, 40), max_size=12)


def _slices(ids: list[int], cuts: list[int]) -> list[list[int]]:
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    return [ids[a:b] for a, b in pairwise(edges)]


def _run(tokenizer: Tokenizer, slices: list[list[int]], context: int | None = None):
    """The text, and for each token where it ends."""
    detokenizer = Detokenizer(tokenizer, context=context)
    text, ends = "", []
    for each in slices:
        piece = detokenizer.add(each)
        ends += [len(text) + end for end in piece.ends]
        text += piece.text
    piece = detokenizer.flush()
    ends += [len(text) + end for end in piece.ends]
    return text + piece.text, ends


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None, print_blob=True)
@given(ids=_any_ids, cuts=_cuts)
def test_any_tokens_in_any_slices(kind, ids, cuts):
    tokenizer = _TOKENIZERS[kind]
    text, ends = _run(tokenizer, _slices(ids, cuts))
    assert text == tokenizer.decode(ids)
    assert len(ends) == len(ids)
    assert ends == sorted(ends)
    assert all(0 <= end <= len(text) for end in ends)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, print_blob=True)
@given(text=st.text(st.one_of(st.sampled_from(_TEXTS), st.characters(exclude_categories=("Cs",)))))
@example(text=_TEXTS)
def test_real_text_one_token_at_a_time(kind, text):
    tokenizer = _TOKENIZERS[kind]
    ids = list(tokenizer.encode_rendered(text, ()))
    streamed, _ = _run(tokenizer, [[each] for each in ids])
    assert streamed == tokenizer.decode(ids)
    if kind == "byte_level":
        assert streamed == text


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None, print_blob=True)
@given(ids=_any_ids)
def test_tokens_wholly_before_a_cut_have_their_text_there(kind, ids):
    """What the ends say is true: the tokens that end by then give no more than that text."""
    tokenizer = _TOKENIZERS[kind]
    text, ends = _run(tokenizer, [[each] for each in ids])
    for count, end in enumerate(ends, start=1):
        if "\ufffd" not in text:
            assert text[:end].startswith(tokenizer.decode(ids[:count]).rstrip("\ufffd"))


def _ids_of_bytes(tokenizer: Tokenizer, data: bytes) -> list[int]:
    by_bytes = {tokenizer.token_bytes(each): each for each in reversed(range(_SIZE))}
    return [by_bytes[bytes([each])] for each in data]


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_an_unfinished_tail_is_flushed_once(kind):
    tokenizer = _TOKENIZERS[kind]
    detokenizer = Detokenizer(tokenizer)
    tail = _ids_of_bytes(tokenizer, "🙂".encode()[:3])
    assert detokenizer.add(tail).text == ""
    flushed = detokenizer.flush()
    assert flushed.text == tokenizer.decode(tail)
    assert set(flushed.text) == {"\ufffd"}
    assert len(flushed.ends) == 3
    assert detokenizer.flush().text == ""


def test_byte_level_characters_are_shown_as_soon_as_they_are_whole():
    tokenizer = _TOKENIZERS["byte_level"]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add([each]) for each in _ids_of_bytes(tokenizer, "🙂a".encode())]
    assert [(piece.text, piece.ends) for piece in pieces] == [
        ("", ()),
        ("", ()),
        ("", ()),
        ("🙂", (1, 1, 1, 1)),
        ("a", (1,)),
    ]


@pytest.mark.parametrize(
    ("parts", "text", "ends"),
    [
        # What had to wait ends with its character, not with what came behind it.
        ([b"\xc3", b"\xbcEND"], "üEND", [1, 4]),
        ([b"ab", b"\xe5", b"\xa5", b"\xbdab", b"ab"], "ab好abab", [2, 3, 3, 5, 7]),
        # The token that ends one character begins the next: it ends with that one.
        ([b"\xc3", b"\xbc\xc3", b"\xbcEND"], "üüEND", [1, 2, 5]),
        # A character that never comes is read as U+FFFD, and ends what waited for it.
        ([b"\xe5", b"\xa5", b"END"], "\ufffdEND", [1, 1, 4]),
        ([b"\xc3", b"\xbc\xc3"], "ü\ufffd", [1, 2]),
    ],
)
def test_what_waited_ends_with_its_character(parts, text, ends):
    tokenizer = carrying_tokenizer()
    ids = ids_of(tokenizer, *parts)
    for slices in ([ids], [[each] for each in ids]):
        assert _run(tokenizer, slices) == (text, ends)


@pytest.mark.parametrize("kind", ["metaspace", "unigram"])
def test_a_run_of_bytes_ends_before_the_token_behind_it(kind):
    tokenizer = _TOKENIZERS[kind]
    dog = list(tokenizer.encode_rendered("a dog", ()))[-1:]
    behind = tokenizer.spell(dog)
    run = _ids_of_bytes(tokenizer, "🙂".encode())
    text, ends = _run(tokenizer, [run + dog])
    assert text == "🙂" + behind
    assert ends == [1] * 4 + [len(text)]


@pytest.mark.parametrize("kind", ["metaspace", "prepending", "unigram"])
def test_text_that_continues_a_prompt_keeps_its_space(kind):
    tokenizer = _TOKENIZERS[kind]
    ids = list(tokenizer.encode_rendered("the dog", ()))
    whole = tokenizer.decode(ids)
    for cut in range(1, len(ids)):
        rest, _ = _run(tokenizer, [ids[cut:]], context=ids[cut - 1])
        assert tokenizer.decode(ids[:cut]) + rest == whole


def test_token_bytes_join_to_the_text():
    for kind in KINDS:
        tokenizer = _TOKENIZERS[kind]
        ids = tokenizer.encode_rendered("the dog 🙂 costs", ())
        joined = b"".join(tokenizer.token_bytes(each) for each in ids).decode()
        assert joined.strip() == "the dog 🙂 costs"
    control = _TOKENIZERS["metaspace"].control
    shown = _TOKENIZERS["metaspace"].token_bytes(control.ids["<|im_end|>"])
    assert shown == b"<|im_end|>"


class _Counting(Tokenizer):
    """Counts the tokens that are looked at."""

    looked_at = 0

    def decode(self, ids):
        self.looked_at += len(ids)
        return super().decode(ids)

    def token_bytes(self, token_id):
        self.looked_at += 1
        return super().token_bytes(token_id)


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_is_looked_at_a_few_times_only(kind):
    """Also in one endless run of bytes, which is all held back, and in broken text."""
    plain = _TOKENIZERS[kind]
    tokenizer = _Counting(pretrained(kind, CHATML), plain.control)
    random_ids = random.Random(5).choices(range(20, _SIZE), k=2_000)
    byte_run = _ids_of_bytes(plain, b"\xe4") * 2_000
    for ids in (random_ids, byte_run):
        tokenizer.looked_at = 0
        text, _ = _run(tokenizer, [[each] for each in ids])
        assert text == plain.decode(ids)
        assert tokenizer.looked_at <= 4 * len(ids) + 4


def test_no_control_tokens_at_all():
    wrapped = pretrained("byte_level")
    assert Tokenizer(wrapped, ControlTokens({})).encode_rendered("dog", ())
