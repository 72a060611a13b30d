"""What measures the model: what counts as right, what is asked, from how far, and of which part."""

import re
from collections.abc import Sequence

import pytest
from transformers import PreTrainedTokenizerFast

from chatserve.demonstration import MODEL_FOLDER
from chatserve.demonstration.batches import Encoder
from chatserve.demonstration.corpus import SKILLS, Chat, Part, Turn, make_chat, make_probe
from chatserve.demonstration.corpus.draw import is_held_out
from chatserve.demonstration.evaluate import (
    DISTANCES,
    DISTANT_SKILLS,
    TRAINING_LENGTH,
    Prompt,
    Score,
    asked_in_training,
    is_right,
    measure_prompts,
    measure_skills,
    overlap,
    own_replies,
    own_rows,
    table,
)

Messages = list[dict[str, str]]
PLANTED = ("told", "told several", "corrected", "corrected in passing")
COUNT = 6


class Scripted:
    """Stands for the model: says what it was given to say, and keeps what it was asked."""

    def __init__(self, says: Sequence[str]) -> None:
        self.says = says
        self.asked: list[Messages] = []

    def reply(self, chats: Sequence[Messages]) -> list[str]:
        self.asked += [list(chat) for chat in chats]
        return [self.says[(len(self.asked) - 1) % len(self.says)] for _ in chats]


class Knowing:
    """Stands for a model that answers probes rightly, or all but those of one skill."""

    def __init__(self, seed: str, wrong: str = "") -> None:
        self.replies: dict[str, str] = {}
        self.asked: list[list[Messages]] = []
        for skill in SKILLS:
            for distance in DISTANCES:
                for index in range(COUNT):
                    chat = make_probe(skill, f"{seed}/{index}", distance=distance)
                    said = "I cannot say." if skill == wrong else chat.turns[-1].reply
                    self.replies[repr(chat.messages()[:-1])] = said

    def reply(self, chats: Sequence[Messages]) -> list[str]:
        self.asked.append(list(chats))
        return [self.replies[repr(chat)] for chat in chats]


def test_a_reply_must_hold_what_is_expected_as_whole_words() -> None:
    turn = Turn("What is my name?", "Your name is Ann.", "recall", ("Ann",))
    assert is_right(turn, "Your name is Ann.")
    assert is_right(turn, "Ann!")
    assert not is_right(turn, "Your name is Anna.")
    assert not is_right(turn, "Your name is Joann.")
    assert not is_right(turn, "Your name is ann.")
    assert not is_right(turn, "")
    both = Turn("What are my name and my age?", "", "recall several", ("Ann", "31"))
    assert is_right(both, "Your name is Ann and you are 31 years old.")
    assert not is_right(both, "Your name is Ann and you are 310 years old.")


def test_a_reply_must_not_hold_what_betrays_a_mix_up() -> None:
    turn = Turn("What is my name?", "Your name is Ann.", "recall", ("Ann",), ("Ben",))
    assert not is_right(turn, "Your name is Ann, or Ben.")
    assert is_right(turn, "Your name is Ann, not Benjamin."), "another word is no mix-up"


def test_a_reply_without_expectations_must_be_the_same_text() -> None:
    turn = Turn("Spell cat.", "c-a-t", "spell")
    assert is_right(turn, "c-a-t")
    assert not is_right(turn, "c-a-t-s")
    assert not is_right(turn, "c-a-t [unended]")


def test_a_hand_written_prompt_finds_all_patterns_and_no_rejected_one() -> None:
    prompt = Prompt("name", ("Who am I?",), (r"\bann\b", "years"), reject=("ben",))
    assert prompt.judge("You are Ann, 31 years old.")
    assert not prompt.judge("You are Ann.")
    assert not prompt.judge("You are Anna, 31 years old.")
    assert not prompt.judge("You are Ann, or Ben, 31 years old.")


def test_hand_written_chats_are_asked_in_turn_and_judged_by_the_last_reply() -> None:
    prompts = [
        Prompt("name", ("I'm Ann.", "Who am I?"), ("ann",), system="Be kind."),
        Prompt("name", ("I'm Ben.", "Who am I?"), ("ben",)),
        Prompt("sum", ("What is 1 + 1?",), ("2",)),
    ]
    says = ["Hello Ann!", "You are Ann.", "Hello Ben!", "You are Ann.", "1 + 1 = 2 [unended]"]
    model = Scripted(says)
    scores = measure_prompts(model, prompts, show=False)
    assert scores == [Score("name", 1, 2), Score("sum", 0, 1)]
    assert [row["content"] for row in model.asked[1]] == [
        *("Be kind.", "I'm Ann.", "Hello Ann!", "Who am I?"),
    ]
    assert [row["role"] for row in model.asked[1]] == ["system", "user", "assistant", "user"]
    assert [len(asked) for asked in model.asked] == [2, 4, 1, 3, 1]
    silent = measure_prompts(Scripted(["Pardon me?"]), prompts, show=False)
    assert silent == [Score("name", 0, 2), Score("sum", 0, 1)]


def test_the_table_of_skills_counts_what_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    scores = measure_skills(Knowing("m"), COUNT, seed="m", batch_size=4, show=False)
    assert len(scores) == len(SKILLS) + len(DISTANT_SKILLS) * (len(DISTANCES) - 1)
    assert all(score.right == score.count == COUNT for score in scores)
    spelled = measure_skills(Knowing("m", wrong="spell"), COUNT, seed="m", batch_size=4, show=True)
    assert [score.group for score in spelled if score.right == 0] == ["spell"]
    assert sum(score.right for score in spelled) == COUNT * (len(scores) - 1)
    assert "[spell]" in capsys.readouterr().out
    assert "| **all** | 6 | 8 | 75.0 |" in table("x", [Score("a", 4, 4), Score("b", 2, 4)])


class Counting:
    """Stands for a model that says how many messages it got, and never ends a first reply."""

    def __init__(self) -> None:
        self.asked: list[list[Messages]] = []

    def reply(self, chats: Sequence[Messages]) -> list[str]:
        self.asked.append([list(chat) for chat in chats])
        return [f"{len(chat)}." + " [unended]" * (len(chat) == 1) for chat in chats]


def test_the_models_own_replies_stand_in_the_place_of_the_right_ones() -> None:
    short = Chat(None, (Turn("Hi.", "Hello!", "talk"), Turn("Bye.", "See you!", "talk")))
    long = Chat("Be kind.", (*short.turns, Turn("What?", "Nothing.", "talk")))
    model = Counting()
    assert own_replies(model, [short, long]) == ["3.", "6."]
    assert [len(batch) for batch in model.asked] == [2, 2, 1], "who has ended is not asked again"
    assert [row["content"] for row in model.asked[1][0]] == ["Hi.", "1.", "Bye."]
    assert [row["content"] for row in model.asked[2][0]] == [
        *("Be kind.", "Hi.", "2.", "Bye.", "4.", "What?"),
    ]


def test_the_table_of_own_replies_asks_every_turn_of_its_probes() -> None:
    model = Counting()
    scores = measure_skills(model, 2, seed="o", batch_size=2, show=False, own=True)
    assert [score.group for score in scores][:2] == ["recall", "recall, 900 characters later"]
    assert len(scores) == len(own_rows())
    probes = [make_probe(s, f"o/{n}", distance=d) for s, d in own_rows() for n in range(2)]
    asked = [chat[-1]["content"] for batch in model.asked for chat in batch]
    assert sorted(asked) == sorted(turn.user for probe in probes for turn in probe.turns)
    told = {turn.reply for probe in probes for turn in probe.turns}
    said = {m["content"] for batch in model.asked for chat in batch for m in chat[:-1]}
    assert not told & said, "no right reply is given away"


def fillers(chat: Chat) -> tuple[Turn, ...]:
    """The turns between what a probe planted and its question."""
    turns = chat.turns[:-1]
    planted = max((n for n, turn in enumerate(turns) if turn.skill in PLANTED), default=-1)
    return turns[planted + 1 :]


@pytest.mark.parametrize("skill", DISTANT_SKILLS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_a_question_lies_as_far_behind_as_its_row_says(skill: str, distance: int) -> None:
    probes = [make_probe(skill, f"far/{n}", distance=distance) for n in range(25)]
    # Characters, counted as the corpus does.
    found = [sum(len(t.user) + len(t.reply) + 20 for t in fillers(probe)) for probe in probes]
    assert min(found) >= distance
    assert min(found) <= distance + 300, "the least is hardly more"


def test_the_farthest_probes_ask_from_beyond_1500_tokens() -> None:
    encoder = Encoder(PreTrainedTokenizerFast.from_pretrained(MODEL_FOLDER))
    for skill in DISTANT_SKILLS:
        for number in range(12):
            between = fillers(make_probe(skill, f"far/{number}", distance=max(DISTANCES)))
            assert len(between) >= 6
            assert len(encoder.chat(Chat(None, between))[0]) > 1500


def test_each_row_asks_from_its_own_distance() -> None:
    model = Knowing("m")
    scores = measure_skills(model, COUNT, seed="m", batch_size=COUNT, show=False)
    for score, asked in zip(scores, model.asked, strict=True):
        skill, _, rest = score.group.partition(", ")
        distance = int(rest.split()[0]) if rest else 0
        wanted = [make_probe(skill, f"m/{n}", distance=distance) for n in range(COUNT)]
        assert sorted(map(repr, asked)) == sorted(repr(c.messages()[:-1]) for c in wanted)
        assert all(sum(len(row["content"]) + 20 for row in chat) >= distance for chat in asked)


def test_probes_are_of_the_held_out_part_unless_training_is_asked_for() -> None:
    sums = [make_probe("add", str(n)).turns[-1].reply for n in range(100)]
    pairs = [re.findall(r"\d+", text)[:2] for text in sums]
    assert all(is_held_out("+".join(pair)) for pair in pairs)
    shown = [make_probe("add", str(n), part=Part.TRAIN).turns[-1].reply for n in range(100)]
    assert not any(is_held_out("+".join(re.findall(r"\d+", text)[:2])) for text in shown)


def test_what_probes_ask_at_last_is_hardly_asked_in_training() -> None:
    """Patterns are held out, and sentences too: filled in, one may equal that of another."""
    skills = ("recall", "corrected", "recall several", "not told", "count", "list", "yes or no")
    probes = [make_probe(skill, f"overlap/{n}") for skill in skills for n in range(150)]
    questions = [probe.turns[-1].user for probe in probes]
    found = asked_in_training(questions, 4000, "1")
    assert len(found) <= 5, found
    said = make_chat("1/17", TRAINING_LENGTH).turns[-1].user
    assert asked_in_training([said, "no one says this"], 18, "1") == [said]
    assert "occur in 5 training chats" in overlap(1, 5, "o")
