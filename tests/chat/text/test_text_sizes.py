"""TextSizes: estimates that cost nothing, and a count that stops in time."""

import pytest
from tokenizers import AddedToken

from chatserve.chat.text.template import read_template
from chatserve.chat.text.text_sizes import TextSizes
from chatserve.chat.text.tokenizer import Tokenizer
from tests.chat.conversations.spoken import counted, text_floor
from tests.chat.templates import CHATML
from tests.chat.vocabularies import pretrained

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


def test_a_written_text_counts_its_control_tokens_and_all_its_white_space():
    floor = text_floor("byte_level", "chatml")
    tokenizer, encoded = counted(floor.tokenizer)
    sizes = TextSizes(tokenizer)
    text = "<|im_start|>user\n" + " the quick brown fox" * 500 + "<|im_end|>" * 300
    spans = tuple(tokenizer.control.find(text))
    true = len(tokenizer.encode_rendered(text, spans))
    assert 0.9 * true < sizes.count_written_up_to(true, text, spans) <= true
    blank = sizes.count_written_up_to(10**6, " " * 100_000, ())
    assert 0.9 * len(tokenizer.encode_rendered(" " * 100_000, ())) < blank
    encoded()
    assert sizes.count_written_up_to(500, text * 1000, ()) > 500
    assert 0 < encoded() <= 4096


def test_white_space_that_control_tokens_swallow_counts_for_nothing():
    wrapped = pretrained("byte_level", CHATML)
    sides = [AddedToken("<|after|>", rstrip=True), AddedToken("<|before|>", lstrip=True)]
    wrapped.add_special_tokens({"extra_special_tokens": sides})
    _, control = read_template(wrapped)
    tokenizer = Tokenizer(wrapped, control)
    text = "<|after|>" + " " * 100_000 + "fox" + " " * 100_000 + "<|before|>"
    spans = tuple(control.find(text))
    true = len(tokenizer.encode_rendered(text, spans))
    assert true < 10
    assert TextSizes(tokenizer).count_written_up_to(10**6, text, spans) <= true
