"""People and pets, spoken of by pronoun: told about, asked for and corrected.

Theory of operation: `Memory.being` is whom the chat spoke of last ("my sister", "Anna"), where that
is one only; a pronoun means that being.  Which pronoun it has is drawn once and kept for the chat,
where the word or the name does not decide it.
"""

from chatserve.demonstration.corpus import facts, words
from chatserve.demonstration.corpus.draw import Draw, Turn
from chatserve.demonstration.corpus.facts import Thing
from chatserve.demonstration.corpus.memory import (
    Fact,
    Memory,
    capital,
    fill,
    loosen,
    wording,
)
from chatserve.demonstration.corpus.recall import acknowledgement
from chatserve.demonstration.corpus.wordings import BY_PRONOUN

# Of each pronoun: its form in "her name", and in "we call her".
PRONOUNS = {"she": ("her", "her"), "he": ("his", "him"), "it": ("its", "it")}
SHE = frozenset(
    words.listed("sister mother wife daughter aunt grandmother niece cow") + words.NAMES_OF_WOMEN
)
HE = frozenset(
    words.listed("brother father husband son uncle grandfather grandson nephew")
    + tuple(name for name in words.NAMES if name not in words.NAMES_OF_WOMEN)
).difference(words.NAMES_OF_BOTH)
BY_NAME = {thing.name: thing for thing in facts.MY_THINGS}
PEOPLES_THINGS = tuple(
    BY_NAME[name]
    for name in (
        *("age", "age", "city", "city", "job", "job", "hobby", "birthday", "favourite colour"),
        *("favourite food", "favourite drink", "lucky number", "shoe size", "favourite animal"),
        *("favourite song", "phone number", "room number", "nickname", "hair colour"),
    )
)
PETS_THINGS = tuple(
    BY_NAME[name]
    for name in ("age", "age", "favourite food", "favourite toy", "birthday", "eye colour")
)


def is_pet(being: str) -> bool:
    """Whether a being is a pet of the user's."""
    return being.removeprefix("my ") in facts.PETS


def pronoun(draw: Draw, memory: Memory, being: str) -> str:
    """Which pronoun a being has in this chat."""
    word = being.removeprefix("my ")
    if word in SHE or word in HE:
        return "she" if word in SHE else "he"
    some = ("she", "he", "it") if is_pet(being) else ("she", "he")
    return memory.pronouns.setdefault(being, draw.choice(some))


def things_of(being: str) -> tuple[Thing, ...]:
    """What can be told of a being, besides its name."""
    return PETS_THINGS if is_pet(being) else PEOPLES_THINGS


def name_of(draw: Draw, being: str) -> Fact | None:
    """A drawn name for one of the user's own; whoever is spoken of by name has it already."""
    if not being.startswith("my "):
        return None
    name = f"{being.removeprefix('my ')}'s name"
    thing = next(thing for thing in facts.NAMED_THINGS if thing.name == name)
    return Fact("my", thing, thing.value(draw))


def worded(draw: Draw, memory: Memory, kind: str, fact: Fact, was: str = "") -> str:
    """A sentence of `people.toml` about a fact of the being last spoken of."""
    subject = pronoun(draw, memory, fact.being)
    whose, whom = PRONOUNS[subject]
    about = "name" if fact.bearer is not None else fact.thing.name
    table = BY_PRONOUN[kind]
    special = table.get(about, ())
    named = fact.bearer is not None
    own = special if special and (named or draw.chance(0.75)) else table["general"]

    def write() -> str:
        template = draw.pick(own)
        for place, word in (("s", subject), ("h", whose), ("m", whom)):
            template = template.replace(f"{{{place}}}", word)
            template = template.replace(f"{{{place.upper()}}}", capital(word))
        return loosen(draw, fill(template, fact, "", was), fact.value)

    return draw.apart(write) if kind == "ask" else write()


def new_fact(draw: Draw, memory: Memory, being: str, *, name_share: float = 0.25) -> Fact | None:
    """A fact about a being that this chat does not know yet; None where the draw was known."""
    named = name_of(draw, being)
    if named is not None and draw.chance(name_share):
        fact = named
    else:
        thing = draw.choice(things_of(being))
        fact = Fact(f"{being}'s", thing, thing.value(draw))
    return None if fact.key in memory.facts or memory.holds(fact.value) else fact


def tell_about(draw: Draw, memory: Memory) -> Turn | None:
    """The user tells something of a person or a pet, and more in the same message by pronoun."""
    kind = draw.random.random()
    being = (
        f"my {draw.choice(facts.PETS)}"
        if kind < 0.35
        else f"my {draw.choice(facts.PEOPLE)}"
        if kind < 0.75
        else facts.person(draw)
    )
    first = new_fact(draw, memory, being, name_share=0.7)
    if first is None:
        return None
    memory.add(first)
    told, sentences = [first], [wording(draw, first, asking=False)]
    if is_pet(being) and first.bearer is not None and draw.chance(0.3):
        opening = draw.choice(("I have a {b}.", "We have a {b}.", "I got a {b}.", "We got a {b}."))
        sentences = [fill(opening, first), worded(draw, memory, "tell", first)]
    for _ in range(draw.choice((0, 1, 1, 2, 3))):
        more = new_fact(draw, memory, being)
        if more is not None:
            memory.add(more)
            told.append(more)
            sentences.append(worded(draw, memory, "tell", more))
    text = " ".join(part if part[-1] in ".!?" else f"{part}." for part in sentences)
    skill = "told" if len(told) == 1 else "told several"
    return Turn(text, acknowledgement(told), skill, tuple(fact.value for fact in told))


def tell_on(draw: Draw, memory: Memory) -> Turn | None:
    """The user tells one more thing of the being last spoken of, by pronoun."""
    fact = new_fact(draw, memory, memory.being) if memory.being else None
    if fact is None:
        return None
    text = worded(draw, memory, "tell", fact)
    memory.add(fact)
    return Turn(text, acknowledgement([fact]), "told", (fact.value,))


def ask_about(draw: Draw, memory: Memory) -> Turn | None:
    """The user asks by pronoun for a fact of the being last spoken of."""
    known = [fact for fact in memory.facts.values() if memory.being and fact.being == memory.being]
    if not known:
        return None
    fact = draw.choice(known)
    text = worded(draw, memory, "ask", fact)
    memory.mention(fact)
    return Turn(text, f"{fact.statement()}.", "recall", (fact.value,), memory.rejects(fact))


def ask_about_unknown(draw: Draw, memory: Memory) -> Turn | None:
    """The user asks by pronoun for something that was not told of the being."""
    fact = new_fact(draw, memory, memory.being) if memory.being else None
    if fact is None:
        return None
    text = worded(draw, memory, "ask", fact)
    memory.subjects = ()
    reply = f"You have not told me {fact.owner_told} {fact.thing.name} yet."
    return Turn(text, reply, "not told")
