"""Telling, correcting and recalling facts: the heart of the corpus.

A `Memory` holds what was told in one chat, in order.  Each function makes one turn, reads or
changes the memory, and states in `expect` and `reject` what a right reply contains.
"""

from dataclasses import dataclass, field

from chatserve.demonstration.corpus import facts
from chatserve.demonstration.corpus.draw import Draw, Turn
from chatserve.demonstration.corpus.facts import Thing

SUMMARY_LENGTH_MAX = 4


@dataclass(frozen=True)
class Fact:
    """One thing known of one owner."""

    owner: str
    thing: Thing
    value: str

    @property
    def key(self) -> tuple[str, str]:
        """What the fact is about."""
        return (self.owner, self.thing.name)

    @property
    def bearer(self) -> str | None:
        """The bearer of a name ("dog"), where the thing is one's name."""
        return facts.BEARER_OF.get(self.thing.name) if self.owner == "my" else None

    def statement(self) -> str:
        """The fact as the assistant says it, without the closing full stop."""
        owner = {"my": "Your", "the": "The"}.get(self.owner, self.owner)
        if self.owner == "my" and self.thing.name in facts.REPLY_SPECIAL:
            return facts.REPLY_SPECIAL[self.thing.name].format(v=self.value).rstrip(".")
        if self.bearer is not None:
            return f"{owner} {self.bearer} is called {self.value}"
        return f"{owner} {self.thing.name} is {self.value}"

    def clause(self) -> str:
        """The statement as it stands inside a sentence."""
        text = self.statement()
        return text[0].lower() + text[1:] if self.owner in ("my", "the") else text


@dataclass
class Memory:
    """What the user told in this chat, oldest first, and the values that no longer hold."""

    facts: dict[tuple[str, str], Fact] = field(default_factory=dict[tuple[str, str], Fact])
    stale: list[str] = field(default_factory=list[str])

    def rejects(self, fact: Fact) -> tuple[str, ...]:
        """Values that would betray a mix-up: of the same thing elsewhere, or corrected ones."""
        same = [
            other.value
            for key, other in self.facts.items()
            if key != fact.key and other.thing.value is fact.thing.value
        ]
        return tuple(value for value in (*same, *self.stale) if value not in fact.statement())


def fill(template: str, fact: Fact, thing_name: str, was: str = "") -> str:
    """Write a user's wording out."""
    owner = fact.owner
    text = template.replace(" a {v}", " an {v}") if fact.value[0] in "aeiou" else template
    return text.format(
        o=owner,
        O=owner[0].upper() + owner[1:],
        t=thing_name,
        b=fact.bearer or "",
        v=fact.value,
        w=was,
    )


def wording(draw: Draw, fact: Fact, *, asking: bool) -> str:
    """A user's sentence that tells the fact, or asks for it."""
    general, special, named = (
        (facts.ASK, facts.ASK_SPECIAL, facts.ASK_NAMED)
        if asking
        else (facts.TELL, facts.TELL_SPECIAL, facts.TELL_NAMED)
    )
    own = special.get(fact.thing.name, ()) if fact.owner in ("my", "the") else ()
    if fact.bearer is not None and draw.chance(0.6):
        template = draw.pick(named)
    elif own and draw.chance(0.5):
        template = draw.pick(own)
    else:
        template = draw.pick(general)
    spellings = (fact.thing.name, *fact.thing.spellings)
    name = draw.choice(spellings) if draw.chance(0.4) else fact.thing.name
    return loosen(draw, fill(template, fact, name), fact.value)


def loosen(draw: Draw, text: str, keep: str = "") -> str:
    """Now and then write as people type: small first letter, no closing mark."""
    if draw.chance(0.12) and not text.startswith((keep or "\n", "I ", "I'")):
        text = text[0].lower() + text[1:]
    if draw.chance(0.12) and text.endswith((".", "?", "!")):
        text = text[:-1]
    return text


def make_fact(draw: Draw, memory: Memory, *, owner: str | None = None) -> Fact:
    """A fact that this chat does not know yet."""
    while True:
        kind = draw.random.random()
        if owner is not None:
            who, thing = owner, draw.choice(facts.OTHERS_THINGS)
        elif kind < 0.4:
            who, thing = "my", draw.choice(facts.ASKED_OFTEN)
        elif kind < 0.85:
            who, thing = "my", draw.choice(facts.MY_THINGS + facts.NAMED_THINGS)
        else:
            who, thing = "the", draw.choice(facts.THE_THINGS)
        value = thing.value(draw)
        if value.isalpha() and draw.chance(0.1):
            value = value.lower()
        fact = Fact(who, thing, value)
        taken = {other.value.lower() for other in memory.facts.values()}
        if fact.key not in memory.facts and value.lower() not in taken:
            return fact


def acknowledgement(draw: Draw, told: list[Fact]) -> str:
    """The assistant's answer to being told facts."""
    if len(told) == 1 and told[0].key == ("my", "name"):
        return f"Nice to meet you, {told[0].value}!"
    clauses = joined([fact.clause() for fact in told])
    return draw.choice((f"Got it: {clauses}.", f"Thanks, I will remember that {clauses}."))


def joined(parts: list[str]) -> str:
    """An enumeration with a closing 'and'."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def tell(draw: Draw, memory: Memory, *, owner: str | None = None) -> Turn:
    """The user tells one fact."""
    fact = make_fact(draw, memory, owner=owner)
    memory.facts[fact.key] = fact
    return Turn(
        wording(draw, fact, asking=False), acknowledgement(draw, [fact]), "told", (fact.value,)
    )


def tell_several(draw: Draw, memory: Memory) -> Turn:
    """The user tells two to four facts in one message."""
    told: list[Fact] = []
    sentences: list[str] = []
    for _ in range(draw.integer(2, 4)):
        fact = make_fact(draw, memory)
        memory.facts[fact.key] = fact
        told.append(fact)
        sentences.append(wording(draw, fact, asking=False))
    if draw.chance(0.5):
        short = [sentence.rstrip(".!") for sentence in sentences]
        sentences = [joined(short) + "."]
    text = " ".join(
        sentence if sentence.endswith((".", "!", "?")) else f"{sentence}." for sentence in sentences
    )
    values = tuple(fact.value for fact in told)
    return Turn(text, acknowledgement(draw, told), "told several", values)


def tell_of_others(draw: Draw, memory: Memory) -> Turn:
    """The same thing told of two or three people."""
    thing = draw.choice(facts.OTHERS_THINGS)
    told: list[Fact] = []
    while len(told) < draw.integer(2, 3):
        fact = Fact(f"{facts.person(draw)}'s", thing, thing.value(draw))
        taken = {other.value for other in memory.facts.values()}
        if fact.key not in memory.facts and fact.value not in taken:
            memory.facts[fact.key] = fact
            told.append(fact)
    parts = [fill("{o} {t} is {v}", fact, thing.name) for fact in told]
    text = joined(parts) + "." if draw.chance(0.5) else ". ".join(parts) + "."
    lead = draw.pick(("", "", "Remember: ", "Please remember that ", "Listen: ", "Note this: "))
    return Turn(
        lead + text, acknowledgement(draw, told), "told several", tuple(f.value for f in told)
    )


def correct(draw: Draw, memory: Memory) -> Turn | None:
    """The user corrects a fact told earlier."""
    if not memory.facts:
        return None
    old = draw.choice(list(memory.facts.values()))
    value = old.thing.value(draw)
    if value.lower() in {other.value.lower() for other in memory.facts.values()}:
        return None
    fact = Fact(old.owner, old.thing, value)
    memory.facts[fact.key] = fact
    memory.stale.append(old.value)
    text = loosen(draw, fill(draw.pick(facts.CORRECT), fact, fact.thing.name, old.value))
    reply = f"Thank you for the correction. {fact.statement()}."
    return Turn(text, reply, "corrected", (value,))


def ask(draw: Draw, memory: Memory, *, skill: str = "recall") -> Turn | None:
    """The user asks for one fact told earlier."""
    if not memory.facts:
        return None
    fact = draw.choice(list(memory.facts.values()))
    text = wording(draw, fact, asking=True)
    return Turn(text, f"{fact.statement()}.", skill, (fact.value,), memory.rejects(fact))


def ask_several(draw: Draw, memory: Memory) -> Turn | None:
    """The user asks for two or three facts at once."""
    mine = [fact for fact in memory.facts.values() if fact.owner in ("my", "the")]
    if len(mine) < 2:  # noqa: PLR2004 - several means at least two
        return None
    asked = draw.random.sample(mine, min(len(mine), draw.integer(2, 3)))
    names = joined([fill("{o} {t}", fact, fact.thing.name) for fact in asked])
    text = draw.wording(
        (
            "What are {names}?",
            "Tell me {names}.",
            "Do you remember {names}?",
            "Please tell me {names}.",
            "What is {names}?",
            "Can you tell me {names}?",
            "I forgot {names}. Can you help?",
            "Remind me of {names}.",
            "What were {names}?",
        ),
        names=names,
    )
    clauses = joined([fact.clause() for fact in asked])
    reply = clauses[0].upper() + clauses[1:] + "."
    return Turn(text, reply, "recall several", tuple(fact.value for fact in asked))


def summary(draw: Draw, memory: Memory) -> Turn | None:
    """The user asks for everything known."""
    mine = [fact for fact in memory.facts.values() if fact.owner == "my"]
    if not 0 < len(mine) <= SUMMARY_LENGTH_MAX:
        return None
    text = draw.pick(
        (
            "What do you know about me?",
            "Tell me what you know about me.",
            "Summarise what I said.",
            "What have I told you about myself?",
            "What do you remember about me?",
            "List everything you know about me.",
            "What did I tell you about myself?",
            "Tell me everything you remember about me.",
            "What have you learned about me?",
            "Can you sum up what you know about me?",
            "Describe me.",
            "Who am I and what do I like?",
        )
    )
    reply = " ".join(f"{fact.statement()}." for fact in mine)
    return Turn(text, reply, "recall several", tuple(fact.value for fact in mine))


def check(draw: Draw, memory: Memory) -> Turn | None:
    """The user asks whether a fact is so."""
    if not memory.facts:
        return None
    fact = draw.choice(list(memory.facts.values()))
    right = draw.chance(0.5)
    guess = fact.value if right else fact.thing.value(draw)
    if not right and guess.lower() == fact.value.lower():
        return None
    asked = fill("{o} {t}", fact, fact.thing.name)
    text = draw.wording(
        (
            "Is {asked} {guess}?",
            "Is it true that {asked} is {guess}?",
            "{asked} is {guess}, right?",
            "Did I say that {asked} is {guess}?",
            "Is {guess} {asked}?",
            "I think {asked} is {guess}?",
        ),
        asked=asked,
        guess=guess,
    )
    reply = f"{'Yes' if right else 'No'}, {fact.clause()}."
    return Turn(text, reply, "yes or no", (reply,))


def ask_unknown(draw: Draw, memory: Memory) -> Turn:
    """The user asks for something never told."""
    fact = make_fact(draw, memory)
    text = wording(draw, fact, asking=True)
    what = f"{'your' if fact.owner == 'my' else 'the'} {fact.thing.name}"
    return Turn(text, f"You have not told me {what} yet.", "not told")
