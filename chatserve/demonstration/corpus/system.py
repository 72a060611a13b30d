"""System prompts: a name, a persona, facts to use, and ways of speaking."""

from dataclasses import dataclass, field

from chatserve.demonstration.corpus import facts, words
from chatserve.demonstration.corpus.draw import Draw, Turn
from chatserve.demonstration.corpus.recall import Fact, Memory, fill, loosen
from chatserve.demonstration.corpus.talk import UNKNOWN

PLAIN = (
    "You are a helpful assistant.", "You are a friendly assistant.", "You are a helpful chatbot.",
    "You are an assistant. Answer briefly.", "Be helpful.", "You are a useful AI assistant.",
    "Answer the user's questions.", "You are a kind and patient assistant.", "Be brief and polite.",
)  # fmt: skip
NAMED = (
    "You are {n}.", "Your name is {n}.", "You are {n}, a helpful assistant.", "You are called {n}.",
    "You are an assistant called {n}.", "You are an assistant named {n}. Be kind.",
    "Your name is {n}. You are a helpful assistant.", "You are {n}, the assistant of a small shop.",
    "Act as {n}.", "Pretend to be {n}.", "From now on you are {n}.", "You play the role of {n}.",
    "You are a chatbot named {n}.", "The assistant's name is {n}.", "Introduce yourself as {n}.",
)  # fmt: skip
ROLED = (
    "You are {n}, {a} {r}.", "Your name is {n} and you are {a} {r}.", "You are {a} {r} named {n}.",
    "You are {a} {r} called {n}.", "Act as {n}, {a} {r}.", "Pretend to be {a} {r} named {n}.",
    "You play {n}. {n} is {a} {r}.", "You are {n}. You work as {a} {r}.",
)  # fmt: skip
ROLES = (*words.JOBS, "pirate", "wizard", "knight", "robot", "king", "queen", "dragon", "detective")
ASK_NAME = (
    "What is your name?", "What's your name?", "Who are you?", "Tell me your name.", "Your name?",
    "Do you have a name?", "How are you called?", "What are you called?", "Who am I talking to?",
    "Introduce yourself.", "May I ask your name?", "Can you tell me your name?", "who are you",
    "Hello, who are you?", "What should I call you?", "Hi, what's your name?", "Who is this?",
)  # fmt: skip
ASK_ROLE = (
    "What do you do?", "What is your job?", "What are you?", "What do you work as?",
    "What is your profession?", "What do you do for work?", "What kind of character are you?",
    "Tell me what you do.", "What's your job?", "What is your role?",
)  # fmt: skip
OWN_FACT = (
    "Your {t} is {v}.", "Your {t} is {v}. Mention it when asked.", "Remember that your {t} is {v}.",
    "If anyone asks, your {t} is {v}.", "You say that your {t} is {v}.",
)  # fmt: skip
ASK_OWN = (
    "What is your {t}?", "What's your {t}?", "Tell me your {t}.", "Do you have a {t}?",
    "Can you tell me your {t}?", "And your {t}?", "What about your {t}?", "Your {t}, please?",
    "I would like to know your {t}.", "May I know your {t}?",
)  # fmt: skip
GIVEN = (
    "{O} {t} is {v}.", "Remember: {o} {t} is {v}.", "Use this fact: {o} {t} is {v}.",
    "If asked, say that {o} {t} is {v}.", "It is known that {o} {t} is {v}.", "{O} {t}: {v}",
    "Know that {o} {t} is {v}.", "Facts: {o} {t} is {v}.", "Here is what you know: {o} {t} is {v}.",
)  # fmt: skip
END_WITH = (
    "End every reply with {w}", "Always end your reply with: {w}", "Finish each answer with {w}",
    "Close every message with {w}", 'End each of your replies with "{w}"', "Add {w} to every reply.",
)  # fmt: skip
BEGIN_WITH = (
    "Begin every reply with {w}", "Always start your reply with: {w}", "Start each answer with {w}",
    'Begin each of your replies with "{w}"', "Start all messages with {w}", "Open with {w}",
)  # fmt: skip


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
    if kind < 0.5:
        return persona
    sentences: list[str] = []
    if kind < 0.62:
        sentences.append(draw.pick(PLAIN))
    elif kind < 0.78:
        persona.name = facts.full_name(draw)
        sentences.append(draw.wording(NAMED, n=persona.name))
    elif kind < 0.86:
        persona.name, persona.role = facts.full_name(draw), draw.pick(ROLES)
        sentences.append(
            draw.wording(ROLED, n=persona.name, r=persona.role, a=article(persona.role))
        )
    if kind >= 0.86 or draw.chance(0.25):
        for _ in range(draw.integer(1, 3)):
            sentences.append(given_fact(draw, memory))
    if draw.chance(0.2):
        thing = draw.choice([thing for thing in facts.MY_THINGS[1:20] if thing.name != "city"])
        persona.own[thing.name] = thing.value(draw)
        sentences.append(draw.wording(OWN_FACT, t=thing.name, v=persona.own[thing.name]))
    if draw.chance(0.12):
        manner(draw, persona, sentences)
    persona.text = " ".join(sentences)
    return persona


def manner(draw: Draw, persona: Persona, sentences: list[str]) -> None:
    """A word that every reply must begin or end with."""
    mark = draw.letters(3, 7).capitalize() + draw.choice("!.")
    if draw.chance(0.5):
        persona.after = f" {mark}"
        sentences.append(draw.wording(END_WITH, w=mark))
    else:
        persona.before = f"{mark} "
        sentences.append(draw.wording(BEGIN_WITH, w=mark))


def given_fact(draw: Draw, memory: Memory) -> str:
    """A sentence that gives the assistant a fact about the user or the world."""
    while True:
        mine = draw.chance(0.5)
        thing = draw.choice(facts.MY_THINGS if mine else facts.THE_THINGS)
        fact = Fact("my" if mine else "the", thing, thing.value(draw))
        if fact.key not in memory.facts:
            memory.facts[fact.key] = fact
            shown = Fact("the user's" if mine else "the", thing, fact.value)
            return fill(draw.pick(GIVEN), shown, thing.name)


def ask_persona(draw: Draw, persona: Persona) -> Turn | None:
    """A question whose answer only the system prompt holds."""
    if persona.own and draw.chance(0.5):
        thing, value = draw.choice(tuple(persona.own.items()))
        text = loosen(draw, draw.wording(ASK_OWN, t=thing))
        return Turn(text, f"My {thing} is {value}.", "persona", (value,))
    if persona.role is not None and draw.chance(0.5):
        reply = f"I am {article(persona.role)} {persona.role}."
        return Turn(loosen(draw, draw.pick(ASK_ROLE)), reply, "persona", (persona.role,))
    if persona.name is not None:
        reply = f"My name is {persona.name}."
        return Turn(loosen(draw, draw.pick(ASK_NAME)), reply, "persona", (persona.name,))
    return None


def ask_own_unknown(draw: Draw) -> Turn:
    """A question about the model itself that nothing answers."""
    thing = draw.choice(facts.MY_THINGS[1:12])
    return Turn(draw.wording(ASK_OWN, t=thing.name), UNKNOWN, "unknown")
