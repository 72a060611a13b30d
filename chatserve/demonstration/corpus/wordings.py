"""Reads the wording tables that lie beside the package's code as TOML."""

import tomllib
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent


def read(name: str) -> dict[str, Any]:
    """One table file."""
    return tomllib.loads((FOLDER / name).read_text(encoding="utf-8"))


def lists(table: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """A table of lists of strings."""
    return {key: tuple(str(item) for item in items) for key, items in table.items()}


WORDINGS = read("wordings.toml")
FACTS = lists(WORDINGS["facts"])
TELL_SPECIAL = lists(WORDINGS["tell_special"])
ASK_SPECIAL = lists(WORDINGS["ask_special"])
CORRECT_SPECIAL = lists(WORDINGS["correct_special"])
CORRECT_NAMED = lists(WORDINGS["correct_named"])["wordings"]
GIVEN_SPECIAL = tuple(
    (str(row["thing"]), str(row["text"])) for row in WORDINGS["system"].pop("given_special")
)
SYSTEM = lists(WORDINGS["system"])
LOOK_BACK = lists(WORDINGS["look_back"])
MANNER = lists(WORDINGS["manner"])
TOGETHER = lists(WORDINGS["together"])["wordings"]
OTHER_LEAD = tuple(str(text) for text in WORDINGS["other"]["lead"])


def of_others(kind: str, thing: str) -> tuple[str, ...]:
    """How the given thing is told of another person, or asked for."""
    return tuple(str(row["text"]) for row in WORDINGS["other"][kind] if row["thing"] == thing)
