"""Ids at their place: what matches says the text, and what is encoded there is as of the whole."""

import random

import pytest

from chatserve.chat.text.control import Span
from chatserve.chat.text.placed_ids import PlacedIds
from chatserve.chat.text.template import Rendered
from chatserve.chat.text.text_floor import TextFloor
from chatserve.chat.values import ChatPrompt, Message
from tests.chat.conversations.spoken import text_floor, user_text

KINDS = ("byte_level", "metaspace", "prepending", "unigram", "normalizing")
END = "<|im_end|>"


def places(kind: str, form: str = "chatml") -> tuple[TextFloor, PlacedIds]:
    floor = text_floor(kind, form)
    return floor, PlacedIds(floor.tokenizer)


def whole(floor: TextFloor, text: Rendered) -> tuple[int, ...]:
    return floor.tokenizer.encode_rendered(text.text, text.spans)


def drawn(floor: TextFloor, source: random.Random) -> Rendered:
    roles = ("user", "assistant", "user", "assistant", "user")
    messages = tuple(Message(role, user_text(source)) for role in roles)
    assert floor.template is not None
    return floor.template.render(ChatPrompt(messages=messages))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["chatml", "llama3", "gemma", "mistral", "reasoning"])
def test_the_ids_of_a_whole_match_up_to_each_control_token_and_are_encoded_behind_it(kind, form):
    floor, placed = places(kind, form)
    for seed in range(8):
        source = random.Random(f"{kind} {form} {seed}")
        print(f"seed {kind} {form} {seed}")
        text = drawn(floor, source)
        ids = whole(floor, text)
        ends = [at for at, each in enumerate(ids, 1) if each in floor.tokenizer.control.id_set]
        assert len(ends) == len(text.spans)
        place = 0
        for at, (before, end) in enumerate(zip([0, *ends], ends, strict=False)):
            found = placed.match(ids[before:end], text, place, first=True)
            if kind != "normalizing":  # which says other texts than it reads
                assert found == text.spans[at].end
            place = text.spans[at].end
            assert placed.encode_from(text, place, first=True) == ids[end:]
        if kind != "normalizing":
            assert placed.match(ids, text, 0, first=True) == len(text.text)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_encoded_inside_of_plain_text_says_the_rest(kind):
    floor, placed = places(kind)
    for seed in range(20):
        source = random.Random(f"{kind} {seed}")
        print(f"seed {kind} {seed}")
        text = "the quick brown fox Köln 你好 " + source.choice(["x", " the", "\n", "  a", "é"])
        place = source.randrange(1, len(text))
        rest = placed.encode_from(Rendered(text, ()), place, first=True)
        assert rest is not None
        assert floor.tokenizer.spell(rest) == text[place:]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_another_text_match_nothing(kind):
    floor, placed = places(kind)
    end = floor.tokenizer.control.ids[END]
    start = floor.tokenizer.control.ids["<|im_start|>"]
    encode = floor.tokenizer.encode_rendered
    text = Rendered(f"<|im_start|>user{END}user", (Span(0, 12), Span(16, 26)))
    user = encode(text.text[:16], text.spans[:1])
    assert placed.match(user, text, 0, first=True) == 16
    assert placed.match((*user, end), text, 0, first=True) == 26
    assert placed.match((*user, start), text, 0, first=True) is None  # another control token
    assert placed.match((*user, end, end), text, 0, first=True) is None  # one too many
    assert placed.match((end,), text, 0, first=True) is None
    assert placed.match(user, text, 12, first=True) is None  # at another place
    assert placed.match((*user, *encode("u", ())), text, 0, first=True) is None  # over its edge
    forged = (start, *encode(f"user{END}", ()))  # in plain pieces
    assert placed.match(forged, text, 0, first=True) is None
    assert placed.match((start, *encode("<s>", ())), text, 0, first=True) is None
    # The names of control tokens in a content are no control tokens.
    content = Rendered(f"a{END}", ())
    assert placed.match((*encode("a", ()), end), content, 0, first=True) is None


@pytest.mark.parametrize("kind", KINDS)
def test_ids_that_say_nothing_stand_nowhere(kind):
    floor, placed = places(kind)
    text = Rendered(f"<|im_start|>user{END}", (Span(0, 12), Span(16, 26)))
    beyond = 100_000
    for place in (0, 12, 14, 16, 26):
        assert placed.match((beyond,), text, place, first=True) is None
        if kind in ("metaspace", "prepending", "unigram"):
            lead = floor.tokenizer.encode_rendered("  ", ())[:1]
            assert floor.tokenizer.spell(lead) == " "
            assert placed.match(lead, text, place, first=True) is None


def test_a_reply_may_shed_the_first_space_that_its_ids_say():
    floor, placed = places("metaspace")
    ids = floor.tokenizer.encode_rendered(" the dog", ())
    assert floor.tokenizer.spell(ids) == " the dog"
    text = Rendered("x:the dog", ())
    assert placed.match(ids, text, 2, first=True, sheds_space=True) == 9
    assert placed.match(ids, text, 2, first=True) is None
    # Only the first: the second one is the text's.
    end = floor.tokenizer.control.ids[END]
    both = Rendered(f"x:the dog{END}the dog", (Span(9, 19),))
    assert placed.match((*ids, end), both, 2, first=True, sheds_space=True) == 19
    twice = (*ids, end, *ids)
    assert placed.match(twice, both, 2, first=True, sheds_space=True) is None
    once = (*ids, *ids)
    assert placed.match(
        once, Rendered("x:the dogthe dog", ()), 2, first=True, sheds_space=True
    ) is (None)


@pytest.mark.parametrize("kind", ["metaspace", "prepending", "unigram"])
def test_an_underline_that_a_user_writes_is_the_space_that_its_ids_say(kind):
    floor, placed = places(kind)
    for content in ("a▁b", "▁a", "a ▁", "▁"):
        text = Rendered(
            f"{END}{content}{END}", (Span(0, 10), Span(10 + len(content), 20 + len(content)))
        )
        ids = whole(floor, text)
        assert placed.match(ids, text, 0, first=True) == len(text.text)
    text = Rendered("a▁b", ())
    assert (
        PlacedIds(text_floor("byte_level", "chatml").tokenizer).match(
            text_floor("byte_level", "chatml").tokenizer.encode_rendered("a b", ()),
            text,
            0,
            first=True,
        )
        is None
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", ["a<table>b", "<table> b", "a\n\nb", "<table><table>b\n\n"])
def test_an_added_token_in_a_users_text_parts_it_as_the_tokenizer_does(kind, content):
    floor, placed = places(kind)
    spans = (Span(0, 10), Span(10 + len(content), 20 + len(content)))
    text = Rendered(f"{END}{content}{END}", spans)
    ids = whole(floor, text)
    assert placed.match(ids, text, 0, first=True) == len(text.text)
    other = Rendered(text.text.replace("<table>", "<tablE>").replace("\n\n", "\nx"), spans)
    assert placed.match(ids, other, 0, first=True) is None
