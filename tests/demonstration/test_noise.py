"""Slips in what training's users say: many kinds, and never in what a reply depends on."""

from collections import Counter

import pytest

from chatserve.demonstration.corpus import Part, make_chat, make_probe, noise, words
from chatserve.demonstration.corpus.draw import Draw
from chatserve.demonstration.corpus.noise import cores, roughened
from tests.seeds import drawn_seed

TEXT = "Well, could you please tell me what my dog's name is, Rex or Otto?"
KEPT = frozenset(("my", "dog", "name", "rex"))


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "SHARE", 1.0)


@pytest.mark.usefixtures("always")
def test_words_go_words_come_and_letters_move_but_not_in_what_is_kept() -> None:
    before = TEXT.split(" ")
    seen = Counter[str]()
    for number in range(400):
        after = roughened(Draw(str(number)), TEXT, KEPT).split(" ")
        assert [word for word in after if noise.core(word) in KEPT] == [
            "my",
            "dog's",
            "name",
            "Rex",
        ]
        at = after.index("dog's")
        assert after[at - 1 : at + 2] == ["my", "dog's", "name"], "nothing comes between them"
        lost, new = Counter(before) - Counter(after), Counter(after) - Counter(before)
        seen["gone"] += len(after) < len(before)
        seen["come"] += len(after) > len(before)
        seen["moved"] += sum(sorted(a) == sorted(b) for a in lost for b in new)
        assert all(noise.core(word) in noise.LIGHT or len(word) >= 4 for word in lost)
    assert min(seen["gone"], seen["come"]) > 60, seen
    assert seen["moved"] > 20, seen


@pytest.mark.usefixtures("always")
def test_a_text_of_kept_words_stays_as_it_is() -> None:
    assert roughened(Draw("1"), "My dog's name: Rex", KEPT) == "My dog's name: Rex"


def test_most_texts_stay_as_they_are() -> None:
    same = sum(roughened(Draw(str(number)), TEXT, KEPT) == TEXT for number in range(1000))
    assert 600 < same < 720


@pytest.mark.parametrize("at", range(3))
def test_a_mistyped_word_is_its_neighbour(at: int) -> None:
    kinds = {
        (len(word), sorted(word) == sorted("bread"))
        for number in range(40)
        for word in (noise.mistyped(Draw(f"{at}/{number}"), "bread"),)
        if word != "bread" and word[0] == "b"
    }
    assert kinds == {(4, False), (5, True), (6, False)}


def test_probes_are_worded_as_lists_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn() -> list[object]:
        held_out = [make_chat(str(seed), 900, Part.HELD_OUT) for seed in range(12)]
        return [*held_out, *(make_probe("recall", str(seed)) for seed in range(12))]

    def trained() -> list[object]:
        return [make_chat(str(seed), 900) for seed in range(12)]

    probes, chats = drawn(), trained()
    monkeypatch.setattr(noise, "SHARE", 0.0)
    assert drawn() == probes
    assert trained() != chats


@pytest.mark.usefixtures("always")
def test_what_was_told_is_said_whole_however_much_slips() -> None:
    told, drawn = 0, drawn_seed()
    for seed in range(200):
        chat = make_chat(f"whole/{drawn}/{seed}", 1000)
        if chat.system is not None:
            continue  # it may ask for words that each reply has besides
        said = ""
        for turn in chat.turns:
            said += f" {turn.user}"
            if turn.skill in ("told", "told several"):
                told += 1
                found = cores([said])
                for value in turn.expect:
                    assert cores([value]) <= found, (turn, value)
    assert told > 100


def test_words_that_come_in_are_no_owners_no_denials_and_no_numbers() -> None:
    assert not {"my", "your", "our", "his", "her", "not", "no", "isn't"} & set(noise.ADDED)
    assert not set(words.NUMBER_WORDS) & set(noise.ADDED)
