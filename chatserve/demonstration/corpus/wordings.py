"""Reads the wording tables that lie beside the package's code as TOML.

A line may be a pattern: "[Say|Write] it[|, please]." stands for its four forms.  Texts that differ
only in capitals and in the closing mark count as one, since users' sentences are loosened in just
these (`memory.loosen`), and a held-out wording must not come into training that way.
"""

import random
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent


def read(name: str) -> dict[str, Any]:
    """One table file."""
    return tomllib.loads((FOLDER / name).read_text(encoding="utf-8"))


ALTERNATIVES = re.compile(r"\[([^\[\]|]*(?:\|[^\[\]|]*)+)\]")
# A pattern with more forms stands for so many of them, lest it crowds out its neighbours.
FORMS_MAX = 40


def forms(text: str) -> list[str]:
    """All forms of a pattern; the text itself where it holds no alternatives."""
    found = ALTERNATIVES.search(text)
    if found is None:
        return [text]
    before, after = text[: found.start()], text[found.end() :]
    return [form for choice in found[1].split("|") for form in forms(before + choice + after)]


def spread(patterns: Iterable[str]) -> tuple[str, ...]:
    """The forms of all patterns, each once."""
    known: dict[str, str] = {}
    for pattern in patterns:
        some = forms(pattern)
        if len(some) > FORMS_MAX:
            some = random.Random(pattern).sample(some, FORMS_MAX)
        for form in some:
            known.setdefault(form.lower().rstrip(".?!"), form)
    return tuple(known.values())


def lists(table: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """A table of lists of strings."""
    return {key: spread(map(str, items)) for key, items in table.items()}


WORDINGS, PROMPTS = read("wordings.toml"), read("system.toml")
FACTS = lists(WORDINGS["facts"])
THINGS = read("things.toml")
TELL_SPECIAL = lists(WORDINGS["tell_special"] | THINGS["tell"])
ASK_SPECIAL = lists(WORDINGS["ask_special"] | THINGS["ask"])
FAVOURITE = lists(THINGS["favourite"])
CALLED = lists(WORDINGS["called"])
CORRECT_SPECIAL = lists(WORDINGS["correct_special"])
CORRECT_NAMED = lists(WORDINGS["correct_named"])["wordings"]
TOGETHER = lists(WORDINGS["together"])["wordings"]
SEVERAL = lists(WORDINGS["several"])
MANNER = lists(WORDINGS["manner"])
CHECK = spread(WORDINGS["check"]["general"])
CHECK_SPECIAL = lists(WORDINGS["check"]["special"])
CHECK_OTHER = lists(WORDINGS["check"]["other"])
# Not `lists`: that there is no lead is listed more than once.
OTHER_LEAD = tuple(str(text) for text in WORDINGS["other"]["lead"])
TELL_OTHER = lists(WORDINGS["other"]["tell"])
ASK_OTHER = lists(WORDINGS["other"]["ask"])
ASK_WHO = lists(WORDINGS["other"]["who"])
SYSTEM = lists(PROMPTS["system"])
SCENES = lists(PROMPTS["scenes"])
GIVEN_SPECIAL = {str(row["thing"]): spread(row["texts"]) for row in PROMPTS["given_special"]}
ASK_OWN_SPECIAL = lists(PROMPTS["own_special"])
LOOK_BACK = lists(PROMPTS["look_back"])
PASSING_TABLE, PEOPLE_TABLE = read("passing.toml")["passing"], read("people.toml")
PASSING = {kind: spread(PASSING_TABLE[kind]) for kind in ("bare", "versus")}
PASSING_MINE = lists(PASSING_TABLE["mine"])
TOLD_THEN = spread(PASSING_TABLE["told_then"]["wordings"])
# By what the user does (tell, ask, correct), then by what is spoken of.
BY_PRONOUN = {kind: lists(PEOPLE_TABLE[kind]) for kind in ("tell", "ask", "correct")}
