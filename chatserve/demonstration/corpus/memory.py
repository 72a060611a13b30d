"""What a chat knows, and how users word it.

A `Fact` is one thing of one owner; a `Memory` holds what was told in one chat, in order.  The
functions write a user's sentence that tells a fact, asks for it, or corrects it.
"""

import re
from dataclasses import dataclass, field

from chatserve.demonstration.corpus import facts, wordings, words
from chatserve.demonstration.corpus.draw import Draw, is_held_out
from chatserve.demonstration.corpus.facts import Thing

# Words that may lose their capital after an opener; anything else could be a value.
FUNCTION_WORDS = frozenset(
    words.listed(
        """What What's Can Do Does Did Tell My The Please How Where Who When Which Could Would Is
        Are Explain Count Spell Add Say Repeat Reverse Write Remind Give Make List Name Now You
        Remember Describe Why Should Have And Let Show"""
    )
)


FAVOURITE = "favourite "
LIKED = words.PLAIN_WORDS + words.COMMON_WORDS
MINE = facts.MY_THINGS + facts.NAMED_THINGS
# The wordings of facts that name the owner, as they must where it is somebody else.
OWNED = {
    kind: tuple(text for text in texts if "{o}" in text.lower())
    for kind, texts in wordings.FACTS.items()
}


@dataclass(frozen=True)
class Fact:
    """One thing known of one owner."""

    owner: str
    thing: Thing
    value: str
    # What opens or closes, where the value is a time.
    place: str = "shop"

    @property
    def key(self) -> tuple[str, str]:
        """What the fact is about."""
        return (self.owner, self.thing.name)

    @property
    def bearer(self) -> str | None:
        """The bearer of a name ("dog"), where the thing is one's name."""
        return None if self.owner == "the" else facts.BEARER_OF.get(self.thing.name)

    @property
    def asked(self) -> str:
        """The thing as one asks for it: of what has a name, the name."""
        return f"{self.thing.name}'s name" if self.thing.value is facts.called else self.thing.name

    @property
    def person(self) -> str:
        """The owner without the ending of the genitive."""
        return self.owner.removesuffix("'s")

    @property
    def being(self) -> str:
        """The person or pet that the fact is about, if it is about one: "my sister", "Anna"."""
        if self.of_other:
            return self.person if self.bearer is None else ""
        return f"my {self.bearer}" if self.bearer in facts.BEINGS else ""

    @property
    def of_other(self) -> bool:
        """Whether somebody else than the user owns the thing."""
        return self.owner not in ("my", "the")

    @property
    def owner_told(self) -> str:
        """The owner as the assistant says it to the user: "my sister's" becomes "your sister's"."""
        return f"your{self.owner[2:]}" if self.owner.split()[0] == "my" else self.owner

    def statement(self) -> str:
        """The fact as the assistant says it, without the closing full stop."""
        thing = self.thing.name
        if self.thing.value is facts.called:
            return f"{'Your' if self.owner == 'my' else 'The'} {thing} is called {self.value}"
        if self.owner == "my":
            if thing in facts.REPLY_SPECIAL:
                return fill(facts.REPLY_SPECIAL[thing], self)
            if self.bearer is not None:
                return f"Your {self.bearer} is called {self.value}"
            return f"Your {thing} is {self.value}"
        if self.owner == "the":
            return f"The {thing} is {self.value}"
        told = Fact(self.owner_told, self.thing, self.value)
        template = "{O} {t} is {v}" if self.bearer is None else "{O} {b} is called {v}"
        return capital(fill(facts.REPLY_OTHER.get(thing, template), told))

    def clause(self) -> str:
        """The statement as it stands inside a sentence."""
        text = self.statement()
        return text[0].lower() + text[1:] if self.owner[0].islower() else text


@dataclass
class Memory:
    """What the user told in this chat, oldest first, and the values that no longer hold."""

    facts: dict[tuple[str, str], Fact] = field(default_factory=dict[tuple[str, str], Fact])
    stale: list[str] = field(default_factory=list[str])
    # The facts by when they were last mentioned, the longest unmentioned first.
    unmentioned: dict[tuple[str, str], None] = field(default_factory=dict[tuple[str, str], None])
    # What this turn has mentioned so far, and what the last turn that spoke of facts spoke of.
    mentioned: list[Fact] = field(default_factory=list[Fact])
    subjects: tuple[Fact, ...] = ()
    # The person or pet that was spoken of last, where it was one, and pronouns that were drawn.
    being: str = ""
    pronouns: dict[str, str] = field(default_factory=dict[str, str])
    # What has opening hours in this chat.
    place: str = ""

    def add(self, fact: Fact) -> None:
        """Keep a fact, in the place of an older one of the same key."""
        self.facts[fact.key] = fact
        self.mention(fact)

    def mention(self, fact: Fact) -> None:
        """Put a fact behind all others in the order of mention."""
        self.unmentioned.pop(fact.key, None)
        self.unmentioned[fact.key] = None
        self.mentioned.append(fact)

    def end_turn(self) -> None:
        """What was mentioned since the last turn is what the chat speaks of now."""
        if not self.mentioned:
            return
        self.subjects = tuple({fact.key: fact for fact in self.mentioned}.values())
        beings = {fact.being for fact in self.subjects if fact.being or fact.of_other}
        if beings:
            self.being = beings.pop() if len(beings) == 1 else ""
        self.mentioned.clear()

    def last_fact(self) -> Fact | None:
        """The fact that was spoken of last, where it was one and is still known."""
        return self.facts.get(self.subjects[0].key) if len(self.subjects) == 1 else None

    def last_facts(self) -> tuple[Fact, ...]:
        """Those spoken of last that the shape of a value alone tells from the others."""
        shapes = [shape(fact.value) for fact in self.subjects]
        alone = [fact for fact in self.subjects if shapes.count(shape(fact.value)) == 1]
        return tuple(self.facts[fact.key] for fact in alone if fact.key in self.facts)

    def any_fact(self, draw: Draw) -> Fact:
        """One of the facts, each as likely."""
        return draw.choice(tuple(self.facts.values()))

    def holds(self, value: str) -> bool:
        """Whether some fact has the value, however it is written."""
        return value.lower() in {fact.value.lower() for fact in self.facts.values()}

    def was(self, value: str) -> bool:
        """Whether a corrected fact had the value."""
        return value.lower() in {old.lower() for old in self.stale}

    def pick(self, draw: Draw) -> Fact:
        """A fact to ask for, more often than not one that was not mentioned for long."""
        known = [key for key in self.unmentioned if key in self.facts]
        far = known[: (len(known) + 2) // 3]
        fact = self.facts[draw.choice(far if draw.chance(0.6) else known)]
        self.mention(fact)
        return fact

    def rejects(self, fact: Fact) -> tuple[str, ...]:
        """Values that would betray a mix-up: of the same thing elsewhere, or corrected ones."""
        same = [
            other.value
            for key, other in self.facts.items()
            if key != fact.key and other.thing.value is fact.thing.value
        ]
        return tuple(value for value in (*same, *self.stale) if value not in fact.statement())


def shape(value: str) -> str:
    """What a value looks like: a number, something with digits in it, or words."""
    if value.isdigit():
        return "number"
    return "mixed" if any(sign.isdigit() for sign in value) else "words"


def capital(text: str) -> str:
    """A sentence with a capital at its beginning."""
    return text[0].upper() + text[1:]


def fill(template: str, fact: Fact, thing_name: str = "", was: str = "") -> str:
    """Write a wording out."""
    owner = fact.owner
    text = template.replace(" a {v}", " an {v}") if fact.value[0] in "aeiou" else template
    return text.format(
        o=owner,
        O=capital(owner),
        t=thing_name or fact.thing.name,
        b=fact.bearer or "",
        p=fact.person,
        v=fact.value,
        w=was,
    )


def wording(draw: Draw, fact: Fact, *, asking: bool) -> str:
    """A user's sentence that tells the fact, or asks for it."""
    if not asking:
        return worded(draw, fact, "tell")
    return draw.apart(lambda: worded(draw, fact, "ask"))


def worded(draw: Draw, fact: Fact, kind: str) -> str:
    """A draft of `wording`: kind is "tell" or "ask"."""
    asking = kind == "ask"
    spellings = (fact.thing.name, *fact.thing.spellings)
    name = draw.choice(spellings) if draw.chance(0.4) else fact.thing.name
    text = fill(template_for(draw, fact, kind), fact, name)
    text = capital(text) if fact.of_other else text
    if fact.of_other and text[-1] not in ".?!" and not asking and draw.chance(0.8):
        text += "."
    if asking and fact.owner in ("my", "the") and draw.chance(0.08):
        return text.lower().replace("'", "").rstrip(".?!")
    if fact.owner == "my" and draw.chance(0.05):
        text = re.sub(r"\bmy\b", "our", re.sub(r"\bMy\b", "Our", text))
    return loosen(draw, text, fact.value)


def template_for(draw: Draw, fact: Fact, kind: str) -> str:
    """A wording with its places open."""
    asking, thing = kind == "ask", fact.thing.name
    special = (wordings.ASK_SPECIAL if asking else wordings.TELL_SPECIAL).get(thing, ())
    if fact.of_other:
        special = (wordings.ASK_OTHER if asking else wordings.TELL_OTHER).get(thing, ())
    table = OWNED if fact.of_other else wordings.FACTS
    if fact.thing.value is facts.called:
        return draw.pick(wordings.CALLED[kind])
    if not asking and fact.owner == "my" and is_telling(thing, fact.value) and draw.chance(0.15):
        return draw.pick(wordings.FACTS["tell_known"])
    if fact.bearer is not None and draw.chance(0.65):
        if not asking and fact.owner == "my" and fact.bearer in facts.PETS and draw.chance(0.15):
            return draw.pick(wordings.TELL_SPECIAL["named_pet"])
        return draw.pick(table[f"{kind}_named"])
    if fact.bearer is None and special and draw.chance(0.55):
        template = draw.pick(special)
        is_open = thing in facts.OPENING_HOURS
        return template.replace("shop", fact.place) if is_open else template
    if fact.owner == "my" and thing.startswith(FAVOURITE) and draw.chance(0.3):
        return draw.pick(wordings.FAVOURITE[kind]).replace("{k}", thing.removeprefix(FAVOURITE))
    return draw.pick(table[kind])


def is_telling(thing: str, value: str) -> bool:
    """Whether a value that training shows says by itself what it is a favourite of."""
    return value in facts.TELLING.get(thing, ()) and not is_held_out(value)


def place_of(draw: Draw, memory: Memory) -> str:
    """What has opening hours: one place in a chat."""
    memory.place = memory.place or draw.pick(words.PLACES)
    return memory.place


def correction(draw: Draw, fact: Fact, was: str) -> str:
    """A user's sentence that replaces the old value."""
    template = draw.pick((OWNED if fact.of_other else wordings.FACTS)["correct"])
    if fact.bearer is not None and draw.chance(0.6):
        template = draw.pick(wordings.CORRECT_NAMED)
    elif fact.owner == "my" and fact.thing.name in wordings.CORRECT_SPECIAL and draw.chance(0.6):
        template = draw.pick(wordings.CORRECT_SPECIAL[fact.thing.name])
    return loosen(draw, fill(template, fact, "", was), fact.value)


def loosen(draw: Draw, text: str, keep: str = "") -> str:
    """Now and then write as people type: small first letter, no closing mark."""
    if draw.chance(0.12) and text[1:2].islower() and not text.startswith((keep or "\n", "I'")):
        text = text[0].lower() + text[1:]
    if draw.chance(0.12) and text.endswith((".", "?", "!")):
        text = text[:-1]
    return text


def decorate(draw: Draw, text: str) -> str:
    """A few words of courtesy or hesitation around a user's sentence."""
    first = text.split(" ", 1)[0]
    if draw.chance(0.5):
        if draw.chance(0.5) or first not in FUNCTION_WORDS:
            return draw.pick(wordings.MANNER["openers"]) + text
        return draw.pick(wordings.MANNER["joining"]) + text[0].lower() + text[1:]
    return text + draw.pick(wordings.MANNER["closers"]) if text.endswith((".", "?", "!")) else text


def favourite(draw: Draw) -> Thing:
    """A favourite of any kind."""
    kind = draw.letters(3, 8) if draw.chance(0.1) else draw.pick(LIKED)
    return Thing(f"favourite {kind}", facts.either_word, (f"favorite {kind}",))


def make_fact(draw: Draw, memory: Memory) -> Fact:
    """A fact that this chat does not know yet."""
    while True:
        kind = draw.random.random()
        if kind < 0.04:
            who, thing = "my", favourite(draw)
        elif kind < 0.11:
            who = draw.choice(("my", "the", "the"))
            thing = facts.anything(draw, who)
        elif kind < 0.4:
            who, thing = "my", draw.choice(facts.ASKED_OFTEN)
        elif kind < 0.72:
            who, thing = "my", draw.choice(MINE)
        elif kind < 0.84:
            who = facts.other_owner(draw)
            thing = draw.choice(facts.OTHERS_THINGS)
            if draw.chance(0.25):
                thing = draw.choice(facts.NAMED_THINGS[: len(facts.PETS)])
        else:
            who, thing = "the", draw.choice(facts.THE_THINGS)
        value = thing.value(draw)
        if value.isalpha() and draw.chance(0.1):
            value = value.lower()
        hours = thing.name in facts.OPENING_HOURS
        fact = Fact(who, thing, value, place_of(draw, memory) if hours else "shop")
        if fact.key not in memory.facts and not memory.holds(value):
            return fact
