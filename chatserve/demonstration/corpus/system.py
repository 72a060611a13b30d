"""System prompts: a name, a persona, facts to use, and ways of speaking."""

import re
from dataclasses import dataclass, field, replace

from chatserve.demonstration.corpus import facts, words
from chatserve.demonstration.corpus.draw import Draw, Turn
from chatserve.demonstration.corpus.memory import Fact, Memory, fill, loosen, place_of
from chatserve.demonstration.corpus.talk import UNKNOWN
from chatserve.demonstration.corpus.tasks import ODD_WORDS, adjective
from chatserve.demonstration.corpus.wordings import (
    ASK_OWN_SPECIAL,
    GIVEN_SPECIAL,
    PROMPTS,
    SCENES,
    SYSTEM,
    TELL_SPECIAL,
)

# Where it lives is asked in too many ways that small talk answers; a role says what its job is.
OWN_THINGS = tuple(thing for thing in facts.MY_THINGS[1:20] if thing.name != "city")
OWN_BESIDE_ROLE = tuple(thing for thing in OWN_THINGS if thing.name != "job")
# As they stand in the file: two may differ in nothing but the closing sign.
MARKS = tuple(str(mark) for mark in PROMPTS["system"]["marks"])
ROLES = (*words.JOBS, "pirate", "wizard", "knight", "robot", "king", "queen", "dragon", "detective")


MY_BY_NAME = {thing.name: thing for thing in facts.MY_THINGS}
THE_BY_NAME = {thing.name: thing for thing in facts.THE_THINGS}
PLACEHOLDER = re.compile(r"{(\w+)}")


@dataclass
class Persona:
    """What the system prompt makes of the assistant in one chat."""

    text: str | None = None
    name: str | None = None
    role: str | None = None
    own: dict[str, str] = field(default_factory=dict[str, str])
    before: str = ""
    after: str = ""

    def speak(self, reply: str) -> str:
        """A reply with the opening and closing words that the system prompt asks for."""
        return f"{self.before}{reply}{self.after}"


def article(noun: str) -> str:
    """'a' or 'an'."""
    return "an" if noun[0] in "aeiou" else "a"


def make_persona(draw: Draw, memory: Memory) -> Persona:
    """A system prompt, or none; facts given in it go into the memory."""
    persona = Persona()
    kind = draw.random.random()
    if kind < 0.36:
        return persona
    sentences: list[str] = []
    if kind < 0.44:
        sentences.append(draw.pick(SYSTEM["plain"]))
    elif kind < 0.62:
        persona.name = facts.full_name(draw)
        sentences.append(draw.wording(SYSTEM["named"], n=persona.name))
    elif kind < 0.77:
        persona.role = make_role(draw)
        persona.name = facts.full_name(draw) if draw.chance(0.7) else None
        form = "roled" if persona.name else "roled_only"
        values = {"n": persona.name, "r": persona.role, "a": article(persona.role)}
        sentences.append(draw.wording(SYSTEM[form], **values))
    if kind >= 0.77 or draw.chance(0.33):
        for _ in range(draw.integer(1, 4)):
            given = given_scene if draw.chance(0.45) else given_fact
            sentences.append(given(draw, memory))
    if draw.chance(0.25):
        thing = draw.choice(OWN_THINGS if persona.role is None else OWN_BESIDE_ROLE)
        persona.own[thing.name] = thing.value(draw)
        sentences.append(draw.wording(SYSTEM["own_fact"], t=thing.name, v=persona.own[thing.name]))
    for _ in range(draw.choice((0, 0, 0, 1, 2))):
        sentences.append(draw.pick(SYSTEM["aside"]))
    if draw.chance(0.36):
        closing = draw.chance(0.5)
        manner(draw, persona, sentences, closing=closing)
        if draw.chance(0.12):
            manner(draw, persona, sentences, closing=not closing)
    if draw.chance(0.3):
        draw.random.shuffle(sentences)
    # Where no mark ends a sentence, the line does.
    ended = [text + (" " if text[-1] in '.!?"' else "\n") for text in sentences]
    persona.text = "".join(ended).rstrip()
    memory.mentioned.clear()
    return persona


def make_role(draw: Draw) -> str:
    """What the assistant plays: a trade or a figure, or any word, often with an adjective."""
    kind = draw.random.random()
    role = draw.letters(4, 8) if kind < 0.25 else draw.pick(words.COMMON_WORDS)
    if kind < 0.7:
        role = role if kind < 0.25 else draw.pick(ROLES)
    return f"{adjective(draw)} {role}" if draw.chance(0.4) else role


def make_mark(draw: Draw) -> str:
    """What replies begin or end with: one of the usual marks, or one to three words of any kind."""
    if draw.chance(0.3):
        return draw.pick(MARKS)
    many = draw.choice((1, 1, 1, 1, 2, 2, 3))
    parts = [
        draw.letters(3, 8) if draw.chance(0.6) else draw.pick(words.COMMON_WORDS)
        for _ in range(many)
    ]
    if draw.chance(0.06):
        parts[-1] = draw.choice(ODD_WORDS)
    if draw.chance(0.08):
        parts.append(draw.number(3))
    mark = " ".join(parts)
    mark = mark.upper() if draw.chance(0.08) else mark
    mark = mark[0].upper() + mark[1:] if draw.chance(0.75) else mark
    return mark + draw.choice(("!", ".", "!", ".", "?", ",", "", ""))


def manner(draw: Draw, persona: Persona, sentences: list[str], *, closing: bool) -> None:
    """A mark that every reply must begin or end with."""
    mark = make_mark(draw)
    template = draw.pick(SYSTEM["end_with" if closing else "begin_with"])
    if mark[-1].isalnum() and template.endswith("{w}"):
        # Unquoted, what comes next in the prompt would read on from the mark.
        template = template.replace("{w}", '"{w}".')
    sentences.append(template.format(w=mark))
    if closing:
        persona.after = f" {mark}"
    else:
        persona.before = f"{mark} "


def given_fact(draw: Draw, memory: Memory) -> str:
    """A sentence that gives the assistant a fact about the user or the world."""
    while True:
        if draw.chance(0.25):
            about = draw.choice(tuple(GIVEN_SPECIAL))
            (thing,) = (thing for thing in facts.MY_THINGS if thing.name == about)
            fact = Fact("my", thing, thing.value(draw))
            if fact.key not in memory.facts:
                memory.add(fact)
                return fill(draw.pick(GIVEN_SPECIAL[about]), fact)
        mine = draw.chance(0.5)
        thing = draw.choice(facts.MY_THINGS if mine else facts.THE_THINGS)
        fact = Fact("my" if mine else "the", thing, thing.value(draw))
        if fact.key not in memory.facts and not memory.holds(fact.value):
            if thing.name in facts.OPENING_HOURS:
                fact = replace(fact, place=place_of(draw, memory))
            memory.add(fact)
            shown = replace(fact, owner="the user's" if mine else "the")
            own = () if mine else TELL_SPECIAL.get(thing.name, ())
            template = draw.pick(own if own and draw.chance(0.5) else SYSTEM["given"])
            if thing.name in facts.OPENING_HOURS:
                template = template.replace("shop", fact.place)
            return fill(template, shown, thing.name)


def given_scene(draw: Draw, memory: Memory) -> str:
    """A few words about the user or a place, as people write prompts, with one to three facts."""
    about = draw.choice(("about_places", "about_places", "about_users"))
    owner, things = ("my", MY_BY_NAME) if about == "about_users" else ("the", THE_BY_NAME)
    template = draw.pick(SCENES[about])
    place = place_of(draw, memory)
    names = [name for name in PLACEHOLDER.findall(template) if name != "P"]
    given: dict[str, Fact] = {}
    for name in names:
        thing = things[name.replace("_", " ")]
        given[name] = Fact(owner, thing, thing.value(draw), place)
    values = [fact.value.lower() for fact in given.values()]
    known = any(fact.key in memory.facts or memory.holds(fact.value) for fact in given.values())
    if known or len(set(values)) < len(values):
        return given_fact(draw, memory)
    for fact in given.values():
        memory.add(fact)
    if "job" in given and given["job"].value[0] in "aeiou":
        template = template.replace(" a {job}", " an {job}")
    return template.format(P=place, **{name: fact.value for name, fact in given.items()})


def ask_persona(draw: Draw, persona: Persona) -> Turn | None:
    """A question whose answer only the system prompt holds."""
    if persona.own and draw.chance(0.5):
        thing, value = draw.choice(tuple(persona.own.items()))
        text = loosen(draw, ask_own(draw, thing))
        return Turn(text, f"My {thing} is {value}.", "persona", (value,))
    if persona.role is not None and (persona.name is None or draw.chance(0.5)):
        reply = f"I am {article(persona.role)} {persona.role}."
        return Turn(loosen(draw, draw.pick(SYSTEM["ask_role"])), reply, "persona", (persona.role,))
    if persona.name is not None:
        reply = f"My name is {persona.name}."
        if persona.role is not None:
            reply += f" I am {article(persona.role)} {persona.role}."
        return Turn(loosen(draw, draw.pick(SYSTEM["ask_name"])), reply, "persona", (persona.name,))
    return None


def ask_own_unknown(draw: Draw) -> Turn:
    """A question about the model itself that nothing answers."""
    thing = draw.choice(facts.MY_THINGS[1:12])
    return Turn(loosen(draw, ask_own(draw, thing.name)), UNKNOWN, "unknown")


def ask_own(draw: Draw, thing: str) -> str:
    """A question for something that the assistant may have itself."""
    special = ASK_OWN_SPECIAL.get(thing, ())
    if special and draw.chance(0.3):
        return draw.pick(special)
    return draw.wording(SYSTEM["ask_own"], t=thing)
