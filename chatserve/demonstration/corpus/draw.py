"""Seeded draws from word and wording lists, split into a training part and a held-out part.

Theory of operation: every string belongs to exactly one part, decided by a checksum of the string
itself, so the split needs no stored lists and cannot drift: a `Draw` of the part TRAIN never
picks a string of HELD_OUT and the reverse.  Of a list that would have no held-out part that way,
the string with the lowest checksum is held out; only lists of fewer than four strings have none,
and both parts draw from all of them.  Nor are dates, times, ages and numbers of one or two digits
split.  The text that the model must produce is never split, only what users write and the values
they tell.  A pattern filled in may equal a sentence of another pattern: `apart` splits those
sentences too, where they are short enough for that to happen.
"""

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import TypeVar

from chatserve.demonstration.corpus.words import COMMON_WORDS

Item = TypeVar("Item")

HELD_OUT_ONE_IN = 8
SPLIT_LENGTH_MIN = 4
# So many drafts of a sentence may turn out to be of the other part.
DRAFTS_MAX = 60


class Part(Enum):
    """Which side of the split a draw may see."""

    TRAIN = "train"
    HELD_OUT = "held out"


@dataclass(frozen=True)
class Turn:
    """One exchange, the skill it belongs to, and how a reply is judged.

    With `expect` empty a reply must equal `reply`; otherwise it must contain every string of
    `expect` and none of `reject`.
    """

    user: str
    reply: str
    skill: str
    expect: tuple[str, ...] = ()
    reject: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chat:
    """A whole conversation: an optional system prompt and its turns in order."""

    system: str | None
    turns: tuple[Turn, ...]

    def messages(self) -> list[dict[str, str]]:
        """The chat in the form that chat templates take."""
        rows = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in self.turns:
            rows.append({"role": "user", "content": turn.user})
            rows.append({"role": "assistant", "content": turn.reply})
        return rows


def checksum(text: str) -> int:
    """What decides the part of a string; capitals do not matter."""
    return zlib.crc32(text.lower().encode())


def is_held_out(text: str) -> bool:
    """Whether a string belongs to the held-out part by itself, whatever list it stands in."""
    return checksum(text) % HELD_OUT_ONE_IN == 0


def bare(text: str) -> str:
    """A sentence without what users leave out or change freely."""
    return text.lower().replace("'", "").strip(" .?!")


@lru_cache(maxsize=4096)
def part_of(items: tuple[str, ...], part: Part) -> tuple[str, ...]:
    """The strings that a part may see: all of a short list."""
    if len(items) < SPLIT_LENGTH_MIN:
        return items
    kept = frozenset(filter(is_held_out, items)) or {min(items, key=checksum)}
    return tuple(item for item in items if (item in kept) == (part is Part.HELD_OUT))


class Draw:
    """A random source bound to one part of the split."""

    def __init__(self, seed: str, part: Part = Part.TRAIN) -> None:
        self.random = random.Random(f"{part.value}/{seed}")
        self.part = part

    def allowed(self, text: str) -> bool:
        """Whether this draw may yield the string."""
        return is_held_out(text) == (self.part is Part.HELD_OUT)

    def apart(self, write: Callable[[], str]) -> str:
        """What `write` draws, again until the whole sentence belongs to this draw's part.

        Of the held-out part the last draft is taken where all belong to the other, as they may
        where a fact is asked for in few ways.
        """
        text = write()
        for _ in range(DRAFTS_MAX):
            if self.allowed(bare(text)):
                break
            text = write()
        return text

    def pick(self, items: Sequence[str]) -> str:
        """One string of the list, from this draw's part of it."""
        return self.random.choice(part_of(tuple(items), self.part))

    def wording(self, templates: Sequence[str], **values: object) -> str:
        """A template from this draw's part, with its places filled in."""
        return self.pick(templates).format(**values)

    def choice(self, items: Sequence[Item]) -> Item:
        """One item of the list, whatever the part."""
        return self.random.choice(items)

    def sample(self, items: Sequence[str], count: int) -> list[str]:
        """Several different strings; the order is drawn, the strings are not split."""
        return self.random.sample(list(items), min(count, len(items)))

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.random.random() < probability

    def integer(self, low: int, high: int) -> int:
        """A whole number between both ends, both included."""
        return self.random.randint(low, high)

    def number(self, digits_max: int = 5) -> str:
        """A number as text, of one to `digits_max` digits, from this draw's part."""
        while True:
            digits = self.integer(1, digits_max)
            text = str(self.integer(10 ** (digits - 1), 10**digits - 1))
            if len(text) < 3 or self.allowed(text):
                return text

    def letters(self, low: int, high: int) -> str:
        """An invented, pronounceable lower-case word of this draw's part."""
        while True:
            syllables = self.integer(1, 3 if high < LONG_WORD else 4)
            word = "".join(self.syllable() for _ in range(syllables))
            if self.chance(SPLICED_SHARE):
                word = self.spliced()
            if self.chance(ACCENTED_SHARE):
                word = word.translate(self.choice(ACCENTS))
            if low <= len(word) <= high and self.allowed(word):
                return word

    def spliced(self) -> str:
        """The beginning of one ordinary word and the end of another: pieces that words have."""
        first, last = self.choice(COMMON_WORDS), self.choice(COMMON_WORDS)
        return first[: self.integer(1, 4)] + last[-self.integer(2, 5) :]

    def syllable(self) -> str:
        """Consonants, a vowel, and now and then a closing consonant."""
        onset = self.random.choice(ONSETS)
        vowel = self.random.choice(VOWELS)
        return onset + vowel + (self.random.choice(CODAS) if self.chance(0.4) else "")


ACCENTED_SHARE = 0.04
SPLICED_SHARE = 0.35
LONG_WORD = 10
ACCENTS = (
    str.maketrans("aoue", "äöüé"),
    str.maketrans("aeioc", "áéíóç"),
    str.maketrans("aslzo", "ąśłżó"),
    str.maketrans("aoie", "åøîê"),
)
ONSETS = (
    *"bcdfghjklmnprstvwyz",
    *("br", "ch", "dr", "fl", "gr", "kl", "pr", "qu", "sh", "sk", "st", "th", "tr", "zh", ""),
)
VOWELS = (*"aaeeiioouuy", "ai", "ea", "ee", "ia", "io", "oa", "oo", "ou")
CODAS = (*"bdgklmnprstxz", "ck", "ld", "ll", "nd", "ng", "nt", "rk", "rn", "ss", "st", "th")
