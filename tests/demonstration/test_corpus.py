"""The corpus: the same seed makes the same text, and the held-out part stays held out."""

import hashlib
import re
from collections.abc import Sequence
from itertools import pairwise

import pytest

from chatserve.demonstration.corpus import (
    SKILLS,
    Part,
    compose,
    make_chat,
    make_probe,
    people,
    system,
)
from chatserve.demonstration.corpus.draw import SPLIT_LENGTH_MIN, Draw, bare, is_held_out, part_of
from chatserve.demonstration.corpus.explain import GENERAL, TOPICS
from chatserve.demonstration.corpus.facts import (
    MY_THINGS,
    NAMED_THINGS,
    TELLING,
    THE_THINGS,
    anything,
    called,
)
from chatserve.demonstration.corpus.memory import Fact, Memory, fill, make_fact, wording
from chatserve.demonstration.corpus.recall import ask_several, ask_unknown, tell_of_others
from chatserve.demonstration.corpus.talk import QUESTIONS, SUBJECTS, TALK
from chatserve.demonstration.corpus.tasks import COUNT_MAX, TOO_FAR, count, spell
from chatserve.demonstration.corpus.wordings import (
    ASK_OTHER,
    ASK_SPECIAL,
    BY_PRONOUN,
    CORRECT_NAMED,
    FACTS,
    FAVOURITE,
    FORMS_MAX,
    PASSING,
    PASSING_MINE,
    SYSTEM,
    TELL_OTHER,
    TELL_SPECIAL,
    TOLD_THEN,
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
    assert hashlib.sha256(chats.encode()).hexdigest().startswith("1c6ce4e9fbdc0e5a")


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


def drawn_lists() -> set[tuple[str, ...]]:
    """The lists that chats and probes really draw from."""
    part_of.cache_clear()
    seen: set[tuple[str, ...]] = set()

    class Watching(Draw):
        def pick(self, items: Sequence[str]) -> str:
            seen.add(tuple(items))
            return super().pick(items)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compose, "Draw", Watching)
        for number in range(400):
            make_chat(f"lists/{number}", 1500)
    return seen


def test_every_list_that_is_drawn_from_has_a_held_out_part() -> None:
    lists = drawn_lists()
    assert len(lists) > 300
    for items in lists:
        assert len(items) >= SPLIT_LENGTH_MIN, items
        train, held_out = (set(part_of(items, part)) for part in (Part.TRAIN, Part.HELD_OUT))
        assert train, items
        assert held_out, items
        assert train | held_out == set(items)
        assert not train & held_out


def test_a_list_without_a_string_held_out_by_itself_gives_up_one() -> None:
    items = tuple(text for text in map(str, range(100, 200)) if not is_held_out(text))[:6]
    (kept,) = part_of(items, Part.HELD_OUT)
    assert set(part_of(items, Part.TRAIN)) == set(items) - {kept}
    assert part_of(items[:3], Part.HELD_OUT) == part_of(items[:3], Part.TRAIN) == items[:3]


def test_a_wording_held_out_of_one_list_comes_to_training_by_no_other() -> None:
    tables = (FACTS, ASK_SPECIAL, TELL_SPECIAL, FAVOURITE, PASSING, PASSING_MINE, ASK_OTHER)
    tables = (*tables, TELL_OTHER, *BY_PRONOUN.values())
    lists = [items for table in tables for items in table.values()]
    lists += [TOLD_THEN, CORRECT_NAMED]
    both = [
        {text.lower().rstrip(".?!") for items in lists for text in part_of(items, part)}
        for part in (Part.TRAIN, Part.HELD_OUT)
    ]
    assert not both[0] & both[1]


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


def test_every_reply_in_training_is_right_by_its_own_standard() -> None:
    for seed in range(250):
        for turn in make_chat(f"right/{seed}", 1200).turns:
            assert is_right(turn, turn.reply), turn
            assert not is_right(turn, "I cannot say."), turn


def test_a_correction_in_passing_names_nothing_and_changes_what_is_asked_later() -> None:
    named = rejected = 0
    for seed in range(120):
        chat = make_probe("corrected in passing", str(seed), distance=200)
        turns = [turn.skill for turn in chat.turns]
        correction = chat.turns[turns.index("corrected in passing")]
        last = chat.turns[-1]
        assert correction.expect == last.expect
        assert correction.expect[0] in correction.user
        rejected += bool(last.reject)
        assert not any(is_right(last, f"{last.reply} {value}") for value in last.reject)
        thing = re.match(r"(?:Your|The) ([a-z ]+?) is ", last.reply)
        named += thing is not None and thing[1] in correction.user.lower()
    assert named <= 6, "a pronoun with the thing's name is the only way to name it"
    assert rejected > 110, "the old value would be wrong, unless the reply has it in other words"


def test_a_sentence_tells_and_asks_of_one_thing() -> None:
    """Where a text could mean two things, their values must look different."""
    owners: dict[tuple[str, str], set[str]] = {}
    for kind, special in (("tell", TELL_SPECIAL), ("ask", ASK_SPECIAL)):
        for name, texts in special.items():
            for text in texts:
                owners.setdefault((kind, text.lower().rstrip(".?!")), set()).add(name)
        for thing in (*MY_THINGS, *NAMED_THINGS):
            fact = Fact("my", thing, "{v}")
            texts = (*FACTS[kind], *(FACTS[f"{kind}_named"] if fact.bearer else ()))
            for text in texts:
                owners.setdefault((kind, fill(text, fact).lower().rstrip(".?!")), set()).add(
                    thing.name
                )
    several = {text: names for text, names in owners.items() if len(names) > 1}
    assert several == {
        ("tell", "i am {v}"): {"name", "age"},
        ("tell", "i'm {v}"): {"name", "age"},
        ("tell", "i come from {v}"): {"city", "home country"},
    }


def test_values_are_told_apart_by_their_shape_where_several_were_told() -> None:
    memory, things = Memory(), {thing.name: thing for thing in MY_THINGS}
    told = {"name": "Ben", "city": "Oslo", "age": "31", "birthday": "3 May"}
    for name, value in told.items():
        memory.add(Fact("my", things[name], value))
    memory.end_turn()
    assert {fact.thing.name for fact in memory.last_facts()} == {"age", "birthday"}
    memory.mention(memory.facts["my", "city"])
    memory.end_turn()
    assert [fact.value for fact in memory.last_facts()] == ["Oslo"]


def test_a_pronoun_means_whom_the_chat_spoke_of_last() -> None:
    for seed in range(80):
        chat = make_probe("recall by pronoun", str(seed))
        told, asked = chat.turns[-2:]
        assert asked.expect[0] in told.reply
        assert re.search(r"\b(she|he|it|her|his|him|its)\b", asked.user, re.IGNORECASE), asked
        being = re.match(r"(Your [a-z ]+?|\w+)(?:'s| is| lives| works)", asked.reply)
        assert being is not None, asked
        assert being[1].removeprefix("Your ").lower() in told.user.lower(), (told, asked)


def test_what_was_told_of_another_person_betrays_a_mix_up() -> None:
    mixed = 0
    for seed in range(40):
        told, last = make_probe("recall of others", str(seed)).turns[-2:]
        for value in set(told.expect) - set(last.expect):
            assert not is_right(last, f"{last.reply} {value}"), (value, last)
            mixed += 1
    assert mixed > 20


def test_of_several_things_asked_for_none_may_be_wrong() -> None:
    for seed in range(40):
        last = make_probe("recall several", str(seed)).turns[-1]
        clauses = re.split(r", | and ", last.reply)
        for clause in clauses:
            assert not is_right(last, last.reply.replace(clause, "")), (clause, last)


def test_a_being_keeps_its_pronoun() -> None:
    for seed in range(40):
        draw, memory = Draw(f"pronoun/{seed}"), Memory()
        first = people.pronoun(draw, memory, "my cat")
        assert {people.pronoun(draw, memory, "my cat") for _ in range(20)} == {first}
    assert people.pronoun(Draw("s"), Memory(), "my sister") == "she"
    assert people.pronoun(Draw("s"), Memory(), "Peter") == "he"


def test_prompts_in_natural_words_give_the_facts_that_they_tell() -> None:
    for seed in range(200):
        memory = Memory()
        text = system.given_scene(Draw(f"scene/{seed}"), memory)
        assert memory.facts
        assert all(fact.value in text for fact in memory.facts.values()), text
        assert not re.search(r"[{}]", text)


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


@pytest.mark.parametrize("part", Part)
def test_a_sentence_is_drawn_again_until_it_is_of_the_part_as_filled_in(part: Part) -> None:
    texts = [f"What is {n}?" for n in range(100)]
    parts: dict[bool, list[str]] = {False: [], True: []}
    for text in texts:
        parts[is_held_out(bare(text))].append(text)
    mine, others = parts[part is Part.HELD_OUT], parts[part is Part.TRAIN]
    drafts = iter(texts)
    draw = Draw("a", part)
    assert [draw.apart(lambda: next(drafts)) for _ in range(5)] == mine[:5]
    assert bare("What's IT called?") == bare("whats it called")
    assert draw.apart(lambda: others[0]) == others[0], "there is no other"


def test_counts_go_as_far_as_they_say_and_no_farther() -> None:
    draw, farthest = Draw("c"), 0
    for _ in range(3000):
        turn = count(draw)
        asked = [int(text) for text in re.findall(r"\d+", turn.user)]
        if turn.reply == TOO_FAR:
            assert max(asked) > COUNT_MAX
            continue
        numbers = [int(text) for text in turn.reply.split(", ")]
        steps = {after - before for before, after in pairwise(numbers)}
        assert len(steps) == 1, turn
        assert steps <= {1, 2, -1}, turn
        if asked and max(asked) > 2:
            assert max(numbers) == max(asked), turn
        farthest = max(farthest, *numbers)
    assert farthest > 0.9 * COUNT_MAX


def test_things_that_no_list_has_are_told_and_asked_for_by_their_names() -> None:
    draw = Draw("things")
    listed = {thing.name for thing in (*MY_THINGS, *THE_THINGS)}
    seen: set[str] = set()
    for _ in range(300):
        for owner, name in (("the", "The"), ("my", "Your")):
            thing = anything(draw, owner)
            fact = Fact(owner, thing, thing.value(draw))
            seen.add(thing.name)
            told, asked = (wording(draw, fact, asking=asking) for asking in (False, True))
            assert thing.name in listed or thing.name in told.lower(), fact
            assert fact.value in told, fact
            assert thing.name in listed or bare(thing.name) in bare(asked), fact
            assert fact.statement().startswith(f"{name} {thing.name} is "), fact
            if thing.value is called:
                assert "name" in f"{told} {asked} {fact.asked}" or "call" in asked
                assert fact.statement() == f"{name} {thing.name} is called {fact.value}"
    assert len(seen - listed) > 200
    assert {"code", "room", "key"} <= seen


def test_a_name_is_asked_for_as_a_name() -> None:
    draw, memory = Draw("n"), Memory()
    boat = next(
        thing for thing in iter(lambda: anything(draw, "the"), None) if thing.value is called
    )
    memory.add(Fact("the", boat, "Saturn"))
    memory.add(Fact("my", MY_THINGS[1], "red"))
    turn = ask_several(draw, memory)
    assert turn is not None
    assert f"the {boat.name}'s name" in turn.user.lower()
    assert f"the {boat.name} is called Saturn" in f"{turn.reply[0].lower()}{turn.reply[1:]}"
    untold = [ask_unknown(draw, Memory()) for _ in range(400)]
    names = [turn for turn, fact in untold if fact.thing.value is called]
    assert names
    assert all("'s name yet." in turn.reply for turn in names)


def test_only_values_that_training_shows_tell_by_themselves_what_they_are() -> None:
    """ "I love indigo.": whoever never met the word cannot know that it is a colour."""
    draw, alone = Draw("k"), re.compile(r"(?i)i (?:really |just )?(?:love|like) (\w+)\.?")
    found: set[str] = set()
    for _ in range(20_000):
        fact = make_fact(draw, Memory())
        text = alone.fullmatch(wording(draw, fact, asking=False))
        if text is not None and fact.owner == "my":
            assert fact.value in TELLING[fact.thing.name], fact
            assert not is_held_out(fact.value), fact
            found.add(fact.thing.name)
    assert {"favourite colour", "favourite food"} <= found


def test_of_several_people_only_the_first_may_have_a_whole_sentence() -> None:
    draw = Draw("o")
    short = 0
    for _ in range(20_000):
        turn = tell_of_others(draw, Memory())
        assert 1 <= len(turn.expect) <= 4
        assert all(value in turn.user for value in turn.expect), turn
        short += bool(re.search(r"is \d+( years old)?, \w+ \d+ and \w+ \d+\.", turn.user))
    assert short
