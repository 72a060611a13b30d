"""Small slips in what users say, so that no exact wording has to be met.

Word-level noise ("easy data augmentation", Wei and Zou 2019, arXiv 1901.11196): words of no weight
are left out, words that mean nothing here come in, letters change places.  A list has tens of
wordings and people have thousands; a model that has met a wording only whole takes the next one for
something else.  What a reply depends on is never touched: the caller names those words.
"""

from collections.abc import Iterable

from chatserve.demonstration.corpus import words
from chatserve.demonstration.corpus.draw import Draw

SHARE = 0.35
EDITS_MAX = 3
TYPO_LENGTH_MIN = 4
# Words that most sentences can lose; never a negation, an owner, or what tells two tasks apart.
LIGHT = frozenset(
    words.listed(
        """please can could would will you me tell that do does is are was be the a an of for at
        in again now then so and it it's its this there here what what's which just still also
        have has had did i i'd know remember well hello hi okay"""
    )
)
NOT_ADDED = frozenset(("never", "right", *words.NUMBER_WORDS))
ADDED = tuple(
    word
    for word in (*sorted(LIGHT), *words.COMMON_WORDS, *words.ADJECTIVES)
    if word not in NOT_ADDED
)
SIGNS = ".,:;?!()"


def core(word: str) -> str:
    """A word without signs, capitals and the ending of the genitive."""
    return word.strip(SIGNS).lower().removesuffix("'s")


def cores(texts: Iterable[str]) -> frozenset[str]:
    """The words of some texts."""
    return frozenset(core(word) for text in texts for word in text.split())


def roughened(draw: Draw, text: str, kept: frozenset[str]) -> str:
    """The text with a few slips, or as it is; `kept` holds the words (as `core`) that must stay."""
    if not draw.chance(SHARE):
        return text
    parts = text.split(" ")
    for _ in range(draw.integer(1, EDITS_MAX)):
        free = [core(word).isalpha() and core(word) not in kept for word in parts]
        kind = draw.random.random()
        if kind < 0.4:
            places = [at for at, is_free in enumerate(free) if is_free and (not at or free[at - 1])]
            if places:
                parts.insert(draw.choice(places), draw.choice(ADDED))
        elif kind < 0.7:
            light = [at for at, word in enumerate(parts) if free[at] and core(word) in LIGHT]
            if light and len(parts) > 2:
                del parts[draw.choice(light)]
        else:
            long = [
                at
                for at, word in enumerate(parts)
                if free[at] and len(word) >= TYPO_LENGTH_MIN and word.isalpha()
            ]
            if long:
                at = draw.choice(long)
                parts[at] = mistyped(draw, parts[at])
    return " ".join(parts)


def mistyped(draw: Draw, word: str) -> str:
    """The word with two letters in each other's place, a letter missing, or one twice."""
    at = draw.integer(1, len(word) - 2)
    kind = draw.integer(0, 2)
    if kind == 0:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[:at] + (word[at + 1 :] if kind == 1 else word[at] + word[at:])
