"""System prompts: a name, a persona, facts to use, and ways of speaking."""

from dataclasses import dataclass, field

from chatserve.demonstration.corpus import facts, words
from chatserve.demonstration.corpus.draw import Draw, Turn
from chatserve.demonstration.corpus.memory import Fact, Memory, fill, loosen
from chatserve.demonstration.corpus.talk import UNKNOWN
from chatserve.demonstration.corpus.wordings import GIVEN_SPECIAL, SYSTEM, TELL_SPECIAL

ROLES = (*words.JOBS, "pirate", "wizard", "knight", "robot", "king", "queen", "dragon", "detective")


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
    if kind < 0.4:
        return persona
    sentences: list[str] = []
    if kind < 0.5:
        sentences.append(draw.pick(SYSTEM["plain"]))
    elif kind < 0.68:
        persona.name = facts.full_name(draw)
        sentences.append(draw.wording(SYSTEM["named"], n=persona.name))
    elif kind < 0.8:
        persona.role = draw.pick(ROLES)
        if draw.chance(0.3):
            persona.role = f"{draw.pick(words.ADJECTIVES)} {persona.role}"
        persona.name = facts.full_name(draw) if draw.chance(0.7) else None
        form = "roled" if persona.name else "roled_only"
        values = {"n": persona.name, "r": persona.role, "a": article(persona.role)}
        sentences.append(draw.wording(SYSTEM[form], **values))
    if kind >= 0.8 or draw.chance(0.3):
        for _ in range(draw.integer(1, 4)):
            sentences.append(given_fact(draw, memory))
    if draw.chance(0.25):
        thing = draw.choice([thing for thing in facts.MY_THINGS[1:20] if thing.name != "city"])
        persona.own[thing.name] = thing.value(draw)
        sentences.append(draw.wording(SYSTEM["own_fact"], t=thing.name, v=persona.own[thing.name]))
    if draw.chance(0.22):
        manner(draw, persona, sentences)
    if draw.chance(0.3):
        draw.random.shuffle(sentences)
    persona.text = " ".join(sentences)
    return persona


def manner(draw: Draw, persona: Persona, sentences: list[str]) -> None:
    """A word that every reply must begin or end with."""
    mark = draw.pick(SYSTEM["marks"])
    if draw.chance(0.5):
        mark = draw.letters(3, 7) if draw.chance(0.6) else draw.pick(words.COMMON_WORDS)
        mark = mark.capitalize() + draw.choice("!.")
    if draw.chance(0.5):
        persona.after = f" {mark}"
        sentences.append(draw.wording(SYSTEM["end_with"], w=mark))
    else:
        persona.before = f"{mark} "
        sentences.append(draw.wording(SYSTEM["begin_with"], w=mark))


def given_fact(draw: Draw, memory: Memory) -> str:
    """A sentence that gives the assistant a fact about the user or the world."""
    while True:
        if draw.chance(0.25):
            about, template = draw.choice(GIVEN_SPECIAL)
            (thing,) = (thing for thing in facts.MY_THINGS if thing.name == about)
            fact = Fact("my", thing, thing.value(draw))
            if draw.allowed(template) and fact.key not in memory.facts:
                memory.add(fact)
                return fill(template, fact)
        mine = draw.chance(0.5)
        thing = draw.choice(facts.MY_THINGS if mine else facts.THE_THINGS)
        fact = Fact("my" if mine else "the", thing, thing.value(draw))
        if fact.key not in memory.facts:
            memory.add(fact)
            shown = Fact("the user's" if mine else "the", thing, fact.value)
            own = () if mine else TELL_SPECIAL.get(thing.name, ())
            wordings = own if own and draw.chance(0.5) else SYSTEM["given"]
            return fill(draw.pick(wordings), shown, thing.name)


def ask_persona(draw: Draw, persona: Persona) -> Turn | None:
    """A question whose answer only the system prompt holds."""
    if persona.own and draw.chance(0.5):
        thing, value = draw.choice(tuple(persona.own.items()))
        text = loosen(draw, draw.wording(SYSTEM["ask_own"], t=thing))
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
    return Turn(draw.wording(SYSTEM["ask_own"], t=thing.name), UNKNOWN, "unknown")
