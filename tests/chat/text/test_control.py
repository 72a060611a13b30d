"""Control strings are found as the tokenizers library finds added tokens."""

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models

from chatserve.chat.text.control import ControlTokens, Span

_strings = st.lists(st.text("ab<|>", min_size=1, max_size=5), min_size=1, max_size=6, unique=True)


@settings(max_examples=300, deadline=None, print_blob=True)
@given(strings=_strings, text=st.text("ab<|>", max_size=60), window=st.integers(1, 20))
def test_leftmost_longest_at_any_window(strings, text, window):
    tokens = ControlTokens({each: index for index, each in enumerate(strings)}, window=window)
    library = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    library.add_special_tokens([AddedToken(each, normalized=False) for each in strings])
    encoding = library.encode(text)
    known = set(strings)
    expected = [
        Span(*offsets)
        for offsets, token in zip(encoding.offsets, encoding.tokens, strict=True)
        if token in known
    ]
    assert list(tokens.find(text)) == expected


@settings(max_examples=300, deadline=None, print_blob=True)
@given(strings=_strings, left=st.text("ab<|>", max_size=6), right=st.text("ab<|>", max_size=6))
def test_whatever_joins_into_a_control_string_was_foreseen(strings, left, right):
    tokens = ControlTokens({each: index for index, each in enumerate(strings)})
    across = [span for span in tokens.find(left + right) if span.start < len(left) < span.end]
    if across:
        assert tokens.may_end_after(left)
        assert tokens.may_begin_before(right)


def test_a_model_without_control_tokens_has_none():
    assert list(ControlTokens({}).find("<|im_start|>")) == []
