"""Telling, correcting and recalling facts: the heart of the corpus.

Each function makes one turn, reads or changes the chat's memory, and states in `expect` and
`reject` what a right reply contains.
"""

from dataclasses import replace

from chatserve.demonstration.corpus import facts, wordings
from chatserve.demonstration.corpus.draw import Draw, Turn
from chatserve.demonstration.corpus.memory import (
    MINE,
    Fact,
    Memory,
    capital,
    correction,
    fill,
    make_fact,
    wording,
)

SUMMARY_LENGTH_MAX = 4


def acknowledgement(told: list[Fact]) -> str:
    """The assistant's answer to being told facts; nothing is drawn: a model cannot learn luck."""
    if len(told) == 1 and told[0].key == ("my", "name"):
        return f"Nice to meet you, {told[0].value}!"
    clauses = joined([fact.clause() for fact in told])
    return f"Got it: {clauses}." if len(told) == 1 else f"Thanks, I will remember that {clauses}."


def joined(parts: list[str]) -> str:
    """An enumeration with a closing 'and'."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def amid_other_talk(draw: Draw, text: str) -> str:
    """A sentence, now and then with a few that tell nothing around it."""
    if not draw.chance(0.15):
        return text
    neutral = [draw.pick(wordings.MANNER["neutral"]) for _ in range(draw.integer(1, 4))]
    neutral.insert(draw.integer(0, len(neutral)), text if text[-1] in ".?!" else f"{text}.")
    return " ".join(neutral)


def tell(draw: Draw, memory: Memory) -> Turn:
    """The user tells one fact."""
    fact = make_fact(draw, memory)
    memory.add(fact)
    text = amid_other_talk(draw, wording(draw, fact, asking=False))
    return Turn(text, acknowledgement([fact]), "told", (fact.value,))


def tell_and_ask(draw: Draw, memory: Memory) -> Turn:
    """The user tells facts and asks for one of them in the same message."""
    told = [make_fact(draw, memory)]
    memory.add(told[0])
    while draw.chance(0.4):
        told.append(make_fact(draw, memory))
        memory.add(told[-1])
    sentences = [wording(draw, fact, asking=False) for fact in told]
    ended = [text if text[-1] in ".?!" else f"{text}." for text in sentences]
    asked = draw.choice(told)
    text = " ".join([*ended, wording(draw, asked, asking=True)])
    return Turn(text, f"{asked.statement()}.", "recall", (asked.value,), memory.rejects(asked))


def tell_several(draw: Draw, memory: Memory) -> Turn:
    """The user tells two to four facts in one message."""
    told: list[Fact] = []
    sentences: list[str] = []
    for _ in range(draw.integer(2, 4)):
        fact = make_fact(draw, memory)
        memory.add(fact)
        told.append(fact)
        sentences.append(wording(draw, fact, asking=False))
    if draw.chance(0.5):
        short = [sentence.rstrip(".!") for sentence in sentences]
        sentences = [joined(short) + "."]
    text = " ".join(
        sentence if sentence.endswith((".", "!", "?")) else f"{sentence}." for sentence in sentences
    )
    values = tuple(fact.value for fact in told)
    return Turn(text, acknowledgement(told), "told several", values)


def tell_of_others(draw: Draw, memory: Memory) -> Turn:
    """The same thing told of one to four people."""
    thing = draw.choice(facts.OTHERS_THINGS)
    if draw.chance(0.15):
        thing = draw.choice(facts.NAMED_THINGS[: len(facts.PETS)])
    told: list[Fact] = []
    many = draw.integer(1, 4)
    while len(told) < many:
        fact = Fact(facts.other_owner(draw), thing, thing.value(draw))
        taken = {other.value for other in memory.facts.values()}
        if fact.key not in memory.facts and fact.value not in taken:
            memory.add(fact)
            told.append(fact)
    special = wordings.TELL_OTHER.get(thing.name, ())
    template = "{o} {t} is {v}" if told[0].bearer is None else "{o} {b} is called {v}"
    if special and draw.chance(0.6):
        template = draw.pick(special)
    parts = [fill(template, fact) for fact in told]
    is_short = template.startswith("{p} ") and template.endswith("{v}") and draw.chance(0.3)
    if is_short:
        parts[1:] = [fill("{p} {v}", fact) for fact in told[1:]]
    text = joined(parts) + "."
    if not is_short and draw.chance(0.5):
        text = ". ".join([parts[0], *map(capital, parts[1:])]) + "."
    lead = draw.pick(wordings.OTHER_LEAD)
    if not lead or lead.rstrip()[-1] in ".!":
        text = capital(text)
    return Turn(lead + text, acknowledgement(told), "told several", tuple(f.value for f in told))


def tell_together(draw: Draw, memory: Memory) -> Turn | None:
    """The user says several of the usual things in one sentence."""
    template = draw.pick(wordings.TOGETHER)
    told: list[Fact] = []
    for thing in facts.MY_THINGS[:9]:
        if "{" + thing.name.replace(" ", "_") + "}" in template:
            fact = Fact("my", thing, thing.value(draw))
            taken = {other.value.lower() for other in memory.facts.values()}
            if fact.key in memory.facts or fact.value.lower() in taken:
                return None
            told.append(fact)
    told.sort(key=lambda fact: template.index("{" + fact.thing.name.replace(" ", "_") + "}"))
    for fact in told:
        memory.add(fact)
    values = {fact.thing.name.replace(" ", "_"): fact.value for fact in told}
    text = template.format(**values)
    return Turn(text, acknowledgement(told), "told several", tuple(values.values()))


def ask_who(draw: Draw, memory: Memory) -> Turn | None:
    """The user asks of whom something was told."""
    known = [
        fact
        for fact in memory.facts.values()
        if fact.of_other and fact.thing.name in wordings.ASK_WHO
    ]
    if not known:
        return None
    fact = draw.choice(known)
    memory.mention(fact)
    text = draw.apart(lambda: fill(draw.pick(wordings.ASK_WHO[fact.thing.name]), fact))
    reply = f"{fact.statement()}."
    return Turn(text, reply, "recall", (reply,))


def correct(draw: Draw, memory: Memory) -> Turn | None:
    """The user corrects a fact told earlier."""
    if not memory.facts:
        return None
    old = memory.any_fact(draw)
    fact = replace(old, value=old.thing.value(draw))
    if memory.holds(fact.value) or memory.was(fact.value):
        return None
    memory.add(fact)
    memory.stale.append(old.value)
    text = correction(draw, fact, old.value)
    reply = f"Thank you for the correction. {fact.statement()}."
    return Turn(text, reply, "corrected", (fact.value,))


def ask(draw: Draw, memory: Memory) -> Turn | None:
    """The user asks for one fact told earlier."""
    if not memory.facts:
        return None
    return ask_for(draw, memory, memory.pick(draw))


def ask_for(draw: Draw, memory: Memory, fact: Fact) -> Turn:
    """The user asks for this fact."""
    memory.mention(fact)
    text = wording(draw, fact, asking=True)
    return Turn(text, f"{fact.statement()}.", "recall", (fact.value,), memory.rejects(fact))


def ask_several(draw: Draw, memory: Memory) -> Turn | None:
    """The user asks for two or three facts at once."""
    known = list(memory.facts.values())
    if len(known) < 2:
        return None
    asked = draw.random.sample(known, min(len(known), draw.integer(2, 3)))
    names = joined([f"{fact.owner} {fact.asked}" for fact in asked])
    text = draw.apart(lambda: capital(draw.wording(wordings.SEVERAL["ask"], names=names)))
    for fact in asked:
        memory.mention(fact)
    clauses = joined([fact.clause() for fact in asked])
    reply = clauses[0].upper() + clauses[1:] + "."
    return Turn(text, reply, "recall several", tuple(fact.value for fact in asked))


def summary(draw: Draw, memory: Memory) -> Turn | None:
    """The user asks for everything known."""
    mine = [fact for fact in memory.facts.values() if fact.owner == "my"]
    if not 0 < len(mine) <= SUMMARY_LENGTH_MAX:
        return None
    text = draw.pick(wordings.SEVERAL["summary"])
    reply = " ".join(f"{fact.statement()}." for fact in mine)
    return Turn(text, reply, "recall several", tuple(fact.value for fact in mine))


def check(draw: Draw, memory: Memory) -> Turn | None:
    """The user asks whether a fact is so."""
    if not memory.facts:
        return None
    fact = memory.pick(draw)
    right = draw.chance(0.5)
    guess = fact.value if right else fact.thing.value(draw)
    others = [value for value in memory.rejects(fact) if value != fact.value]
    if not right and others and draw.chance(0.4):
        guess = draw.choice(others)
    if not right and guess.lower() == fact.value.lower():
        return None
    text = draw.apart(lambda: checking(draw, fact, guess))
    # The fact comes before the verdict, so that the model can compare the two.
    reply = f"{fact.statement()}, so {'yes' if right else 'no'}."
    return Turn(text, reply, "yes or no", (reply,))


def checking(draw: Draw, fact: Fact, guess: str) -> str:
    """A question whether a fact has the guessed value."""
    special = wordings.CHECK_SPECIAL.get(fact.thing.name if fact.bearer is None else "named", ())
    if fact.owner == "the":
        special = ()
    elif fact.of_other and fact.bearer is None:
        special = wordings.CHECK_OTHER.get(fact.thing.name, ())
    if special and draw.chance(0.45):
        text = fill(draw.pick(special), Fact(fact.owner, fact.thing, guess))
    else:
        text = draw.wording(wordings.CHECK, asked=fill("{o} {t}", fact), guess=guess)
    text = capital(text)
    small = draw.chance(0.1) and text[1:2].islower() and not text.startswith(("I ", guess))
    return text[0].lower() + text[1:] if small and fact.owner[0].islower() else text


def ask_unknown(draw: Draw, memory: Memory) -> tuple[Turn, Fact]:
    """The user asks for something never told, now and then of another person; and that fact."""
    fact = make_fact(draw, memory)
    others = [known for known in memory.facts.values() if known.of_other]
    if others and draw.chance(0.5):
        known = draw.choice(others)
        thing = known.thing if draw.chance(0.5) else draw.choice(facts.OTHERS_THINGS)
        owner = known.owner if thing is not known.thing else facts.other_owner(draw)
        fact = Fact(owner, thing, thing.value(draw))
    elif draw.chance(0.35):
        fact = akin(draw, memory) or fact
    if fact.key in memory.facts:
        fact = make_fact(draw, memory)
    text = wording(draw, fact, asking=True)
    memory.subjects, memory.being = (), ""
    reply = f"You have not told me {fact.owner_told} {fact.asked} yet."
    return Turn(text, reply, "not told"), fact


def akin(draw: Draw, memory: Memory) -> Fact | None:
    """A fact of the same kind as one that was told: another's name, another number."""
    kinds = {known.thing.value for known in memory.facts.values()}
    things = [
        thing for thing in MINE if thing.value in kinds and ("my", thing.name) not in memory.facts
    ]
    thing = draw.choice(things) if things else None
    return thing and Fact("my", thing, thing.value(draw))


def tell_after_all(draw: Draw, memory: Memory, fact: Fact) -> Turn:
    """The user tells what the assistant had to say was not told."""
    memory.add(fact)
    text = wording(draw, fact, asking=False)
    return Turn(text, acknowledgement([fact]), "told", (fact.value,))
