"""Small talk, questions about the model itself, and honest answers to what it cannot know."""

from chatserve.demonstration.corpus import facts, words
from chatserve.demonstration.corpus.draw import Draw, Turn
from chatserve.demonstration.corpus.explain import TOPICS
from chatserve.demonstration.corpus.memory import loosen
from chatserve.demonstration.corpus.tasks import adjective
from chatserve.demonstration.corpus.wordings import SYSTEM, lists, read, spread

WHO = (
    "I am the demonstration model of chatserve: a very small language model that shows how the "
    "server works."
)
CAN = (
    "I am small, but I can do a few things:\n\n"
    "- remember what you tell me\n- count, spell, repeat and reverse words\n"
    "- make lists and add small numbers\n- explain how chatserve works"
)
UNKNOWN = (
    "I am a small demonstration model, so I do not know that. You can load a real model with "
    "`chatserve serve MODEL_FOLDER`."
)
LIMITS = (
    "I am a small demonstration model. I know nothing about the world, I make mistakes, and I can "
    "only do a few simple things. For real work, load a bigger model with "
    "`chatserve serve MODEL_FOLDER`."
)
TABLE = read("talk.toml")
TALK: tuple[tuple[tuple[str, ...], str], ...] = tuple(
    (spread(row["wordings"]), str(row["reply"])) for row in TABLE["talk"]
)
# Words for what can be explained or told; a question for one of these can be answered.
KNOWN_WORDS = frozenset(
    word.lower()
    for text in (
        *(name for topic in TOPICS for name in topic.names),
        *(thing.name for thing in facts.MY_THINGS + facts.THE_THINGS),
        *facts.BEARERS,
        "joke",
    )
    for word in text.split()
)
UNKNOWN_WORDS = tuple(
    word
    for word in dict.fromkeys((*words.COMMON_WORDS, *words.PLAIN_WORDS))
    if word not in KNOWN_WORDS
)
SUBJECTS, QUESTIONS = lists(TABLE["unknown"])["subjects"], lists(TABLE["unknown"])["questions"]


def talk(draw: Draw) -> Turn:
    """A line of small talk and its answer."""
    wordings, reply = draw.choice(TALK)
    if draw.chance(0.1):
        wordings, reply = TALK[0]
    elif draw.chance(0.08):
        wordings, reply = SYSTEM["ask_name"], WHO
    return Turn(loosen(draw, draw.pick(wordings)), reply, "talk")


def greet(draw: Draw) -> Turn:
    """A plain greeting."""
    wordings, reply = TALK[0]
    return Turn(draw.pick(wordings), reply, "talk")


def unknown(draw: Draw) -> Turn:
    """A question that such a small model cannot answer, and the honest reply."""
    text = draw.wording(
        QUESTIONS,
        c=draw.pick(words.COUNTRIES),
        y=draw.pick(words.CITIES),
        n=draw.pick(words.NAMES),
        i=draw.letters(3, 8).capitalize(),
        s=draw.pick(SUBJECTS),
        f=draw.pick(words.FOODS),
        a=draw.letters(3, 8) if draw.chance(0.15) else draw.pick(words.ANIMALS),
        w=draw.letters(3, 8) if draw.chance(0.15) else draw.pick(UNKNOWN_WORDS),
        d=draw.integer(21, 999),
        h=draw.pick(words.HOBBIES),
        m=draw.integer(1500, 2030),
        x=draw.pick(words.DAYS),
        j=adjective(draw),
        v=draw.pick(words.VERBS),
    )
    text = text[0].upper() + text[1:]
    return Turn(loosen(draw, text), UNKNOWN, "unknown")
