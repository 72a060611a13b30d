"""The cut: what a context has no room for is left out in whole exchanges, seldom and at once."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from chatserve.chat.conversations.history import History
from chatserve.chat.store.conversation import Role, Turn
from chatserve.errors import ContextLengthExceeded
from tests.chat.conversations.spoken import (
    Chat,
    Spoken,
    counted,
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


QUESTION = "What is the capital of France? " * 3
ANSWER = "Paris. the quick brown fox"


def watched(context: int) -> tuple[Chat, Callable[[], int]]:
    """A chat, and how many characters were encoded for it since that was last asked."""
    floor = text_floor("byte_level", "chatml")
    tokenizer, encoded = counted(floor.tokenizer)
    history = History(
        replace(floor, tokenizer=tokenizer), context_length=context, reserve=context // 8
    )
    encoded()
    return Chat(history, "You are a fox.", []), encoded


def answer(chat: Chat, text: str = ANSWER) -> None:
    """A reply whose ids are what a tokenizer would choose."""
    floor = text_floor("byte_level", "chatml")
    chat.answer(Spoken((), floor.tokenizer.encode_rendered(text, ()), text, "length"))


def test_a_turn_near_the_limit_costs_its_own_text_however_long_the_path_is():
    chat, encoded = watched(1200)
    costs: list[int] = []
    begins: list[int] = []
    for _ in range(400):
        encoded()
        chat.ask(QUESTION)
        costs.append(encoded())
        begins.append(chat.history.prompt(chat.system, chat.path).left_out)
        answer(chat)
    assert len(set(begins)) > 10
    appended = [cost for at, cost in enumerate(costs) if at and begins[at] == begins[at - 1]]
    assert max(appended) <= costs[0] + 4 * len(QUESTION)
    assert max(appended[-50:]) == max(appended[:100])
    assert max(costs) < 4 * 1200  # a turn that cuts


def test_turns_after_an_import_cost_what_fits_once_and_then_their_own_text():
    for text in ("the quick brown fox " * 50, "x7Qz" * 250, "你好" * 200):
        chat, encoded = watched(1200)
        for at in range(300):
            role = Role.ASSISTANT if at % 2 else Role.USER
            chat.path.append(Turn(id=str(at), parent=None, role=role, text=text, created=0.0))
        encoded()
        prompt = chat.ask("hi")
        assert len(prompt) < 1200
        assert encoded() < 8 * 1200, text
        answer(chat)
        for _ in range(3):
            begin = chat.history.prompt(chat.system, chat.path[:-1]).left_out
            encoded()
            longer = chat.ask("hi")
            cost = encoded()
            if chat.history.prompt(chat.system, chat.path).left_out == begin:
                assert longer[: len(prompt)] == prompt
                assert cost < 300, text
            prompt = longer
            answer(chat)


def test_a_beginning_does_not_depend_on_what_was_asked_before():
    chat, _ = watched(1200)
    fresh, _ = watched(1200)
    for _ in range(60):
        chat.ask("x7Qz" * 20)
        fresh.path = list(chat.path)
        told = fresh.history.prompt(chat.system, chat.path)
        assert told == chat.history.prompt(chat.system, chat.path)
        answer(chat)
    assert chat.history.prompt(chat.system, chat.path[:-1]).left_out > 0


@pytest.mark.parametrize("system", [False, True])
def test_a_text_that_is_far_too_long_is_refused_at_the_cost_of_what_fits(system):
    chat, encoded = watched(1200)
    for at in range(4):
        chat.ask(f"question {at}")
        answer(chat)
    encoded()
    huge = "the quick brown fox " * 100_000
    if system:
        chat.system = huge
    with pytest.raises(ContextLengthExceeded, match="at least"):
        chat.ask("hi" if system else huge)
    assert encoded() < 3 * 4096


def test_a_dense_text_costs_one_cut_and_no_refusal():
    chat, _ = watched(1200)
    begins: list[int] = []
    for _ in range(80):
        assert len(chat.ask("§¶†‡" * 12)) < 1200 - 1200 // 16
        begins.append(chat.history.prompt(chat.system, chat.path).left_out)
        answer(chat)
    assert begins == sorted(begins)
    assert 2 < len(set(begins)) < 40


def test_a_beginning_that_was_too_long_is_not_tried_again():
    first: list[int] = []
    for size in range(12, 152, 20):
        chat, encoded = watched(1200)
        for at in range(100):
            role = Role.ASSISTANT if at % 2 else Role.USER
            text = f"{at}x7Qz" * (size // 4)
            chat.path.append(Turn(id=str(at), parent=None, role=role, text=text, created=0.0))
        encoded()
        prompt = chat.ask("hi")
        first.append(encoded())
        assert 300 < len(prompt) < 1200
        answer(chat)
        assert chat.ask("hi")[: len(prompt)] == prompt
        assert encoded() < 300, size
    print("first", first)
    assert max(first) > 2 * min(first)  # some were composed more than once
