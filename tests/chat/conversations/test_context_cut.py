"""The cut: what a context has no room for is left out in whole exchanges, seldom and at once."""

import pytest

from chatserve.chat.conversations.history import History
from chatserve.chat.store.conversation import Role, Turn
from chatserve.errors import ContextLengthExceeded
from tests.chat.conversations.spoken import (
    Chat,
    Spoken,
    plain_ids,
    plainly,
    seeded,
    speak,
    text_floor,
    user_text,
)

KINDS = ("byte_level", "metaspace", "prepending", "unigram")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["chatml", "llama3", "gemma", "mistral", "reasoning"])
def test_a_cut_lets_most_turns_append(kind, form):
    turns, context, reserve = 50, 800, 150
    source = seeded(kind, form, 0)
    floor = text_floor(kind, form)
    chat = Chat(History(floor, context_length=context, reserve=reserve), None, [])
    if form != "gemma":
        chat.system = "You are a fox. " * 3
    before: tuple[int, ...] = ()
    cuts: list[int] = [0]
    for _ in range(turns):
        prompt = chat.ask("the question " + user_text(source))
        again = chat.history.prompt(chat.system, chat.path)
        assert again.tokens == prompt
        assert len(prompt) < context - reserve // 2
        assert again.left_out % 2 == 0
        if again.left_out == cuts[-1]:
            assert prompt[: len(before)] == before
        else:
            assert again.left_out > cuts[-1]
            assert len(prompt) <= context // 2 + 20
            cuts.append(again.left_out)
        ids = chat.answer(speak(source, floor, plain_ids(kind), thinks=form == "reasoning"))
        before = prompt if form == "reasoning" else prompt + ids
    print("cuts", cuts)
    assert 2 < len(cuts) <= turns // 4  # sizes are estimates, and rather too high


def test_a_cut_leaves_the_system_prompt_and_whole_exchanges():
    floor = text_floor("byte_level", "chatml")
    chat = Chat(History(floor, context_length=400, reserve=50), "You are a fox.", [])
    left_out = 0
    while not left_out:
        chat.ask(f"question {len(chat.path)} " * 5)
        left_out = chat.history.prompt(chat.system, chat.path).left_out
        kept = list(chat.path)
        chat.answer(Spoken((), floor.tokenizer.encode_rendered("Paris", ()), "Paris", ""))
    chat.path = kept[left_out:]
    assert kept[left_out].role is Role.USER
    assert chat.history.prompt(chat.system, kept).tokens == plainly(floor, chat)


def test_one_message_that_does_not_fit_is_refused_and_one_that_just_fits_is_not():
    floor = text_floor("byte_level", "chatml")
    turn = Turn(id="1", parent=None, role=Role.USER, text="the dog " * 30, created=0.0)
    wide = History(floor, context_length=10_000, reserve=10)
    size = len(wide.prompt(None, [turn]).tokens)
    assert len(History(floor, context_length=size + 1, reserve=50).prompt(None, [turn]).tokens)
    with pytest.raises(ContextLengthExceeded):
        History(floor, context_length=size, reserve=50).prompt(None, [turn])


def test_a_template_that_writes_more_than_was_estimated_costs_one_more_exchange():
    floor = text_floor("byte_level", "repeating")
    left_out: set[int] = set()
    for size in range(50, 260, 5):
        chat = Chat(History(floor, context_length=400, reserve=50), None, [])
        for _ in range(3):
            assert len(chat.ask("hi")) < 400
            ids = (floor.tokenizer.encode_rendered("x", ())[0],) * size
            chat.answer(Spoken((), ids, "x" * size, "length"))
        assert len(chat.ask("hi")) < 400
        left_out.add(chat.history.prompt(None, chat.path).left_out)
    assert left_out >= {4, 6}
