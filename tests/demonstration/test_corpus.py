"""The corpus: the same seed makes the same text, and the held-out part stays held out."""

import hashlib
import re

import pytest

from chatserve.demonstration.corpus import SKILLS, Part, make_chat, make_probe
from chatserve.demonstration.corpus.draw import SPLIT_LENGTH_MIN, Draw, is_held_out
from chatserve.demonstration.corpus.explain import GENERAL, TOPICS
from chatserve.demonstration.corpus.facts import MY_THINGS, NAMED_THINGS
from chatserve.demonstration.corpus.memory import Fact, Memory, wording
from chatserve.demonstration.corpus.talk import QUESTIONS, SUBJECTS, TALK
from chatserve.demonstration.corpus.tasks import spell
from chatserve.demonstration.corpus.wordings import (
    ASK_SPECIAL,
    FACTS,
    FORMS_MAX,
    SYSTEM,
    TELL_SPECIAL,
    spread,
)
from chatserve.demonstration.corpus.words import CITIES, NAMES, ORDINARY_WORDS
from chatserve.demonstration.evaluate import is_right, read_prompts


def test_the_same_seed_makes_the_same_chat() -> None:
    assert make_chat("7", 900) == make_chat("7", 900)
    assert make_chat("7", 900) != make_chat("8", 900)
    assert make_probe("recall", "7") == make_probe("recall", "7")


def test_the_corpus_is_the_one_that_the_weights_were_trained_on() -> None:
    """A change is welcome with a new run: then this digest changes too."""
    chats = "\n".join(repr(make_chat(f"frozen/{n}", 200 * n)) for n in range(40))
    assert hashlib.sha256(chats.encode()).hexdigest().startswith("980ae2aa1ed2510a")


def test_chats_alternate_and_grow_to_the_length_asked_for() -> None:
    for seed in range(60):
        chat = make_chat(str(seed), 1500)
        roles = [row["role"] for row in chat.messages()]
        if roles[0] == "system":
            roles = roles[1:]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert sum(len(row["content"]) + 20 for row in chat.messages()) >= 1500
        assert all(turn.user.strip() and turn.reply.strip() for turn in chat.turns)


@pytest.mark.parametrize("items", [NAMES, CITIES, FACTS["ask"], FACTS["tell"], SYSTEM["named"]])
def test_the_two_parts_of_a_list_are_disjoint_and_both_there(items: tuple[str, ...]) -> None:
    train, held_out = Draw("a", Part.TRAIN), Draw("a", Part.HELD_OUT)
    seen = {train.pick(items) for _ in range(3000)}
    kept = {held_out.pick(items) for _ in range(3000)}
    assert seen
    assert kept
    assert not seen & kept
    assert seen | kept == set(items)


def test_most_wordings_have_a_held_out_part() -> None:
    lists = [*FACTS.values(), *ASK_SPECIAL.values(), *TELL_SPECIAL.values(), *SYSTEM.values()]
    lists += [wordings for wordings, _ in TALK] + [topic.questions for topic in TOPICS]
    long = [items for items in lists if len(items) >= SPLIT_LENGTH_MIN]
    assert sum(any(map(is_held_out, items)) for items in long) >= 0.7 * len(long)


def test_invented_names_and_numbers_are_split_too() -> None:
    train, held_out = Draw("b", Part.TRAIN), Draw("b", Part.HELD_OUT)
    assert not any(is_held_out(train.letters(3, 8)) for _ in range(500))
    assert all(is_held_out(held_out.letters(3, 8)) for _ in range(500))
    assert all(is_held_out(text) for text in (held_out.number() for _ in range(500)) if text[2:])


@pytest.mark.parametrize("skill", SKILLS)
def test_each_probe_accepts_its_own_reply_and_refuses_another(skill: str) -> None:
    for seed in range(20):
        last = make_probe(skill, str(seed), distance=300).turns[-1]
        assert is_right(last, last.reply), last
        assert not is_right(last, "I cannot say."), last
        assert not is_right(last, last.reply + " [unended]"), last


def test_a_far_probe_is_far() -> None:
    chat = make_probe("recall", "3", distance=6000)
    assert sum(len(turn.user) + len(turn.reply) for turn in chat.turns) > 5000


def test_hand_written_prompts_are_many_and_judge_honestly() -> None:
    prompts = read_prompts()
    assert len(prompts) >= 260
    for prompt in prompts:
        assert prompt.user, prompt
        assert prompt.match, prompt
        assert not prompt.judge(""), prompt
        assert not prompt.judge("Let me think about that."), prompt


def test_hand_written_prompts_are_none_of_the_wordings() -> None:
    wordings = [text for items in (*FACTS.values(), *ASK_SPECIAL.values()) for text in items]
    wordings += [text for items, _ in TALK for text in items] + list(QUESTIONS)
    wordings += [text for topic in TOPICS for text in topic.questions]
    known = {text.lower().rstrip(".!?") for text in wordings}
    alone = [p for p in read_prompts() if len(p.user) == 1 and p.system is None]
    assert not [p.user for p in alone if p.user[0].lower().rstrip(".!?") in known]


def test_hand_written_chats_do_not_occur_in_training() -> None:
    chats = {prompt.user for prompt in read_prompts() if len(prompt.user) > 1}
    for seed in range(300):
        said = {turn.user for turn in make_chat(str(seed), 700).turns}
        assert not any(said >= set(users) for users in chats)


def test_texts_to_explain_are_whole_paragraphs_with_markdown() -> None:
    texts = [text for topic in TOPICS for text in (topic.text, topic.more)]
    assert any("```" in text for text in texts)
    assert sum("**" in text for text in texts) >= len(TOPICS) // 2
    assert all(re.search(r"[.`]$", text) for text in texts)
    assert all(len(topic.text) > 150 for topic in TOPICS)


def test_a_pattern_stands_for_all_its_forms_and_a_loosened_one_counts_once() -> None:
    assert spread(["[Say|Write] it[|, please].", "say it"]) == (
        *("Say it.", "Say it, please.", "Write it.", "Write it, please."),
    )
    assert spread(["{n} ({v}) [sic]"]) == ("{n} ({v}) [sic]",), "no alternatives, no pattern"
    many = "|".join(map(str, range(3 * FORMS_MAX)))
    assert len(spread([f"[{many}]"])) == FORMS_MAX
    assert spread([f"[{many}]"]) == spread([f"[{many}]"])


def test_no_wording_keeps_an_unspread_alternative() -> None:
    lists = [*FACTS.values(), *SYSTEM.values(), *(wordings for wordings, _ in TALK), QUESTIONS]
    lists += [topic.questions for topic in TOPICS]
    assert not [text for items in lists for text in items if re.search(r"[\[\]|]", text)]


def test_ordinary_words_are_spelled_in_training_whatever_their_part() -> None:
    draw = Draw("d")
    spelled = {spell(draw).reply.replace("-", "") for _ in range(30_000)}
    words = {word for word in ORDINARY_WORDS if is_held_out(word)}
    assert len(words & spelled) > 0.9 * len(words)
    names = {name for name in NAMES if is_held_out(name) and name.lower() not in ORDINARY_WORDS}
    assert names
    assert not names & spelled


def test_texts_want_one_reply_each_where_the_chat_does_not_matter() -> None:
    """What can be explained is never answered with small talk or with not knowing."""
    owner: dict[str, set[str]] = {}
    for wordings, reply in TALK:
        for text in wordings:
            owner.setdefault(text.lower().rstrip(".?!"), set()).add(reply)
    for topic in TOPICS:
        asked = [text.format(n=name) for text in GENERAL for name in topic.names]
        for text in (*topic.questions, *asked):
            owner.setdefault(text.lower().rstrip(".?!"), set()).add(topic.text)
    for text in QUESTIONS:
        filled = [text.format(s=s) for s in SUBJECTS] if re.findall("{.}", text) == ["{s}"] else []
        for one in filled or [text]:
            owner.setdefault(one.lower().rstrip(".?!"), set()).add("unknown")
    assert not {text: replies for text, replies in owner.items() if len(replies) > 1}


@pytest.mark.parametrize("owner", ["Anna's", "my sister's"])
def test_facts_of_others_name_their_owner_and_turn_to_the_user(owner: str) -> None:
    draw = Draw(owner)
    pet = next(thing for thing in NAMED_THINGS if thing.name == "cat's name")
    told = owner.replace("my", "your")
    person = told.removesuffix("'s")
    for thing in (*MY_THINGS[1:], pet):
        fact = Fact(owner, thing, thing.value(draw))
        memory = Memory()
        memory.add(fact)
        assert fact.statement().lower().startswith((person.lower(), told.lower())), fact
        assert fact.value in fact.statement()
        for asking in (False, True):
            for _ in range(20):
                assert fact.person.lower() in wording(draw, fact, asking=asking).lower(), fact
    assert Fact(owner, pet, "Rex").statement().endswith("cat is called Rex")
