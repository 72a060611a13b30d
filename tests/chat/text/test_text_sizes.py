"""TextSizes: estimates that cost nothing, and a count that stops in time."""

import pytest

from chatserve.chat.text.text_sizes import TextSizes
from tests.chat.conversations.spoken import counted, text_floor

KINDS = ("byte_level", "metaspace", "prepending", "unigram")


@pytest.mark.parametrize("kind", KINDS)
def test_an_estimate_encodes_nothing_and_is_about_right(kind: str):
    tokenizer, encoded = counted(text_floor(kind, "chatml").tokenizer)
    sizes = TextSizes(tokenizer)
    encoded()
    for text in ("Some words, as others were. " * 9, "Köln 你好 🦊 Привет " * 9, "", "\ud800"):
        estimate = sizes.estimate(text)
        assert not encoded()
        assert estimate == sizes.estimate(text) > 0
        if "\ud800" not in text:
            true = len(tokenizer.encode_rendered(text, ()))
            assert true / 2 <= estimate <= 2 * true + 1
            encoded()


def test_a_count_is_true_for_what_fits_and_stops_at_what_does_not():
    tokenizer, encoded = counted(text_floor("byte_level", "chatml").tokenizer)
    sizes = TextSizes(tokenizer)
    text = "the quick brown fox " * 1000
    true = len(tokenizer.encode_rendered(text.strip(), ()))
    encoded()
    assert 0.9 * true < sizes.count_up_to(true, [text]) <= true
    assert sizes.count_up_to(true, [" " * 100_000, text[:40]]) <= 40
    encoded()
    assert sizes.count_up_to(500, [text * 1000, text]) > 500
    assert 0 < encoded() <= 4096
    assert sizes.count_up_to(true, [text, text]) > true
