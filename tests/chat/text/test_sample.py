"""One sample: text, told tokens and its end, however its tokens are delivered."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatserve.chat.text.sample import SampleText, TextRule
from chatserve.chat.text.stop_strings import StopStrings
from chatserve.chat.text.template import read_template
from chatserve.chat.text.tokenizer import Tokenizer
from chatserve.engine.values import Emission, FinishReason, TokenLogprobs
from tests.chat.templates import CHATML
from tests.chat.text.carrying import carrying_tokenizer, ids_of
from tests.chat.vocabularies import pretrained


def _build(kind: str) -> Tokenizer:
    wrapped = pretrained(kind, CHATML)
    return Tokenizer(wrapped, read_template(wrapped)[1])


_TOKENIZERS = {kind: _build(kind) for kind in ("byte_level", "metaspace")}
_BYTES = _TOKENIZERS["byte_level"]
_END = _BYTES.control.ids["<|im_end|>"]


def _ids(text: str) -> list[int]:
    return list(_BYTES.encode_rendered(text, ()))


def _sample(*stops: str, tokenizer: Tokenizer = _BYTES, **rule) -> SampleText:
    return SampleText(0, tokenizer, TextRule(stops=StopStrings(stops), **rule))


def _feed(sample: SampleText, tokens: list[int], finish: FinishReason | None = None) -> bool:
    chances = tuple(TokenLogprobs(-float(each)) for each in tokens)
    return sample.feed(Emission(sample=0, tokens=tuple(tokens), logprobs=chances, finish=finish))


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@settings(max_examples=100, deadline=None, print_blob=True)
@given(
    ids=st.lists(st.integers(12, 400), min_size=1, max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=8),
    stops=st.lists(st.sampled_from(["e", "th", "\ufffd", "a b", "is", "zz"]), max_size=3),
    searched_after=st.integers(0, 5),
)
def test_delivery_does_not_matter(kind, ids, cuts, stops, searched_after):
    tokenizer = _TOKENIZERS[kind]

    def outcome(slices: list[list[int]]):
        sample = _sample(*stops, tokenizer=tokenizer, searched_after=searched_after)
        for each in slices[:-1]:
            if _feed(sample, each):
                break
        if sample.end is None:
            _feed(sample, slices[-1], FinishReason.LENGTH)
        assert len(sample.logprobs) == len(sample.token_ids)
        assert [-chance.logprob for chance in sample.logprobs] == sample.token_ids
        assert sample.length == len("".join(sample.texts))
        return "".join(sample.texts), sample.token_ids, sample.end, sample.kept_tokens

    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    sliced = outcome([ids[a:b] for a, b in pairwise(edges)])
    assert sliced == outcome([ids])
    assert sliced == outcome([[each] for each in ids])
    text, told, end, kept = sliced
    assert told == ids[: len(told)]
    whole = tokenizer.decode(ids)
    assert whole.startswith(text)
    if kept is None:
        assert (text, told, end.finish_reason) == (whole, ids, "length")
    else:
        assert whole[len(text) :].startswith(end.stop_reason)
        assert kept == len(told)
        assert text.startswith(tokenizer.decode(told)) or kind == "metaspace"


def test_no_part_of_a_stop_string_is_ever_shown():
    sample = _sample("\n\nHuman:")
    for token in _ids("fine.\n\nHum"):
        assert not _feed(sample, [token])
    assert "".join(sample.texts) == "fine."
    assert _feed(sample, _ids("an: more"))
    assert "".join(sample.texts) == "fine."
    assert sample.end.stop_reason == "\n\nHuman:"


def test_what_was_held_back_is_shown_if_no_stop_string_came_of_it():
    sample = _sample("END")
    _feed(sample, _ids("the E"))
    assert "".join(sample.texts) == "the "
    _feed(sample, _ids("N"), FinishReason.LENGTH)
    assert "".join(sample.texts) == "the EN"
    assert sample.token_ids == _ids("the E") + _ids("N")


def test_the_tokens_kept_are_those_wholly_before_the_cut():
    tokens = _ids("abc") + _ids(" the") + _ids("xyz")
    sample = _sample("he")
    assert _feed(sample, tokens)
    assert "".join(sample.texts) == "abc t"
    kept = sample.kept_tokens
    assert kept == len(sample.token_ids)
    assert _BYTES.decode(tokens[:kept]) in ("abc", "abc t")


@pytest.mark.parametrize(
    ("parts", "stop", "shown", "kept"),
    [
        # The stop string came with the end of a character: what had waited for that is before it.
        ([b"\xc3", b"\xbcEND"], "END", "ü", 1),
        ([b"ab", b"\xe5", b"\xa5", b"\xbdab"], "ab好a", "", 0),
        ([b"ab", b"\xe5", b"\xa5", b"\xbdab"], "b", "a", 0),
        ([b"\xe5", b"\xa5", b"\xbdab", b"ab"], "bab", "好a", 2),
        ([b"\xc3", b"\xbc\xc3", b"\xbcEND"], "ND", "üüE", 2),
        # It reaches back into the character: nothing of that is before it.
        ([b"a", b"\xc3", b"\xbcEND"], "üE", "a", 1),
        ([b"\xe5", b"\xa5", b"END"], "END", "\ufffd", 2),
    ],
)
def test_the_tokens_kept_where_a_token_ends_a_character_and_goes_on(parts, stop, shown, kept):
    tokenizer = carrying_tokenizer()
    tokens = ids_of(tokenizer, *parts)
    for slices in ([tokens], [[each] for each in tokens]):
        sample = _sample(stop, tokenizer=tokenizer)
        assert any(_feed(sample, each) for each in slices)
        assert "".join(sample.texts) == shown
        assert sample.kept_tokens == kept
        assert sample.token_ids == tokens[:kept]


def test_a_stop_id_counts_and_has_no_text():
    dog = _ids("dog")
    plain_stop = _ids(".")[0]
    for stop, named, reason in ((_END, False, None), (plain_stop, True, plain_stop)):
        rule = {"silent_stop_ids": frozenset({stop})}
        if named:
            rule["named_stop_ids"] = frozenset({stop})
        sample = _sample(**rule)
        _feed(sample, [*dog, stop], FinishReason.STOP)
        assert "".join(sample.texts) == "dog"
        assert sample.token_ids == [*dog, stop]
        assert sample.end.finish_reason == "stop"
        assert sample.end.stop_reason == reason


def test_stop_strings_do_not_count_in_the_first_tokens():
    tokens = _ids("a") + _ids("a") + _ids("b") + _ids("a")
    sample = _sample("a", searched_after=2)
    assert _feed(sample, tokens)
    assert "".join(sample.texts) == "aab"
    assert sample.kept_tokens == 3


def test_a_stop_string_in_the_flushed_tail_counts():
    sample = _sample("\ufffd")
    broken = next(each for each in range(300) if _BYTES.token_bytes(each) == b"\xe4")
    _feed(sample, [*_ids("dog"), broken])
    assert sample.end is None
    assert _feed(sample, [], FinishReason.LENGTH)
    assert sample.end.stop_reason == "\ufffd"
    assert "".join(sample.texts) == "dog"


def test_tokens_after_the_cut_are_ignored():
    sample = _sample("x")
    assert _feed(sample, _ids("dogx"))
    assert not _feed(sample, _ids("more"), FinishReason.STOP)
    assert "".join(sample.texts) == "dog"


def test_chances_name_bytes_and_alternatives():
    sample = _sample()
    dog = _ids(" dog")
    top = tuple((token, -9.0) for token in _ids("é"))
    sample.feed(
        Emission(sample=0, tokens=tuple(dog), logprobs=tuple(TokenLogprobs(-1.0, top) for _ in dog))
    )
    chances = sample.chances_from(0)
    assert b"".join(each.token_bytes for each in chances) == b" dog"
    assert [each.logprob for each in chances] == [-1.0] * len(dog)
    assert [each.token_id for each in chances[0].top] == _ids("é")
