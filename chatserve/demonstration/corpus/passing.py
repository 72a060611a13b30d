"""Corrections in passing: by pronoun, by the old value, or by the new value alone.

What a correction means must follow from the chat: without a name and without the old value it is
about the fact that was spoken of last, or of several such about the one whose value looks like the
new one: after a name and an age, "sorry, 31" means the age.
"""

from dataclasses import replace

from chatserve.demonstration.corpus import people
from chatserve.demonstration.corpus.draw import Draw, Turn
from chatserve.demonstration.corpus.memory import (
    Fact,
    Memory,
    fill,
    loosen,
    make_fact,
    shape,
    wording,
)
from chatserve.demonstration.corpus.recall import acknowledgement
from chatserve.demonstration.corpus.wordings import PASSING, PASSING_MINE, TOLD_THEN

# Values that people give with an article as often as without.
COUNTED = frozenset(("job", "favourite animal"))
LAST_SHARE = 0.7


def correct_in_passing(draw: Draw, memory: Memory) -> Turn | None:
    """The user corrects a fact without saying which; the chat does."""
    if not memory.facts:
        return None
    last = memory.last_facts()
    old = draw.choice(last) if last and draw.chance(LAST_SHARE) else memory.any_fact(draw)
    fact = renewed(draw, memory, old)
    if fact is None:
        return None
    text = worded(draw, memory, fact, old, is_last=old in last)
    memory.add(fact)
    memory.stale.append(old.value)
    reply = f"Thank you for the correction. {fact.statement()}."
    return Turn(text, reply, "corrected in passing", (fact.value,), memory.rejects(fact))


def renewed(draw: Draw, memory: Memory, old: Fact) -> Fact | None:
    """The fact with another value of the same shape; None where the draw is known already."""
    fact = replace(old, value=old.thing.value(draw))
    if memory.holds(fact.value) or memory.was(fact.value):
        return None
    return fact if shape(fact.value) == shape(old.value) else None


def tell_corrected(draw: Draw, memory: Memory) -> Turn | None:
    """The user tells a fact and corrects it in the same breath."""
    old = make_fact(draw, memory)
    fact = renewed(draw, memory, old)
    if fact is None or fact.value.lower() == old.value.lower():
        return None
    told = wording(draw, old, asking=False)
    memory.being = old.being or memory.being
    text = worded(draw, memory, fact, old, is_last=True)
    memory.add(fact)
    memory.stale.append(old.value)
    said = f"{told if told[-1] in '.!?' else f'{told}.'} {text}"
    return Turn(said, acknowledgement([fact]), "told", (fact.value,), memory.rejects(fact))


def worded(draw: Draw, memory: Memory, fact: Fact, old: Fact, *, is_last: bool) -> str:
    """The correction in one of the ways that this chat allows."""
    kinds = ["versus", "versus"]
    if is_last:
        kinds += ["bare"] * 4
    if fact.owner == "my" and fact.thing.name in PASSING_MINE:
        kinds += ["mine"] * 2
    if memory.being and fact.being == memory.being:
        kinds += ["pronoun"] * 3
    kind = draw.choice(kinds)
    if kind == "pronoun":
        return people.worded(draw, memory, "correct", fact, old.value)
    if kind == "mine":
        return loosen(
            draw, written(draw.pick(PASSING_MINE[fact.thing.name]), fact, old), fact.value
        )
    template = draw.pick(PASSING[kind])
    if fact.thing.name in COUNTED and draw.chance(0.5):
        template = template.replace("{v}", "a {v}").replace("{w}", "a {w}")
    text = written(template, fact, old)
    return loosen(draw, text, text[: len(fact.value)])


def written(template: str, fact: Fact, old: Fact) -> str:
    """A wording with both values filled in, each with its own article."""
    if old.value[0] in "aeiou":
        template = template.replace("a {w}", "an {w}")
    if template.startswith("a {v}") and fact.value[0] in "aeiou":
        template = f"an{template[1:]}"
    text = fill(template, fact, "", old.value)
    return text[0].upper() + text[1:] if template.startswith(("a ", "an ")) else text


def tell_then(draw: Draw, memory: Memory, fact: Fact) -> Turn:
    """The user tells by pronoun what the assistant had to say was not told."""
    text = loosen(draw, fill(draw.pick(TOLD_THEN), fact), fact.value)
    if fact.being and fact.bearer is None and draw.chance(0.5):
        text = people.worded(draw, memory, "tell", fact)
    memory.add(fact)
    return Turn(text, acknowledgement([fact]), "told", (fact.value,))
